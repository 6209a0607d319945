"""Architectures are built by name as torchvision and PyTorch's MNIST example define them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from vmap_ensemble.errors import SettingsError
from vmap_ensemble.models.architecture import SkipRandomFills, build_architecture, current_key, infer_num_classes
from vmap_ensemble.models.mnist import MnistNet


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_0", "mobilenet_v3_small"])
@pytest.mark.parametrize("classes", [None, 7])
def test_torchvision_by_name(name: str, classes: int | None) -> None:
    got = build_architecture(f"torchvision:{name}", classes)
    with torch.device("meta"):
        expected = torchvision.models.get_model(name, weights=None, num_classes=classes or 1000)
    shapes = {key: tuple(tensor.shape) for key, tensor in got.state_dict().items()}
    assert shapes == {key: tuple(tensor.shape) for key, tensor in expected.state_dict().items()}
    assert not any(module.training for module in got.modules())
    assert infer_num_classes(f"torchvision:{name}", shapes) == (classes or 1000)


def test_outputs_equal_torchvisions_with_the_same_weights() -> None:
    torch.manual_seed(0)
    expected = torchvision.models.resnet18(num_classes=3).eval()
    got = build_architecture("torchvision:resnet18", 3)
    got.load_state_dict(expected.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(got(images), expected(images))


def test_buffers_outside_the_checkpoint_get_real_values() -> None:
    with SkipRandomFills():
        got = torchvision.models.swin_t(num_classes=2)
    key = "features.1.0.attn.relative_position_index"
    expected = torchvision.models.swin_t(num_classes=2).get_buffer(key)
    assert torch.equal(got.get_buffer(key), expected)


def test_random_fills_leave_memory_alone() -> None:
    with SkipRandomFills():
        parameter = nn.Parameter(torch.zeros(8))
        nn.init.normal_(parameter)
        nn.init.uniform_(parameter)
        buffer = torch.zeros(8).normal_()
    assert parameter.tolist() == [0.0] * 8
    assert buffer.abs().min() > 0


def test_initialisers_that_draw_until_in_range_end() -> None:
    with SkipRandomFills():
        for garbage in (0.0, 1e9, float("nan")):
            nn.init.trunc_normal_(nn.Parameter(torch.full((64,), garbage)), std=0.02)


def test_mnist_has_the_examples_names_and_shapes() -> None:
    shapes = {key: tuple(tensor.shape) for key, tensor in build_architecture("mnist").state_dict().items()}
    assert shapes == {
        "conv1.weight": (32, 1, 3, 3),
        "conv1.bias": (32,),
        "conv2.weight": (64, 32, 3, 3),
        "conv2.bias": (64,),
        "fc1.weight": (128, 9216),
        "fc1.bias": (128,),
        "fc2.weight": (10, 128),
        "fc2.bias": (10,),
    }
    assert [n for n, _ in MnistNet().named_children()] == [
        *("conv1", "conv2", "dropout1", "dropout2", "fc1", "fc2"),
    ]


def test_mnist_gives_log_probabilities() -> None:
    torch.manual_seed(0)
    output = MnistNet().eval()(torch.randn(3, 1, 28, 28))
    assert output.shape == (3, 10)
    torch.testing.assert_close(output.exp().sum(1), torch.ones(3))


ONE_CLASS = "from torch import nn\nclass Net(nn.Module):\n    def __init__(self, num_classes=2):\n" + (
    "        super().__init__()\n        self.fc = nn.Linear(3, num_classes)\n"
)


@pytest.mark.parametrize("spec", ["model.py", "model.py:Net"])
def test_a_file_of_ones_own(tmp_path: Path, spec: str) -> None:
    (tmp_path / "model.py").write_text(ONE_CLASS)
    got = build_architecture(spec, 5, tmp_path)
    assert got.fc.weight.shape == (5, 3)
    assert not got.training


@pytest.mark.parametrize(
    ("spec", "text", "message"),
    [
        ("torchvision:resnet81", "", r"unknown to torchvision .*; did you mean 'resnet18'\?"),
        (
            "resnet18",
            "",
            r"architecture 'resnet18': expected 'torchvision:NAME', 'transformers:MODE', 'model\.py:ClassName' or",
        ),
        ("other.py", "", r"'other\.py': no such file in the root of the archive"),
        ("../model.py", "", r"no such file in the root of the archive"),
        ("model.py:Gone", ONE_CLASS, r"model\.py: no nn\.Module class 'Gone'; it defines Net"),
        ("model.py", "x = 1\n", r"model\.py: expected one nn\.Module class, got none"),
        ("model.py", ONE_CLASS + "class B(nn.Module):\n    pass\n", r"got Net, B; name the one"),
        ("model.py", "import gone_for_good\n", r"importing it fails \(ModuleNotFoundError: No module"),
        (
            "model.py",
            "from torch import nn\nclass N(nn.Module):\n    def __init__(self, w): pass\n",
            r"can't be built without arguments",
        ),
    ],
)
def test_refusals(tmp_path: Path, spec: str, text: str, message: str) -> None:
    (tmp_path / "model.py").write_text(text)
    with pytest.raises(SettingsError, match=message):
        build_architecture(spec, None, tmp_path)


REGNETS = [
    name for name in torchvision.models.list_models(module=torchvision.models) if name.startswith("regnet_y_400")
]


@pytest.mark.parametrize("name", [*REGNETS, "densenet121", "mnasnet0_5", "googlenet"])
def test_classes_are_counted_for_networks_that_the_meta_device_refuses(name: str) -> None:
    shapes = {
        key: tuple(value.shape) for key, value in build_architecture(f"torchvision:{name}", 6).state_dict().items()
    }
    assert infer_num_classes(f"torchvision:{name}", shapes) == 6


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
@pytest.mark.parametrize("option", ["", ":transform_input"])
def test_without_auxiliary_heads_and_with_the_input_that_weights_want(name: str, option: str) -> None:
    torch.manual_seed(0)
    expected = torchvision.models.get_model(
        name, num_classes=3, init_weights=False, transform_input=bool(option)
    ).eval()
    for parameter in expected.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    got = build_architecture(f"torchvision:{name}{option}", 3)
    kept = {key: value for key, value in expected.state_dict().items() if current_key(f"torchvision:{name}", key)}
    assert len(kept) < len(expected.state_dict())
    got.load_state_dict(kept)
    side = 96 if name == "inception_v3" else 64
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        assert torch.equal(got(images), expected(images))


def test_the_published_keys_of_densenet() -> None:
    key = "features.denseblock1.denselayer2.norm.1.weight"
    assert current_key("torchvision:densenet121", key) == "features.denseblock1.denselayer2.norm1.weight"
    for spec in ("torchvision:resnet18", "model.py"):
        assert current_key(spec, key) == key


@pytest.mark.parametrize("spec", ["torchvision:resnet18:transform_input", "torchvision:googlenet:aux"])
def test_options_of_other_architectures_are_refused(spec: str) -> None:
    with pytest.raises(SettingsError, match="expected nothing after"):
        build_architecture(spec)
