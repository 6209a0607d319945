"""Turns an archive's setup_config.json and its worker's model-config section into one frozen, checked dataclass.

What is served stands in setup_config.json, how the worker runs stands in the `handler:` section of the
model-config yaml; each key lives in one of them. Unknown keys are refused with the nearest known name.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from vmap_ensemble.archive.modes import AUTO, AUTO_BUDGET_S, mode_names, reason_against_name
from vmap_ensemble.errors import SettingsError

SETTINGS_FILE = "setup_config.json"
WORKER_KEYS = ("threads", "device", "devices")

PositiveInt = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, le=1)]


def refuse_unknown(reason_against: Callable[[str], str | None]) -> AfterValidator:
    """Check a name against a register: what `reason_against` says of it is the error."""

    def check(name: str) -> str:
        unknown = reason_against(name)
        if unknown:
            raise PydanticCustomError("unknown_name", "{unknown}", {"unknown": unknown})
        return name

    return AfterValidator(check)


def list_names(names: Callable[[], list[str]]) -> Callable[[dict[str, Any]], None]:
    """For a field's JSON Schema: the names that its register holds."""
    return lambda schema: schema.update(enum=names())


ExecutionMode = Annotated[str, refuse_unknown(reason_against_name)]


@dataclass(frozen=True, kw_only=True, config={"extra": "forbid", "strict": False})
class Settings:
    """The options that every handler knows; a handler with more of its own inherits from this."""

    name: str = Field("ens", description="Name of the archive; it heads the description.")
    handler: str = Field("", description="Handler file under handlers/.")
    architecture: str = Field(
        "",
        description="`torchvision:resnet18`, `mnist`, `model.py:ClassName` for a file of your own, or `pruned.json`, "
        "which `vmap-ensemble prune` writes.",
    )
    num_classes: PositiveInt | None = Field(
        None, description="Width of the last layer; read from the members when archiving."
    )
    input_shape: tuple[PositiveInt, ...] | None = Field(
        None, description="Shape of one example, (channels, height, width) for images."
    )
    aggregation: Literal["mean_probability", "mean_logit", "majority_vote"] = Field(
        "mean_probability", description="How the members' outputs become one prediction."
    )
    weights: dict[str, Annotated[float, Field(ge=0)]] | None = Field(
        None, description="Weight of each member by name; equal by default."
    )
    temperature: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="Logits are divided by it before the softmax."
    )
    output: Literal["auto", "logits", "probabilities", "log_probabilities"] = Field(
        "auto",
        description="What a classifier's forward returns. `auto` looks at the sample when loading: rows that all sum "
        "to 1 are a softmax's, and get no other. One column is a logit, the sigmoid of the second of two classes.",
    )
    top_k: PositiveInt = Field(5, description="Number of labels in an answer; at most the number of classes.")
    abstain_below_probability: Probability | None = Field(
        None, description="Answers with a lower probability say `abstain`."
    )
    abstain_above_mutual_information: Annotated[float, Field(ge=0)] | None = Field(
        None, description="Answers with a higher mutual information, in nats, say `abstain`."
    )
    require_subset: bool = Field(
        False, description="Refuse requests that name no `subset`, where the members are different tenants'."
    )
    response: Literal["full", "torchserve"] = Field(
        "full", description="`torchserve` answers {label: probability}, as TorchServe's classifiers do."
    )
    identify_answers: bool = Field(
        False, description="Every answer says which archive gave it: `archive`, with version and SHA-256."
    )
    dtype: Literal["fp32", "fp16", "bf16"] = Field("fp32", description="Floating point type of the members.")
    float32_matmul_precision: Literal["highest", "high", "medium"] = Field(
        "highest", description="torch.set_float32_matmul_precision; `high` admits TF32 on a GPU."
    )
    execution: ExecutionMode = Field(
        AUTO,
        json_schema_extra=list_names(mode_names),
        description="How the one forward is run: `auto` measures at load and keeps the fastest that gives the same "
        "numbers, so int8 is never among its candidates (`quantization`); `eager` vmap; `prepared` weights; "
        "`compiled`, by `./archive.sh --compile` or else at load; `onnxruntime`, `openvino`, by `--onnx` or else so; "
        "recorded on a GPU: `branches`, members side by side, `compiled_branches`, `cudagraph`, the vmapped forward, "
        "`cudagraph_fused`, an encoder in fused steps, `cudagraph_loop`; `reference`, the plain loop.",
    )
    execution_budget_s: float = Field(
        AUTO_BUDGET_S,
        ge=0,
        description="Seconds that `auto` may measure at load; the choice is cached for the next start.",
    )
    tolerance: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Largest relative difference to the members' own forwards at load; per dtype."
    )
    threads: PositiveInt | None = Field(None, description="Worker key: torch threads; the cores at hand by default.")
    device: str | None = Field(
        None, description="Worker key: `cpu` or `cuda:0`; the GPU that TorchServe assigns by default."
    )
    devices: Annotated[list[str], Field(min_length=2)] | None = Field(
        None,
        description="Worker key, instead of `device`: several, such as `cuda:0` and `cuda:1`. Members are spread "
        "over them, or batches split among them, whichever is measured faster.",
    )

    @property
    def abstains(self) -> list[str]:
        """The keys that make answers say `abstain`, among those that are set."""
        keys = ("abstain_below_probability", "abstain_above_mutual_information")
        return [key for key in keys if getattr(self, key) is not None]

    @model_validator(mode="after")
    def _devices_are_said_once(self) -> Settings:
        if self.devices is not None and self.device is not None:
            raise ValueError(f"devices: expected no 'device' beside it, got '{self.device}'")
        return self

    @model_validator(mode="after")
    def _abstaining_is_said(self) -> Settings:
        if self.response == "torchserve" and self.abstains:
            raise ValueError(
                f"{self.abstains[0]}: expected response 'full'; TorchServe's plain form has no place for abstain"
            )
        return self


