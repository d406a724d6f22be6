"""Decisions only: no clock, no I/O, no asyncio. Everything here is a function from values to a value."""
