"""The forward as native code."""
