"""This process: its device, memory, threads and cache folder."""
