"""Directories that save_pretrained wrote, adapters and traced files -> one config and tokenizer for all members."""
