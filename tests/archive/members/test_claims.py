"""What members say of their classes and preprocessing must agree, and is what is served."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torchvision

from archiver.members.claims import (
    claimed_architecture,
    claimed_classes,
    claimed_transforms,
    note_on_input,
    stage_labels,
)
from archiver.source import Source
from tests.archive.conftest import Project, tiny_state
from vmap_ensemble.errors import ArchiveError


def by_weights(*names: str) -> list[Source]:
    return [Source(name, Path(name), name, None, name) for name in names]


FILE = Source("mine", Path("mine.pt"), "mine.pt")
PETS = {0: "cat", 1: "dog"}


@pytest.mark.parametrize(
    "name", ["MobileNet_V2_Weights.IMAGENET1K_V1", "RegNet_Y_16GF_Weights.IMAGENET1K_SWAG_E2E_V1"]
)
def test_weights_name_their_own_transforms(name: str) -> None:
    got = claimed_transforms([FILE, *by_weights(name)])
    assert got == name
    assert repr(torchvision.models.get_weight(got).transforms()) == repr(
        torchvision.models.get_weight(name).transforms()
    )


def test_a_default_is_called_by_its_own_name() -> None:
    assert claimed_transforms(by_weights("ResNet50_Weights.DEFAULT")) == "ResNet50_Weights.IMAGENET1K_V2"


def test_files_say_nothing_of_transforms() -> None:
    assert claimed_transforms([FILE]) is None


def test_weights_that_want_different_images_are_refused() -> None:
    sources = by_weights("MobileNet_V2_Weights.IMAGENET1K_V1", "MobileNet_V2_Weights.IMAGENET1K_V2")
    with pytest.raises(
        ArchiveError, match=r"IMAGENET1K_V2 wants other transforms .*resize_size \[232\] instead of \[256"
    ):
        claimed_transforms(sources)
    assert claimed_transforms([*by_weights("ResNet50_Weights.IMAGENET1K_V1", "ResNet18_Weights.IMAGENET1K_V1")])


@pytest.mark.parametrize(
    ("name", "weights"),
    [("inception_v3", "Inception_V3_Weights.IMAGENET1K_V1"), ("googlenet", "GoogLeNet_Weights.IMAGENET1K_V1")],
)
def test_the_input_that_torchvisions_weights_want(name: str, weights: str) -> None:
    spec = f"torchvision:{name}"
    assert claimed_architecture(spec, by_weights(weights)) == f"{spec}:transform_input"
    assert claimed_architecture(f"{spec}:transform_input", [FILE]) == f"{spec}:transform_input"
    assert claimed_architecture(spec, [FILE]) == spec
    assert "transform_input is off" in str(note_on_input(spec))
    assert note_on_input(f"{spec}:transform_input") is None
    with pytest.raises(ArchiveError, match=r"whether the other members do, their files don't say"):
        claimed_architecture(spec, [FILE, *by_weights(weights)])


def test_other_architectures_have_no_such_input() -> None:
    weights = by_weights("ResNet18_Weights.IMAGENET1K_V1")
    assert claimed_architecture("torchvision:resnet18", weights) == "torchvision:resnet18"
    assert note_on_input("torchvision:resnet18") is None


def test_classes_that_agree() -> None:
    other = Source("other", Path("other.pt"), "other.pt")
    assert claimed_classes([FILE, other], [PETS, None], 2) == PETS
    assert claimed_classes([FILE, other], [PETS, dict(PETS)], None) == PETS
    assert claimed_classes([FILE, other], [None, None], 2) is None
    assert claimed_classes([FILE], [PETS], 1) == PETS


def test_classes_that_differ_or_do_not_fit_are_refused() -> None:
    other = Source("other", Path("other.pt"), "other.pt")
    with pytest.raises(
        ArchiveError, match="member 'other': its classes are not those of 'mine': 0 is 'dog', there 'cat'"
    ):
        claimed_classes([FILE, other], [PETS, {0: "dog", 1: "cat"}], 2)
    with pytest.raises(
        ArchiveError, match="member 'mine': its checkpoint: 2 labels, the members have 5 classes; give"
    ):
        claimed_classes([FILE], [PETS], 5)
    weights = by_weights("ResNet18_Weights.IMAGENET1K_V1")
    with pytest.raises(ArchiveError, match="its classes are not those of 'mine': 0 is 'tench', there 'cat'"):
        claimed_classes([FILE, *weights], [PETS, None], None)


def test_labels_are_staged_as_an_archive_has_them(tmp_path: Path) -> None:
    given = tmp_path / "given.json"
    given.write_text('["cat", "dog"]')
    staged = stage_labels(given, None, 2, tmp_path)
    assert staged is not None
    assert json.loads(staged.read_text()) == {"0": "cat", "1": "dog"}
    given.write_text('{"0": ["n1", "cat"], "1": ["n2", "dog"]}')
    assert stage_labels(given, {0: "x", 1: "y"}, 2, tmp_path) == given
    assert stage_labels(None, None, 2, tmp_path) is None


def test_an_archive_gets_the_classes_of_its_checkpoints(project: Project) -> None:
    for seed in range(2):
        project.save(f"m{seed}.pt", {"state_dict": tiny_state(seed), "class_to_idx": {"dog": 1, "cat": 0}})
    assert project.run("tiny") == 0
    assert json.loads((project.unpack() / "index_to_name.json").read_text()) == {"0": "cat", "1": "dog"}


def test_checkpoints_with_other_classes_are_no_ensemble(project: Project, capsys) -> None:
    for seed, names in enumerate((["cat", "dog"], ["dog", "cat"])):
        project.save(f"m{seed}.pt", {"state_dict": tiny_state(seed), "classes": names})
    assert project.run("tiny") == 1
    assert "member 'm1': its classes are not those of 'm0'" in capsys.readouterr().err
    assert project.leftovers() == []


def test_a_choice_of_weights_from_block_and_command_line(project: Project, capsys) -> None:
    for seed in range(2):
        project.save(f"m{seed}.pt", {"model": tiny_state(seed), "model_ema": tiny_state(seed + 5)})
    assert project.run("tiny") == 1
    assert "m0.pt: holds several state dicts (model, model_ema)" in capsys.readouterr().err
    assert project.run("tiny", "--weights", "ema") == 0
    project.block(checkpoint_weights="model")
    assert project.run("tiny", "--force") == 0
    assert "checkpoint_weights" not in json.loads((project.unpack() / "setup_config.json").read_text())


@pytest.mark.parametrize("form", [["cat", "dog", "cow"], {"1": "cat", "2": "dog"}, {"0": 1, "1": 2}])
def test_labels_of_the_wrong_count_or_form_are_refused(project: Project, form, capsys) -> None:
    (project.folder / "labels.json").write_text(json.dumps(form))
    project.block(labels="labels.json")
    assert project.run("tiny") == 1
    error = capsys.readouterr().err
    assert error.startswith("archive: labels.json: ")
    assert error.count("\n") == 1


def test_a_module_beside_the_network_of_torchvision_is_named(project: Project, capsys) -> None:
    net = torchvision.models.squeezenet1_1(num_classes=3)
    state = {f"model.{key}": value for key, value in net.state_dict().items()}
    project.save("m0.pt", {"state_dict": {**state, "criterion.weight": net.classifier[1].bias}})
    project.block(
        model_file=None, input_shape=[3, 64, 64], members=["m0.pt"], architecture="torchvision:squeezenet1_1"
    )
    assert project.run("tiny") == 1
    assert "--weights model (key 'checkpoint_weights') takes those below model alone" in capsys.readouterr().err
    assert project.run("tiny", "--weights", "model") == 0
    assert json.loads((project.unpack() / "setup_config.json").read_text())["num_classes"] == 3
