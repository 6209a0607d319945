"""Turns a layer and what follows it into one step: the layer swallows a sum, or an activation, that it alone feeds.

The one fuser of lowered networks, traced encoders and packed layers; each says how its graph writes these steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from vmap_ensemble.execution.graph.lowered_model import replace_node
from vmap_ensemble.execution.graph.patterns import only_user


def swallow(
    node: fx.Node, name_of: Callable[[fx.Node], str | None], nodes: list[fx.Node] | None = None
) -> str | None:
    """Let a layer swallow the step that alone takes its value, as an activation: to compute it is the caller's part.

    Args:
        node: The layer; whoever took the step's value takes the layer's afterwards.
        name_of: A node -> the name of the step that it is, of those that the layer can compute, too; else None.
        nodes: If given, the step must be one of them, and leaves them.

    Returns:
        The step's name; None if there is none, and nothing changed.
    """
    user = only_user(node)
    name = None if user is None or (nodes is not None and user not in nodes) else name_of(user)
    if user is None or name is None:
        return None
    replace_node(user, node)
    if nodes is not None:
        nodes.remove(user)
    return name


def fuse_addition(
    node: fx.Node,
    is_sum: Callable[[fx.Node], bool],
    make_call: Callable[[fx.Node], tuple[Callable[..., Any], tuple[Any, ...]] | None],
) -> fx.Node:
    """Let a layer swallow the sum that alone takes its value.

    Args:
        node: The layer.
        is_sum: Whether a node is a sum of its two arguments.
        make_call: What is added -> function and arguments of the layer with the sum, or None if it can't be had.

    Returns:
        The layer with the sum, in the sum's place; the layer as it was if there is none.
    """
    add = only_user(node)
    if add is None or not is_sum(add) or add.kwargs or len(add.args) != 2:
        return node
    other = add.args[1] if add.args[0] is node else add.args[0]
    call = make_call(other) if isinstance(other, fx.Node) and other is not node else None
    if call is None:
        return node
    with node.graph.inserting_before(add):
        new = node.graph.call_function(*call)
    new.meta = dict(add.meta)
    replace_node(add, new)
    node.graph.erase_node(node)
    return new
