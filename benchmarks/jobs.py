"""The files of benchmarks/results, each with the command that writes it."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.gpu.settings import SETTINGS


@dataclass(frozen=True)
class Job:
    """One file of results.

    Attributes:
        name: of the file, before the chip.
        table: how the report shows it.
        arguments: of `python -m`.
        gpu: run where torch has CUDA, and named after the GPU.
        writes_itself: into the folder that its arguments name, under the name that this file should have.
        settings: what it measures, row by row, where a page says so before there is a result.
    """

    name: str
    table: str
    arguments: str
    gpu: bool = False
    writes_itself: bool = False
    settings: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """As a reader would type it."""
        return f"python -m {self.arguments}"


JOBS = (
    Job("forward-resnet18", "forward", "benchmarks.forward --model resnet18 --members 4 --batch 1 8 --seconds 20"),
    Job(
        "forward-resnet50",
        "forward",
        "benchmarks.forward --model resnet50 --members 4 --batch 1 --seconds 20 "
        "--only loop_compiled onnxruntime_one_graph openvino stock_vmap ours_auto",
    ),
    Job("forward-mnist", "forward", "benchmarks.forward --model mnist --members 8 32 --batch 1 8 --seconds 10"),
    Job(
        "forward-mnist-trained",
        "forward",
        "benchmarks.forward --model mnist-trained --members 8 32 --batch 1 8 --seconds 10",
    ),
    Job("forward-minilm", "forward", "benchmarks.forward --model minilm --members 4 --batch 1 8 --seconds 20"),
    Job("forward-bert", "forward", "benchmarks.forward --model bert --members 2 --batch 1 --seconds 20"),
    Job("scaling", "scaling", "benchmarks.scaling --model mnist resnet18 minilm --seconds 25"),
    Job("seeds", "seeds", "benchmarks.seeds --seconds 20"),
    Job("bert", "bert", "benchmarks.bert_vmap --num_models 4 --iterations 20"),
    Job("loading", "loading", "benchmarks.loading --architecture resnet18 --members 8"),
    Job("uncertainty", "uncertainty", "benchmarks.uncertainty"),
    Job("serve", "serve", "benchmarks.serve --handlers resnet18 --members 4"),
    Job("serve-mnist", "serve", "benchmarks.serve --handlers mnist --members 4 --rate 0"),
    Job(
        "serve-sizes",
        "serve",
        "benchmarks.serve --handlers resnet18 --members 1 2 8 16 --rivals separate ours --rate 0 --rounds 2",
    ),
    Job(
        "gpu",
        "forward",
        "benchmarks.gpu --json benchmarks/results",
        gpu=True,
        writes_itself=True,
        settings=tuple(setting.row for setting in SETTINGS),
    ),
)
