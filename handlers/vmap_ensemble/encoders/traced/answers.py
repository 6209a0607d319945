"""Turns what a checkpoint answered when it was traced into bytes inside of the traced file, and back into a proof.

A traced module can be compared with nothing but itself once it is alone; so the tracer records inputs and what the
checkpoint's own forward gave for them, and every load compares.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from vmap_ensemble.core.proof import Proof, compare_outputs, default_tolerance
from vmap_ensemble.encoders.traced.forward import OUTPUTS, TracedForward
from vmap_ensemble.errors import LoadError

ANSWERS_FILE = "answers.safetensors"  # among the extra files of a TorchScript archive


@dataclass(frozen=True)
class RecordedAnswers:
    """What a checkpoint's own forward gave.

    Attributes:
        arguments: input_ids, attention_mask and token_type_ids, (B, S) int64 each.
        outputs: Its logits, (B, ...), on all three.
        without_types: Its logits on the first two alone.
    """

    arguments: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    without_types: tuple[Tensor, ...]

    def to_bytes(self) -> bytes:
        """As a safetensors file."""
        groups = {"argument": self.arguments, "output": self.outputs, "without_types": self.without_types}
        tensors = {
            f"{name}.{i}": t.detach().cpu().contiguous() for name, ts in groups.items() for i, t in enumerate(ts)
        }
        return save(tensors)

    @classmethod
    def of_bytes(cls, data: bytes) -> RecordedAnswers:
        """What `to_bytes` wrote."""
        tensors = load(data)

        def group(name: str) -> tuple[Tensor, ...]:
            count = sum(key.startswith(f"{name}.") for key in tensors)
            return tuple(tensors[f"{name}.{i}"] for i in range(count))

        return cls(group("argument"), group("output"), group("without_types"))


def read_answers(path: Path) -> RecordedAnswers | None:
    """The answers in a traced file; None where it was traced by something that records none.

    Raises:
        LoadError: They are damaged.
    """
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(f"/extra/{ANSWERS_FILE}")]
        if not names:
            return None
        try:
            return RecordedAnswers.of_bytes(archive.read(names[0]))
        except (SafetensorError, KeyError, ValueError) as error:
            raise LoadError(f"{path.name}: its recorded answers are damaged ({error}); trace it again") from None


def prove_traced(
    forward: TracedForward, recorded: Sequence[RecordedAnswers], arguments: int, tolerance: float | None
) -> Proof:
    """Compare each traced module with what its checkpoint answered before it was traced.

    Args:
        forward: The modules, on their device.
        recorded: Per member.
        arguments: How many arguments the modules are called with: 2, or 3 with token types.
        tolerance: Largest relative difference; that of the recorded dtype by default.

    Raises:
        LoadError: A module differs by more.
    """
    proofs = []
    for index, answers in enumerate(recorded):
        own = forward.part(index, index + 1)
        args = tuple(argument.to(own.device) for argument in answers.arguments[:arguments])
        expected = answers.outputs if arguments > 2 else answers.without_types
        names = OUTPUTS[len(expected)]
        theirs = {name: tensor.to(own.device) for name, tensor in zip(names, expected, strict=True)}
        bound = tolerance or default_tolerance(expected[0].dtype, expected[0].device)
        leaves = [clear_padding(tensor, args[1], 0) for tensor in theirs.values()]
        got = {name: clear_padding(tensor, args[1], 1) for name, tensor in own(*args).items()}
        proofs.append(compare_outputs(own, got, [leaves], args, bound))
    worst = max(proofs, key=lambda proof: proof.largest_difference)
    agreement = sum(proof.argmax_agreement for proof in proofs) / len(proofs)
    not_finite = tuple(name for proof in proofs for name in proof.not_finite)
    return Proof(worst.largest_difference, agreement, worst.tolerance, not_finite)


def clear_padding(tensor: Tensor, mask: Tensor, batch_axis: int) -> Tensor:
    """Outputs per token, zero at padding, of which nobody asks anything; others as they are."""
    if tensor.dim() < batch_axis + 2 or tensor.shape[batch_axis : batch_axis + 2] != mask.shape:
        return tensor
    rest = tensor.dim() - batch_axis - 2
    return torch.where(mask.bool().view(*mask.shape, *[1] * rest), tensor, 0.0)
