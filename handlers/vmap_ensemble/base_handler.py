"""The base of handlers of your own, under the name that their files import it by."""

from vmap_ensemble.frontends.torchserve.handler import VmapEnsembleHandler

__all__ = ["VmapEnsembleHandler"]
