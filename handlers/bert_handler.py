"""Serves an ensemble of Hugging Face encoders: BERT, RoBERTa, DistilBERT, ELECTRA, MPNet, XLM-R and their kin."""

from vmap_ensemble.frontends.torchserve.handler import TorchServeHandler
from vmap_ensemble.tasks.text.encoder_task import EncoderTask


class BertEnsembleHandler(TorchServeHandler, EncoderTask):
    """Members written by save_pretrained; the mode says what is asked of the text."""
