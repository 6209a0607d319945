"""Names of architectures and the modules that they stand for."""
