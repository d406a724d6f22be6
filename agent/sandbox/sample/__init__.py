"""A real analysis of real public data, and the image that it runs in."""
