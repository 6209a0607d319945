"""The vmapped forward against a plain loop over torch modules."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from vmap_ensemble.core.forward import EnsembleForward, Forward
from vmap_ensemble.core.members import stack_members
from vmap_ensemble.core.proof import prove_equal
from vmap_ensemble.errors import LoadError
from vmap_ensemble.models.mnist import MnistNet


def compare_with_loop(build, models, x, rtol=1e-5):
    states = {f"m{i}": model.state_dict() for i, model in enumerate(models)}
    forward = EnsembleForward(build().eval(), stack_members(states))
    with torch.inference_mode():
        ours = forward(x)
        plain = torch.stack([model(x) for model in models])
        assert torch.equal(forward.loop(x), plain)
    assert ours.shape == plain.shape
    assert (ours - plain).abs().max() <= rtol * plain.abs().max()
    return forward


@pytest.mark.parametrize("count", [1, 2, 5])
def test_mnist_equals_loop(count, make_model):
    compare_with_loop(MnistNet, [make_model(MnistNet, i) for i in range(count)], torch.randn(3, 1, 28, 28))


@pytest.mark.parametrize(("name", "count"), [("resnet18", 1), ("resnet18", 2), ("resnet18", 5), ("resnet50", 2)])
def test_resnet_equals_loop_with_random_batch_norm_statistics(name, count, make_model):
    def build():
        return torchvision.models.get_model(name, num_classes=7)

    models = [make_model(build, i) for i in range(count)]
    assert not torch.equal(models[0].bn1.running_mean, torch.zeros(64))
    forward = compare_with_loop(build, models, torch.randn(2, 3, 64, 64))
    if count > 1:
        assert torch.equal(forward.members.stacked["bn1.running_var"][1], models[1].bn1.running_var)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_equal_members_are_kept_once(count, make_model):
    models = [make_model(MnistNet, 0)] * count
    forward = compare_with_loop(MnistNet, models, torch.randn(2, 1, 28, 28))
    if count > 1:
        assert forward.members.stacked == {}
    assert forward(torch.randn(2, 1, 28, 28)).shape == (count, 2, 10)


def test_shared_backbone_is_passed_unbatched(make_model):
    models = [make_model(MnistNet, 0), make_model(MnistNet, 1)]
    models[1].conv1.load_state_dict(models[0].conv1.state_dict())
    forward = compare_with_loop(MnistNet, models, torch.randn(2, 1, 28, 28))
    assert set(forward.members.shared) == {"conv1.weight", "conv1.bias"}
    assert forward.members.shared["conv1.weight"].shape == (32, 1, 3, 3)


class Tied(nn.Module):
    """Two layers with one weight, and a buffer that no state dict holds."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0, 4.0]), persistent=False)

    def forward(self, x):
        return {"y": self.second(torch.relu(self.first(x))) * self.scale, "x": x}


@pytest.mark.parametrize("count", [1, 2, 5])
def test_ties_buffers_and_structure(count):
    models = []
    for seed in range(count):
        torch.manual_seed(seed)
        models.append(Tied().eval())
    forward = EnsembleForward(Tied().eval(), stack_members({f"m{i}": m.state_dict() for i, m in enumerate(models)}))
    x = torch.randn(3, 4)
    out = forward(x)
    torch.testing.assert_close(out["y"], torch.stack([m(x)["y"] for m in models]), rtol=1e-5, atol=1e-6)
    assert torch.equal(out["x"], x.expand(count, 3, 4))
    assert forward.model.first.weight is forward.model.second.weight
    assert forward.model.first.weight.is_meta


def test_training_mode_is_refused():
    model = MnistNet().eval()
    model.dropout1.train()
    with pytest.raises(LoadError, match="training mode in dropout1"):
        EnsembleForward(model, stack_members({"a": model.state_dict()}))


def test_missing_parameter_is_named():
    state = MnistNet().state_dict()
    state.pop("fc2.bias")
    with pytest.raises(LoadError, match=r"no member holds 'fc2\.bias'"):
        EnsembleForward(MnistNet().eval(), stack_members({"a": state}))


class Doubled(Forward):
    """The least that a forward must say: its members, a member, and all of them."""

    def __init__(self, members):
        self.members = members

    def member(self, index, x):
        return x * self.members.stacked["scale"][index]

    def __call__(self, x):
        return x * self.members.stacked["scale"][:, None, None]


def test_a_forward_of_ones_own_needs_a_member_and_a_call():
    members = stack_members({"a": {"scale": torch.tensor(2.0)}, "b": {"scale": torch.tensor(3.0)}})
    forward, x = Doubled(members), torch.randn(4, 5)
    assert torch.equal(forward.loop(x), torch.stack([2 * x, 3 * x]))
    assert prove_equal(forward, forward, (x,)).largest_difference == 0.0
    assert (forward.one_vmap, forward.preparation, forward.only_mode) == (None, None, None)
    assert forward.without_packed_weights() is forward


@pytest.mark.parametrize(
    ("model", "convolves"),
    [(MnistNet(), True), (nn.Sequential(nn.ConvTranspose1d(1, 1, 1)), True), (nn.Linear(1, 1), False)],
)
def test_convolutions_are_found(model, convolves):
    forward = EnsembleForward(model.eval(), stack_members({"a": model.state_dict()}))
    assert forward.has_convolutions is convolves
    assert forward.one_vmap is forward
