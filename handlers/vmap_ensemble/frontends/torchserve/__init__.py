"""TorchServe: the only folder that imports it."""
