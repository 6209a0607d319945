"""What training frameworks make of a state dict is read where it is unambiguous, and else refused by name.

Every form is made by the library that writes it (torch's own wrappers), or is laid out as that library documents it.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel

from archiver.members.survey import Survey, survey_members
from archiver.source import Source
from vmap_ensemble.archive.checkpoints import checkpoint_stem, find_checkpoints, read_checkpoint, read_state_dict
from vmap_ensemble.errors import MemberError

MODEL = """from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.classifier = nn.Linear(4, 5)
    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))
"""
WRAPPING = """from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.NAME = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
"""


class Net(nn.Module):
    """As in MODEL."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.classifier = nn.Linear(4, 5)


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    made = Net()
    made.features[1].running_mean.normal_()
    return made.eval()


def survey(folder: Path, *files: str, model: str = MODEL, choice: str | None = None) -> Survey:
    (folder / "model.py").write_text(model)
    sources = [Source(Path(file).stem, folder / file, file) for file in files]
    return survey_members(sources, "model.py", None, folder, False, lambda _: None, choice)


def saved(folder: Path, value: Any, file: str = "a.pt") -> str:
    torch.save(value, folder / file)
    return file


def assert_is(got: dict[str, torch.Tensor], expected: nn.Module) -> None:
    wanted = expected.state_dict()
    assert list(got) == list(wanted)
    for key, value in wanted.items():
        assert got[key].dtype == value.dtype, key
        assert torch.equal(got[key], value), key


def prefixed(model: nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in model.state_dict().items()}


def lightning(state: dict[str, torch.Tensor], **more: Any) -> dict[str, Any]:
    return {
        **{"state_dict": state, "epoch": 1, "global_step": 9, "pytorch-lightning_version": "2.6", "loops": {}},
        **{"callbacks": {}, "optimizer_states": [{"state": {}, "param_groups": []}], "lr_schedulers": []},
        **{"hyper_parameters": {"lr": 0.1}, **more},
    }


def inside(wrap: Any) -> dict[str, torch.Tensor]:
    model = net()
    model.features = wrap(model.features)
    return model.state_dict()


def optimised(model: nn.Module) -> dict[str, Any]:
    optimiser = torch.optim.Adam(model.parameters())
    loss = model.classifier(model.features(torch.rand(2, 3, 5, 5)).mean((2, 3))).sum()
    loss.backward()
    optimiser.step()
    return optimiser.state_dict()


FORMS = {
    "averaged": lambda: AveragedModel(net()).state_dict(),
    "averaged, wrapped": lambda: {"model": AveragedModel(net()).state_dict(), "epoch": 3},
    "averaged, compiled": lambda: AveragedModel(torch.compile(net())).state_dict(),
    "lightning": lambda: lightning(prefixed(net(), "model.")),
    "lightning, net": lambda: lightning(prefixed(net(), "net.")),
    "lightning, two deep": lambda: lightning(prefixed(net(), "model.backbone.")),
    "lightning, compiled": lambda: lightning(prefixed(torch.compile(net()), "model.")),
    "lightning, parallel inside": lambda: lightning(
        {f"model.{key}": v for key, v in inside(nn.DataParallel).items()}
    ),
    "parallel": lambda: {"state_dict": nn.DataParallel(net()).state_dict(), "best": torch.tensor(1.0)},
    "parallel inside": lambda: inside(nn.DataParallel),
    "compiled inside": lambda: inside(torch.compile),
    "both inside": lambda: inside(lambda module: torch.compile(nn.DataParallel(module))),
    "fsdp": lambda: {
        key.replace("features.", "features._fsdp_wrapped_module."): v for key, v in net().state_dict().items()
    },
    "one entry of any name": lambda: {"net": net().state_dict(), "acc": torch.tensor(93.1), "epoch": 4},
    "nested": lambda: {"learner": {"weights": net().state_dict(), "step": 3}, "optimizer": optimised(net())},
    "beside an optimiser": lambda: {"model": net().state_dict(), "optimizer": optimised(net())},
    "torchvision's args": lambda: {"model": net().state_dict(), "args": argparse.Namespace(lr=0.1, name="x")},
    "numpy's best accuracy": lambda: {"state_dict": net().state_dict(), "best": np.float64(0.5), "n": np.int64(3)},
    "the same twice": lambda: {"state_dict": net().state_dict(), "best_state": net().state_dict()},
    "float counters": lambda: {key: v.float() for key, v in net().state_dict().items()},
    "no counters": lambda: {key: v for key, v in net().state_dict().items() if "num_batches" not in key},
}


@pytest.mark.parametrize("form", list(FORMS))
def test_forms_are_the_network_itself(tmp_path: Path, form: str) -> None:
    got = survey(tmp_path, saved(tmp_path, FORMS[form]()))
    assert_is(got.states[0], net())


