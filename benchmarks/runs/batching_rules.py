"""Each batching rule of ours beside vmap's stock rule and the plain loop: equality and times."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap

from benchmarks.measuring.measure import describe_machine, measure_interleaved, write_json
from vmap_ensemble.encoders.attention import attend_packed
from vmap_ensemble.encoders.batching_rules import FastRules
from vmap_ensemble.encoders.packing import Packing, pack, take_first, unpack

TOLERANCE = 1e-5
VOCABULARY, WIDTH, INNER, HEADS = 30522, 384, 1536, 12
BATCHES = {"ragged": [80] + [8] * 7, "single": [15], "full": [128] * 8}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Work:
    """A function of one member, and its arguments.

    Attributes:
        function: Of one member's tensors.
        arguments: Tensors, (M, ...) where `own` says so.
        own: Which of them differ between members.
    """

    function: Callable[..., Tensor]
    arguments: tuple[Tensor, ...]
    own: tuple[bool, ...]

    def vmapped(self, repeat: int) -> Tensor:
        """All members in one call, `repeat` times inside it."""
        in_dims = tuple(0 if own else None for own in self.own)
        return vmap(lambda *tensors: self._again(repeat, tensors), in_dims=in_dims)(*self.arguments)

    def looped(self, repeat: int) -> Tensor:
        """One member after another."""
        members = next(len(t) for t, own in zip(self.arguments, self.own, strict=True) if own)
        rows = [[t[m] if own else t for t, own in zip(self.arguments, self.own, strict=True)] for m in range(members)]
        return torch.stack([self._again(repeat, row) for row in rows])

    def _again(self, repeat: int, tensors: Sequence[Tensor]) -> Tensor:
        for _ in range(repeat - 1):
            self.function(*tensors)
        return self.function(*tensors)


@dataclass(frozen=True)
class Case:
    """A rule and what it replaces.

    Attributes:
        name: In the table.
        stock: What vmap's own rules and the loop run.
        ours: What our rule runs; the same work unless packing changes its shape.
        ours_asked, stock_asked: From an output (M, ...) to the part that anybody asks for, in one shape.
        weights: Matrices of linear layers, which the rules may prepare beforehand, as at load.
        once: A model calls it once, not in every layer.
    """

    name: str
    stock: Work
    ours: Work
    ours_asked: Callable[[Tensor], Tensor] = lambda output: output
    stock_asked: Callable[[Tensor], Tensor] = lambda output: output
    weights: tuple[Tensor, ...] = ()
    once: bool = False


def make_cases(members: int, lengths: list[int]) -> list[Case]:
    """One case per rule, on seeded numbers.

    Args:
        members: M.
        lengths: Tokens of each text of the batch.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    packing = pack(mask)
    tokens = len(packing.index)
    ids = torch.randint(0, VOCABULARY, (1, tokens), generator=generator)
    shared, own = draw(1, tokens, WIDTH), draw(members, 1, tokens, WIDTH)
    wide, bias = draw(members, INNER, WIDTH), draw(members, INNER)
    scale, shift = draw(members, WIDTH), draw(members, WIDTH)
    plain: list[tuple[str, Callable[..., Tensor], tuple[Tensor, ...], tuple[bool, ...]]] = [
        ("embedding", F.embedding, (ids, draw(members, VOCABULARY, WIDTH)), (False, True)),
        ("linear, input shared", F.linear, (shared, wide, bias), (False, True, True)),
        ("linear", F.linear, (own, wide, bias), (True, True, True)),
        ("linear, weight shared", F.linear, (own, wide[0], bias), (True, False, True)),
        ("layer norm", _normalise, (own, scale, shift), (True, True, True)),
    ]
    cases = []
    for name, function, arguments, batched in plain:
        work = Work(function, arguments, batched)
        weights = arguments[1:2] if function is F.linear else ()
        cases.append(Case(name, work, work, weights=weights, once=function is F.embedding))
    return [*cases, *_attention_cases(draw, members, mask, packing), *_packing_cases(own, packing)]


def _normalise(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.layer_norm(x, (WIDTH,), scale, shift, 1e-12)


def _attention_cases(draw: Callable[..., Tensor], members: int, mask: Tensor, packing: Packing) -> list[Case]:
    """Attention on padded texts, and on packed ones, whose stock rival has to pad."""
    batch, longest = mask.shape
    depth = WIDTH // HEADS
    padded = tuple(draw(members, batch, HEADS, longest, depth) for _ in range(3))
    keep = mask.bool()[:, None, None, :]
    attend = Work(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=keep), padded, (True,) * 3)
    rows = tuple(_pack_heads(tensor, packing) for tensor in padded)
    packed = Work(lambda q, k, v: attend_packed(q, k, v, packing, depth**-0.5), rows, (True,) * 3)

    def real(output: Tensor) -> Tensor:
        """(M, B, heads, S, D) -> (M, 1, T, heads, D)."""
        return _pack_heads(output, packing).transpose(2, 3)

    # What stands at padding nobody asks for.
    return [
        Case("attention, padded", attend, attend, real, real),
        Case("attention, packed", attend, packed, stock_asked=real),
    ]


