"""Surveyed members -> the files of an archive, native code and graphs among them, and the .mar."""
