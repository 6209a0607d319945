"""One vmapped forward for N checkpoints of one architecture, served by TorchServe."""

__version__ = "0.1.0"
