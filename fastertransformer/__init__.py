"""Turns the C++ sources here into libpyt_fastertransformer.so, and BERT checkpoints into TorchScript that uses it."""
