"""Serves an ensemble of traced FasterTransformer (EFFT) modules, with the modes and answers of the BERT handler."""

from vmap_ensemble.frontends.torchserve.handler import TorchServeHandler
from vmap_ensemble.tasks.text.traced_task import TracedTask


class FTBertHandler(TorchServeHandler, TracedTask):
    """Members are TorchScript files that call torch.classes.FasterTransformer.Encoder of the archive's library."""
