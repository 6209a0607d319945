"""Which kernel serves few rows: the choice by fake kernels, the kernels themselves by Triton's interpreter."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vmap_ensemble.execution.cuda.few_rows import PLAIN, FewRows, check_close
from vmap_ensemble.execution.graph.steps import LINEAR_ACTIVATIONS, multiply_members

TILES = tuple(SimpleNamespace(outputs=outputs, inputs=64) for outputs in (16, 32))
KEY = "2 x 16 rows, 6 to 4, none, float32"


class FakeKernels:
    """Kernels that compute as told, and a clock that knows each by its result's version."""

    MOST_ROWS = 64
    TILES = TILES

    def __init__(self, wrong=()):
        self.wrong, self.ran = wrong, []

    def block_of(self, rows):
        return 16 if rows <= 16 else 64

    def multiply(self, x, weight, bias, other, activation, tile):
        self.ran.append(tile.outputs)
        if tile.outputs in self.wrong:
            raise RuntimeError("out of resource")
        return multiply_members(x, weight, bias)

    def normalise(self, x, weight, bias, eps):
        self.ran.append("norm")
        return torch.layer_norm(x, x.shape[-1:]) * 2  # wrong


def make(kernels, times, known=None):
    """A chooser whose clock reads these times, one after another."""
    readings = iter(times)
    return FewRows(known, lambda _work: next(readings), lambda: kernels)


def operands(rows=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows)
    shapes = ((2, rows, 6), (2, 4, 6), (2, 4))
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


@pytest.mark.parametrize(
    ("times", "chosen", "ran"),
    [((3.0, 2.0, 1.0), "triton 32x64", 32), ((3.0, 1.0, 2.0), "triton 16x64", 16), ((1.0, 2.0, 3.0), PLAIN, None)],
)
def test_the_fastest_serves(times, chosen, ran):
    kernels = FakeKernels()
    few = make(kernels, times)
    x, weight, bias = operands()
    for _ in range(2):  # the second one measures nothing: the clock has run out
        torch.testing.assert_close(few.multiply(x, weight, bias, None, "none"), multiply_members(x, weight, bias))
    assert few.choices == {KEY: chosen}
    assert kernels.ran[2:] == ([] if ran is None else [ran, ran])


def test_what_was_chosen_at_an_earlier_start_is_not_measured():
    kernels = FakeKernels()
    few = make(kernels, (), {KEY: "triton 32x64"})
    few.multiply(*operands(), None, "none")
    assert kernels.ran == [32]


def test_a_layer_that_is_not_known_runs_as_it_is_once_choosing_is_over():
    kernels = FakeKernels()
    few = make(kernels, ())
    few.choosing = False
    few.multiply(*operands(), None, "none")
    assert (kernels.ran, few.choices) == ([], {})


def test_a_kernel_that_fails_or_differs_is_left_out():
    few = make(FakeKernels(wrong=(32,)), (3.0, 1.0))
    few.multiply(*operands(), None, "none")
    assert few.choices == {KEY: "triton 16x64"}
    assert few.refused is None


def test_where_none_can_serve_torch_does_for_good(caplog):
    kernels = FakeKernels(wrong=(16, 32))
    few = make(kernels, (1.0,))
    x, weight, bias = operands()
    for rows in (x, x[:, :2]):
        torch.testing.assert_close(
            few.multiply(rows, weight, bias, None, "none"), multiply_members(rows, weight, bias)
        )
    assert kernels.ran == [16, 32]
    assert few.refused == f"{KEY}: " + "; ".join(f"triton {n}x64: RuntimeError: out of resource" for n in (16, 32))
    assert few.refused in caplog.text


def test_wrong_numbers_are_refused():
    few = make(FakeKernels(), (1.0,))
    x = torch.randn(2, 3, 6)
    ones, zeros = torch.ones(2, 6), torch.zeros(2, 6)
    torch.testing.assert_close(few.normalise(x, ones, zeros, 1e-5), torch.layer_norm(x, (6,)))
    assert "LoadError: expected torch's result to" in few.refused


def test_without_triton_torch_serves():
    few = FewRows(load=lambda: importlib.import_module("triton_is_absent"))
    x, weight, bias = operands()
    y = few.multiply(x, weight, bias, torch.ones(2, 3, 4), "none")
    torch.testing.assert_close(y, multiply_members(x, weight, bias) + 1)
    assert few.refused == "Triton can't be had: ModuleNotFoundError: No module named 'triton_is_absent'"


