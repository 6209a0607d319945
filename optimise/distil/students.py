"""Turns an architecture into a student: one network, or a head per member on one trunk.

Both are called on packed examples, (B, ...), and give (H, B, C), the raw outputs of H networks; both write states of
the archive's own architecture, so that nothing else has to know that there is a trunk: tensors that are the same in
all members are stored once by ./archive.sh and computed once by the vmapped forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.modules.batchnorm import _BatchNorm

from optimise.errors import OptimiseError
from optimise.examples.teacher import with_axis
from vmap_ensemble.tasks.classification import pick_outputs

DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


# How a model is called on packed examples; `Teacher.call` is one.
Call = Callable[[Callable[..., Any], Tensor], Any]


def call_plainly(model: Callable[..., Any], batch: Tensor) -> Any:
    """Of a model whose one argument the examples are."""
    return model(batch)


class Student(nn.Module):
    """What is trained to say what an ensemble says: called on (B, ...), it gives (H, B, C).

    Attributes:
        learns_statistics: Whether batch normalisation follows the batches, as where the weights are drawn anew.
        model: The architecture of one member.
    """

    learns_statistics: bool
    model: nn.Module

    def states(self) -> dict[str, dict[str, Tensor]]:
        """Name of the member -> its state dict."""
        raise NotImplementedError


class OneStudent(Student):
    """A single network.

    Args:
        model: With the weights that it starts from.
        name: Of the only member that it becomes.
        classes: Width of the output, where the model gives several tensors.
        learns_statistics: Whether batch normalisation follows the batches.
        call: How the model is called.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        classes: int | None = None,
        learns_statistics: bool = False,
        call: Call = call_plainly,
    ) -> None:
        super().__init__()
        self.learns_statistics, self.call = learns_statistics, call
        self.model, self.name, self.classes = model.requires_grad_(True), name, classes

    def forward(self, batch: Tensor) -> Tensor:
        """(B, ...) -> (1, B, C)."""
        return pick_outputs(with_axis(self.call(self.model, batch)), self.classes)

    def states(self) -> dict[str, dict[str, Tensor]]:
        """Name of the member -> its state dict."""
        return {self.name: {key: tensor.detach() for key, tensor in self.model.state_dict().items()}}


class HeadsStudent(Student):
    """A trunk and a head for each of M members; vmap runs the heads at once and the trunk a single time.

    Args:
        model: With the weights that trunk and every head start from.
        names: The members that the heads learn from.
        heads: Names of the modules that each member has of its own.
        classes: Width of the output, where the model gives several tensors.
        call: How the model is called.

    Raises:
        OptimiseError: The model has no such module, or nothing is left for the trunk.

    Source: Tran et al., Hydra, https://arxiv.org/abs/2001.04694
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        heads: Sequence[str],
        classes: int | None = None,
        call: Call = call_plainly,
    ) -> None:
        super().__init__()
        self.learns_statistics, self.call = False, call  # a member's weights come with its own statistics
        self.model, self.names, self.classes = model.requires_grad_(True), tuple(names), classes
        self._parameter_keys = _keys_below(heads, dict(model.named_parameters()))
        self._buffer_keys = _keys_below(heads, dict(model.named_buffers()))
        check_heads(model, heads, self._parameter_keys)
        for keys, register in (
            (self._parameter_keys, lambda name, tensor: self.register_parameter(name, nn.Parameter(tensor))),
            (self._buffer_keys, self.register_buffer),
        ):
            for key in keys:
                own = _get(model, key).detach()
                register(_slot(key), own.expand(len(names), *own.shape).clone())
        # The model's own copies are never used; training must not move them.
        for key in self._parameter_keys:
            _get(model, key).requires_grad_(False)

    def forward(self, batch: Tensor) -> Tensor:
        """(B, ...) -> (M, B, C)."""
        own = {key: getattr(self, _slot(key)) for key in (*self._parameter_keys, *self._buffer_keys)}
        # "same": dropout of the trunk drops the same for all heads, so that it is computed once.
        outputs = vmap(self._run, in_dims=(0, None), randomness="same")(own, batch)
        return pick_outputs(outputs, self.classes)

    def _run(self, own: Mapping[str, Tensor], batch: Tensor) -> Any:
        return self.call(lambda *args, **keywords: functional_call(self.model, dict(own), args, keywords), batch)

    def states(self) -> dict[str, dict[str, Tensor]]:
        """Name of the member -> its state dict; what belongs to the trunk is the same tensor in all."""
        trunk = {key: tensor.detach() for key, tensor in self.model.state_dict().items()}
        keys = [key for key in (*self._parameter_keys, *self._buffer_keys) if key in trunk]
        return {
            name: {**trunk, **{key: getattr(self, _slot(key)).detach()[index] for key in keys}}
            for index, name in enumerate(self.names)
        }


def train_mode(student: Student) -> Student:
    """In training mode, but for what would keep a student from saying what its teacher says.

    Dropout is noise. Batch normalisation that came with a member's weights keeps the member's means: those of batches
    half of which are changed aren't those of the examples that are served.
    """
    student.train()
    for module in student.modules():
        keeps = isinstance(module, _BatchNorm) and not student.learns_statistics
        if isinstance(module, DROPOUT) or keeps:
            module.eval()
    return student


def last_module(model: nn.Module, batch: Tensor, call: Call = call_plainly) -> str:
    """The module with parameters of its own that a forward runs last: the classifier's layer.

    Raises:
        OptimiseError: None has any.
    """
    ran: list[str] = []
    hooks = [
        module.register_forward_hook(lambda *_args, name=name: ran.append(name))
        for name, module in model.named_modules()
        if name and next(module.parameters(recurse=False), None) is not None
    ]
    with torch.no_grad():
        call(model, batch)
    for hook in hooks:
        hook.remove()
    if not ran:
        raise OptimiseError(f"{type(model).__name__}: no layer of it has parameters; name the heads with --head")
    return ran[-1]


def check_heads(model: nn.Module, heads: Sequence[str], keys: Sequence[str]) -> None:
    """Refuse heads that aren't modules of the model, and those that leave nothing to share.

    Raises:
        OptimiseError: Names the module, and those that there are.
    """
    known = [name for name, module in model.named_modules() if name and next(module.parameters(), None) is not None]
    for name in heads:
        if name not in known:
            raise OptimiseError(
                f"--head: {type(model).__name__} has no module '{name}'; it has {', '.join(known[-12:])}"
            )
    if not keys or len(keys) == len(dict(model.named_parameters())):
        raise OptimiseError(f"--head: {', '.join(heads)}: expected a part of the parameters, got {len(keys)} tensors")


def _keys_below(modules: Sequence[str], tensors: Mapping[str, Tensor]) -> list[str]:
    return [key for key in tensors if any(key.startswith(f"{name}.") for name in modules)]


def _get(model: nn.Module, key: str) -> Tensor:
    owner, _, name = key.rpartition(".")
    return getattr(model.get_submodule(owner), name)


def _slot(key: str) -> str:
    """A parameter's name has no dot."""
    return "head/" + key.replace(".", "/")
