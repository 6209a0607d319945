"""An archive asked about a folder, a table or shards, without a server."""
