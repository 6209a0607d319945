#!/usr/bin/env bash
# torchvision 0.27.1 x safetensors 0.8: weights of MNASNet saved as safetensors can't be loaded again.
#
# A good engineer would guess that load_state_dict(load_file(save_file(model.state_dict()))) loads what it saved, as
# it does for torchvision's other networks. MNASNet reads a version from the state dict's `_metadata`, an attribute of
# the OrderedDict that torch.save keeps and a plain dict, and safetensors, don't: it raises ValueError.
# Seen: "version should be set to 1 or 2 instead of None", also from safetensors.torch.load_model.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.12.1 torchvision==0.27.1 safetensors==0.8.0 numpy==2.4.6

"$work/venv/bin/python" - "$work" <<'PYTHON'
import sys

import torch
from safetensors.torch import load_file, load_model, save_file
from torchvision.models import mnasnet0_5, resnet18

path = f"{sys.argv[1]}/weights.safetensors"


def outcome(load):
    try:
        load()
        return "loads"
    except ValueError as error:
        return f"ValueError: {error}"


seen = {}
for make in (resnet18, mnasnet0_5):
    torch.manual_seed(0)
    model = make(weights=None)
    save_file(model.state_dict(), path)
    seen[make.__name__] = {
        "its own state dict": outcome(lambda: make(weights=None).load_state_dict(model.state_dict())),
        "a plain dict of it": outcome(lambda: make(weights=None).load_state_dict(dict(model.state_dict()))),
        "load_file": outcome(lambda: make(weights=None).load_state_dict(load_file(path))),
        "load_model": outcome(lambda: load_model(make(weights=None), path)),
    }
for name, rows in seen.items():
    for how, told in rows.items():
        print(f"{name:<12}{how:<22}{told}")

refused = "ValueError: version should be set to 1 or 2 instead of None"
assert set(seen["resnet18"].values()) == {"loads"}, "resnet18 was expected to load in every way"
assert seen["mnasnet0_5"]["its own state dict"] == "loads"
for how in ("a plain dict of it", "load_file", "load_model"):
    assert seen["mnasnet0_5"][how] == refused, f"the behaviour changed: {how}: {seen['mnasnet0_5'][how]}"
print("as described: MNASNet can't be loaded from safetensors")
PYTHON
