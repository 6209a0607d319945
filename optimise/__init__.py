"""Turns an archive into something cheaper that answers nearly the same: one tool per module."""
