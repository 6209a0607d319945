"""Turns members into narrower ones of one shape: the same channels, attention heads and neurons are cut from all.

What is cut is what matters least to all members together: the mean of their own importances, each the sum of squares
of all weights that would go with a channel. The residual stream of an encoder stays whole, and so do the classes.

Source: Fang et al., DepGraph, https://arxiv.org/abs/2301.12900 (torch-pruning: which layers a channel goes through);
Li et al., Pruning Filters for Efficient ConvNets, https://arxiv.org/abs/1608.08710 (magnitude)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from optimise.distil.start import sample_of
from optimise.distil.students import last_module
from optimise.errors import OptimiseError
from optimise.examples.teacher import Teacher
from vmap_ensemble.errors import EnsembleError, first_line

# Channels that a layer keeps are a multiple of this where it has as many: what vector units of today compute at once.
MULTIPLE = 8


@dataclass(frozen=True)
class Cut:
    """A layer whose outputs are cut, and with them all that goes with these.

    Attributes:
        name: Of the layer.
        unit: Neighbouring outputs that go together: those of an attention head; 1.
    """

    name: str
    unit: int = 1


def cut_members(teacher: Teacher, keep: float) -> list[nn.Module]:
    """The members, each with the same share of its channels, heads and neurons, in float32 on the host.

    Args:
        teacher: The ensemble.
        keep: Share that stays, in each layer.

    Raises:
        OptimiseError: The architecture can't be followed, or has nothing to cut.
    """
    members = [teacher.build_member(index).requires_grad_(True) for index in range(len(teacher.ensemble.names))]
    try:
        graphs = [_follow(teacher, member) for member in members]
        cuts = list(_find_cuts(teacher, members[0], graphs[0]))
        importance = [_joint_importance(graphs, cut) for cut in cuts]
        removed = [least_important(scores, keep, cut.unit) for cut, scores in zip(cuts, importance, strict=True)]
        for cut, channels in zip(cuts, removed, strict=True):
            for graph in graphs if channels else ():
                _group(graph, cut.name, channels).prune()
        with torch.no_grad():
            for member in members:
                teacher.call(member.eval(), sample_of(teacher))
    except EnsembleError:
        raise
    except Exception as error:  # whatever following a network that it doesn't know may raise
        name = type(members[0]).__name__
        raise OptimiseError(f"{name}: its channels can't be followed ({first_line(error)})") from error
    if not any(removed):
        raise OptimiseError(f"{type(members[0]).__name__}: no layer has channels to cut at --keep {keep:g}")
    return members


def least_important(scores: Tensor, keep: float, unit: int = 1) -> list[int]:
    """The outputs to cut: those of the units whose scores are least.

    Args:
        scores: (C,) importance of each output.
        keep: Share of the units that stays; at least one does, a multiple of MULTIPLE where there are as many.
        unit: Neighbouring outputs that go together.
    """
    units = scores.reshape(-1, unit).sum(1)
    count = len(units)
    step = MULTIPLE if unit == 1 and count >= 2 * MULTIPLE else 1
    kept = min(count, max(step, round(keep * count / step) * step))
    gone = units.argsort(stable=True)[: count - kept]
    return sorted((gone[:, None] * unit + torch.arange(unit)).flatten().tolist())


def _follow(teacher: Teacher, member: nn.Module) -> Any:
    with torch.enable_grad():
        return torch_pruning.DependencyGraph().build_dependency(
            member, sample_of(teacher), forward_fn=teacher.call, verbose=False
        )


def _find_cuts(teacher: Teacher, member: nn.Module, graph: Any) -> Iterator[Cut]:
    names = {module: name for name, module in member.named_modules()}
    last = member.get_submodule(last_module(member, sample_of(teacher), teacher.call))
    for group in graph.get_all_groups(ignored_layers=[last], root_module_types=[_ConvNd, nn.Linear]):
        if teacher.reads_texts:
            outputs = [dep.target.module for dep, _ in group if graph.is_out_channel_pruning_fn(dep.handler)]
            unit = _unit_of_encoder(member, outputs)
        else:
            unit = None if any(_is_grouped(dep.target.module) for dep, _ in group) else 1
        if unit is not None:
            yield Cut(names[group[0].dep.target.module], unit)


def _is_grouped(module: nn.Module) -> bool:
    """Whether channels can't go one by one."""
    return isinstance(module, _ConvNd) and 1 < module.groups < module.out_channels


def _unit_of_encoder(member: Any, outputs: Sequence[nn.Module]) -> int | None:
    """Outputs that go together: of a head where query, key and value are among them; None: these stay."""
    from vmap_ensemble.encoders.forward import find_encoder  # here: it imports transformers

    inside = set(find_encoder(member).modules())
    linear = [module for module in outputs if isinstance(module, nn.Linear)]
    others = [module for module in outputs if isinstance(module, nn.LayerNorm | nn.Embedding)]
    if others or not linear or not inside.issuperset(linear):
        return None
    config = member.config
    return int(config.hidden_size // config.num_attention_heads) if len(linear) > 1 else 1


def _joint_importance(graphs: Sequence[Any], cut: Cut) -> Tensor:
    """(C,) mean over the members of what each says of a layer's outputs, each scaled to a mean of 1."""
    score = torch_pruning.importance.GroupMagnitudeImportance(p=2, normalizer="mean")
    return torch.stack([score(_group(graph, cut.name)) for graph in graphs]).mean(0)


def _group(graph: Any, name: str, channels: Sequence[int] | None = None) -> Any:
    """What goes with some of a layer's outputs, or with all."""
    layer = graph.model.get_submodule(name)
    pruner = graph.get_pruner_of_module(layer)
    chosen = range(pruner.get_out_channels(layer)) if channels is None else channels
    return graph.get_pruning_group(layer, pruner.prune_out_channels, list(chosen))
