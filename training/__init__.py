"""Commands that make and judge ensemble members; run from the root of the repository with `python -m`."""
