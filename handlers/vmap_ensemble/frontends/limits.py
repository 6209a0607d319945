"""What every front end refuses alike; without importing torch."""

from __future__ import annotations

# Of a request's body: TorchServe's limit in the default configuration here, config/config.properties.
MOST_BYTES = 32 * 1024 * 1024