def _pack_heads(tensor: Tensor, packing: Packing) -> Tensor:
    """(M, B, heads, S, D) -> (M, 1, heads, T, D), the real tokens in the order of the packing."""
    flat = tensor.transpose(2, 3).flatten(1, 2)[:, packing.index]
    return flat.transpose(1, 2).unsqueeze(1).contiguous()


def _packing_cases(own: Tensor, packing: Packing) -> list[Case]:
    """Back from a packed row to a batch: every token's place, or the first tokens alone."""
    batch, longest = packing.size

    def scatter(row: Tensor) -> Tensor:
        empty = row.new_zeros(batch * longest, WIDTH)
        return empty.index_copy(0, packing.index, row[0]).view(batch, longest, WIDTH)

    def gather(row: Tensor) -> Tensor:
        return row[0].index_select(0, packing.first).unsqueeze(1)

    pairs = {"unpack": (scatter, unpack), "first tokens": (gather, take_first)}
    return [
        Case(name, Work(stock, (own,), (True,)), Work(partial(ours, packing=packing), (own,), (True,)), once=True)
        for name, (stock, ours) in pairs.items()
    ]


@torch.inference_mode()
def measure_case(case: Case, batch: str, options: argparse.Namespace) -> dict[str, Any]:
    """Time stock, loop and ours on one case; returns its figures with the largest differences to the loop."""
    rules = FastRules({str(number): weight for number, weight in enumerate(case.weights)})
    repeat = 1 if case.once else options.repeat

    def ours() -> Tensor:
        with rules:
            return case.ours.vmapped(repeat)

    reference = case.stock_asked(case.stock.looped(1))
    largest = reference.abs().max().item()
    stock_difference = (case.stock_asked(case.stock.vmapped(1)) - reference).abs().max().item() / largest
    difference = (case.ours_asked(ours()) - reference).abs().max().item() / largest
    rivals = {"stock": lambda: case.stock.vmapped(repeat), "loop": lambda: case.stock.looped(repeat), "ours": ours}
    timings = measure_interleaved(rivals, CPU, options.warmup, options.iterations, options.block)
    times = {timing.name: {k: vars(timing)[k] for k in ("median_ms", "p10_ms", "p90_ms")} for timing in timings}
    medians = {name: row["median_ms"] for name, row in times.items()}
    return {
        "rule": case.name, "batch": batch, "calls": repeat, **times,
        "stock_by_ours": medians["stock"] / medians["ours"], "loop_by_ours": medians["loop"] / medians["ours"],
        "largest_relative_difference": difference, "of_stock": stock_difference, "equal": difference <= TOLERANCE,
    }  # fmt: skip


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print the figures as the Markdown of docs/bert.md: medians with 10th and 90th percentile."""
    print("\n| rule | calls | batch | stock vmap, ms | loop, ms | ours, ms | stock / ours | loop / ours |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        cells = [
            f"{t['median_ms']:.2f} ({t['p10_ms']:.2f}–{t['p90_ms']:.2f})"
            for t in (row["stock"], row["loop"], row["ours"])
        ]
        ratios = f"{row['stock_by_ours']:.2f}x | {row['loop_by_ours']:.2f}x"
        print(f"| {row['rule']} | {row['calls']} | {row['batch']} | {' | '.join(cells)} | {ratios} |")


def run(options: argparse.Namespace) -> int:
    """Do what the options ask; returns the exit code: 1 where the numbers differ, 2 for a wrong option."""
    torch.set_num_threads(options.threads)
    machine = describe_machine(CPU)
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    rows = [
        measure_case(case, name, options)
        for name in options.batches
        for case in make_cases(options.num_models, BATCHES[name])
    ]
    print_table(rows)
    if options.json:
        facts = {"members": options.num_models, "repeat": options.repeat, "tolerance": TOLERANCE, "rows": rows}
        write_json(options.json, machine, [], **facts)
    different = [f"{row['rule']} ({row['batch']})" for row in rows if not row["equal"]]
    if different:
        print(f"error: differs from the loop beyond the tolerance: {', '.join(different)}", file=sys.stderr)
    return 1 if different else 0
