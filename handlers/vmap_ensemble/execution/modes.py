"""Turns a forward and the name of a mode into the callable that serves: the same values, run in another way.

reference  the plain loop over members         eager     one vmapped call
prepared   cpu/: weights prepared              compiled  compiled/: the archive's native code, else compiled at load
cudagraph  cuda/: recorded per bucket of sizes, as cudagraph_loop, branches, compiled_branches (cuda/mode.py)
auto       whichever is measured fastest, never below the loop (auto.py)
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from vmap_ensemble.core.forward import Forward
from vmap_ensemble.core.proof import Proof, prove_equal
from vmap_ensemble.errors import LoadError, first_line
from vmap_ensemble.execution.choice_cache import Candidate
from vmap_ensemble.execution.register import Built, ExecutionOptions, find_mode, mode
from vmap_ensemble.execution.timing import Args, Run

logger = logging.getLogger(__name__)


@dataclass
class Execution:
    """The chosen way to run the forward; call it with the model's arguments.

    Attributes:
        name: The mode that serves.
        reason: One line: why this one.
        candidates: What was looked at, for the description of the model and for metrics.
        run: Arguments (B, ...) -> outputs (M, B, ...).
        proof: The comparison of exactly this callable with the members' own forwards, at this start.
        proof_s: Seconds that it took.
        channels_last: Whether images are wanted in this memory format; others are copied into it.
        schedule: What building it measured; see `Built`.
    """

    name: str
    reason: str
    candidates: list[Candidate]
    run: Run
    proof: Proof | None = None
    proof_s: float = 0.0
    channels_last: bool = False
    schedule: Mapping[str, Any] | None = None

    def __call__(self, *args: Any) -> Any:
        return self.run(*args)

    def describe(self) -> dict[str, Any]:
        """What serves, why, what else was looked at and why it can't serve, and the proof; for JSON."""
        return {
            "serves": self.name,
            "reason": self.reason,
            "candidates": [asdict(candidate) for candidate in self.candidates],
            "proof": asdict(self.proof) if self.proof else None,
        }


def prove(execution: Execution, forward: Forward, sample: Args, tolerance: float | None = None) -> Execution:
    """Prove what is about to serve: the only comparison of a start that has nothing to measure.

    Args:
        execution: Gets the proof, and the seconds that it took.
        forward: The members' own forwards.
        sample: The batch to compare on.
        tolerance: As `prove_equal` takes it.

    Raises:
        LoadError: As `prove_equal`, or it doesn't run on the sample.
    """
    started = time.perf_counter()
    try:
        with torch.inference_mode():
            execution.proof = prove_equal(forward, execution.run, sample, tolerance)
    except LoadError:
        raise
    except Exception as error:  # whatever somebody's model may raise
        told = f"{type(error).__name__}: {first_line(error)}"
        raise LoadError(f"execution '{execution.name}' fails on the sample that would prove it: {told}") from error
    execution.proof_s = time.perf_counter() - started
    return execution


def build_mode(name: str, forward: Forward, examples: Sequence[Args], options: ExecutionOptions) -> Built:
    """What serves in one mode, not yet compared with the members' own forwards.

    Raises:
        SettingsError: There is no such mode.
        LoadError: It can't be had, for whatever reason; the text names the mode.
    """
    chosen = find_mode(name)
    try:
        reasons = chosen.reasons(forward, examples, options)
        if reasons:
            raise LoadError(f"execution '{name}': {'; '.join(reasons)}")
        return chosen.build(forward, examples, options)
    except LoadError:
        raise
    except Exception as error:
        raise LoadError(f"execution '{name}' can't be had: {type(error).__name__}: {first_line(error)}") from error


@mode("eager", what="one call of vmap", place=3)
def build_eager(forward: Forward, _examples: Sequence[Args], _options: ExecutionOptions) -> Built:
    """The forward as it is."""
    return Built(forward, channels_last=forward.channels_last)


@mode("reference", what="the plain loop over members")
def build_loop(forward: Forward, _examples: Sequence[Args], _options: ExecutionOptions) -> Built:
    """The plain loop, on modules of the members' own where it can: that spares each call the swapping of weights."""
    plain = forward.one_vmap
    if plain is None:
        return Built(forward.loop)
    try:
        from vmap_ensemble.execution.compiled.unrolled import UnrolledModules  # here: the folder may be left out

        return Built(UnrolledModules(plain).eval())
    except Exception as error:  # whatever the copying of somebody's module may raise
        name = type(plain.model).__name__
        logger.warning("the loop swaps weights: %s can't be copied: %s", name, first_line(error))
        return Built(forward.loop)
