"""What an archive holds and how it is read: manifest, checkpoints, settings, labels, precision."""
