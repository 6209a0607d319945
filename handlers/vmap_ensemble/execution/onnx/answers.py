"""Turns the members' graph into one that answers: probabilities and uncertainty beside the members' own outputs."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from vmap_ensemble.core.aggregate import TIE, Method, OutputKind, combine, disagreement
from vmap_ensemble.execution.onnx.graph import MembersGraph, export_module

# Outputs of `AnsweredClasses`, in order; entropies in nats.
ANSWERS = (
    *("probabilities", "predictive_entropy", "expected_entropy", "mutual_information", "agreement"),
    "member_probabilities",
)


class AnsweredClasses(nn.Module):
    """Outputs of all members (M, B, C) -> what the ensemble makes of them: `ANSWERS`, each (B, ...) or (M, B, C).

    Args:
        weights: (M, 1) of the members.
        method: As of `combine_classes`, like what follows.
        temperature: Of the softmax.
        kind: What the outputs are.
    """

    def __init__(self, weights: Tensor, method: Method, temperature: float, kind: OutputKind) -> None:
        super().__init__()
        self.how: tuple[Method, float, OutputKind] = (method, temperature, kind)
        self.weights: Tensor
        self.register_buffer("weights", weights)

    def forward(self, outputs: Tensor) -> tuple[Tensor, ...]:
        """Combine a batch."""
        found = combine(outputs, self.weights.expand(-1, outputs.shape[1]), *self.how)
        best = found.probabilities.max(-1, keepdim=True).values
        # Equal votes are decided by the mean probability.
        tie = TIE if self.how[0] == "majority_vote" else 0.0
        winner = torch.where(found.probabilities >= best - tie, found.mixture, -1.0).argmax(-1)
        return (found.probabilities, *disagreement(found, winner), found.member_probabilities)


def add_answers(graph: MembersGraph, output: str, example: Tensor, answers: AnsweredClasses) -> MembersGraph:
    """Put the answers' nodes behind one output of the members' graph.

    Args:
        graph: Of the members; it becomes part of the new one.
        output: The name of what is combined.
        example: (M, B, C) of it, with at least two rows.
        answers: Combines it.

    Raises:
        LoadError: The aggregation can't be exported.
    """
    batch = torch.export.Dim("batch")
    behind = export_module(answers, [example], ["combined"], ({1: batch},))
    (source,) = [value for value in graph.model.graph.outputs if value.name == output]
    (taken,) = behind.graph.inputs
    taken.replace_all_uses_with(source)
    whole, own = graph.model.graph, behind.graph
    outputs = list(own.outputs)
    own.outputs.clear()
    for value in list(own.initializers.values()):
        own.initializers.pop(str(value.name))
        value.name = f"answers.{value.name}"
        whole.register_initializer(value)
    for node in list(own):
        own.remove(node)
        node.name = f"answers.{node.name}"
        for value in node.outputs:
            value.name = f"answers.{value.name}"
        whole.append(node)
    for name, value in zip(ANSWERS, outputs, strict=True):
        value.name = name
        whole.outputs.append(value)
    return replace(graph, outputs=(*graph.outputs, *ANSWERS))
