"""What becomes of measurements: files, plots."""
