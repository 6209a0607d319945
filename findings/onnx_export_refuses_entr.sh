#!/usr/bin/env bash
# torch 2.12.1: torch.onnx.export can't take apart torch.special.entr, which torch.export exports.
#
# A good engineer would guess that an operator which torch.export takes, and whose decomposition is made of operators
# that the ONNX exporter knows, can be exported: xlogy, which is the same but for its sign, can. The exporter's pass on
# types of scalars fails on the decomposition of entr, on its `where` with a number in place of a tensor.
# Seen: ConversionError in step 2/3, from AssertionError "Expected same OpOverload packet, got prim.device != aten.where".
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.12.1 onnx==1.23.2 onnxscript==0.7.2 numpy==2.4.6

"$work/venv/bin/python" - <<'PYTHON'
import contextlib
import io
import warnings

import torch
from torch import nn

warnings.simplefilter("ignore")


class Entr(nn.Module):
    def forward(self, p):
        return torch.special.entr(p).sum(-1)


class Xlogy(nn.Module):
    def forward(self, p):
        return -torch.xlogy(p, p).sum(-1)


def outcome(export):
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            export()
        return "exported"
    except Exception as error:
        cause = error.__cause__ or error
        return f"{type(error).__name__}: {type(cause).__name__}: {str(cause).splitlines()[0]}"


p = torch.rand(2, 5).softmax(-1)
torch.testing.assert_close(Entr()(p), Xlogy()(p))
seen = {}
for make in (Entr, Xlogy):
    module = make().eval()
    seen[make.__name__, "torch.export"] = outcome(lambda: torch.export.export(module, (p,)).run_decompositions())
    seen[make.__name__, "torch.onnx.export"] = outcome(
        lambda: torch.onnx.export(module, (p,), dynamo=True, verbose=False)
    )
for (name, how), told in seen.items():
    print(f"{name:<7}{how:<19}{told}")

assert seen["Entr", "torch.export"] == seen["Xlogy", "torch.export"] == "exported"
assert seen["Xlogy", "torch.onnx.export"] == "exported"
refused = "ConversionError: AssertionError: Expected same OpOverload packet, got prim.device != aten.where"
assert seen["Entr", "torch.onnx.export"] == refused, f"the behaviour changed: {seen['Entr', 'torch.onnx.export']}"
print("as described: entr can't be exported to ONNX, xlogy can")
PYTHON
