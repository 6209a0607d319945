"""Turns the settings classes into docs/settings.md, so that the page can't fall behind the code.

python -m scripts.settings_docs            writes the page
python -m scripts.settings_docs --check    exits 1 when the page is out of date
"""

from __future__ import annotations

import dataclasses
from typing import Any

from pydantic import TypeAdapter

from scripts.generated import write_or_check
from vmap_ensemble.archive.settings import WORKER_KEYS, Settings, known_keys
from vmap_ensemble.tasks.images.settings import TorchvisionSettings, VisionSettings
from vmap_ensemble.tasks.text.settings import TextSettings, TracedSettings

# Heading on the generated page of settings -> class.
DOCUMENTED: dict[str, type[Settings]] = {
    "Every handler": Settings,
    "Handlers of images": VisionSettings,
    "Handlers of torchvision's classifiers": TorchvisionSettings,
    "Handlers of text": TextSettings,
    "Handlers of traced text": TracedSettings,
}
HEAD = """# Settings

Written by `python -m scripts.settings_docs` from the settings classes; don't edit it by hand.

A block of `setup_config.json` says what one archive serves. `./archive.sh` reads these keys itself:

| key | what it says |
| --- | --- |
| `members` | files, folders, globs, `torchvision:ResNet50_Weights.IMAGENET1K_V1`; a list, or `{name: path}` |
| `labels` | a JSON file `{"0": "label", …}`; packed as `index_to_name.json` |
| `model_config` | the yaml with TorchServe's settings of this model: batch size, delay, workers |
| `model_file` | a `model.py` with an architecture of your own |
| `extra_files` | further files for the archive's root |
| `version` | the archive's version, `1.0` by default |
| `allow_nan` | pack members although weights are NaN or infinite |
| `samples` | input files, or folders: int8 is calibrated on them; fp16, bf16 and int8 are judged on them |
| `pretrained` | a directory with config.json and tokenizer, where the members don't bring them |
| `library_path` | the FasterTransformer library of traced members; built by default |
| `checkpoint_weights` | which weights to take of checkpoints that hold several, such as `ema` |
| `max_changed_predictions` | share of the samples whose prediction may differ from float32's, `0.01` by default |

All other keys go into the archive, where the handler checks them: an unknown one is refused with the nearest
known name. Keys marked *worker* stand in the `handler:` section of the model-config yaml instead.
"""


def describe_type(schema: dict[str, Any]) -> str:
    """A JSON Schema of one key in a few words."""
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "anyOf" in schema:
        return " or ".join(describe_type(part) for part in schema["anyOf"] if part.get("type") != "null")
    words = {"integer": "whole number", "string": "text", "boolean": "true or false", "array": "list"}
    kind = schema.get("type", "value")
    bounds = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most"}
    limits = [f"{bound} {schema[key]:g}" for key, bound in bounds.items() if key in schema]
    return " ".join([words.get(kind, kind), ", ".join(limits)]).strip()


def rows_of(kind: type[Settings], known: set[str]) -> list[str]:
    """One table row per key that is not in `known`."""
    properties = TypeAdapter(kind).json_schema()["properties"]
    rows = []
    for field in dataclasses.fields(kind):
        if field.name in known:
            continue
        schema = properties[field.name]
        default = "" if schema.get("default") in (None, "") else f"`{schema['default']}`"
        worker = "*worker* " if field.name in WORKER_KEYS else ""
        text = schema["description"].removeprefix("Worker key: ")
        rows.append(f"| `{field.name}` | {worker}{describe_type(schema)} | {default} | {text} |")
    return rows


def render() -> str:
    """The whole page."""
    parts = [HEAD]
    known: set[str] = set()
    for title, kind in DOCUMENTED.items():
        table = ["| key | values | default | what it says |", "| --- | --- | --- | --- |"]
        parts.append("\n".join([f"## {title}", "", *table, *rows_of(kind, known)]) + "\n")
        known |= set(known_keys(kind))
    return "\n".join(parts)


def main() -> int:
    """Write or check the page."""
    return write_or_check({"settings.md": render}, "python -m scripts.settings_docs", __doc__)


if __name__ == "__main__":
    raise SystemExit(main())
