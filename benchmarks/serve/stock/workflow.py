"""The workflow's functions around its members; TorchServe runs each in a worker of its own."""

import json
from typing import Any


def receive(data: list[dict[str, Any]] | None, context: Any) -> list[bytes] | None:
    """Hand each picture on as it came: a workflow must have exactly one first node."""
    if data is None:  # once, at load
        return None
    return [bytes(row["data"] if "data" in row else row["body"]) for row in data]


def average(data: list[dict[str, Any]] | None, context: Any) -> list[dict[str, float]] | None:
    """Average {class: probability} over the members."""
    if data is None:
        return None
    means = []
    for row in data:
        answers = [json.loads(answer) for answer in row.values()]
        means.append({label: sum(answer[label] for answer in answers) / len(answers) for label in answers[0]})
    return means
