"""What is asked of a model: items become examples, outputs become answers."""
