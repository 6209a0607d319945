"""The server of the tests: scripts/private_torchserve.py, which benchmarks/serve runs its rivals on as well."""

from scripts.private_torchserve import ROOT, TorchServe, free_ports

__all__ = ["ROOT", "TorchServe", "free_ports"]
