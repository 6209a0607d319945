"""What benchmarks measure with: timing, rivals, networks, ceilings."""
