"""What each word of a text adds to its answer."""
