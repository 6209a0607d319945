"""How images are prepared, as members say it: beside them, or in their checkpoints."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models import squeezenet1_1

from archiver.members.preprocessing import read_form
from tests.archive.conftest import Project
from vmap_ensemble.ensemble import Ensemble
from vmap_ensemble.errors import ArchiveError

OURS = {"resize": 70, "crop": [64, 64], "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2], "interpolation": "bicubic"}
TIMM = {
    "architecture": "squeezenet",
    "pretrained_cfg": {
        "input_size": [3, 224, 224],
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    },
}
VIT = {
    "do_resize": True,
    "size": {"height": 224, "width": 224},
    "resample": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "do_normalize": True,
    "rescale_factor": 0.00392156862745098,
}


def test_known_forms() -> None:
    assert read_form(OURS, "x") == OURS
    assert read_form({"crop_size": (64, 64), "resize_size": [70]}, "x") == {"crop": [64, 64], "resize": [70]}
    assert read_form(TIMM, "x") == {
        "resize": 256,
        "crop": [224, 224],
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "interpolation": "bicubic",
    }
    rest = {key: TIMM["pretrained_cfg"][key] for key in ("input_size", "mean", "std")}
    assert read_form({"pretrained_cfg": rest}, "x")["resize"] == 256  # timm's own defaults: 0.875, bicubic
    assert read_form({"pretrained_cfg": rest}, "x")["interpolation"] == "bicubic"
    assert read_form({**OURS, "antialias": True}, "x") == OURS
    assert read_form(VIT, "x") == {
        "resize": [224, 224],
        "crop": [224, 224],
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": "bilinear",
    }
    resnet = {
        **VIT,
        "size": {"shortest_edge": 256},
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
    }
    assert (read_form(resnet, "x")["resize"], read_form(resnet, "x")["crop"]) == (256, [224, 224])
    convnext = {**VIT, "size": {"shortest_edge": 224}, "crop_pct": 0.875}
    assert (read_form(convnext, "x")["resize"], read_form(convnext, "x")["crop"]) == (256, [224, 224])
    large = {**VIT, "size": {"shortest_edge": 384}, "crop_pct": 0.875}
    assert (read_form(large, "x")["resize"], read_form(large, "x")["crop"]) == ([384, 384], [384, 384])
    plain = {**VIT, "do_normalize": False}
    assert (read_form(plain, "x")["mean"], read_form(plain, "x")["std"]) == ([0.0] * 3, [1.0] * 3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"means": [1]}, "unknown key 'means'; expected resize"),
        ([1], "expected an object, got list"),
        ({**VIT, "rescale_factor": 1.0}, "rescale_factor 1.0 can't be had"),
        ({**VIT, "do_rescale": False}, "can't be left out"),
        ({**VIT, "size": {"shortest_edge": 224}}, "without do_center_crop"),
        ({"pretrained_cfg": {"mean": [0.5] * 3}}, "no key 'input_size'"),
        ({"pretrained_cfg": {**TIMM["pretrained_cfg"], "crop_mode": "squash"}}, "crop_mode 'squash' can't be had"),
        ({"pretrained_cfg": {**TIMM["pretrained_cfg"], "input_size": [3, 256, 128]}}, "input_size 256x128"),
        ({"pretrained_cfg": {**TIMM["pretrained_cfg"], "interpolation": "random"}}, "interpolation: expected one of"),
        ({"pretrained_cfg": {**TIMM["pretrained_cfg"], "mean": [0.5]}}, "mean: expected red, green and blue"),
        ({**OURS, "antialias": False}, "antialias false can't be had"),
    ],
)
def test_what_can_not_be_had_is_one_line(values: Any, message: str) -> None:
    with pytest.raises(ArchiveError, match=message):
        read_form(values, "x")


@pytest.fixture
def photos(project: Project) -> Project:
    for seed in range(2):
        torch.manual_seed(seed)
        state = squeezenet1_1(num_classes=3).state_dict()
        project.save(f"runs/{seed}/best.pt", {"state_dict": state})
    project.block(
        handler="resnet_handler.py",
        model_file=None,
        input_shape=None,
        architecture="torchvision:squeezenet1_1",
        members=["runs/*/best.pt"],
    )
    return project


def settings_of(project: Project) -> dict[str, Any]:
    with zipfile.ZipFile(project.mar) as archive:
        return json.loads(archive.read("setup_config.json"))


def write(folder: Path, name: str, values: Any) -> None:
    (folder / name).write_text(json.dumps(values))


def test_a_file_beside_a_member_is_read(photos: Project, capsys: pytest.CaptureFixture[str]) -> None:
    write(photos.folder / "runs/0", "preprocessing.json", OURS)
    assert photos.run("tiny") == 0
    assert "images are prepared as the members say: resize 70" in capsys.readouterr().out
    assert {key: settings_of(photos)[key] for key in OURS} == OURS
    write(photos.folder / "runs/1", "preprocessing.json", {**OURS, "crop": [32, 32]})
    assert photos.run("tiny", "--force") == 1
    assert "member '1-best': its preprocessing is not that of '0-best': crop" in capsys.readouterr().err
    assert photos.run("tiny", "--force", "--set", "crop=48") == 0  # that key is decided, and the others agree
    assert (settings_of(photos)["crop"], settings_of(photos)["resize"]) == (48, 70)
    (photos.folder / "runs/1/preprocessing.json").unlink()
    assert photos.run("tiny", "--force", "--set", "mean=[0.1,0.2,0.3]") == 0
    assert settings_of(photos)["mean"] == [0.1, 0.2, 0.3]
    assert settings_of(photos)["crop"] == [64, 64]


def test_a_checkpoints_own_entry_is_read_and_transforms_win(photos: Project) -> None:
    for seed in range(2):
        torch.manual_seed(seed)
        state = squeezenet1_1(num_classes=3).state_dict()
        photos.save(f"runs/{seed}/best.pt", {"state_dict": state, "preprocessing": OURS})
    assert photos.run("tiny") == 0
    assert settings_of(photos)["interpolation"] == "bicubic"
    assert photos.run("tiny", "--force", "--set", "transforms=ResNet18_Weights.IMAGENET1K_V1") == 0
    assert "interpolation" not in settings_of(photos)


def test_other_peoples_files_say_nothing(photos: Project) -> None:
    write(photos.folder / "runs/0", "config.json", {"lr": 0.1})
    (photos.folder / "runs/1/config.json").write_text("no json")
    assert photos.run("tiny") == 0
    assert "mean" not in settings_of(photos)
    write(photos.folder / "runs/1", "config.json", TIMM)
    assert photos.run("tiny", "--force") == 0
    assert settings_of(photos)["resize"] == 256


def test_a_network_of_ones_own_takes_photos(project: Project) -> None:
    (project.folder / "net.py").write_text(
        "from torch import nn\nclass Net(nn.Sequential):\n    def __init__(self):\n"
        "        super().__init__(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))\n"
    )
    for seed in range(2):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        project.save(f"n{seed}.pt", net.state_dict())
    five = [f"{key}={json.dumps(value)}" for key, value in OURS.items()]
    arguments = [
        "tiny",
        "--handler",
        "resnet_handler.py",
        "--model-file",
        "net.py:Net",
        "--members",
        "n0.pt",
        "n1.pt",
    ]
    project.block(model_file=None, input_shape=None)
    assert project.run(*arguments, "--set", *five) == 0
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 100, 3), dtype=np.uint8))
    (answer,) = Ensemble.load(project.mar, execution="eager").predict([image])
    pixels = torch.from_numpy(np.asarray(image.resize((77, 70), Image.Resampling.BICUBIC), dtype=np.float32) / 255)
    cut = ((pixels - 0.5) / 0.2).permute(2, 0, 1)[:, 3:67, 6:70]
    with torch.inference_mode():
        logits = []
        for seed in range(2):
            net.load_state_dict(torch.load(project.folder / f"n{seed}.pt"))
            logits.append(net(cut[None]))
        own = torch.stack(logits).softmax(-1).mean(0)[0]
    assert answer.body["prediction"]["probability"] == pytest.approx(own.max().item(), abs=1e-4)
