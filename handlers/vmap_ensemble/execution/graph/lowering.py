"""Turns one member's module into a graph of fused steps whose weights are slots, filled member by member.

    conv -> batch norm -> relu            becomes  convolve(x, w, b, ..., "relu")       with folded w, b
    conv -> batch norm -> + other -> relu becomes  convolve_add(x, other, w, b, ..., "relu")

Folding is done when a weight is asked for, for one member or for all, and is exact in eval mode up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.func import functional_call

from vmap_ensemble.execution.graph.fusing import fuse_addition, swallow
from vmap_ensemble.execution.graph.lowered_model import (
    Folded,
    LoweredModel,
    UnsupportedModel,
    drop_unused_slots,
    mark_batched,
    replace_node,
    slot_name,
)
from vmap_ensemble.execution.graph.patterns import activation_name, is_addition, only_user
from vmap_ensemble.execution.graph.steps import convolve, convolve_add

if TYPE_CHECKING:
    from vmap_ensemble.core.members import StackedMembers

_IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


def lower_model(model: nn.Module, members: StackedMembers) -> LoweredModel:
    """Trace one member and fuse its convolutions with what follows them.

    Args:
        model: The architecture in eval mode; its own tensors may be on the meta device, they aren't read.
        members: M stacked members; batch norm is folded into copies, theirs stay as they are.

    Returns:
        The graph, with folded weights as slots. Unfused layers keep views of the members' tensors.

    Raises:
        UnsupportedModel: The model can't be traced with torch.fx (control flow on values), or it trains.
    """
    if any(module.training for module in model.modules()):
        raise UnsupportedModel("expected a model in eval mode, got training mode; call .eval()")
    try:
        graph = fx.Tracer().trace(model)
    except Exception as error:
        raise UnsupportedModel(f"torch.fx can't trace {type(model).__name__}: {error}") from error
    lowered = LoweredModel(graph, model)
    _Lowering(lowered, {**members.shared, **members.stacked}, set(members.stacked)).run()
    return lowered


class _Lowering:
    """One pass over a traced graph: layers with weights become functions of slots, then fuse."""

    def __init__(self, lowered: LoweredModel, tensors: dict[str, Tensor], stacked: set[str]) -> None:
        self.lowered, self.graph, self.root = lowered, lowered.graph, lowered.root
        self.tensors, self.stacked_keys = tensors, stacked
        self.by_id: dict[int, fx.Node] = {}

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if node.op == "get_attr" and node.target in self.tensors:
                replace_node(node, self._slot(node.target))
            elif node.op == "call_module":
                self._lower_module(node)
            elif node.target is F.dropout and not _argument(node, 2, "training", True):
                replace_node(node, node.args[0])
            elif node.op == "call_method" and node.target == "view" and not isinstance(node.args[1], torch.dtype):
                node.target = "reshape"  # channels_last values can't be viewed the way contiguous ones can
        mark_batched(self.lowered)
        for node in list(self.graph.nodes):
            if node.target is convolve:
                self._fuse(node)
        drop_unused_slots(self.lowered)
        mark_batched(self.lowered)
        self.graph.lint()

    def _lower_module(self, node: fx.Node) -> None:
        module = self.root.get_submodule(str(node.target))
        keys = [name for name, _ in [*module.named_parameters(), *module.named_buffers()]]
        if isinstance(module, _IDENTITIES):
            replace_node(node, node.args[0])
        elif isinstance(module, nn.Conv2d) and module.padding_mode == "zeros":
            self._lower_convolution(node, module)
        elif isinstance(module, nn.Linear):
            self._lower_linear(node, module)
        elif any(f"{node.target}.{key}" in self.tensors for key in keys):
            self._lower_generic(node, module, keys)

    def _lower_convolution(self, node: fx.Node, module: nn.Conv2d) -> None:
        padding: Any = module.padding
        if isinstance(padding, str):
            total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
            if padding == "same" and any(t % 2 for t in total):
                return self._lower_generic(node, module, ["weight"] + ["bias"] * (module.bias is not None))
            padding = [t // 2 for t in total] if padding == "same" else [0, 0]
        settings = [list(padding), list(module.stride), list(module.dilation), module.groups]
        self._call(node, convolve, (*self._weights(node, module), settings, "none"))

    def _lower_linear(self, node: fx.Node, module: nn.Linear) -> None:
        self._call(node, F.linear, self._weights(node, module))

    def _lower_generic(self, node: fx.Node, module: nn.Module, keys: list[str]) -> None:
        """Any other layer with weights: call it with them, whatever it is."""
        held = [key for key in keys if f"{node.target}.{key}" in self.tensors]
        slots = {key: self._slot(f"{node.target}.{key}") for key in held}
        with self.graph.inserting_before(node):
            call = _ModuleCall(module)
            new = self.graph.call_function(call, (slots, *node.args), dict(node.kwargs))
        replace_node(node, new)

    def _weights(self, node: fx.Node, module: Any) -> tuple[Any, ...]:
        bias = None if module.bias is None else self._slot(f"{node.target}.bias")
        return node.args[0], self._slot(f"{node.target}.weight"), bias

    def _call(self, node: fx.Node, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        with self.graph.inserting_before(node):
            replace_node(node, self.graph.call_function(function, args))

    def _slot(self, key: str) -> fx.Node:
        """The placeholder for a member's tensor; tied tensors share one."""
        if key not in self.tensors:
            raise UnsupportedModel(f"no member holds '{key}', which the model's {key.rpartition('.')[0]} uses")
        tensor = self.tensors[key]
        if id(tensor) not in self.by_id:
            self.by_id[id(tensor)] = self.lowered.add_slot(slot_name(key), tensor, key in self.stacked_keys)
        return self.by_id[id(tensor)]

    def _fuse(self, node: fx.Node) -> None:
        """Swallow, in this order, a batch norm, an addition, and an activation that only this node feeds."""
        node = self._fold_batch_norm(node)
        node = self._fuse_addition(node)
        name = swallow(node, lambda user: activation_name(user, self.root))
        if name is not None:
            node.args = (*node.args[:-1], name)

    def _fold_batch_norm(self, node: fx.Node) -> fx.Node:
        norm = only_user(node)
        module = norm.target.module if norm is not None and isinstance(norm.target, _ModuleCall) else None
        if norm is None or not isinstance(module, nn.BatchNorm2d) or module.running_mean is None:
            return node
        weights: Any = norm.args[0]
        slots: dict[str, fx.Node] = {k: slot for k, slot in weights.items() if k != "num_batches_tracked"}
        own_norm = any(slot.name in self.lowered.stacked for slot in slots.values())
        if own_norm and node not in self.lowered.batched:
            return node  # a shared convolution stays ONE convolution: folding would make it M of them
        weight, bias = self._folded(node, slots, module.eps)
        node.update_arg(1, weight)
        node.update_arg(2, bias)
        replace_node(norm, node)
        return node

    def _folded(self, node: fx.Node, slots: dict[str, fx.Node], eps: float) -> tuple[fx.Node, fx.Node]:
        """Slots for w * s and (b - mean) * s + beta, with s = gamma / sqrt(var + eps), stacked if any part is."""
        weight_node, bias_node = node.args[1], node.args[2]
        parts = [n for n in (weight_node, bias_node, *slots.values()) if isinstance(n, fx.Node)]
        stacked = any(part.name in self.lowered.stacked for part in parts)

        def value(slot: Any, default: float) -> Tensor:
            if slot is None:
                return torch.tensor(default)
            tensor = self.lowered.value(slot.name)
            return tensor.unsqueeze(0) if stacked and slot.name not in self.lowered.stacked else tensor

        scale = value(slots.get("weight"), 1.0) * torch.rsqrt(value(slots["running_var"], 0.0).double() + eps)
        weight = value(weight_node, 0.0)
        # In float32 at least: half precision would round the scale and then the product.
        product = torch.promote_types(weight.dtype, torch.float32)
        bias = (value(bias_node, 0.0) - value(slots["running_mean"], 0.0)) * scale + value(slots.get("bias"), 0.0)
        bias = bias.to(weight.dtype)
        if stacked:  # a part that all members share is repeated: the other part differs
            count = max(len(weight), len(scale), len(bias))
            scale, bias = scale.expand(count, *scale.shape[1:]), bias.expand(count, *bias.shape[1:])
        key = str(weight_node).removeprefix("slot_")
        folded = Folded(weight, scale[..., None, None, None].to(product))
        return (
            self.lowered.add_slot(slot_name(f"{key}_folded"), folded, stacked),
            self.lowered.add_slot(slot_name(f"{key}_folded_bias"), bias, stacked),
        )

    def _fuse_addition(self, node: fx.Node) -> fx.Node:
        x, *rest = node.args
        new = fuse_addition(node, is_addition, lambda other: (convolve_add, (x, other, *rest)))
        if any(parent in self.lowered.batched for parent in new.all_input_nodes):
            self.lowered.batched.add(new)
        return new


class _ModuleCall:
    """A layer as a function of its weights: call(weights, *args)."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.__name__ = self.__qualname__ = f"call_{type(module).__name__}"
        self.__module__ = __name__

    def __call__(self, weights: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.module, dict(weights), args, kwargs)


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
