"""The forward on a GPU."""
