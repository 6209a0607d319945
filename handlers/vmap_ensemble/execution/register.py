"""Turns a function that makes a forward ready into a mode, which a name asks for and `auto` may choose.

    @mode("mine", what="half of the layers", place=2)
    def build_mine(forward, examples, options) -> Built: ...

The file of a mode is imported when the mode is first asked for, so that a technique's folder can be left out: the
others still serve.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmap_ensemble.archive.modes import AUTO_BUDGET_S, MODULES, reason_against_name
from vmap_ensemble.core.forward import Forward
from vmap_ensemble.errors import LoadError, SettingsError, first_line
from vmap_ensemble.execution.timing import Args, Budget, Run


@dataclass(frozen=True)
class ExecutionOptions:
    """How `auto` measures and where it keeps its choice, and what modes need beside the forward.

    Attributes:
        budget_s: Time that measuring may take; building a candidate that was begun is finished.
        budget: What `auto` has begun to spend of it, of which a mode that measures while it is built takes a share.
        count: Members that will be served, where a mode is built for some of them, to be measured; else None.
        tolerance: Largest relative difference to the members' own forwards; by default that of the dtype.
        cache_dir: Folder for the choice; None keeps none.
        packed_choices: Folder of choices that the archive brings.
        archive_sha: What the choice is for: a hash of the members.
        buckets: Batch sizes that CUDA graphs are recorded for; by default those of cuda/graphs.py.
        sample: Batch that what serves is proved on; by default the first example.
        schedule: What the chosen mode measured while it was built at an earlier start (`Built.schedule`).
        packed: Loads the forward that the archive brings as native code; None if it brings none.
        graph_folder: The unpacked archive, where it brings an ONNX graph of all members; else None.
        float32_matmul_precision: Of float32 members on a GPU, set for the process: torch's own default lets
            convolutions use TF32, `highest` doesn't, `high` and `medium` do. None leaves it as it is.
    """

    budget_s: float = AUTO_BUDGET_S
    budget: Budget | None = None
    count: int | None = None
    tolerance: float | None = None
    cache_dir: Path | None = None
    packed_choices: Path | None = None
    archive_sha: str = ""
    buckets: tuple[int, ...] | None = None
    sample: Args | None = None
    schedule: Mapping[str, Any] | None = None
    packed: Callable[[], Run] | None = None
    graph_folder: Path | None = None
    float32_matmul_precision: str | None = "highest"


@dataclass(frozen=True)
class Built:
    """A forward that is ready to serve, not yet compared with the members' own, and what is known of it.

    Attributes:
        run: Arguments (B, ...) -> outputs (M, B, ...).
        channels_last: Whether images are wanted in this memory format; others are copied into it.
        schedule: What was measured while it was built, for JSON, so that another start needn't.
        growth: How much longer a call takes for `ExecutionOptions.count` members than for those that it was built
            for; None: in proportion.
    """

    run: Run
    channels_last: bool = False
    schedule: Mapping[str, Any] | None = None
    growth: float | None = None


Factory = Callable[[Forward, Sequence[Args], ExecutionOptions], Built]
ReasonsAgainst = Callable[[Forward, Sequence[Args], ExecutionOptions], list[str]]


def _no_reasons(_forward: Forward, _examples: Sequence[Args], _options: ExecutionOptions) -> list[str]:
    return []


def _no_seconds(_options: ExecutionOptions) -> float:
    return 0.0


def _no_library(_forward: Forward) -> str | None:
    return None


@dataclass(frozen=True)
class Mode:
    """One way to run a forward; `mode` has the attributes' meaning."""

    name: str
    what: str
    build: Factory
    place: float | None
    devices: frozenset[str] | None
    reasons_against: ReasonsAgainst
    needs_s: Callable[[ExecutionOptions], float]
    library: Callable[[Forward], str | None]

    def runs_on(self, forward: Forward) -> bool:
        """Whether it is made for the device of the forward's members."""
        return self.devices is None or forward.members.device.type in self.devices

    def reasons(self, forward: Forward, examples: Sequence[Args], options: ExecutionOptions) -> list[str]:
        """Why it can't be had, as far as that is known before any work."""
        if self.devices is not None and not self.runs_on(forward):
            devices = " or ".join(sorted(name.upper() for name in self.devices))
            return [f"expected the members on a {devices} device, got {forward.members.device}"]
        return self.reasons_against(forward, examples, options)


_MODES: dict[str, Mode] = {}


def mode(
    name: str,
    *,
    what: str,
    place: float | None = None,
    devices: Sequence[str] | None = None,
    reasons_against: ReasonsAgainst = _no_reasons,
    needs_s: Callable[[ExecutionOptions], float] = _no_seconds,
    library: Callable[[Forward], str | None] = _no_library,
) -> Callable[[Factory], Factory]:
    """Register a factory: (forward, examples, options) -> `Built`.

    Args:
        name: What the setting `execution` says.
        what: What runs then, in a few words; begins the reason of a failure.
        place: Its turn among the candidates of `auto`, by how often it wins: who comes late may find the budget
            spent. None: it runs only where it's asked for.
        devices: Device types that it is made for; None: any.
        reasons_against: Why it can't be had for a forward, examples and options, one reason each; called before
            any work. What only turns out later is raised.
        needs_s: Seconds of the budget that must be left for building it, since it can't be interrupted.
        library: Names what its speed depends on beside torch, which makes a choice of `auto` one of its own.

    Raises:
        SettingsError: Another file has registered the name.
    """

    def register(build: Factory) -> Factory:
        owner = MODULES.setdefault(name, build.__module__)
        if owner != build.__module__:
            raise SettingsError(f"execution '{name}' in {build.__module__}: expected a new name, {owner} has it")
        kinds = None if devices is None else frozenset(devices)
        _MODES[name] = Mode(name, what, build, place, kinds, reasons_against, needs_s, library)
        return build

    return register


def find_mode(name: str) -> Mode:
    """The mode of a name; the file that registers it is imported where it wasn't yet.

    Raises:
        SettingsError: No file is known to register it.
        LoadError: Its file can't be imported.
    """
    if name not in MODULES:
        raise SettingsError(f"execution: {reason_against_name(name)}")
    if name not in _MODES:
        try:
            importlib.import_module(MODULES[name])
        except Exception as error:  # whatever importing somebody's file may raise
            told = f"{type(error).__name__}: {first_line(error)}"
            raise LoadError(f"execution '{name}' can't be had: {told}") from error
    if name not in _MODES:
        raise LoadError(f"execution '{name}': expected {MODULES[name]} to register it, it doesn't")
    return _MODES[name]