def test_a_counter_that_an_average_made_fractional_is_cut_as_torch_cuts_it(tmp_path: Path) -> None:
    state = net().state_dict()
    state["features.1.num_batches_tracked"] = torch.tensor(12.7)
    got = survey(tmp_path, saved(tmp_path, state)).states[0]["features.1.num_batches_tracked"]
    reference = net()
    reference.load_state_dict(state)
    assert got.dtype == torch.int64
    assert got.item() == reference.features[1].num_batches_tracked.item() == 12


@pytest.mark.parametrize("name", ["model", "net", "module"])
def test_a_network_that_wraps_another_keeps_its_own_keys(tmp_path: Path, name: str) -> None:
    state = {f"{name}.{key}": v for key, v in nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).state_dict().items()}
    got = survey(tmp_path, saved(tmp_path, state), model=WRAPPING.replace("NAME", name))
    assert {key: value.tolist() for key, value in got.states[0].items()} == {k: v.tolist() for k, v in state.items()}


@pytest.mark.parametrize("suffix", [".ckpt", ".pth.tar", ".tar", ".pkl"])
def test_other_names_of_checkpoints(tmp_path: Path, suffix: str) -> None:
    assert_is(read_state_dict(tmp_path / saved(tmp_path, net().state_dict(), f"best{suffix}")), net())
    assert checkpoint_stem(tmp_path / f"best{suffix}") == "best"


def test_files_that_begin_with_a_dot_are_no_checkpoints(tmp_path: Path) -> None:
    for name in ("b.pt", "a.ckpt", "._a.ckpt", ".hidden.safetensors", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    assert [file.name for file in find_checkpoints([tmp_path])] == ["a.ckpt", "b.pt"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "._a.pt").write_bytes(b"")
    with pytest.raises(MemberError, match="expected a checkpoint or a folder of them"):
        find_checkpoints([tmp_path / "empty"])


def shadow() -> dict[str, Any]:
    return {"decay": 0.9, "num_updates": 3, "shadow_params": [value * 2 for value in net().parameters()]}


TWO = {
    "timm": ({"state_dict": net().state_dict(), "state_dict_ema": net(9).state_dict()}, "state_dict_ema"),
    "torchvision": ({"model": net().state_dict(), "model_ema": AveragedModel(net(9)).state_dict()}, "model_ema"),
    "teacher": ({"student": net().state_dict(), "teacher": net(9).state_dict()}, "teacher"),
    "callback": (
        lightning(prefixed(net(), "model."), callbacks={"EMA": {"ema_state_dict": net(9).state_dict()}}),
        "callbacks.EMA.ema_state_dict",
    ),
    "parameters alone": ({"model": net().state_dict(), "shadow": dict(net(9).named_parameters())}, "shadow"),
    "best": ({"model": net().state_dict(), "best_model": net(9).state_dict()}, "best_model"),
    "in a list": ({"model": net().state_dict(), "snapshots": [net(9).state_dict()]}, "snapshots.0"),
    "beside an optimiser": ({"model": net().state_dict(), "optim_ema": net(9).state_dict()}, "optim_ema"),
    "deepspeed": ({"module": net().state_dict(), "ema": {"module": net(9).state_dict()}}, "ema"),
}


@pytest.mark.parametrize("form", list(TWO))
def test_two_sets_of_weights_need_a_choice(tmp_path: Path, form: str) -> None:
    value, name = TWO[form]
    file = saved(tmp_path, value)
    with pytest.raises(MemberError, match=r"a\.pt: holds several state dicts .*--weights NAME") as error:
        survey(tmp_path, file)
    assert name in str(error.value)
    if form != "parameters alone":
        assert_is(survey(tmp_path, file, choice=name).states[0], net(9))


def test_a_choice_by_a_part_of_the_name(tmp_path: Path) -> None:
    file = saved(tmp_path, TWO["timm"][0])
    assert_is(survey(tmp_path, file, choice="ema").states[0], net(9))
    assert_is(survey(tmp_path, file, choice="state_dict").states[0], net())
    with pytest.raises(MemberError, match=r"--weights average: no entry and no submodule of that name"):
        survey(tmp_path, file, choice="average")


def test_averages_within_an_optimiser_are_found_and_its_own_moments_are_none(tmp_path: Path) -> None:
    """NeMo keeps them there, as a tuple; Adam's moments have the parameters' shapes, too."""
    model = net()
    adam = torch.optim.AdamW(model.parameters(), amsgrad=True)
    model.classifier(torch.ones(1, 4)).sum().backward()
    adam.step()
    moments = {"exp_avg": {name: torch.rand_like(value) for name, value in model.named_parameters()}}
    plain = {"state_dict": net().state_dict(), "optimizer_states": [adam.state_dict()], "optimizer": moments}
    assert_is(survey(tmp_path, saved(tmp_path, plain)).states[0], net())
    average = tuple(value.data for value in net(9).parameters())
    file = saved(tmp_path, {**plain, "optimizer_states": [{"opt": adam.state_dict(), "ema": average}]})
    with pytest.raises(MemberError, match=r"several state dicts \(state_dict, optimizer_states\.0\.ema\)"):
        survey(tmp_path, file)
    assert_is(survey(tmp_path, file, choice="state_dict").states[0], net())


def test_averages_without_names_can_not_be_chosen(tmp_path: Path) -> None:
    file = saved(tmp_path, {"model": net().state_dict(), "ema": shadow()})
    with pytest.raises(MemberError, match=r"holds several state dicts \(model, ema\.shadow_params\)"):
        survey(tmp_path, file)
    with pytest.raises(MemberError, match=r"ema\.shadow_params is a list of tensors without names"):
        survey(tmp_path, file, choice="ema")
    assert_is(survey(tmp_path, file, choice="model").states[0], net())


@pytest.mark.parametrize("other", ["criterion.weight", "train_acc.total"])
def test_a_module_beside_the_network_needs_a_choice(tmp_path: Path, other: str) -> None:
    file = saved(tmp_path, lightning({**prefixed(net(), "model."), other: torch.ones(5)}))
    with pytest.raises(MemberError, match=r"the weights below model fit .*--weights model"):
        survey(tmp_path, file)
    assert_is(survey(tmp_path, file, choice="model").states[0], net())


def test_two_copies_of_the_network_need_a_choice(tmp_path: Path) -> None:
    state = {**prefixed(net(), "online_model."), **prefixed(net(9), "ema_model."), "step": torch.tensor(3)}
    file = saved(tmp_path, state)
    with pytest.raises(MemberError, match=r"below online_model and below ema_model fit"):
        survey(tmp_path, file)
    assert_is(survey(tmp_path, file, choice="ema").states[0], net(9))


def pruned() -> dict[str, torch.Tensor]:
    model = net()
    prune.l1_unstructured(model.classifier, "weight", 0.5)
    return model.state_dict()


def normalised() -> dict[str, torch.Tensor]:
    model = net()
    parametrizations.weight_norm(model.classifier)
    return model.state_dict()


def adapted() -> dict[str, torch.Tensor]:
    return {**net().state_dict(), "classifier.lora_A.default.weight": torch.ones(2, 4)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (pruned, r"these weights are pruned; make that permanent: torch\.nn\.utils\.prune\.remove"),
        (normalised, r"these weights are parametrised"),
        (adapted, r"these are unmerged LoRA weights; merge them"),
        (lambda: {"a": net().state_dict(), "b": net(1).state_dict()}, r"several state dicts \(a, b\)"),
        (lambda: {**net().state_dict(), "x._extra_state": {"scale": 1}}, r"is what get_extra_state gave"),
        (lambda: {"features.module.0.weight": torch.ones(1), "features.0.weight": torch.ones(1)}, r"is missing"),
        (lambda: [net().state_dict()], r"expected a state dict \(name -> tensor\), got list"),
        (lambda: {0: torch.ones(2)}, r"key '0' is Tensor, expected a tensor"),
    ],
)
def test_forms_that_are_refused_say_what_they_are(tmp_path: Path, make, message: str) -> None:
    with pytest.raises(MemberError, match=message):
        survey(tmp_path, saved(tmp_path, make()))


