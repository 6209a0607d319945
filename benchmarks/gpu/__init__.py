"""A GPU -> whether every way to run an ensemble is right on it, and how fast: one command, one file of results."""
