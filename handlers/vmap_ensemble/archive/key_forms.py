"""Turns a state dict whose keys a training framework has prefixed into the one that an architecture takes.

Which part of a key is a framework's and which the network's own, only the architecture tells: `model.conv1.weight` of
Lightning is `conv1.weight` of a ResNet, but a network that wraps another as `self.model` has that key itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from vmap_ensemble.core.states import State, renamed
from vmap_ensemble.errors import MemberError, OtherArchitecture

Fit = Callable[[State], State]

# Part of a key -> what such weights are and how to make plain ones.
HINTS = {
    "lora_A": "these are unmerged LoRA weights; merge them where you trained: model.merge_and_unload()",
    "weight_mask": "these weights are pruned; make that permanent: torch.nn.utils.prune.remove(module, name)",
    "weight_g": "these weights are normalised; make that permanent: torch.nn.utils.remove_weight_norm(module)",
    "weight_u": "these weights are normalised; make that permanent: torch.nn.utils.remove_spectral_norm(module)",
    "parametrizations": "these weights are parametrised; make that permanent: remove_parametrizations(module, name)",
}


def fit_member(label: str, state: State, known: set[str], fit: Fit) -> State:
    """The first form of a state dict that fits.

    Args:
        label: What errors call the member.
        state: Key -> tensor, as `read_state_dict` gives it.
        known: The architecture's keys.
        fit: Makes of a form what is archived, or raises MemberError.

    Raises:
        MemberError: None fits, and it is known why: a part of the keys alone fits, or the weights are not plain.
        OtherArchitecture: None fits: what is wrong with the form that has most of the architecture's keys.
    """
    closest: tuple[int, MemberError] | None = None
    for form in _forms(state):
        try:
            return fit(form)
        except MemberError as error:
            common = len(known & set(form))
            if closest is None or common > closest[0]:
                closest = (common, error)
    best = closest[1] if closest else MemberError(f"{label}: the state dict is empty")
    fitting = _fitting_submodules(state, fit)
    if fitting:
        others = sorted({key.partition(".")[0] for key in state} - set(fitting))
        raise MemberError(
            f"{label}: the weights below {' and below '.join(fitting)} fit the architecture, and there are others "
            f"below {', '.join(others[:4]) or 'the other'}; --weights {fitting[0]} (key 'checkpoint_weights') takes "
            f"those below {fitting[0]} alone"
        ) from None
    hint = _hint(state, known)
    if hint:
        raise MemberError(f"{best}{hint}") from None
    raise OtherArchitecture(str(best)) from None


def _forms(state: State) -> Iterator[State]:
    """As it is, without what all keys begin with, and each of these without DataParallel's parts inside."""
    form = state
    while True:
        yield form
        inside = _without(form, "module")
        if inside is not None:
            yield inside
        shared = {key.partition(".")[0] for key in form}
        if len(shared) != 1 or not all("." in key for key in form):
            break
        prefix = f"{shared.pop()}."
        form = renamed(form, lambda key, prefix=prefix: key.removeprefix(prefix))  # type: ignore[misc]
    # A network whose own attribute is called module: reading took it for DataParallel's.
    yield renamed(state, lambda key: f"module.{key}")


def _without(state: State, part: str) -> State | None:
    """Without a part of the keys; None where no key has it, or two keys would become one."""
    if not any(part in key.split(".")[:-1] for key in state):
        return None
    try:
        return renamed(state, lambda key: ".".join(name for name in key.split(".") if name != part))
    except MemberError:
        return None


def _fitting_submodules(state: State, fit: Fit) -> list[str]:
    found = []
    for part in dict.fromkeys(key.partition(".")[0] for key in state if "." in key):
        below = renamed(state, lambda key, part=part: key.partition(".")[2] if key.startswith(f"{part}.") else None)  # type: ignore[misc]
        for form in _forms(below):
            try:
                fit(form)
            except MemberError:
                continue
            found.append(part)
            break
    return found


def _hint(state: State, known: set[str]) -> str:
    for part, text in HINTS.items():
        if any(part in key.split(".") for key in state if key not in known):
            return f"; {text}"
    return ""
