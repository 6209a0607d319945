"""oneDNN's private operators are named in one module, and called in the order of their schemas."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import vmap_ensemble
from vmap_ensemble.core.members import StackedMembers
from vmap_ensemble.execution.cpu import onednn
from vmap_ensemble.process import device

PACKAGE = Path(vmap_ensemble.__file__).parent
PRIVATE = re.compile(r"torch\.ops\.(mkldnn|onednn|quantized)|torch\._C\._nn\.mkldnn")


def test_private_operators_are_named_in_one_module():
    """But for one probe: `process` lies below `execution`, and can't ask there."""
    found = {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in PACKAGE.rglob("*.py")}
    found = {name: PRIVATE.findall(text) for name, text in found.items() if PRIVATE.search(text)}
    assert set(found) == {"execution/cpu/onednn.py", "process/device.py"}
    assert len(found["process/device.py"]) == 1


@pytest.mark.parametrize(
    ("operator", "arguments"),
    [
        (onednn.CONVOLVE, onednn.ConvolveArguments),
        (onednn.CONVOLVE_ADD, onednn.ConvolveAddArguments),
        (onednn.LINEAR, onednn.LinearArguments),
        (onednn.LINEAR_ADD, onednn.LinearAddArguments),
    ],
)
def test_arguments_have_the_order_of_the_schema(operator, arguments):
    spelling = {"X": "x", "W": "weight", "B": "bias"}
    schema = [spelling.get(argument.name, argument.name) for argument in operator._schema.arguments]
    assert schema == list(arguments._fields)


def test_in_place_the_residual_comes_first():
    names = [argument.name for argument in onednn.CONVOLVE_ADD_IN_PLACE._schema.arguments]
    assert names[:3] == ["other", "X", "W"]
    assert names[2:] == [argument.name for argument in onednn.CONVOLVE_ADD._schema.arguments][2:]


@pytest.mark.parametrize(
    ("activation", "plain"),
    [
        ("none", lambda y: y),
        ("relu", F.relu),
        ("gelu", F.gelu),
        ("gelu_tanh", lambda y: F.gelu(y, approximate="tanh")),
    ],
)
@pytest.mark.parametrize("bias", [torch.randn(12), None])
def test_a_product_and_its_activation_are_torchs(activation, plain, bias):
    x, weight = torch.randn(3, 40), torch.randn(12, 40)
    (packed,) = onednn.prepack(weight)
    got = onednn.multiply(x, packed, bias, activation)
    torch.testing.assert_close(got, plain(F.linear(x, weight, bias)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_dtypes_without_kernels_are_told(monkeypatch, dtype):
    monkeypatch.setattr(onednn, "has_float16_kernels", lambda: False)
    reasons = onednn.reasons_against_dtypes(StackedMembers(("a",), {"weight": torch.ones(1, 2, dtype=dtype)}, {}))
    assert len(reasons) == (dtype != torch.float32)
    assert all(f"no fast convolution of {dtype}, only of " in reason for reason in reasons)


def test_the_probe_of_the_process_is_the_cpus():
    assert device.has_float16_kernels() is torch.ops.mkldnn._is_mkldnn_fp16_supported()


def test_the_rooms_of_the_cpu_need_no_transformers():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import vmap_ensemble.execution.cpu.networks, vmap_ensemble.execution.int8.forward\n"
        "import vmap_ensemble.execution.compiled.unrolled"
    )
    paths = f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r})\n"
    done = subprocess.run(
        [sys.executable, "-c", paths + code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
