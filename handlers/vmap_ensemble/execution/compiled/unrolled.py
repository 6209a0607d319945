"""Turns stacked members into one module for a compiler on a CPU, in which no convolution becomes a grouped one.

    what members share, once -> every member's own steps, one after another -> stack -> heads, as batched products

It is the vmapped forward with another rule for what a member computes on its own: under vmap a convolution becomes
a grouped one, which no compiler makes fast on a CPU; here M plain steps on M constant weights, which Inductor's
freezing packs for oneDNN and fuses with what follows them.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import vmap
from torch.utils import _pytree as pytree

from vmap_ensemble.core.forward import EnsembleForward
from vmap_ensemble.execution.graph.lowered_model import LoweredModel, UnsupportedModel, extract_program
from vmap_ensemble.execution.graph.lowering import lower_model
from vmap_ensemble.execution.graph.steps import CONVOLUTIONS

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
        if not any(node.target in CONVOLUTIONS for node in nodes):
            raise UnsupportedModel(f"{type(lowered.root).__name__} has no 2-d convolution")
        own = [node for node in nodes if node in lowered.batched]
        shared = [node for node in nodes if node not in lowered.batched]
        self._one_by_one = not own or any(node.target in CONVOLUTIONS for node in own)
        (output,) = (node for node in lowered.graph.nodes if node.op == "output")
        member = extract_program(lowered, own, output.args[0])
        trunk = extract_program(lowered, shared, tuple(node for node in member.inputs if node in set(shared)))
        self._arguments = [node.name for node in lowered.arguments()]
        self._trunk_inputs = [node.name for node in trunk.inputs]
        self._trunk_outputs = [node.name for node in member.inputs if node in set(shared)]
        self._member_inputs = [node.name for node in member.inputs]
        self._trunk_slots = self._keep("shared", {name: lowered.value(name) for name in trunk.slots})
        slots = {name: lowered.value(name) for name in member.slots}
        self._dims = tuple(0 if name in lowered.stacked else None for name in slots)
        self._stacks, self._member_slots = [], []
        if self._one_by_one:
            for index in range(count):
                rows = {name: tensor[index] if name in lowered.stacked else tensor for name, tensor in slots.items()}
                self._member_slots.append(self._keep(f"member{index}", rows))
        else:
            self._stacks = self._keep("stack", slots)
        self._run_trunk = fx.GraphModule(lowered.root, trunk.graph)
        self._run_member = fx.GraphModule(lowered.root, member.graph)

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
        trunk = self._run_trunk(*[values[name] for name in self._trunk_inputs], *self._kept(self._trunk_slots))
        values.update(zip(self._trunk_outputs, trunk, strict=True))
        inputs = [values[name] for name in self._member_inputs]
        if not self._one_by_one:
            in_dims = (*(None for _ in inputs), *self._dims)
            return vmap(self._run_member, in_dims=in_dims)(*inputs, *self._kept(self._stacks))
        outputs = [self._run_member(*inputs, *self._kept(names)) for names in self._member_slots]
        return pytree.tree_map(lambda *leaves: torch.stack(leaves), *outputs)
