"""What a block of setup_config.json says to the archiver: the model that checks it, and that its schema is made of.

All other keys are the handler's settings (`vmap_ensemble.archive.settings`) and go into the archive.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, ValidationError
from pydantic.dataclasses import dataclass

from vmap_ensemble.errors import ArchiveError

MAX_CHANGED_PREDICTIONS = 0.01


@dataclasses.dataclass(frozen=True)
class Expected:
    """What a wrong value is told was expected."""

    text: str


NotEmpty = Annotated[str, Field(min_length=1)]
# TorchServe takes it as a part of an address: no slash.
VersionText = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}$")]
NotNegative = Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, allow_inf_nan=False)]
PathText = Annotated[NotEmpty | None, Expected("a path")]
MemberSpecs = list[str] | dict[str, str]


# Strict: "false" is no flag, 3 no path, true no number.
@dataclass(frozen=True, kw_only=True, config={"extra": "forbid", "strict": True})
class Block:
    """The keys that only the archiver reads; paths start at the folder of setup_config.json."""

    members: Annotated[str | MemberSpecs, Expected("paths as a list or as {name: path}")] = Field(
        default_factory=list, description="Checkpoints, folders or globs: a list, or name -> path."
    )
    labels: PathText = Field(None, description="JSON of the classes.")
    model_config: PathText = Field(None, description="yaml of TorchServe's settings of this archive.")
    extra_files: Annotated[list[NotEmpty], Expected("a list of paths")] = Field(
        default_factory=list, description="Other files that the handler wants."
    )
    model_file: PathText = Field(None, description="`model.py`, or `model.py:Class`: an architecture of your own.")
    version: Annotated[VersionText | NotNegative, Expected('digits, letters and dots such as "1.0"')] = Field(
        "1.0", description="Of the archive, as TorchServe addresses it."
    )
    allow_nan: Annotated[bool, Expected("true or false")] = Field(
        False, description="Archive NaN and infinite weights nevertheless."
    )
    pretrained: PathText = Field(None, description="Brings config.json and the tokenizer where members don't.")
    library_path: PathText = Field(None, description="The library that traced members call.")
    samples: Annotated[NotEmpty | list[NotEmpty] | None, Expected("paths of files or folders")] = Field(
        None, description="Inputs to calibrate int8 on, and to judge any other precision than float32 by."
    )
    max_changed_predictions: Annotated[float, Field(ge=0, le=1), Expected("a share from 0 to 1")] = Field(
        MAX_CHANGED_PREDICTIONS, description="Share of the samples whose prediction may differ from float32's."
    )
    checkpoint_weights: Annotated[NotEmpty | None, Expected("a name")] = Field(
        None, description="Which weights to take of checkpoints that hold several, such as `ema`."
    )


ARCHIVER_KEYS = tuple(field.name for field in dataclasses.fields(Block))
# Of these, paths or lists of them.
PATH_KEYS = ("labels", "model_config", "extra_files", "model_file", "pretrained", "library_path", "samples")


def check_keys(name: str, given: Mapping[str, Any]) -> Block:
    """Check the archiver's keys of one block.

    Args:
        name: Of the archive, for the message.
        given: Key -> value, keys of ARCHIVER_KEYS alone.

    Raises:
        ArchiveError: Names the archive, the key, what was expected and what is there.
    """
    try:
        return Block(**given)
    except ValidationError as error:
        key = str(error.errors()[0]["loc"][0])
        expected = next(part.text for part in _metadata(key) if isinstance(part, Expected))
        raise ArchiveError(f"'{name}': {key}: expected {expected}, got {given[key]!r}") from None


def _metadata(key: str) -> list[Any]:
    fields = Block.__pydantic_fields__  # type: ignore[attr-defined]
    return fields[key].metadata
