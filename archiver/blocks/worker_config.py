"""Turns an archive request into TorchServe's settings of its model: the file that was named, or the default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from archiver.blocks.request import ArchiveRequest
from vmap_ensemble.errors import ArchiveError, first_line

CONFIG_FILE = "model-config.yaml"
# Without a file of its own TorchServe would answer every request in a batch of its own, after 100 ms.
DEFAULT = """# Packed by ./archive.sh, since nothing else was named by --model-config FILE or a block's model_config.
# One worker holds all members: more workers mean as many copies of the whole ensemble.
minWorkers: 1
maxWorkers: 1
# Requests that wait at most maxBatchDelay ms for each other share one forward. 0 would mean 100 ms.
batchSize: 16
maxBatchDelay: 5
# Seconds.
responseTimeout: 120
startupTimeout: 600
"""


def config_name(request: ArchiveRequest) -> str:
    """What the file is called in the archive."""
    return request.model_config.name if request.model_config else CONFIG_FILE


def read_worker_config(path: Path, shown: str) -> dict[str, Any]:
    """What a yaml says.

    Args:
        path: Where it lies.
        shown: What errors call it.

    Raises:
        ArchiveError: It isn't YAML, or says no keys.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ArchiveError(f"{shown}: expected YAML ({first_line(error)})") from None
    if not isinstance(values, dict):
        raise ArchiveError(f"{shown}: expected keys such as batchSize, got {type(values).__name__}")
    return values


def describe_worker(values: dict[str, Any]) -> str:
    """One line: how requests are batched, and by how many workers; what isn't said is TorchServe's default."""
    size, delay = values.get("batchSize", 1), values.get("maxBatchDelay", 100)
    workers = values.get("minWorkers", "one per core")
    return f"batches of up to {size} after at most {delay} ms, workers: {workers}"
