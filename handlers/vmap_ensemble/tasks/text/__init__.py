"""Texts: labels, entities, answers, masks, embeddings."""
