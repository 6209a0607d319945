"""What is measured on a GPU, as data: what stands here and in no file of results was not measured."""

from __future__ import annotations

from dataclasses import dataclass

RIVALS = ("loop_graph", "stock_vmap", "ours_cudagraph", "ours_auto")
IMAGE_RIVALS = ("ours_branches", "ours_compiled_branches")
TEXT_RIVALS = ("ours_cudagraph_fused",)


@dataclass(frozen=True)
class Setting:
    """One row of the tables.

    Attributes:
        network: Name among `networks` of cells.py.
        title: Of the network, for readers.
        members, batch: How many.
        dtype: As settings name it.
        over_graph, over_compile: How many times the speed of the loop in a graph is wanted, and of its torch.compile.
        most_ms: And within what time.
        compiled: Whether torch.compile of the whole loop is a rival; it takes up to half a minute to compile.
        quick: Whether `--quick` measures it.
    """

    network: str
    title: str
    members: int
    batch: int
    dtype: str = "fp16"
    over_graph: float = 1.0
    over_compile: float | None = None
    most_ms: float | None = None
    compiled: bool = False
    quick: bool = False

    @property
    def row(self) -> str:
        """How a table calls it."""
        return f"{self.title}, N={self.members}, batch {self.batch}, {self.dtype}"

    @property
    def rivals(self) -> tuple[str, ...]:
        """What is measured beside the loop."""
        more = TEXT_RIVALS if self.network.startswith(("bert", "minilm")) else IMAGE_RIVALS
        return (*RIVALS, *more, *(("loop_reduce_overhead",) if self.compiled else ()))


MNIST, RESNET18, BERT, MINILM = "MNIST, 28x28", "ResNet-18, 224x224", "bert-base shape", "MiniLM-L6 shape"
SETTINGS = (
    Setting("mnist", MNIST, 2, 1, "fp32", quick=True),
    Setting("mnist", MNIST, 32, 8, compiled=True),
    Setting("resnet18-720", "ResNet-18, 720x720", 2, 1, "fp32"),
    Setting("resnet18", RESNET18, 16, 1, over_graph=11.0, most_ms=0.75, quick=True),
    Setting("resnet18", RESNET18, 4, 8, over_graph=2.8, over_compile=1.8, compiled=True),
    Setting("resnet18", RESNET18, 8, 8),
    Setting("resnet50", "ResNet-50, 224x224", 4, 8, over_graph=3.2),
    Setting("bert-10", f"{BERT}, 10 tokens", 2, 1, "fp32", quick=True),
    Setting("bert", f"{BERT}, 32 tokens", 8, 1, over_graph=5.5, quick=True),
    Setting("bert", f"{BERT}, 32 tokens", 16, 1),
    Setting("bert", f"{BERT}, 32 tokens", 8, 8),
    Setting("bert-ragged", f"{BERT}, 8 ragged texts, 136 tokens", 8, 8, over_graph=4.5),
    Setting("minilm", f"{MINILM}, 32 tokens", 16, 8),
    Setting("minilm-ragged", f"{MINILM}, 8 ragged texts, 136 tokens", 16, 8, over_graph=8.0, quick=True),
)
