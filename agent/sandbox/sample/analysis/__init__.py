"""How one measurement follows another in each group of a table: the program in the sample image.

It needs numpy, matplotlib and the standard library, and imports nothing of the agent: in the image it stands alone.
"""
