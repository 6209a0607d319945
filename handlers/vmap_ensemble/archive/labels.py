"""Turns an archive's index_to_name.json into labels."""

from __future__ import annotations

import json
from pathlib import Path

from vmap_ensemble.errors import SettingsError

LABELS_FILE = "index_to_name.json"


def read_labels(folder: Path) -> dict[int, str] | None:
    """Read index_to_name.json ({"0": "cat"}, or {"0": ["n02123045", "cat"]}); None where there is none.

    Raises:
        SettingsError: The file is not a JSON object of class numbers.
    """
    path = folder / LABELS_FILE
    if not path.is_file():
        return None
    try:
        mapping = json.loads(path.read_text(encoding="utf-8"))
        # TorchServe's lists are [id, name]: the name is what people read.
        return {int(k): str(v[-1] if isinstance(v, list) else v) for k, v in mapping.items()}
    except (ValueError, AttributeError, IndexError) as error:
        raise SettingsError(f'{LABELS_FILE}: expected {{"0": "label", …}}, got {error}') from None
