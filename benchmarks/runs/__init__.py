"""What the commands of `benchmarks` do once their options are read."""
