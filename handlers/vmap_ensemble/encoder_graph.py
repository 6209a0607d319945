"""Turns the packed forward of one text into a flat graph of operators, traced once for every length.

What transformers, vmap and the batching rules do in Python around each operator takes a third of the time of a
short text. The graph has the operators alone, with the products that read the same rows joined into one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch._functorch.compile_utils import fx_graph_cse
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from vmap_ensemble.errors import LoadError
from vmap_ensemble.lowering import UnsupportedModel
from vmap_ensemble.packing import SHORT_TEXT

if TYPE_CHECKING:
    from vmap_ensemble.encoder import PackedEncoderForward

_LINEAR = torch.ops.mkldnn._linear_pointwise.default
_STACK = torch.ops.aten.stack.default
_SIZE = torch.ops.aten.sym_size.int
# Relative; the same operators in the same order, but for the joined products.
TOLERANCE = 1e-5


class PreparedEncoder:
    """A packed encoder whose short single texts run on a flat graph; every other batch runs as it did.

    Args:
        forward: The packed forward, float32 on a CPU.
        example: Its arguments; tells whether it is called with token types. Sizes don't matter.

    Raises:
        UnsupportedModel: Its tensors are elsewhere or of another dtype, or the model can't be traced.
        LoadError: The graph's outputs differ from the forward's.

    Note:
        Holds a second reordered copy of the joined matrices (query, key and value).
    """

    def __init__(self, forward: PackedEncoderForward, example: tuple[Any, ...]) -> None:
        tensors = [*forward.members.stacked.values(), *forward.members.shared.values()]
        if any(t.device.type != "cpu" or t.dtype != torch.float32 for t in tensors if t.is_floating_point()):
            raise UnsupportedModel("expected float32 weights on a CPU; use eager or compiled")
        self.forward = forward
        self._with_types = len(example) > 2 and example[2] is not None
        # The graph holds for the side of each of the forward's thresholds that it was traced on.
        self.longest = int(min(SHORT_TEXT, forward.few_rows, forward.longest))
        self._graph, self._structure = self._trace()
        for length in sorted({2, self.longest}):
            self._check(length)

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Any:
        """Run every member on one batch of texts; see `PackedEncoderForward`."""
        if not self._fits(input_ids, attention_mask, token_type_ids):
            return self.forward(input_ids, attention_mask, token_type_ids)
        positions = self.forward.positions(input_ids)
        leaves = self._graph(input_ids, token_type_ids, positions)
        return pytree.tree_unflatten(leaves, self._structure)

    def _fits(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None) -> bool:
        texts, length = input_ids.shape
        with_types = token_type_ids is not None
        # Symbolic tracing takes 0 and 1 for constants, so a text of one token isn't among the graph's.
        fits = texts == 1 and 2 <= length <= self.longest and with_types == self._with_types
        return fits and bool(attention_mask.all())

    def _trace(self) -> tuple[fx.GraphModule, Any]:
        structure: list[Any] = []

        def run(ids: Tensor, types: Tensor | None, positions: Tensor) -> list[Any]:
            leaves, spec = pytree.tree_flatten(self.forward.run_single(ids, types, positions))
            structure.append(spec)
            return leaves

        ids, _, types = self._draw(max(3, self.longest // 2))
        try:
            with torch.inference_mode(False), torch.no_grad():
                traced = make_fx(run, tracing_mode="symbolic", _allow_non_fake_inputs=True)(
                    ids, types, self.forward.positions(ids)
                )
                flatten(traced)
        except Exception as error:
            raise UnsupportedModel(f"one text can't be traced: {type(error).__name__}: {error}") from error
        return traced, structure[0]

    def _draw(self, length: int) -> tuple[Tensor, Tensor, Tensor | None]:
        generator = torch.Generator().manual_seed(length)
        ids = torch.randint(5, self.forward.model.config.vocab_size, (1, length), generator=generator)
        return ids, torch.ones_like(ids), torch.zeros_like(ids) if self._with_types else None

    def _check(self, length: int) -> None:
        inputs = self._draw(length)
        expected, got = (pytree.tree_leaves(run(*inputs)) for run in (self.forward, self))
        for own, ours in zip(expected, got, strict=True):
            if own.shape != ours.shape:
                raise LoadError(f"{length} tokens: expected an output of {list(own.shape)}, got {list(ours.shape)}")
            bound = TOLERANCE * max(1.0, own.abs().max().item())
            if not torch.allclose(own, ours, rtol=0, atol=bound, equal_nan=True):
                raise LoadError(f"{length} tokens: the graph differs from the forward by more than {bound:.0e}")


def flatten(module: fx.GraphModule) -> None:
    """Compute what doesn't depend on the inputs, once; join products of the same rows; in place."""
    _unify_sizes(module.graph)
    module.graph = fx_graph_cse(module.graph)
    _fold_constants(module)
    _join_products(module)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()


