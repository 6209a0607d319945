"""Turns an ensemble into what can be said of it: members, how it is run and why, what was proved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vmap_ensemble.tasks.answers import dump_json


@dataclass(frozen=True)
class Description:
    """What an ensemble is, as a mapping that JSON knows; printed, it is a page for people.

    Attributes:
        summary: Architecture, size, dtype, device, execution with candidates, proof, seconds of each phase.
        members: One row per member: name, file, SHA-256, source.
        settings: The settings that aren't empty.
        labels: In the order of the classes.
    """

    summary: dict[str, Any]
    members: list[dict[str, Any]]
    settings: dict[str, Any]
    labels: list[str]

    def to_dict(self) -> dict[str, Any]:
        """One flat object: the answer to a description request."""
        return {**self.summary, "members": self.members, "settings": self.settings, "labels": self.labels}

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return dump_json(self.to_dict())

    def __str__(self) -> str:
        own = self.summary
        execution, proof = own["execution"], own["equivalence"]
        lines = [
            f"{own['ensemble']}: {own['size']} members of {own['architecture'] or 'a model in memory'}, "
            f"{own['dtype']} on {own['device']}",
            f"  run      {execution['serves']}: {execution['reason']}",
            *(f"           {_show(candidate)}" for candidate in execution["candidates"]),
        ]
        if proof:
            lines.append(
                f"  proof    differs from the members' own forwards by {proof['largest_difference']:.1e} at most, "
                f"{proof['tolerance']:.0e} allowed"
            )
        lines += [f"  member   {row['name']}{_show_origin(row)}" for row in self.members]
        return "\n".join(lines)


def _show(candidate: dict[str, Any]) -> str:
    if candidate.get("refused"):
        return f"{candidate['name']}: refused, {candidate['refused']}"
    latencies = ", ".join(f"{value:.2f} ms" for value in candidate.get("latency_ms") or [])
    return f"{candidate['name']}: {latencies or 'not measured'}"


def _show_origin(row: dict[str, Any]) -> str:
    return f"  {row['source']}  sha256 {row['sha256'][:12]}…" if row["sha256"] else ""
