"""The forward on weights packed for a CPU, by oneDNN and by kernels of our own."""
