"""Hugging Face encoders that compute no padding."""
