"""What options of the commands may say, and options that several share; without importing what the names mean.

A command reads its arguments first and imports its work from `benchmarks.runs` afterwards, so that `--help` and wrong
usage are answered at once. tests/unit/test_quick_commands.py holds the names to those of the work.
"""

from __future__ import annotations

import argparse
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SAMPLE_IMAGE = ROOT / "data" / "images" / "sample.jpg"
SAMPLE_DIGIT = ROOT / "data" / "digits" / "3.png"

DTYPES = ("bf16", "fp16", "fp32")
# measuring/networks.py
NETWORKS = ("bert", "minilm", "mnist", "mnist-trained", "resnet18", "resnet50")
# Batches of texts in runs/batching_rules.py and runs/bert_vmap.py
TEXTS = ("ragged", "single", "full")
# The encoder that `benchmarks.precision` compares
TEXT_MODEL = "minilm"
# Settings of runs/seeds.py
SEEDS = ("mnist", "resnet18", "bert")
# Methods of measuring/rivals.py.
RIVALS = (
    "loop",
    "loop_compiled",
    "loop_graph",
    "loop_reduce_overhead",
    "onnxruntime_per_member",
    "onnxruntime_one_graph",
    "openvino",
    "stock_vmap",
    "ours_eager",
    "ours_prepared",
    "ours_compiled",
    "ours_ahead_of_time",
    "ours_cudagraph",
    "ours_cudagraph_fused",
    "ours_branches",
    "ours_compiled_branches",
    "ours_auto",
    "ours_auto_onnx",
)
# serve/archives.py and serve/rivals.py
SERVED = ("mnist", "resnet18")
SERVED_RIVALS = ("separate", "ours", "loop", "workflow", "ours_reference", "ours_two_workers")
# Methods of runs/engines.py.
ENGINES = ("torchserve", "ray", "ray_haproxy", "ray_loop", "ray_loop_haproxy")
# Share of the separately registered models' closed-loop rate at which the open loop arrives, where none is given.
OPEN_SHARE = 0.7
# Rows of offline
OFFLINE = ("digits", "texts")
# Lengths of the texts in each cell of ft_bert.
FULL = 128  # the length that a server pads to when it doesn't look at the batch
FT_CELLS: dict[str, list[int]] = {
    "ragged_8": [80, *[8] * 7],
    "single_15": [15],
    "full_8": [FULL] * 8,
    # Mean length a third of the longest, from short to full.
    "mixed_1": [43],
    "mixed_8": [128, 64, 43, 32, 24, 20, 16, 16],
    "mixed_32": [128, 64, 43, 32, 24, 20, 16, 16] * 4,
}


def comparison_parser(title: str, image_path: Path, prog: str) -> argparse.ArgumentParser:
    """Describe the command line that `mnist_vmap` and `resnet_vmap` share."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog=prog,
        description=f"Time {title} members one after another against one vmapped ensemble.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--image_path", type=Path, default=image_path, help="picture to classify")
    add("--num_models", type=int, default=2, help="members of the ensemble")
    add(
        "--model_path", type=Path, nargs="+", default=None,
        help="checkpoints or a folder of them; where they are fewer than the members, the others are "
        "perturbed copies; without it: members trained here, or else seeded fresh weights",
    )  # fmt: skip
    add("--device", default=None, help="where to run; without it, on a GPU where there is one")
    add("--batch_size", type=int, default=1, help="times the picture is in the batch")
    add("--warmup", type=int, default=100, help="calls that are not counted")
    add("--iterations", type=int, default=1000, help="calls that are counted")
    add("--threads", type=int, default=None, help="threads of torch on the CPU")
    add("--json", type=Path, metavar="FILE", default=None, help="write the figures to this file")
    return parser


def parse_comparison(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line of `comparison_parser`; exits with 2 when a count makes no sense."""
    options = parser.parse_args(arguments)
    for name, least in (("num_models", 1), ("batch_size", 1), ("warmup", 0), ("iterations", 1), ("threads", 1)):
        refuse_below(parser, options, name, least)
    return options


def refuse_below(parser: argparse.ArgumentParser, options: argparse.Namespace, name: str, least: int) -> None:
    """Exit with 2 where a number is given that is below the least that makes sense."""
    value = getattr(options, name)
    if value is not None and value < least:
        parser.error(f"--{name}: expected {least} or more, got {value}")