def test_where_nothing_can_be_measured_torch_serves():
    x, weight, bias = operands()
    few = make(FakeKernels(), ())
    torch.testing.assert_close(few.multiply(x, weight, bias, None, "none"), multiply_members(x, weight, bias))
    assert few.refused.startswith(f"{KEY}: torch: StopIteration")


@pytest.mark.parametrize("change", ["rows", "dtype", "strides"])
def test_what_the_kernels_do_not_take_runs_as_it_is(change):
    kernels = FakeKernels()
    x, weight, bias = operands(65 if change == "rows" else 3, torch.float64 if change == "dtype" else torch.float32)
    weight = weight.mT.contiguous().mT if change == "strides" else weight
    y = make(kernels, ()).multiply(x, weight, bias, None, "relu")
    torch.testing.assert_close(y, torch.relu(multiply_members(x, weight, bias)))
    assert kernels.ran == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_close_enough(dtype):
    expected = torch.linspace(-8, 8, 100).to(dtype)
    check_close(torch.nextafter(expected.float(), torch.tensor(9.0)).to(dtype), expected)
    for other in (expected * 1.5, torch.full_like(expected, float("nan"))):
        with pytest.raises(Exception, match="expected torch's result to"):
            check_close(other, expected)


def interpret():
    """Run by the test below where Triton interprets: each case's distance from float32's, in steps of its dtype."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _convert_float, tl

    from vmap_ensemble.execution.cuda import few_rows_kernels as kernels

    whole = InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, *others):  # it keeps bfloat16 as integers, and multiplies these
        if a.dtype == tl.bfloat16:
            shape = [t.data.shape for t in (a, b)]
            a, b = (
                TensorHandle(
                    _convert_float(t.data, tl.bfloat16, tl.float32, None).view("float32").reshape(s), tl.float32
                )
                for t, s in zip((a, b), shape, strict=True)
            )
        return whole(self, a, b, d, *others)

    InterpreterBuilder.create_dot = create_dot
    torch.manual_seed(0)
    found = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for members, rows, inputs, outputs in ((1, 1, 16, 16), (2, 17, 130, 18)):
            shapes = (
                (members, rows, inputs),
                (members, outputs, inputs),
                (members, outputs),
                (members, rows, outputs),
            )
            x, weight, bias, other = (torch.randn(shape).to(dtype) for shape in shapes)
            weight = weight / inputs**0.5
            shared = bias[:1].expand(members, -1)
            layers = [
                (None, None, "none"),
                (bias, other, "none"),
                *((shared, None, name) for name in LINEAR_ACTIVATIONS),
            ]
            for number, (own_bias, residual, activation) in enumerate(layers):
                y = multiply_members(x.float(), weight.float(), None if own_bias is None else own_bias.float())
                y = LINEAR_ACTIVATIONS[activation](y if residual is None else y + residual.float())
                tile = kernels.TILES[number % len(kernels.TILES)]
                steps = distance(kernels.multiply(x, weight, own_bias, residual, activation, tile), y)
                found[f"{dtype} {rows}x{inputs}x{outputs} {number} {activation}"] = steps
            scale, shift = weight[:, 0].contiguous(), weight[:, -1].contiguous()
            y = torch.layer_norm(x.float(), (inputs,)) * scale.float()[:, None] + shift.float()[:, None]
            found[f"{dtype} {rows}x{inputs} norm"] = distance(kernels.normalise(x, scale, shift, 1e-5), y)
    print(json.dumps(found))


def distance(got, expected):
    """Largest difference in steps of the result's dtype, relative to the largest number."""
    step = torch.finfo(got.dtype).eps * max(1.0, expected.abs().max().item())
    return (got.float() - expected).abs().max().item() / step


def test_kernels_equal_torch_in_tritons_interpreter():
    pytest.importorskip("triton")
    code = "from tests.unit.execution.cuda.test_few_rows import interpret; interpret()"
    root = Path(__file__).resolve().parents[4]
    path = os.pathsep.join([str(root), str(root / "handlers")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
        cwd=root, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 3 * 2 * 7
    assert not {case: steps for case, steps in found.items() if not steps <= (8 if "float32" in case else 1)}
