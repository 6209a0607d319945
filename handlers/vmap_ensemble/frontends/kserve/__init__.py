"""KServe: the only room of its SDK; `python -m vmap_ensemble.frontends.kserve --model_dir /mnt/models`."""
