#!/usr/bin/env bash
# torch-pruning 1.6.1 (torch 2.12.1): beside a grouped convolution the share that is pruned isn't the share asked for.
#
# A good engineer would guess that pruning_ratio 0.25 removes a quarter of the channels, or as near as the groups allow,
# and that a ratio which can't be met is refused or told of. With 64 channels in 32 groups the channels that stay are
# rounded down to a multiple of the groups, for the layer before as well: 0.1 and 0.5 both remove half; 0.6, which leaves
# fewer channels than groups, removes nothing at all. Nothing is raised, warned of or logged. Without groups 0.1, 0.5
# and 0.6 remove 7, 32 and 39 of 64.
# Seen: channels left are 57, 32 and 25 with 1 group; 32, 32 and 64 with 32.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.12.1 torch-pruning==1.6.1 numpy==2.4.6

"$work/venv/bin/python" - <<'PYTHON'
import contextlib
import io
import warnings

import torch
import torch_pruning
from torch import nn

WIDTH = 64


class Block(nn.Module):
    """Two convolutions, the second in groups, as in a ResNeXt."""

    def __init__(self, groups):
        super().__init__()
        self.first = nn.Conv2d(3, WIDTH, 1)
        self.grouped = nn.Conv2d(WIDTH, WIDTH, 3, groups=groups)
        self.classes = nn.Linear(WIDTH, 5)

    def forward(self, x):
        return self.classes(self.grouped(self.first(x).relu()).mean((2, 3)))


def channels_left(groups, ratio):
    torch.manual_seed(0)
    model, example = Block(groups), torch.randn(1, 3, 8, 8)
    said = io.StringIO()
    with warnings.catch_warnings(record=True) as warned, contextlib.redirect_stdout(said):
        warnings.simplefilter("always")
        with contextlib.redirect_stderr(said):
            pruner = torch_pruning.pruner.MagnitudePruner(
                model,
                example,
                importance=torch_pruning.importance.MagnitudeImportance(),
                pruning_ratio=ratio,
                ignored_layers=[model.classes],
            )
            pruner.step()
    model(example)  # what is left is a network that runs
    told = [str(one.message) for one in warned if "prun" in str(one.message).lower()]
    assert not told and not said.getvalue().strip(), (told, said.getvalue())
    assert model.first.out_channels == model.grouped.out_channels
    return model.first.out_channels


seen = {groups: [channels_left(groups, ratio) for ratio in (0.1, 0.5, 0.6)] for groups in (1, 32)}
for groups, left in seen.items():
    print(f"groups {groups:>2}: of {WIDTH} channels pruning_ratio 0.1, 0.5, 0.6 leaves {left}")
assert seen == {1: [57, 32, 25], 32: [32, 32, 64]}, seen
PYTHON
