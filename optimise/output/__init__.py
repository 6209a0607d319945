"""The folder that a tool writes to, and what ./archive.sh packs of it."""
