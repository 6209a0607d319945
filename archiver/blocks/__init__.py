"""What an archive is asked to be: a block of setup_config.json, the command line, a handler, a worker's settings."""