def test_torchscript_is_named(tmp_path: Path) -> None:
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "a.pt"))
    with pytest.raises(MemberError, match=r"a\.pt: a TorchScript file, expected a state dict"):
        read_state_dict(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "said",
    [
        {"class_to_idx": {"dog": 1, "cat": 0}},
        {"id2label": {0: "cat", 1: "dog"}},
        {"label2id": {"cat": 0, "dog": 1}},
        {"classes": ["cat", "dog"]},
        {"meta": {"categories": ("cat", "dog")}},
        {"args": argparse.Namespace(class_names=["cat", "dog"])},
        {"hyper_parameters": {"idx_to_class": {"0": "cat", "1": "dog"}}},
        {"classes": 2, "class_to_idx": {"cat": 0, "dog": 1}},
    ],
)
def test_classes_in_every_form(tmp_path: Path, said: dict[str, Any]) -> None:
    file = saved(tmp_path, {"state_dict": net().state_dict(), **said})
    assert read_checkpoint(tmp_path / file).classes == {0: "cat", 1: "dog"}


def test_a_checkpoint_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    value = {"state_dict": net().state_dict(), "classes": ["dog", "cat"], "class_to_idx": {"cat": 0, "dog": 1}}
    with pytest.raises(MemberError, match="class_to_idx and classes say different things of the classes"):
        read_checkpoint(tmp_path / saved(tmp_path, value))


def test_reading_leaves_the_file_mapped_and_unchanged(tmp_path: Path) -> None:
    file = tmp_path / saved(tmp_path, AveragedModel(net()).state_dict())
    before = copy.copy(file.read_bytes())
    survey(tmp_path, file.name)
    assert file.read_bytes() == before
