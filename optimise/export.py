"""Turns an archive into one file for other runtimes: all members, their aggregation and their uncertainty.

    vmap-ensemble export model_store/resnet_ens.mar --to onnx --output ens.onnx
    vmap-ensemble export model_store/resnet_ens.mar --to pt2 --output ens.pt2
    vmap-ensemble export model_store/resnet_ens.mar --to sagemaker --output model.tar.gz

A graph is read again and compared with the ensemble before it is there.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmap_ensemble.errors import EnsembleError
from vmap_ensemble.process.outcome import exit_code

if TYPE_CHECKING:
    from torch import Tensor

    from vmap_ensemble.ensemble import Ensemble
    from vmap_ensemble.execution.onnx.answers import AnsweredClasses

EPILOG = """\
outputs: the model's own of all members, (M, batch, ...); of classifiers also probabilities (batch, classes),
predictive_entropy, expected_entropy, mutual_information (nats), agreement (batch,), and member_probabilities.
"""
# Largest difference of any output to the ensemble's that a file may have.
TOLERANCE = 1e-4
SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2", "sagemaker": ".tar.gz"}
# Options for SageMaker, and their defaults; what is none by default may stay so.
REPLICA = {"batch-size": 8, "cpus": 1, "gpus": 0}


@dataclass(frozen=True)
class Exported:
    """A file and what was found about it: names of inputs and outputs, bytes, largest difference to the ensemble."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    size_bytes: int
    difference: float


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with 2 when it makes no sense."""
    parser = argparse.ArgumentParser(
        prog="vmap-ensemble export",
        description="Write all members with their aggregation as one file, for other runtimes or for SageMaker.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("archive", type=Path, metavar="MAR", help="what ./archive.sh built")
    add("--to", choices=tuple(SUFFIXES), required=True, help="the format")
    add("--output", type=Path, required=True, metavar="FILE", help="such as ens.onnx")
    add("--force", action="store_true", help="replace a file that exists")
    sagemaker = parser.add_argument_group("sagemaker", "what config.yaml says of a replica")
    for name, default in REPLICA.items():
        sagemaker.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"default: {default}")
    options = parser.parse_args(arguments)
    for name, default in REPLICA.items():
        given, least = getattr(options, name.replace("-", "_")), min(1, default)
        if given < least:
            parser.error(f"--{name}: expected {least} or more, got {given}")
    if not options.output.name.endswith(SUFFIXES[options.to]):
        parser.error(f"--output: expected a name that ends in {SUFFIXES[options.to]}, got {options.output.name}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0 done, 1 refused, 130 stopped."""
    options = parse_arguments(arguments)
    return exit_code("export", lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    if options.output.exists() and not options.force:
        raise EnsembleError(f"{options.output.name}: exists; --force replaces it")
    if options.to == "sagemaker":
        return _write_for_sagemaker(options)
    from vmap_ensemble.ensemble import Ensemble  # what follows imports torch

    ensemble = Ensemble.load(options.archive, execution="eager", device="cpu", dtype="fp32")
    exported = export(ensemble, options.to, options.output)
    _report(options.output, ensemble, exported)
    _show(options.output, ensemble, exported)
    return 0


def _write_for_sagemaker(options: argparse.Namespace) -> int:
    from optimise.sagemaker import Deployment, write_model

    own = Deployment(options.archive.stem, options.batch_size, options.cpus, options.gpus)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    size = write_model(options.archive, options.output, own)
    print(f"{options.output.name}: {size / 2**20:.1f} MiB, to be unpacked to /opt/ml/model")
    return 0


def export(ensemble: Ensemble, to: str, path: Path) -> Exported:
    """Write an ensemble as one file.

    Args:
        ensemble: Its members in float32 on the CPU.
        to: `onnx` or `pt2`.
        path: The file; a large ONNX graph has its weights in `path`.data beside it.

    Raises:
        EnsembleError: The members can't be exported, a package is missing, or the file answers otherwise.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _check(ensemble)
    combined = _combined(ensemble)
    with tempfile.TemporaryDirectory(prefix="export-", dir=path.parent) as name:
        made = Path(name) / path.name
        write = {"onnx": _write_onnx, "pt2": _write_pt2}[to]
        inputs, outputs, run = write(ensemble, combined, made)
        difference = _compare(ensemble, combined, outputs, run)
        files = sorted(Path(name).iterdir())
        for file in files:
            file.replace(path.parent / file.name)
    size = sum((path.parent / file.name).stat().st_size for file in files)
    return Exported(inputs, outputs, size, difference)


Run = Callable[[Sequence[Any]], "list[Tensor]"]
Written = tuple[tuple[str, ...], tuple[str, ...], Run]


@dataclass(frozen=True)
class Combined:
    """What the ensemble makes of one of the members' outputs.

    Attributes:
        number: Which output it is, among the model's tensors.
        example: Of it, for two rows.
        answers: (M, B, C) -> the tensors of ANSWERS.
    """

    number: int
    example: Tensor
    answers: AnsweredClasses


def _write_onnx(ensemble: Ensemble, combined: Combined | None, path: Path) -> Written:
    from vmap_ensemble.errors import LoadError
    from vmap_ensemble.execution.onnx.answers import add_answers
    from vmap_ensemble.execution.onnx.engines import load_onnxruntime
    from vmap_ensemble.execution.onnx.graph import export_members
    from vmap_ensemble.execution.onnx.packages import write_graph

    forward: Any = ensemble.forward
    try:
        graph = export_members(forward, _example(ensemble, 2))
        if combined is not None:
            graph = add_answers(graph, graph.outputs[combined.number], combined.example, combined.answers)
        write_graph(graph, path)
        engine = load_onnxruntime(path, graph.inputs, graph.outputs, forward.members.device)
    except ImportError as error:
        raise LoadError(f"{error.name}: not installed; pip install 'vmap-ensemble[onnx]'") from None
    return graph.inputs, graph.outputs, lambda given: engine(_tensors(given))


def _write_pt2(ensemble: Ensemble, combined: Combined | None, path: Path) -> Written:
    import torch

    from vmap_ensemble.errors import LoadError, first_line
    from vmap_ensemble.execution.onnx.answers import ANSWERS
    from vmap_ensemble.execution.onnx.graph import AllMembers, free_axes

    forward: Any = ensemble.forward
    args = _example(ensemble, 2)
    answered = () if combined is None else (combined.answers, combined.number)
    module, given = AllMembers(forward, args, *answered), _tensors(args)
    try:
        with torch.no_grad():
            program = torch.export.export(
                module.eval(), tuple(given), dynamic_shapes=(free_axes(given, bounded=True),)
            )
            torch.export.save(program, path)
            run = torch.export.load(path).module()
    except Exception as error:  # whatever an exporter may raise
        raise LoadError(f"{type(forward.model).__name__} can't be exported: {first_line(error)}") from error
    outputs = (*module.names, *(() if combined is None else ANSWERS))
    return tuple(forward.argument_names(args)), outputs, lambda rows: list(run(*_tensors(rows)))


def _check(ensemble: Ensemble) -> None:
    """Refuse what has no graph.

    Raises:
        LoadError: Says why.
    """
    from vmap_ensemble.errors import LoadError
    from vmap_ensemble.execution.onnx.graph import reasons_against

    if ensemble.alone:
        raise LoadError("rows of a batch depend on each other: no graph of a batch gives what each row alone does")
    reasons = reasons_against(ensemble.forward)
    if reasons:
        raise LoadError("; ".join(reasons))


def _example(ensemble: Ensemble, count: int) -> tuple[Any, ...]:
    """Arguments of a batch of the task's own sample."""
    return ensemble.task.collate(ensemble.task.sample_examples(count))


def _tensors(args: Sequence[Any]) -> list[Tensor]:
    from torch import Tensor

    return [arg for arg in args if isinstance(arg, Tensor)]


def _combined(ensemble: Ensemble) -> Combined | None:
    """What combines the members' outputs to classes; None where the answer is none of classes."""
    from torch.utils import _pytree as pytree

    from vmap_ensemble.errors import LoadError
    from vmap_ensemble.execution.onnx.answers import AnsweredClasses
    from vmap_ensemble.tasks.classification import pick_outputs

    if not ensemble.task.combines_classes:
        return None
    settings, kind = ensemble.settings, ensemble.task.class_answers.kind
    answers = AnsweredClasses(ensemble.member_weights, settings.aggregation, settings.temperature, kind)
    outputs = ensemble.outputs(*_example(ensemble, 2))
    picked = pick_outputs(outputs, settings.num_classes)
    for number, tensor in enumerate(_tensors(pytree.tree_leaves(outputs))):
        if tensor is picked:
            return Combined(number, tensor.detach().clone(), answers)
    raise LoadError("the model gives one number a row without an axis of classes, which can't be exported")


def _compare(ensemble: Ensemble, combined: Combined | None, names: Sequence[str], run: Run) -> float:
    """The largest difference of any output to the ensemble's, for batches of other sizes than it was exported with.

    Raises:
        LoadError: It is beyond TOLERANCE.
    """
    import torch
    from torch.utils import _pytree as pytree

    from vmap_ensemble.errors import LoadError

    largest = 0.0
    for count in (1, 3):
        args = _example(ensemble, count)
        with torch.inference_mode():
            expected = _tensors(pytree.tree_leaves(ensemble.forward.loop(*args)))
            if combined is not None:
                expected += combined.answers(expected[combined.number])
            got = run(args)
        for name, own, other in zip(names, expected, got, strict=True):
            if own.shape != other.shape:
                raise LoadError(f"{name}: expected the shape {tuple(own.shape)}, the file gives {tuple(other.shape)}")
            largest = max(largest, float((own - other).abs().max() / own.abs().max().clamp_min(1)))
    if not largest <= TOLERANCE:
        raise LoadError(f"the file's outputs differ from the ensemble's by {largest:.1e}, {TOLERANCE:.0e} is allowed")
    return largest


def _report(path: Path, ensemble: Ensemble, exported: Exported) -> None:
    """ens.report.json and ens.report.html beside ens.onnx."""
    from optimise.gate.page import write_facts
    from vmap_ensemble.offline.page import bars

    members = ensemble.forward.members.size_bytes()
    sizes = bars("Size, in MiB", [("members", members / 2**20), (path.name, exported.size_bytes / 2**20)], ".1f")
    facts = {"file": path.name, "members": list(ensemble.names), **dataclasses.asdict(exported)}
    write_facts(path.with_suffix(".report.json"), f"{path.name}: {len(ensemble.names)} members", facts, sizes)


def _show(path: Path, ensemble: Ensemble, exported: Exported) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{path.name}: {len(ensemble.names)} members", show_header=False, title_justify="left")
    table.add_row("inputs", ", ".join(exported.inputs))
    table.add_row("outputs", ", ".join(exported.outputs))
    table.add_row("size", f"{exported.size_bytes / 2**20:.1f} MiB")
    table.add_row("difference to the ensemble", f"{exported.difference:.1e}, {TOLERANCE:.0e} allowed")
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
