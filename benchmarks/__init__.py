"""Commands that compare the vmapped forward with its rivals; run from the root with `python -m`."""
