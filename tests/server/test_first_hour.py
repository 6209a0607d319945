"""The first hour of three users with files of their own, in an empty folder, by the commands that one installs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import transforms
from torchvision.models import resnet50

pytest.importorskip("transformers")

from scripts.private_torchserve import ROOT, TorchServe
from tests.unit.tasks.text.test_encoder_task import CONFIGS, random_members, save_tokenizer
from vmap_ensemble import Ensemble
from vmap_ensemble.client import Client, Refused

PHOTO = ROOT / "data" / "images" / "sample.jpg"
Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A function: words behind `vmap-ensemble` -> what it prints, run in the user's folder; it must succeed."""
    command = Path(sys.executable).parent / "vmap-ensemble"
    monkeypatch.chdir(tmp_path)

    def call(*words: str | Path) -> str:
        done = subprocess.run([command, *words], capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    return call


def save_fold(seed: int, network: nn.Module) -> None:
    """What a trainer of Lightning leaves of one fold."""
    state = {f"model.{key}": tensor for key, tensor in network.state_dict().items()}
    path = Path("runs") / f"fold{seed}" / "best.ckpt"
    path.parent.mkdir(parents=True)
    checkpoint = {"state_dict": state, "epoch": 3, "global_step": 90, "pytorch-lightning_version": "2.6", "loops": {}}
    torch.save({**checkpoint, "hyper_parameters": {"lr": 0.1}, "optimizer_states": [], "callbacks": {}}, path)


def test_a_vision_engineer_serves_lightning_folds(run: Run, tmp_path: Path) -> None:
    for seed in range(2):
        torch.manual_seed(seed)
        save_fold(seed, resnet50(num_classes=10))
    animals = ["ape", "bat", "cat", "dog", "eel", "fox", "gnu", "hen", "ibis", "jay"]
    Path("labels.json").write_text(json.dumps(animals))
    told = run(
        *("archive", "folds", "--handler", "resnet_handler.py", "--architecture", "torchvision:resnet50"),
        *("--members", "runs/*/best.ckpt", "--labels", "labels.json", "--input-shape", "3", "160", "160"),
        "--no-check",  # the next line is one, with a picture
        *(
            "--set",
            'weights={"fold0-best": 2, "fold1-best": 1}',
            "abstain_below_probability=0.99",
            "execution=eager",
        ),
    )
    assert "batches of up to 16" in told
    checked = run("check", "model_store/folds.mar", PHOTO)
    assert "fold0" in checked
    with (
        TorchServe({"ens": tmp_path / "model_store" / "folds.mar"}) as server,
        Client(server.inference_url, "ens") as client,
    ):
        answer = client.predict(PHOTO, detail=True)
        described = server.describe()
    assert answer.label in animals
    assert answer.abstains
    assert [row["name"] for row in answer.body["members"]] == ["fold0-best", "fold1-best"]
    assert described["batchSize"] > 1
    run("predict", "model_store/folds.mar", PHOTO.parent, "--output", "answers.jsonl")
    (row,) = [r for r in map(json.loads, Path("answers.jsonl").read_text().splitlines()) if r["input"] == PHOTO.name]
    assert row["answer"]["prediction"]["label"] == answer.label
    assert row["answer"]["prediction"]["probability"] == pytest.approx(answer.probability, abs=1e-4)


# Small ones of a user's own: torchvision's named sizes are in tests/archive/test_architectures.py.
SMALL = {
    "ConvNeXt": """
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

class Small(ConvNeXt):
    def __init__(self):
        super().__init__([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], num_classes=3, layer_scale=1.0)
""",
    "ViT": """
from torch import nn
from torchvision.models import VisionTransformer

class Small(VisionTransformer):
    def __init__(self):
        super().__init__(32, 8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=3)
        nn.init.normal_(self.heads.head.weight)  # torchvision begins with zeros
""",
}


@pytest.mark.parametrize("kind", SMALL)
def test_a_vision_engineer_brings_another_architecture(kind: str, run: Run) -> None:
    Path("model.py").write_text(SMALL[kind])
    space: dict[str, Any] = {}
    exec(SMALL[kind], space)
    folds = []
    for seed in range(2):
        torch.manual_seed(seed)
        folds.append(space["Small"]().eval())
        save_fold(seed, folds[-1])
    run(
        *("archive", "folds", "--handler", "resnet_handler.py", "--model-file", "model.py:Small", "--no-check"),
        *("--members", "runs/*/best.ckpt", "--input-shape", "3", "32", "32"),
        *("--set", "resize=40", "crop=32", "mean=[0.5,0.5,0.5]", "std=[0.25,0.25,0.25]"),
        *("interpolation=bilinear", "execution=eager"),
    )
    (answer,) = Ensemble.load("model_store/folds.mar").predict([PHOTO.read_bytes()])
    steps = [transforms.Resize(40), transforms.CenterCrop(32), transforms.ToTensor()]
    x = transforms.Compose([*steps, transforms.Normalize([0.5] * 3, [0.25] * 3)])(Image.open(PHOTO).convert("RGB"))
    with torch.inference_mode():
        expected = torch.stack([fold(x[None])[0].softmax(-1) for fold in folds]).mean(0)
    assert answer.body["prediction"]["index"] == int(expected.argmax())
    assert answer.body["prediction"]["probability"] == pytest.approx(float(expected.max()), abs=1e-4)


MODEL = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layer, self.norm = nn.Linear(width, width), nn.BatchNorm1d(width)

    def forward(self, x):
        return x + torch.relu(self.norm(self.layer(x)))


class Sensor(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.Sequential(Block(6), Block(6)), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.blocks(x))
"""


def test_a_file_of_ones_own_with_helper_classes(run: Run) -> None:
    Path("model.py").write_text(MODEL)
    space: dict[str, Any] = {}
    exec(MODEL, space)
    models = {}
    for seed in range(3):
        torch.manual_seed(seed)
        models[f"seed{seed}"] = space["Sensor"]().eval()
        torch.save(models[f"seed{seed}"].state_dict(), f"seed{seed}.pt")
    Path("mine.py").write_text(
        "from vmap_ensemble.base_handler import VmapEnsembleHandler\n\n\nclass Mine(VmapEnsembleHandler):\n    pass\n"
    )
    run(
        *("archive", "sensors", "--handler", "mine.py", "--model-file", "model.py:Sensor", "--input-shape", "6"),
        *("--members", "seed0.pt", "seed1.pt", "seed2.pt", "--set", "execution=eager"),
    )
    x = torch.arange(12.0).reshape(2, 6) / 12
    answers = Ensemble.load("model_store/sensors.mar").predict(list(x), detail=True)
    with torch.inference_mode():
        expected = torch.stack([model(x).softmax(-1) for model in models.values()]).mean(0)
    for row, answer in zip(expected, answers, strict=True):
        assert answer.body["prediction"]["index"] == int(row.argmax())
        assert answer.body["prediction"]["probability"] == pytest.approx(float(row.max()), rel=1e-4)


def test_a_platform_engineer_moves_tenants(run: Run, tmp_path: Path) -> None:
    trained = random_members("sequence_classification", CONFIGS["bert"](num_labels=3), 9)
    trunk = trained["m0"].bert.state_dict()
    names = [f"tenant{number}" for number in range(9)]
    for name, model in zip(names, trained.values(), strict=True):
        model.bert.load_state_dict(trunk)
        model.save_pretrained(tmp_path / "tenants" / name)
        save_tokenizer(tmp_path / "tenants" / name, token_types=True)

    def build(version: str, members: list[str]) -> Path:
        told = run(
            *("archive", "tenants", "--handler", "bert_handler.py", "--version", version, "--output", f"v{version}"),
            *("--members", *(f"tenants/{name}" for name in members)),
            *(["--no-check"] if version != "1.0" else []),  # once is enough here: it takes a process of its own
            *(
                "--set",
                "mode=sequence_classification",
                "require_subset=true",
                "execution=eager",
                "identify_answers=true",
            ),
        )
        assert "identical in all members" in told
        return tmp_path / f"v{version}" / "tenants.mar"

    first = build("1.0", names[:8])
    with TorchServe({"ens": first}) as server, Client(server.inference_url, "ens", timeout_s=30) as client:

        def switch(version: str, members: list[str]) -> None:
            shutil.copy(build(version, members), server.launch.model_store / f"ens-{version}.mar")
            asked = {"url": f"ens-{version}.mar", "model_name": "ens", "initial_workers": "1", "synchronous": "true"}
            manage("post", "/models", params=asked)
            manage("put", f"/models/ens/{version}/set-default")

        def manage(method: str, path: str, **more: Any) -> None:
            reply = httpx.request(method, server.management_url + path, timeout=120, trust_env=False, **more)
            assert reply.status_code == 200, reply.text

        def ask(tenant: str) -> tuple[str, Any]:
            answer = client.predict("a great movie", subset=[tenant])
            return answer.body["archive"]["version"], answer.body["prediction"]

        with pytest.raises(Refused, match="unknown member 'tenant8'; known: tenant0") as refused:
            ask("tenant8")
        assert refused.value.status == 422
        with pytest.raises(Refused, match="expected names of members"):
            client.predict("a great movie")
        version, before = ask("tenant1")
        assert version == "1.0"
        switch("2.0", names)  # a ninth
        assert ask("tenant8")[0] == "2.0"
        assert ask("tenant1")[1]["probability"] == pytest.approx(before["probability"], rel=1e-4)
        switch("3.0", names[1:])  # one less
        with pytest.raises(Refused, match="unknown member 'tenant0'"):
            ask("tenant0")
        manage("put", "/models/ens/2.0/set-default")  # and back
        assert ask("tenant0")[0] == "2.0"
