"""Turns stacked members and one model skeleton into ONE vmapped forward, and the plain loop it must equal.

`Forward` is what the rest of the project asks of any forward; `EnsembleForward` is the one below, and the default:

    y[m] = f(theta_m, x)  for every member m, in one call:
    vmap(f, in_dims=(0, None))(stacked theta, x)            -> every output tensor is (M, B, ...)

Tensors that all members share are passed unbatched, so vmap computes what depends on them alone once.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils import _pytree as pytree

from vmap_ensemble.errors import LoadError

if TYPE_CHECKING:
    from vmap_ensemble.core.members import StackedMembers


class Forward(Protocol):
    """The forward of M members on one batch: what running, proving and cutting it into chunks need of it.

    Attributes:
        members: Names, tensors and device of the members.
        tolerance: Largest relative difference between ways to run it; None: that of the output's dtype (proof.py).
        only_mode: The name of the one way to run it, where others would give other numbers or can't exist; None: any.
        reason: One line on how it was made, where there is something to say.
        channels_last: Whether it takes images fastest in this memory format.
    """

    members: StackedMembers
    tolerance: float | None = None
    only_mode: str | None = None
    reason: str = ""
    channels_last: bool = False

    def __call__(self, *args: Any) -> Any:
        """Run every member on the same arguments: tensors (B, ...) -> the output's structure, each (M, B, ...)."""

    def member(self, index: int, *args: Any) -> Any:
        """Run one member alone, plainly, as if there were no ensemble: outputs (B, ...)."""

    def part(self, start: int, stop: int) -> Callable[..., Any]:
        """A callable like this one for the members from `start` to `stop`, exclusive."""

    def loop(self, *args: Any) -> Any:
        """Run the members one after another: the reference that `__call__` must equal; (M, B, ...)."""
        return self.loop_part(0, len(self.members.names))(*args)

    def loop_part(self, start: int, stop: int) -> Callable[..., Any]:
        """The loop over the members from `start` to `stop`, exclusive."""

        def run(*args: Any) -> Any:
            outputs = [self.member(index, *args) for index in range(start, stop)]
            return pytree.tree_map(lambda *leaves: torch.stack(leaves), *outputs)

        return run

    def comparable(self, outputs: Any, args: tuple[Any, ...], batch_axis: int) -> Any:
        """The part of an output that must equal the members' own; here all of it.

        Args:
            outputs: Of `__call__` (batch_axis 1) or `member` (batch_axis 0).
            args: What they were called with.
            batch_axis: The axis of B in the outputs.
        """
        return outputs

    @property
    def one_vmap(self) -> EnsembleForward | None:
        """This forward, where its model called on the arguments as they are is all that a member does; else None.

        What is made of model and members alone (native code, a prepared graph, a loop over modules) is right then.
        """
        return None

    @property
    def preparation(self) -> Callable[[tuple[Any, ...]], Callable[..., Any]] | None:
        """Makes a preparation of its own for the mode `prepared` from arguments like those that will be served."""
        return None

    @property
    def static_batches(self) -> Callable[[Callable[..., Any], Sequence[int] | None], Any] | None:
        """Makes of a run with these arguments, and batch sizes, what execution/cuda/graphs.py calls a LayOut.

        That is how its batches become static inputs of a recording. None: tensors (B, ...) of rows that stand alone.
        """
        return None

    @property
    def static_forward(self) -> Callable[[Sequence[int] | None], Any] | None:
        """As `static_batches` for this forward itself, where it is recorded on other inputs than its arguments."""
        return None

    @property
    def static_fused(self) -> Callable[[Any, Sequence[Any], Sequence[int] | None], Any] | None:
        """As `static_forward`, in fused steps, of kernels for them and an example of the arguments."""
        return None

    def without_packed_weights(self) -> Forward:
        """The same on plain weights: compilers refuse reordered matrices that aren't constants of their own."""
        return self


