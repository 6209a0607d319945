"""Building architectures by name, under the name that scripts import it by."""

from vmap_ensemble.models.architecture import build_architecture

__all__ = ["build_architecture"]
