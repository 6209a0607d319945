"""Requests in, replies out, each on its own; no server's library."""
