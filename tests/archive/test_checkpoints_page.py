"""docs/checkpoints.md: every form is made, every command line and Python block runs, every quoted refusal is said."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torchvision.models import mobilenet_v3_small, resnet18

from archiver.__main__ import main

pytest.importorskip("transformers")
from tests.unit.tasks.text.test_encoder_task import CONFIGS, random_members, save_tokenizer

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "checkpoints.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"(<!-- not run: [^>]*-->\n)?```(bash|python|json)\n(.*?)```", re.S)
SECTIONS = {part.partition("\n")[0]: part for part in re.split(r"^## ", PAGE, flags=re.M)[1:]}
QUOTES = [
    " ".join(quote.replace("\n> ", " ").split()) for quote in re.findall(r"^> `(.*?)`$", PAGE, flags=re.M | re.S)
]
# Blocks that are the contents of a file which the section's commands name.
FILES = {"import timm": "timm_model.py", "class MyHandler": "my_handler.py", '{"mine"': "setup_config.json"}
# Word of a block -> what it needs, which no requirements file has.
NEEDS = {"import timm": "timm", "timm_model.py": "timm", "from peft": "peft"}
BLOCK_CLASS = "from torch import nn\n\n\nclass Block(nn.Linear):\n    pass\n"
NET_CLASS = """

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = Block(3, 2)

    def forward(self, x):
        return self.head(x)
"""
WIDE = "from torch import nn\n\n\nclass Net(nn.Module):\n    def __init__(self, width):\n        super().__init__()\n"
HANDLER = """from vmap_ensemble.base_handler import VmapEnsembleHandler


class MyHandler(VmapEnsembleHandler):
    pass
"""
PHOTOS = "./archive.sh photos --handler resnet_handler.py --architecture torchvision:mobilenet_v3_small --members "
LETTERS = "./archive.sh letters --handler bert_handler.py --members "


def net(seed: int, build: Any = mobilenet_v3_small) -> nn.Module:
    torch.manual_seed(seed)
    return build(num_classes=3)


def save(path: str, value: Any) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path)


def lightning(state: dict[str, Any]) -> dict[str, Any]:
    """As lightning.pytorch's Trainer.save_checkpoint lays it out."""
    return {
        **{"epoch": 1, "global_step": 9, "pytorch-lightning_version": "2.6.6", "state_dict": state, "loops": {}},
        **{"callbacks": {}, "optimizer_states": [{"state": {}, "param_groups": []}], "lr_schedulers": []},
        **{"hparams_name": "kwargs", "hyper_parameters": {"lr": 0.1}},
    }


def make_images() -> None:
    for seed, suffix in enumerate((".pt", ".pth", ".bin")):
        save(f"seeds/{'abc'[seed]}{suffix}", net(seed).state_dict())
    save_file(net(3).state_dict(), "seeds/d.safetensors")
    Path("again").mkdir()
    save("whole/seed0.pt", net(0))
    torch.jit.trace(nn.Linear(2, 2), torch.rand(1, 2)).save("script.pt")
    save("shadow.pt", {"model": net(0).state_dict(), "ema": {"shadow_params": list(net(9).parameters())}})
    save("compiled/seed0.pt", torch.compile(net(0)).state_dict())
    save("parallel/seed1.pt", nn.DataParallel(net(1)).state_dict())
    for seed in range(2):
        model, average = net(seed), AveragedModel(net(seed + 9))
        state = {f"model.{key}": value for key, value in model.state_dict().items()}
        save(f"runs/fold{seed}/best.ckpt", lightning(state))
        save(f"with_loss/fold{seed}/best.ckpt", lightning({**state, "criterion.weight": torch.ones(3)}))
        save(f"swa/seed{seed}.pt", average.state_dict())
        save(f"ema/seed{seed}.pt", {"model": model.state_dict(), "ema": net(seed + 9).state_dict()})
        training = {"optimizer": {}, "epoch": 2, "args": argparse.Namespace(lr=0.1)}
        save(
            f"tv/model_{seed}.pth",
            {"model": model.state_dict(), "model_ema": average.state_dict(), **training},
        )
        # As timm.utils.CheckpointSaver lays it out.
        both = {
            "state_dict": net(seed, resnet18).state_dict(),
            "state_dict_ema": net(seed + 9, resnet18).state_dict(),
        }
        save(f"timm/{seed}/model_best.pth.tar", {"arch": "resnet18", "version": 2, **both, **training})


def make_texts() -> None:
    config = CONFIGS["bert"](num_labels=3)
    for index, model in enumerate(random_members("sequence_classification", config, 2).values()):
        model.save_pretrained(f"hf/seed{index}")
        save(f"states/seed{index}.pt", model.state_dict())
        save(f"merged/seed{index}/pytorch_model.bin", model.state_dict())
        config.save_pretrained(f"merged/seed{index}")
        if index == 0:
            model.save_pretrained("sharded", max_shard_size="20KB")
            model.save_pretrained("base")
            adapted = {f"base_model.{key}.lora_A.default": value for key, value in model.state_dict().items()}
            save("unmerged/seed0.pt", {key.replace(".lora_A.default", ""): v for key, v in adapted.items()} | adapted)
        for folder in (f"hf/seed{index}", f"merged/seed{index}", "sharded", "base"):
            save_tokenizer(Path(folder), token_types=True)
    Path("adapters/seed0").mkdir(parents=True)
    Path("adapters/seed0/adapter_config.json").write_text("{}")


