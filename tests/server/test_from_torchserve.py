"""docs/from_torchserve.md: its lines run, and one archive answers the mean of N archives of image_classifier."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchvision.models import resnet18

from archiver.checking.check import check_archive
from scripts.private_torchserve import ROOT, TorchServe

pytest.importorskip("captum.attr")
pytest.importorskip("transformers")
pytest.importorskip("model_archiver")

from rich.console import Console

from tests.unit.tasks.text.test_encoder_task import CONFIGS, random_members, save_tokenizer

PAGE = (ROOT / "docs" / "from_torchserve.md").read_text(encoding="utf-8")
PACK, IMAGES, CURL, TEXTS = re.findall(r"```bash\n(.*?)```", PAGE, re.S)
LABELS = ["cat", "dog", "bird", "fish", "frog", "crow"]
MODEL = """from torchvision.models.resnet import BasicBlock, ResNet


class Net(ResNet):
    def __init__(self):
        super().__init__(BasicBlock, [2, 2, 2, 2], num_classes=6)
"""
FLAT = {
    **{"model_name": "bert-base-uncased", "mode": "sequence_classification", "do_lower_case": True},
    **{"num_labels": "2", "save_mode": "pretrained", "max_length": "64", "captum_explanation": True},
    **{"embedding_name": "bert", "FasterTransformer": False, "BetterTransformer": False, "model_parallel": False},
}


def shell(text: str, folder: Path) -> None:
    """Lines of the page, with the archiver of this repository; archives go into `folder`/new, loaded elsewhere."""
    python, temporary = Path(sys.executable), folder / "temporary"
    temporary.mkdir(exist_ok=True)
    text = text.replace("./archive.sh ", f"{ROOT}/archive.sh --output new --no-check ")
    environment = {
        "PATH": f"{python.parent}:/usr/local/bin:/usr/bin:/bin",
        "PYTHON": str(python),
        "HOME": str(folder),
        "TMPDIR": str(temporary),  # torch-model-archiver takes the model's name for a folder there
    }
    done = subprocess.run(
        ["bash", "-ec", text], cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    (folder / "old").mkdir()
    (folder / "model.py").write_text(MODEL)
    (folder / "index_to_name.json").write_text(json.dumps(dict(enumerate(LABELS))))
    (folder / "model-config.yaml").write_text("minWorkers: 1\nmaxWorkers: 1\nbatchSize: 4\nmaxBatchDelay: 5\n")
    for seed in range(3):
        torch.manual_seed(seed)
        torch.save(resnet18(num_classes=6).state_dict(), folder / f"seed{seed}.pth")
        shell(PACK.replace("m0", f"m{seed}").replace("seed0", f"seed{seed}"), folder)
    shell(IMAGES, folder)
    return folder


def test_one_archive_answers_the_mean_of_the_others(images: Path) -> None:
    archives = {f"m{seed}": images / "old" / f"m{seed}.mar" for seed in range(3)}
    picture = (ROOT / "data" / "images" / "sample.jpg").read_bytes()
    with TorchServe({**archives, "ens": images / "new" / "ens.mar"}) as server:
        alone = [server.predict(name, content=picture).json() for name in archives]
        words = CURL.replace("http://127.0.0.1:8080", server.inference_url)
        asked = subprocess.run(["bash", "-ec", words], cwd=ROOT, capture_output=True, text=True, check=True)
        member = server.predict(content=picture, headers={"X-Ensemble-Subset": "seed1"}).json()
        assert server.describe()["batchSize"] == 4
        assert server.predict("m0", content=b"no picture").status_code == 503
        assert server.predict(content=b"no picture").status_code == 415
    together = json.loads(asked.stdout)
    assert len(together) == len(member) == 5
    assert member == pytest.approx(alone[1], abs=1e-4)
    for label in set(together).intersection(*alone):
        assert together[label] == pytest.approx(sum(answer[label] for answer in alone) / 3, abs=1e-4)


def test_an_archive_of_the_hugging_face_example_is_a_directory(tmp_path: Path, capsys) -> None:
    (tmp_path / "old").mkdir()
    config = CONFIGS["bert"](num_labels=2)
    for index, model in enumerate(random_members("sequence_classification", config, 2).values()):
        folder = tmp_path / f"made{index}"
        model.save_pretrained(folder)
        save_tokenizer(folder, token_types=True)
        (folder / "setup_config.json").write_text(json.dumps(FLAT))
        (folder / "index_to_name.json").write_text('{"0": "Not Accepted", "1": "Accepted"}')
        (folder / "handler.py").write_text("class TransformersSeqClassifierHandler:\n    pass\n")
        extra = "config.json,tokenizer.json,tokenizer_config.json,setup_config.json,index_to_name.json"
        shell(
            f"torch-model-archiver --model-name t{index} --version 1.0 --serialized-file model.safetensors "
            f"--handler handler.py --extra-files {extra} --export-path ../old",
            folder,
        )
    shell(TEXTS, tmp_path)
    (tmp_path / "text.txt").write_text("great movie")
    check_archive(tmp_path / "new" / "my_bert.mar", tmp_path / "text.txt", Console(width=400), False)
    assert '"label": "Not Accepted"' in capsys.readouterr().out.replace("\n", "")
