"""Ray Serve: the only folder that imports it; `serve run vmap_ensemble.frontends.ray_serve:app archive=…`."""

from vmap_ensemble.frontends.ray_serve.application import app

__all__ = ["app"]