def make_own() -> None:
    for seed in range(2):
        torch.manual_seed(seed)
        save(f"folds/{seed}.pt", {f"head.{key}": value for key, value in nn.Linear(3, 2).state_dict().items()})
    Path("nets").mkdir()
    Path("model.py").write_text(BLOCK_CLASS + NET_CLASS)
    Path("wide.py").write_text(WIDE)
    Path("my_handler.py").write_text(HANDLER)
    Path("nets/layers.py").write_text(BLOCK_CLASS)
    Path("nets/model.py").write_text("from layers import Block\nfrom torch import nn\n" + NET_CLASS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    made = tmp_path_factory.mktemp("checkpoints")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        make_images()
        make_texts()
        make_own()
        yield made


def run(line: str) -> int:
    """One line of the page; the archive is loaded elsewhere, which takes seconds."""
    words = shlex.split(line.removeprefix("./archive.sh "))
    config = [] if "--config" in words else ["--config", "none.json"]
    return main([*words, *config, "--no-check", "--force", "--output", "store"])


def commands(text: str) -> list[str]:
    return text.replace("\\\n", " ").strip().splitlines()


def archived(name: str) -> dict[str, dict[str, torch.Tensor]]:
    """Member -> its whole state."""
    with zipfile.ZipFile(f"store/{name}.mar") as file:
        parts = {Path(n).stem: load(file.read(n)) for n in file.namelist() if n.startswith("members/")}
    shared = parts.pop("shared", {})
    return {member: {**shared, **state} for member, state in parts.items()}


@pytest.mark.parametrize("title", SECTIONS)
def test_blocks_of_a_section_run_as_written(folder: Path, title: str) -> None:
    for not_run, language, text in BLOCK.findall(SECTIONS[title]):
        file = next((name for start, name in FILES.items() if start in text), None)
        if any(word in text and find_spec(package) is None for word, package in NEEDS.items()):
            continue
        if file is not None:
            Path(file).write_text(text)
            if file == "timm_model.py":
                import timm

                for seed in range(2):
                    model = timm.create_model("vit_tiny_patch16_224", num_classes=3)
                    save(f"vit/{seed}/last.pth.tar", {"arch": "vit_tiny", "state_dict": model.state_dict()})
        elif language == "python":
            if "peft" in text:
                save_adapter()
            exec(compile(text, title, "exec"), {"__name__": "page"})
        elif language == "bash" and not not_run:
            for line in commands(text):
                assert run(line) == 0, line


def save_adapter() -> None:
    import peft
    from transformers import AutoModelForSequenceClassification

    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    peft.get_peft_model(AutoModelForSequenceClassification.from_pretrained("base"), config).save_pretrained(
        "adapters/seed0"
    )


PICKED = {
    "ema --weights ema": 9,
    "ema --weights model": 0,
    "'tv/*.pth' --weights model_ema": 9,
    "swa": 9,
    "'runs/*/best.ckpt'": 0,
    "'with_loss/*/best.ckpt' --weights model": 0,
    "compiled/seed0.pt parallel/seed1.pt": 0,
}


@pytest.mark.parametrize("members", PICKED)
def test_the_weights_that_the_page_says_are_archived(folder: Path, members: str) -> None:
    assert run(PHOTOS + members) == 0
    for seed, state in enumerate(archived("photos").values()):
        for key, value in net(seed + PICKED[members]).state_dict().items():
            assert torch.equal(state[key], value), key


def test_folds_are_told_apart_by_their_folders(folder: Path) -> None:
    assert run(PHOTOS + "'runs/*/best.ckpt'") == 0
    assert list(archived("photos")) == ["fold0-best", "fold1-best"]
    assert "these members are `fold0-best` and `fold1-best`" in PAGE


# A part of the quote -> what is refused so.
REFUSED = {
    "a.pt: key 'conv1.weight'": "./archive.sh photos --handler resnet_handler.py --members seeds/a.pt",
    "holds more than weights": PHOTOS + "whole/seed0.pt",
    "a TorchScript file": PHOTOS + "script.pt",
    "the weights below model fit": PHOTOS + "'with_loss/*/best.ckpt'",
    "several state dicts (state_dict, state_dict_ema)": (
        "./archive.sh birds --handler resnet_handler.py --members 'timm/*/model_best.pth.tar'"
    ),
    "--weights average": PHOTOS + "ema --weights average",
    "as torch_ema saves them": PHOTOS + "shadow.pt --weights ema",
    "an adapter (adapter_config.json)": LETTERS + "adapters/seed0",
    "unmerged LoRA": LETTERS + "unmerged --pretrained hf/seed0",
    "unknown weights": PHOTOS + "torchvision:ResNet50_Weights.IMAGENET1K_V3",
    "its head has never been trained": LETTERS + "hf --set mode=token_classification",
    "its weights are sharded": LETTERS + "sharded",
    "expected one nn.Module class": "./archive.sh mine --handler my_handler.py --model-file model.py --members folds",
    "can't be built without arguments": (
        "./archive.sh mine --handler my_handler.py --model-file wide.py:Net --members folds"
    ),
}


@pytest.mark.parametrize("quote", QUOTES)
def test_refusals_are_those_that_are_quoted(
    folder: Path, quote: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    (line,) = [line for part, line in REFUSED.items() if part in quote]
    assert run(line) == 1
    assert quote in capsys.readouterr().err


def test_every_row_of_the_table_leads_to_a_section() -> None:
    targets = set(re.findall(r"^\| \[[^]]*\]\(#([^)]*)\)", PAGE, flags=re.M))
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in SECTIONS}
    assert targets == anchors