class EnsembleForward(Forward):
    """The forward of all members on one batch, as a single call of torch.func.vmap.

    Args:
        model: The architecture in eval mode. Its own parameters are dropped (moved to the meta device):
            the members' are used. Buffers outside the state dict stay and are moved to the members' device.
        members: M state dicts, stacked: `stacked` holds (M, ...) tensors, `shared` holds tensors (...).
        rules: Makes the context in which the model's code runs inside vmap, for batching rules that are
            faster than the stock ones; none by default.

    Raises:
        LoadError: The model is in training mode, or neither `stacked` nor `shared` fills one of its tensors.

    Example:
        >>> forward = EnsembleForward(model.eval(), members)
        >>> y = forward(torch.rand(8, 1, 28, 28))
        >>> assert y.shape == (len(members.names), 8, 10)
    """

    def __init__(
        self,
        model: nn.Module,
        members: StackedMembers,
        rules: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        training = [name or "(root)" for name, module in model.named_modules() if module.training]
        if training:
            raise LoadError(f"expected a model in eval mode, got training mode in {training[0]}; call .eval()")
        self.model, self.members, self.rules = model, members, rules
        # vmap wraps every dict entry anew, so a tied key would no longer be the tensor that it is tied to:
        # one entry per tensor goes in, and the ties are joined inside.
        self._own = {key: tensor for key, tensor in members.stacked.items() if key not in members.ties}
        _drop_own_tensors(model, members)
        # vmap wants at least one batched argument, which N equal members don't have.
        self._index = torch.arange(len(members.names), device=members.device)

    def __call__(self, *args: Any) -> Any:
        """Run every member on the same arguments in one vmapped call.

        Args:
            args: What the model's forward takes; tensors (B, ...), shared by all members.

        Returns:
            The model's output structure; each tensor (M, B, ...), member-major.
        """
        in_dims = (0, 0, None, *(None for _ in args))
        with self.rules():
            return vmap(self._member, in_dims=in_dims, randomness="error")(
                self._index, self._own, self.members.shared, *args
            )

    def _member(self, _index: Tensor, own: dict[str, Tensor], shared: dict[str, Tensor], *args: Any) -> Any:
        return functional_call(self.model, self._join_ties({**shared, **own}), args)

    def member_state(self, index: int) -> dict[str, Tensor]:
        """The state dict of one member: views of the stack, nothing is copied."""
        own = {key: tensor[index] for key, tensor in self._own.items()}
        return self._join_ties({**self.members.shared, **own})

    def _join_ties(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**tensors, **{key: tensors[kept] for key, kept in self.members.ties.items()}}

    def bind(self, *args: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the model is called with for this forward's arguments: positional ones, and those with a name."""
        return args, {}

    def argument_names(self, args: Sequence[Any]) -> list[str]:
        """A name for each argument that is a tensor."""
        count = sum(isinstance(arg, Tensor) for arg in args)
        return ["input"] if count == 1 else [f"input_{number}" for number in range(count)]

    def plain_model(self) -> nn.Module:
        """A copy of the architecture as it is where nothing of ours runs it; without weights."""
        return copy.deepcopy(self.model)

    def member(self, index: int, *args: Any) -> Any:
        """Run one member alone, without vmap and without special rules: outputs (B, ...)."""
        return functional_call(self.model, self.member_state(index), *self.bind(*args))

    def part(self, start: int, stop: int) -> EnsembleForward:
        """The vmapped forward of the members from `start` to `stop`, exclusive: views, nothing is copied."""
        part = copy.copy(self)
        stacked = {key: tensor[start:stop] for key, tensor in self._own.items()}
        stacked.update({key: stacked[kept] for key, kept in self.members.ties.items() if kept in stacked})
        part.members = dataclasses.replace(
            self.members,
            names=self.members.names[start:stop],
            stacked=stacked,
            members=self.members.members[start:stop],
        )
        part._own = {key: tensor for key, tensor in stacked.items() if key not in self.members.ties}
        part._index = self._index[start:stop]
        return part

    @property
    def one_vmap(self) -> EnsembleForward | None:
        """This forward; see `Forward`. A subclass with a `member` of its own says None."""
        return self

    @property
    def size_bytes(self) -> int:
        """What the members' tensors take as they are served."""
        return self.members.size_bytes()

    @property
    def has_convolutions(self) -> bool:
        """Whether vmap makes grouped convolutions of some of the model's layers."""
        return any(isinstance(module, nn.modules.conv._ConvNd) for module in self.model.modules())


def as_one_vmap(forward: Forward) -> EnsembleForward:
    """The forward as one of model and members alone, for what needs both.

    Raises:
        LoadError: It is more than that.
    """
    plain = forward.one_vmap
    if plain is None:
        raise LoadError(f"expected one vmapped model, got {type(forward).__name__}, which does more than its model")
    return plain


def _float_dtype_of(members: StackedMembers) -> torch.dtype | None:
    return next((tensor.dtype for tensor in members.tensors() if tensor.is_floating_point()), None)


def _drop_own_tensors(model: nn.Module, members: StackedMembers) -> None:
    """Replace what the members fill by meta tensors (ties kept); what they don't goes to their device and dtype."""
    filled = set(members.stacked) | set(members.shared)
    device, dtype = members.device, _float_dtype_of(members)
    replaced: dict[int, nn.Parameter | Tensor] = {}
    by_id: dict[int, list[str]] = {}
    for name, tensor in _named_tensors(model):
        by_id.setdefault(id(tensor), []).append(name)
    for name, tensor in list(_named_tensors(model)):
        owner_name, _, key = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        is_parameter = isinstance(tensor, nn.Parameter)
        if not filled.intersection(by_id[id(tensor)]):
            if is_parameter or key not in owner._non_persistent_buffers_set:
                raise LoadError(f"no member holds '{name}', which the architecture has; check the checkpoints")
            owner._buffers[key] = tensor.to(device, dtype if tensor.is_floating_point() else None)
            continue
        if id(tensor) not in replaced:
            empty = torch.empty_like(tensor, device="meta")
            replaced[id(tensor)] = nn.Parameter(empty, requires_grad=False) if is_parameter else empty
        (owner._parameters if is_parameter else owner._buffers)[key] = replaced[id(tensor)]  # type: ignore[assignment]


def _named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
