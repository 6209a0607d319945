"""Traced FasterTransformer (EFFT) modules and their library."""
