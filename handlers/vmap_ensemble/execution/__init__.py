"""Ways to run one and the same forward; without them, the vmapped one serves."""
