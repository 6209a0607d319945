"""What became of an ensemble beside the ensemble: figures, a table, a page, and yes or no."""
