"""Turns one member of a packed encoder into a flat graph of fused steps whose weights are slots.

    query, key, value = linear(x) three times, attend within each text     becomes  linear(x), attend_joined
    linear -> gelu or relu                                                  becomes  one linear
    linear -> + residual                                                    becomes  one linear

Traced once with symbolic numbers of texts and tokens, so that the graph serves every batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._functorch.compile_utils import fx_graph_cse
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from vmap_ensemble.core.members import StackedMembers
from vmap_ensemble.encoders.attention import attend_joined
from vmap_ensemble.encoders.packing import Group, Packing
from vmap_ensemble.execution.graph.fusing import fuse_addition, swallow
from vmap_ensemble.execution.graph.lowered_model import (
    LoweredModel,
    UnsupportedModel,
    drop_unused_slots,
    mark_batched,
    replace_node,
    slot_name,
)
from vmap_ensemble.execution.graph.steps import linear, linear_add

ATTEND = torch.ops.vmap_ensemble.attend_packed.default
_aten = torch.ops.aten
_SIZE = _aten.sym_size.int
# Ways in which a model turns rows (1, T, H) into heads (1, heads, T, D); none of them moves a number.
_VIEWS = (_aten.view.default, _aten._unsafe_view.default, _aten.transpose.int, _aten.permute.default)


# Registered at import: a name is defined once in a process. Tracing goes through every function of Python and stops
# at operators, so a linear layer has to be one to stay whole; no graph that runs holds it.
@torch.library.custom_op("vmap_ensemble::whole_linear", mutates_args=())
def _whole_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


@_whole_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_LINEAR = torch.ops.vmap_ensemble.whole_linear.default


class _Layers(TorchFunctionMode):
    """Keeps F.linear whole, and leaves dropout out."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return _linear(*args, **(kwargs or {}))
        if func is F.dropout:
            return args[0]  # in eval mode, which `EnsembleForward` saw to; its operator would copy the rows
        return func(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _LINEAR(input, weight, bias)


class PackedForward(Protocol):
    """What is asked of the forward of an encoder without padding, of which a flat graph is made."""

    @property
    def members(self) -> StackedMembers:
        """The stacked members."""

    @property
    def model(self) -> nn.Module:
        """The architecture, a Hugging Face one."""

    @property
    def longest(self) -> int:
        """The longest text in tokens."""

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Any:
        """Run every member on one batch of texts, (B, S) each: outputs (M, B, ...)."""

    def loop(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Any:
        """Run the members one after another, plainly: outputs (M, B, ...)."""

    def comparable(self, outputs: Any, args: tuple[Any, ...], batch_axis: int) -> Any:
        """The part of an output that must be equal however it was made."""

    def member_state(self, index: int) -> dict[str, Tensor]:
        """The state dict of one member."""

    def packed_weights(self, weight: Tensor) -> list[Tensor]:
        """Reordered matrices of (M, out, in) or (out, in) weights."""

    def pack_rows(
        self, packing: Packing, input_ids: Tensor, token_type_ids: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Ids, token types and position ids of the real tokens: (B, S) each -> (1, T)."""

    def run_state(
        self, state: dict[str, Tensor], packing: Packing, ids: Tensor, types: Tensor | None, places: Tensor
    ) -> Any:
        """Run a member's state dict on what `pack_rows` gives."""

    def unpack_outputs(self, outputs: Any, packing: Packing) -> Any:
        """Outputs of a packed row as those of a batch."""


def trace_encoder(forward: PackedForward, with_types: bool) -> tuple[LoweredModel, Any]:
    """Trace one member and fuse its steps.

    Args:
        forward: The packed forward.
        with_types: Whether the graph takes token types.

    Returns:
        The graph, whose arguments `graph_arguments` makes, and the structure of its outputs, which it returns as a
        list.

    Raises:
        UnsupportedModel: The model can't be traced.
    """
    state = forward.member_state(0)
    structure: list[Any] = []

    def run(ids: Tensor, *others: Tensor) -> list[Any]:
        *types, places, index, first, mask, table = others
        packing = Packing((mask.shape[0], mask.shape[1]), index, first, (), table)
        outputs = forward.run_state(state, packing, ids, types[0] if types else None, places)
        leaves, spec = pytree.tree_flatten(outputs)
        structure.append(spec)
        return leaves

    # Three texts of 7 tokens: no size is another's, and none is 0 or 1, which tracing takes for constants.
    with forward.members.device:
        packing = Packing((3, 5), torch.arange(7), torch.tensor([0, 1, 3]), (Group(0, 1, 1), Group(1, 3, 2)))
        ids = torch.full((1, 7), 5)
        rows = (ids, torch.zeros_like(ids) if with_types else None, torch.arange(7).unsqueeze(0))
        arguments = graph_arguments(packing, torch.ones(3, 5, dtype=torch.long), rows)
    try:
        with torch.inference_mode(False), torch.no_grad(), _Layers():
            traced = make_fx(run, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*arguments)
        lowered = _open_slots(traced, forward, {id(tensor): key for key, tensor in state.items()})
        _simplify(lowered)
    except Exception as error:
        raise UnsupportedModel(f"the encoder can't be traced: {type(error).__name__}: {error}") from error
    return lowered, structure[0]


def graph_arguments(packing: Packing, mask: Tensor, rows: tuple[Tensor | None, ...]) -> list[Tensor]:
    """The arguments of a traced graph.

    Args:
        packing: Of the batch.
        mask: (B, S), of which only the size counts.
        rows: What `PackedForward.pack_rows` gives.
    """
    table = torch.tensor([(group.start, group.count, group.length) for group in packing.groups])
    return [*(row for row in rows if row is not None), packing.index, packing.first, mask, table]


def _open_slots(traced: fx.GraphModule, forward: PackedForward, keys: dict[int, str]) -> LoweredModel:
    """Replace the first member's tensors by slots, one each, and keep what isn't a member's."""
    _unify_sizes(traced.graph)
    lowered = LoweredModel(fx_graph_cse(traced.graph), traced)
    tensors = {**forward.members.shared, **forward.members.stacked}
    nodes: dict[str, fx.Node] = {}
    for node in list(lowered.graph.find_nodes(op="get_attr")):
        key = keys.get(id(getattr(traced, node.target)))
        if key is None:
            continue
        if key not in nodes:
            nodes[key] = lowered.add_slot(slot_name(key), tensors[key], key in forward.members.stacked)
            nodes[key].meta = dict(node.meta)
        replace_node(node, nodes[key])
    mark_batched(lowered)
    return lowered


def _unify_sizes(graph: fx.Graph) -> None:
    """One node for each symbolic size, read off the first tensor that has it."""
    first: dict[str, fx.Node] = {}
    for node in graph.find_nodes(op="call_function", target=_SIZE):
        size = str(node.meta["val"])
        if size in first:
            replace_node(node, first[size])
        else:
            first[size] = node


def _simplify(lowered: LoweredModel) -> None:
    graph = lowered.graph
    for node in graph.find_nodes(op="call_function", target=_aten.native_layer_norm.default):
        _shorten_layer_norm(node)
    for node in graph.find_nodes(op="call_function", target=_LINEAR):
        node.target, node.args, node.kwargs = linear, (*node.args, swallow(node, _activation_name) or "none"), {}
    for node in graph.find_nodes(op="call_function", target=linear):
        _fuse_addition(node)
    for node in graph.find_nodes(op="call_function", target=ATTEND):
        _join_attention(node)
    graph.eliminate_dead_code()
    drop_unused_slots(lowered)
    mark_batched(lowered)
    graph.lint()


def _shorten_layer_norm(node: fx.Node) -> None:
    """The mean and deviation that the operator gives beside its result are for gradients."""
    x, shape, weight, bias, eps = node.args
    with node.graph.inserting_before(node):
        new = node.graph.call_function(torch.layer_norm, (x, shape, weight, bias, eps))
    for user in list(node.users):
        if user.args[1] == 0:
            new.meta = dict(user.meta)
            replace_node(user, new)


def _activation_name(node: fx.Node) -> str | None:
    """Which of `LINEAR_ACTIVATIONS` a node is."""
    if node.target is _aten.gelu.default:
        return "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"
    return "relu" if node.target is _aten.relu.default else None


def _fuse_addition(node: fx.Node) -> None:
    x, weight, bias, activation = node.args

    def with_residual(other: fx.Node) -> Any:
        fits = other.meta["val"].shape == node.meta["val"].shape
        return (linear_add, (x, other, weight, bias)) if fits else None

    if activation == "none":
        fuse_addition(node, lambda user: user.target is _aten.add.Tensor, with_residual)


def _join_attention(node: fx.Node) -> None:
    """Attention on three products of the same rows -> on one product with the three matrices joined."""
    query, key, value, groups, scale = cast(Any, node.args)
    products: list[Any] = [_product_behind(part) for part in (query, key, value)]
    if any(product is None for product in products):
        return
    rows = {product.args[0] for product in products}
    biased = {product.args[2] is not None for product in products}
    flat = [user for user in node.users if user.target in _VIEWS and user.meta["val"].dim() == 3]
    if len(rows) > 1 or len(biased) > 1 or len(flat) < len(node.users):
        return
    heads = query.meta["val"].shape[1]
    with node.graph.inserting_before(node):
        weights = tuple(product.args[1] for product in products)
        biases = tuple(product.args[2] for product in products) if biased == {True} else None
        joined = node.graph.call_function(linear_joined, (*rows, weights, biases))
        new = node.graph.call_function(attend_joined, (joined, groups, heads, scale))
    joined.meta, new.meta = dict(products[0].meta), dict(flat[0].meta)
    for user in flat:
        replace_node(user, new)


def linear_joined(x: Tensor, weights: tuple[Tensor, ...], biases: tuple[Tensor, ...] | None) -> Tensor:
    """Products of the same rows, side by side; packing puts one product in its place."""
    return F.linear(x, torch.cat(weights), None if biases is None else torch.cat(biases))


def _product_behind(node: fx.Node) -> Any:
    """The plain linear layer whose rows these heads are; None if anything else is in between."""
    for step in _climb(node):
        if step.target is linear:
            return step if step.args[3] == "none" else None
        if step.target not in _VIEWS:
            return None
    return None


def _climb(node: fx.Node) -> Iterator[fx.Node]:
    while isinstance(node, fx.Node):
        yield node
        node = node.args[0]  # type: ignore[assignment]
