"""What was packed -> the certainty that a worker loads it and that its precision may be served."""