SettingsType = TypeVar("SettingsType", bound=Settings)
Block = TypeVar("Block")


def read_block(folder: Path) -> dict[str, Any]:
    """What setup_config.json of an unpacked archive says, unchecked.

    Raises:
        SettingsError: The file is missing or no JSON object.
    """
    path = Path(folder) / SETTINGS_FILE
    try:
        block = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(f"{SETTINGS_FILE}: not in the archive; build archives with ./archive.sh") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{SETTINGS_FILE}: expected JSON, got {error}") from None
    if not isinstance(block, dict):
        raise SettingsError(f"{SETTINGS_FILE}: expected a JSON object, got {type(block).__name__}")
    return block


def override_settings(settings: SettingsType, given: Mapping[str, Any]) -> SettingsType:
    """Settings with some of them replaced, checked like the others.

    Raises:
        SettingsError: As `parse_settings`.
    """
    return parse_settings({**dataclasses.asdict(settings), **given}, type(settings), "options")


def load_settings(folder: Path, kind: type[SettingsType], worker: Mapping[str, Any] | None = None) -> SettingsType:
    """Read the settings of an unpacked archive.

    Args:
        folder: Where setup_config.json lies.
        kind: The settings class of the handler.
        worker: The `handler:` section of the model-config yaml, as TorchServe hands it over.

    Raises:
        SettingsError: The file is missing or no JSON object, or a key or value is wrong.
    """
    block = read_block(folder)
    worker = dict(worker or {})
    # TorchServe's own key in the same section (handler_utils/timer.py), not ours to judge.
    worker.pop("profile", None)
    check_keys(block, [key for key in known_keys(kind) if key not in WORKER_KEYS], SETTINGS_FILE)
    check_keys(worker, WORKER_KEYS, "model-config yaml, section handler")
    return parse_settings({**block, **worker}, kind, SETTINGS_FILE)


def parse_settings(block: Mapping[str, Any], kind: type[Block], where: str) -> Block:
    """Check a block of settings, a dataclass of any kind; `where` names its file in errors.

    Raises:
        SettingsError: One line that names the file, the key, what was expected and what was got.
    """
    check_keys(block, known_keys(kind), where)
    try:
        return TypeAdapter(kind).validate_python(dict(block))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "settings"
        got = "" if first["type"] in ("missing", "unknown_name") else f", got {first['input']!r}"
        raise SettingsError(f"{where}: {key}: {first['msg']}{got}") from None


def known_keys(kind: type[Any]) -> list[str]:
    """The keys that a settings class knows."""
    return [field.name for field in dataclasses.fields(kind)]


def check_keys(block: Mapping[str, Any], known: list[str] | tuple[str, ...], where: str) -> None:
    """Refuse keys that are not known, naming the nearest one that is.

    Raises:
        SettingsError: A key is unknown, or belongs into the other file.
    """
    for key in block:
        if key in known:
            continue
        if key in WORKER_KEYS:
            raise SettingsError(f"{where}: '{key}' is a worker's key; put it under handler: in the model-config yaml")
        close = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
        hint = f"did you mean '{close[0]}'?" if close else f"known keys: {', '.join(known)}"
        raise SettingsError(f"{where}: unknown key '{key}'; {hint}")


@dataclass(frozen=True, kw_only=True, config={"extra": "forbid", "strict": False})
class QuantisableSettings(Settings):
    """Settings of handlers whose members can be served in 8 bits."""

    quantization: Literal["int8"] | None = Field(
        None,
        description="`int8`: 8-bit weights and activations in convolutions, large linear layers and the layers of "
        "encoders, on a CPU; judged on `--samples`, without which images can't be served so (docs/precision.md).",
    )

    @model_validator(mode="after")
    def _quantization_alone(self) -> QuantisableSettings:
        if self.quantization and self.dtype != "fp32":
            raise ValueError(f"quantization {self.quantization} starts from dtype fp32, got dtype {self.dtype}")
        if self.quantization and self.execution not in ("auto", "prepared"):
            raise ValueError(
                f"quantization {self.quantization} has one way to run; expected execution auto or prepared, "
                f"got {self.execution}"
            )
        return self
