"""How good and how honest an ensemble is, on labelled inputs."""
