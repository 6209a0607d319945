"""N checkpoints -> a real TorchServe under load, in each of the ways to serve them; python -m benchmarks.serve."""