def _unify_sizes(graph: fx.Graph) -> None:
    """One node for each symbolic size, read off the first tensor that has it."""
    first: dict[str, fx.Node] = {}
    for node in graph.find_nodes(op="call_function", target=_SIZE):
        size = str(node.meta["val"])
        if size in first:
            node.replace_all_uses_with(first[size])
            graph.erase_node(node)
        else:
            first[size] = node


def _fold_constants(module: fx.GraphModule) -> None:
    """Replace nodes that depend on the members alone by their values."""
    values: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            values[node] = getattr(module, node.target)
        elif _is_pure(node) and all(argument in values for argument in node.all_input_nodes):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    for node, value in values.items():
        needed = node.op != "get_attr" and any(user not in values for user in node.users)
        if needed and isinstance(value, Tensor):
            with module.graph.inserting_before(node):
                node.replace_all_uses_with(_insert_tensor(module, f"folded_{node.name}", value))
    module.graph.eliminate_dead_code()


def _is_pure(node: fx.Node) -> bool:
    # Uninitialised memory isn't a value, and reordered matrices are never what a rule computes on twice.
    return node.op == "call_function" and node.target is not _LINEAR and "empty" not in str(node.target)


def _insert_tensor(module: fx.GraphModule, name: str, value: Tensor) -> fx.Node:
    module.register_buffer(name, value, persistent=False)
    return module.graph.get_attr(name)


def _join_products(module: fx.GraphModule) -> None:
    """Members' stacks of products of the same rows, such as query, key and value -> one stack of wider ones."""
    siblings: dict[tuple[tuple[fx.Node, ...], bool], list[fx.Node]] = {}
    for node in module.graph.find_nodes(op="call_function", target=_STACK):
        products = _products(node)
        if len(node.args) == 1 and all(product.target is _LINEAR for product in products):
            rows = tuple(product.args[0] for product in products)
            siblings.setdefault((rows, products[0].args[2] is not None), []).append(node)
    for (rows, biased), stacks in siblings.items():
        if len(stacks) > 1:
            _join_stacks(module, rows, stacks, biased)


def _products(stack: fx.Node) -> list[Any]:
    stacked: Any = stack.args[0]
    return list(stacked)


def _join_stacks(module: fx.GraphModule, rows: tuple[fx.Node, ...], stacks: list[fx.Node], biased: bool) -> None:
    def tensors(position: int, member: int) -> list[Tensor]:
        return [getattr(module, _products(stack)[member].args[position].target) for stack in stacks]

    graph = module.graph
    with graph.inserting_before(stacks[0]):
        products = []
        for member, row in enumerate(rows):
            plain = [matrix.to_dense() for matrix in tensors(1, member)]
            joined = torch.ops.mkldnn._reorder_linear_weight(torch.cat(plain), 16)
            name = f"joined_{stacks[0].name}_{member}"
            weight = _insert_tensor(module, name, joined)
            bias = _insert_tensor(module, f"{name}_bias", torch.cat(tensors(2, member))) if biased else None
            products.append(graph.call_function(_LINEAR, (row, weight, bias, "none", [], "")))
        together = graph.call_function(_STACK, (products,))
        start = 0
        for stack, width in zip(stacks, [matrix.shape[0] for matrix in plain], strict=True):
            part = graph.call_function(torch.ops.aten.slice.Tensor, (together, 2, start, start + width))
            stack.replace_all_uses_with(part)
            start += width
