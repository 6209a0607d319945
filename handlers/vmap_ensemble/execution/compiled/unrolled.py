"""Turns stacked members into one module for a compiler on a CPU, in which no convolution becomes a grouped one.

    what members share, once -> every member's own steps, one after another -> stack -> heads, as batched products

It is the vmapped forward with another rule for what a member computes on its own: under vmap a convolution becomes
a grouped one, which no compiler makes fast on a CPU; here M plain steps on M constant weights, which Inductor's
freezing packs for oneDNN and fuses with what follows them.
"""

from __future__ import annotations

import copy
import logging
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import vmap
from torch.utils import _pytree as pytree

from vmap_ensemble.core.forward import EnsembleForward
from vmap_ensemble.execution.graph.lowered_model import LoweredModel, Program, UnsupportedModel
from vmap_ensemble.execution.graph.lowering import lower_model
from vmap_ensemble.execution.graph.partition import partition
from vmap_ensemble.execution.graph.patterns import count_convolutions

logger = logging.getLogger(__name__)


def unroll(forward: EnsembleForward) -> nn.Module:
    """The members' forward for a compiler: arguments (B, ...) -> outputs (M, B, ...).

    Args:
        forward: Gives the architecture and the members; the module keeps views of their tensors, and folded copies
            of those that batch norm is folded into.
    """
    try:
        return UnrolledGraph(lower_model(forward.model, forward.members), len(forward.members.names)).eval()
    except UnsupportedModel as error:
        logger.info("members are compiled whole, what they share as often as there are members: %s", error)
        return UnrolledModules(forward).eval()


class UnrolledModules(nn.Module):
    """All members one after another, each as the module that it is: the plain loop, and what a compiler is given of
    architectures that torch.fx can't trace.

    Args:
        forward: Gives the architecture and the members' weights, which are not copied.
    """

    def __init__(self, forward: EnsembleForward) -> None:
        super().__init__()
        self.members = nn.ModuleList()
        for index in range(len(forward.members.names)):
            member = copy.deepcopy(forward.model)
            member.load_state_dict(forward.member_state(index), assign=True, strict=False)
            self.members.append(member.eval().requires_grad_(False))

    def forward(self, *args: Tensor) -> Any:
        """Run every member on the same batch."""
        outputs = [member(*args) for member in self.members]
        return pytree.tree_map(lambda *leaves: torch.stack(leaves), *outputs)


class UnrolledGraph(nn.Module):
    """A lowered graph whose weights are constants: what members share once, the rest once for each member.

    Where members share every convolution, the rest runs under vmap's stock rules: batched products.

    Args:
        lowered: The graph of one member, with folded batch norm.
        count: M.

    Raises:
        UnsupportedModel: It has no 2-d convolution.
    """

    def __init__(self, lowered: LoweredModel, count: int) -> None:
        super().__init__()
        nodes = lowered.nodes()
        if not count_convolutions(nodes):
            raise UnsupportedModel(f"{type(lowered.root).__name__} has no 2-d convolution")
        parts = partition(lowered, nodes)
        own_nodes = [node for node in nodes if node in lowered.batched]
        self._one_by_one = parts.own is None or count_convolutions(own_nodes) > 0
        self._arguments = [node.name for node in lowered.arguments()]
        self._trunk = _Part(lowered, parts.trunk, parts.trunk_outputs)
        self._own = None if parts.own is None else _Part(lowered, parts.own, parts.own_outputs)
        self._nest = _Part(lowered, parts.tail, ())
        self._trunk_slots = self._keep("shared", {name: lowered.value(name) for name in parts.trunk.slots})
        names = dict.fromkeys([*(parts.own.slots if parts.own else ()), *parts.tail.slots])
        self._slots = list(names)
        slots = {name: lowered.value(name) for name in names}
        self._dims = tuple(0 if name in lowered.stacked else None for name in names)
        self._stacks, self._member_slots = [], []
        if self._one_by_one:
            for index in range(count):
                rows = {name: tensor[index] if name in lowered.stacked else tensor for name, tensor in slots.items()}
                self._member_slots.append(self._keep(f"member{index}", rows))
        else:
            self._stacks = self._keep("stack", slots)

    def _keep(self, prefix: str, tensors: dict[str, Tensor]) -> list[str]:
        """Make buffers of them, which a compiler takes for constants; their names."""
        for name, tensor in tensors.items():
            self.register_buffer(f"{prefix}_{name}", tensor, persistent=False)
        return [f"{prefix}_{name}" for name in tensors]

    def _kept(self, names: list[str]) -> list[Tensor]:
        return [getattr(self, name) for name in names]

    def forward(self, *args: Tensor) -> Any:
        """Run every member on the same arguments: (B, ...) -> (M, B, ...)."""
        values: dict[str, Any] = dict(zip(self._arguments, args, strict=False))
        trunk_slots = zip(self._trunk.slots, self._kept(self._trunk_slots), strict=True)
        values = self._trunk.add_to(values, dict(trunk_slots))
        if not self._one_by_one:
            return vmap(partial(self._member, values), in_dims=self._dims)(*self._kept(self._stacks))
        outputs = [self._member(values, *self._kept(names)) for names in self._member_slots]
        return pytree.tree_map(lambda *leaves: torch.stack(leaves), *outputs)

    def _member(self, values: dict[str, Any], *tensors: Tensor) -> Any:
        """One member's output from what all share: (B, ...)."""
        slots = dict(zip(self._slots, tensors, strict=True))
        if self._own is not None:
            values = self._own.add_to(values, slots)
        return self._nest.run(values, slots)


class _Part(nn.Module):
    """A part of the graph on values by name, as a compiler can look through it."""

    def __init__(self, lowered: LoweredModel, program: Program, outputs: tuple[fx.Node, ...]) -> None:
        super().__init__()
        self.inputs, self.slots = [node.name for node in program.inputs], program.slots
        self.outputs = [node.name for node in outputs]
        self.module = fx.GraphModule(lowered.root, program.graph)

    def run(self, values: dict[str, Any], slots: dict[str, Tensor]) -> Any:
        return self.module(*(values[name] for name in self.inputs), *(slots[name] for name in self.slots))

    def add_to(self, values: dict[str, Any], slots: dict[str, Tensor]) -> dict[str, Any]:
        return {**values, **dict(zip(self.outputs, self.run(values, slots), strict=True))}
