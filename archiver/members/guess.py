"""Turns a checkpoint into the torchvision networks that have exactly its keys and shapes: an offer, no decision."""

from __future__ import annotations

from collections.abc import Iterator

from archiver.members.survey import fit_members
from archiver.source import Source
from vmap_ensemble.archive.checkpoints import read_checkpoint
from vmap_ensemble.core.states import State
from vmap_ensemble.errors import EnsembleError
from vmap_ensemble.models.architecture import TORCHVISION, build_architecture

# Entries of a state dict that no optimiser sees, so that torchvision doesn't count them.
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
# torchvision's counts are of networks with this many classes.
_CLASSES = 1000


def describe_assumption(architecture: str, assumed: bool, sources: list[Source], choice: str | None = None) -> str:
    """What a refusal of members says of the architecture that they were held against.

    Args:
        architecture: As in `build_architecture`.
        assumed: Whether it is the handler's own, since nobody named one.
        sources: The members.
        choice: Which weights to take of files that hold several.

    Returns:
        Text that begins with `; `, or nothing.
    """
    told = f"; no architecture was named, so the handler's own {architecture} was assumed" if assumed else ""
    fitting = find_fitting(sources[0], choice) if architecture.startswith(TORCHVISION) else []
    others = [name for name in fitting if name != architecture]
    if others:
        return f"{told}; {' and '.join(others)} has exactly these keys and shapes: --architecture {others[0]}"
    return f"{told}: --architecture names another" if assumed else ""


def find_fitting(source: Source, choice: str | None = None) -> list[str]:
    """Architectures `torchvision:NAME` that a member's checkpoint fits, key by key."""
    try:
        state = read_checkpoint(source.path, choice).state
    except EnsembleError:
        return []
    return [name for name, classes in _of_its_size(state) if _fits(source.shown, state, name, classes)]


def _of_its_size(state: State) -> Iterator[tuple[str, int]]:
    """Networks whose number of parameters differs by a last layer of other width alone, and that width."""
    from torchvision import models  # here: slow to import, and only a refusal asks

    widths = [tensor.shape[0] for key, tensor in state.items() if tensor.dim() == 1 and key.endswith("bias")]
    classes = widths[-1] if widths else _CLASSES
    count = sum(tensor.numel() for key, tensor in state.items() if not key.endswith(_BUFFERS))
    for name in models.list_models(module=models):
        more = int(models.get_model_weights(name).DEFAULT.meta["num_params"]) - count
        fewer_classes = _CLASSES - classes
        if more == 0 if fewer_classes == 0 else more % fewer_classes == 0 and more // fewer_classes > 1:
            yield f"{TORCHVISION}{name}", classes


def _fits(label: str, state: State, architecture: str, classes: int) -> bool:
    try:
        fit_members({label: state}, build_architecture(architecture, classes), architecture)
    except EnsembleError:
        return False
    return True
