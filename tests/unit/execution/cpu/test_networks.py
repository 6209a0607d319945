"""The prepared convolutional forward equals the members' own forwards, or refuses and says why."""

import collections

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vmap_ensemble.core.forward import EnsembleForward
from vmap_ensemble.core.members import StackedMembers
from vmap_ensemble.errors import LoadError
from vmap_ensemble.execution.cpu import pack_convolutions, pack_linears, schedule, single_row, winograd
from vmap_ensemble.execution.cpu.kernel_library import load_library
from vmap_ensemble.execution.cpu.member_threads import MemberThreads
from vmap_ensemble.execution.cpu.networks import prepare
from vmap_ensemble.execution.cpu.prepared import PreparedForward
from vmap_ensemble.execution.cpu.schedule import Schedule
from vmap_ensemble.execution.graph import values
from vmap_ensemble.execution.graph.lowered_model import UnsupportedModel

APART = Schedule(False, 1)
needs_kernels = pytest.mark.skipif(load_library() is None, reason="no kernels for this machine")


def leave_to_onednn(monkeypatch):
    """Without the kernels of our own, whose calls can't be counted."""
    monkeypatch.setattr(pack_convolutions, "CONVOLUTION_KERNELS", [pack_convolutions.OneDnnConvolution()])


def joint(members):
    """All of them in one call."""
    return Schedule(True, len(members.names))


class Plain(nn.Module):
    """The published MNIST net, narrower: functional activations and pooling, no batch norm."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 16, 3)
        self.fc1, self.fc2 = nn.Linear(16 * 5 * 5, 12), nn.Linear(12, 10)

    def forward(self, x):
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        x = F.dropout(F.max_pool2d(x, 2), 0.5, self.training)
        x = F.relu(self.fc1(x.view(x.size(0), -1)))
        return F.log_softmax(self.fc2(x), dim=1)


class Residual(nn.Module):
    """Residual sums with and without a projection, so both the in-place and the plain sum run."""

    def __init__(self):
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.a, self.a_norm = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.b, self.b_norm = nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32)
        self.project = nn.Sequential(nn.Conv2d(16, 32, 1, 2, bias=False), nn.BatchNorm2d(32))
        self.relu, self.pool, self.fc = nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Linear(32, 10)

    def forward(self, x):
        x = self.relu(self.stem_norm(self.stem(x)))
        y = self.a_norm(self.a(x))
        y += x
        y = self.relu(y)
        y = self.relu(self.b_norm(self.b(y)) + self.project(y))
        return self.fc(torch.flatten(self.pool(y), 1))


class Deep(nn.Module):
    """Convolutions of 3x3 pixels behind one another: with a norm, a residual sum, pooling, a bias."""

    def __init__(self):
        super().__init__()
        self.stem, self.first, self.norm = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.second, self.third = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 48, 3, padding=(0, 1))
        self.fc = nn.Linear(48, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm(self.first(F.relu(self.stem(x))))), 2)
        x = F.relu(self.second(x) + x)
        return self.fc(self.third(x).mean((2, 3)))


class Shifted(nn.Module):
    """What is added to a convolution has not the sum's shape; or it has, and the convolution has not."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3)
        self.shift = nn.Parameter(torch.randn(1, 16, 1, 1))

    def forward(self, x):
        x = F.relu(self.one(self.stem(x)) + self.shift)
        return self.two(F.adaptive_avg_pool2d(x, 3)) + x


class Mobile(nn.Module):
    """Depthwise, dilated and `same` convolutions, gating, other activations, a norm that can't be folded."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.Hardswish())
        self.depth = nn.Sequential(nn.Conv2d(16, 16, 5, padding=2, groups=16), nn.BatchNorm2d(16), nn.ReLU6())
        self.dilated = nn.Sequential(nn.Conv2d(16, 16, 3, padding="same", dilation=2), nn.SiLU())
        self.even = nn.Conv2d(16, 16, 2, padding="same")
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 16, 1), nn.Sigmoid())
        self.norm, self.scale = nn.BatchNorm2d(16), nn.Parameter(torch.randn(16, 1, 1))
        self.last = nn.Conv2d(16, 10, 1)
        self.drop = nn.Dropout(0.2)

    def forward(self, x):
        x = self.even(self.dilated(self.depth(self.stem(x))))
        x = x * self.gate(x) + 0.5
        x = self.last(torch.relu(self.norm(x)) * self.scale)
        return {"map": x, "logits": self.drop(x).mean((2, 3))}


class Headed(nn.Module):
    """A frozen trunk that all members share, and a head of their own with a convolution."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
        self.head, self.fc = nn.Conv2d(8, 4, 3), nn.Linear(4, 10)

    def forward(self, x):
        return self.fc(self.head(self.trunk(x)).mean((2, 3)))


class Heads(nn.Module):
    """Linear heads on a trunk that all members share."""

    def __init__(self):
        super().__init__()
        self.trunk, self.fc = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), nn.Linear(8, 10)

    def forward(self, x):
        return self.fc(self.trunk(x).mean((2, 3)))


class HeadedResidual(nn.Module):
    """A shared trunk whose value each member's own convolution reads and is added to."""

    def __init__(self):
        super().__init__()
        self.trunk, self.head, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 10)

    def forward(self, x):
        x = self.trunk(x)
        return self.fc(F.relu(self.head(x) + x).mean((2, 3)))


class Patches(nn.Module):
    """The sizes of a convolution's output are used behind the last convolution, and so is a split of it."""

    def __init__(self):
        super().__init__()
        self.project, self.fc = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 6)

    def forward(self, x):
        batch, _, height, width = x.shape
        tokens = self.project(x)
        first, second = tokens.chunk(2, 1)
        hidden = tokens.shape[1]
        tokens = self.fc(tokens.reshape(batch, hidden, (height // 4) * (width // 4)).permute(0, 2, 1))
        return {"tokens": tokens, "gate": torch.sigmoid(first) * second / hidden, "sum": tokens.sum(1)}


class Flat(nn.Module):
    """Flattened values of several positions, whose order the linear layer's columns must follow."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(8 * 6 * 6, 16), nn.ReLU(), nn.Linear(16, 10, bias=False))

    def forward(self, x):
        return F.log_softmax(self.head(self.features(x)), dim=1)


class Stem(nn.Module):
    """As a residual network begins: halved by max pooling, then summed with what was pooled."""

    def __init__(self):
        super().__init__()
        self.stem, self.pool = nn.Conv2d(3, 16, 7, 2, 3), nn.MaxPool2d(3, 2, 1)
        self.a, self.b = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.mean, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(16, 10)

    def forward(self, x):
        x = self.pool(F.relu(self.stem(x)))
        x = F.relu(self.b(F.relu(self.a(x))) + x)
        return self.fc(self.mean(F.max_pool2d(x, 2)).flatten(1))


CASES = {
    "plain": (Plain, (1, 14, 14)),
    "flat": (Flat, (1, 14, 14)),
    "residual": (Residual, (3, 16, 16)),
    "stem": (Stem, (3, 32, 32)),
    "mobile": (Mobile, (3, 20, 20)),
    "patches": (Patches, (3, 16, 16)),
}


def build_members(make, count, shared_prefix=None):
    """Members with weights and batch statistics of their own; keys under the prefix are shared."""
    torch.manual_seed(0)
    models = [make().eval() for _ in range(count)]
    for model in models:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2.0)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.3)
        if shared_prefix is not None:
            own = {k: v for k, v in models[0].state_dict().items() if k.startswith(shared_prefix)}
            model.load_state_dict(own, strict=False)
    states = [model.state_dict() for model in models]
    shared = {k: v for k, v in states[0].items() if shared_prefix is not None and k.startswith(shared_prefix)}
    stacked = {k: torch.stack([state[k] for state in states]) for k in states[0] if k not in shared}
    names = tuple(f"m{index}" for index in range(count))
    return models, StackedMembers(names=names, stacked=stacked, shared=shared)


def run_loop(models, x):
    with torch.no_grad():
        outputs = [model(x) for model in models]
    if isinstance(outputs[0], dict):
        return {key: torch.stack([output[key] for output in outputs]) for key in outputs[0]}
    return torch.stack(outputs)


def assert_equal(got, want):
    if isinstance(want, dict):
        assert list(got) == list(want)
        for key in want:
            assert_equal(got[key], want[key])
        return
    assert got.shape == want.shape
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


class CountCalls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_loop(case, packed, count):
    make, shape = CASES[case]
    models, members = build_members(make, count)
    x = torch.randn(3, *shape)
    forward = prepare(make().eval(), members, x, packed=packed, schedule=APART)
    assert_equal(forward(x), run_loop(models, x))


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("in_one_call", [5, 2])
@pytest.mark.parametrize("case", ["plain", "flat", "residual"])
def test_joined_members_equal_the_loop(case, in_one_call, count):
    make, shape = CASES[case]
    models, members = build_members(make, count)
    schedule = Schedule(True, min(count, in_one_call))
    forward = prepare(make().eval(), members, torch.randn(3, *shape), schedule=schedule)
    for size in (3, 1, 4):
        x = torch.randn(size, *shape)
        assert_equal(forward(x), run_loop(models, x))


@pytest.mark.parametrize("shared", ["head.1.weight", "head.1", "head", "features"])
def test_joined_members_with_layers_in_common(shared):
    models, members = build_members(Flat, 3, shared)
    x = torch.randn(2, 1, 14, 14)
    # Without a convolution of their own nothing is joined.
    schedule = APART if shared == "features" else joint(members)
    assert_equal(prepare(Flat().eval(), members, x, schedule=schedule)(x), run_loop(models, x))


@pytest.mark.parametrize("make", [Headed, HeadedResidual])
def test_joined_heads_read_a_shared_trunk(make):
    models, members = build_members(make, 3, "trunk")
    x = torch.randn(2, 3, 12, 12)
    assert_equal(prepare(make().eval(), members, x, schedule=joint(members))(x), run_loop(models, x))


def test_joined_members_leave_other_steps_to_vmap():
    models, members = build_members(Patches, 3)
    x = torch.randn(2, 3, 16, 16)
    assert_equal(prepare(Patches().eval(), members, x, schedule=joint(members))(x), run_loop(models, x))


def test_joined_members_are_one_call_of_each_step(monkeypatch):
    import vmap_ensemble.execution.cpu.prepared as module

    monkeypatch.setattr(module, "vmap", None)  # every step has its rule: nothing is left for it
    leave_to_onednn(monkeypatch)
    models, members = build_members(Residual, 5)
    x = torch.randn(2, 3, 16, 16)
    forward = prepare(Residual().eval(), members, x, schedule=joint(members))
    with CountCalls() as counted:
        got = forward(x)
    assert_equal(got, run_loop(models, x))
    steps = {name: n for name, n in counted.calls.items() if "mkldnn" in name}
    assert steps == {"mkldnn::_convolution_pointwise": 3, "mkldnn::_convolution_pointwise_": 1}
    assert counted.calls["aten::baddbmm"] == 1


def test_steps_that_mix_channels_before_a_convolution_are_not_joined():
    _, members = build_members(Mobile, 2)
    with pytest.raises(UnsupportedModel, match="can't be joined: its input is neither joined nor shared"):
        prepare(Mobile().eval(), members, torch.randn(1, 3, 20, 20), schedule=joint(members))


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_members_on_threads_keep_their_order(groups):
    models, members = build_members(Residual, 5)
    x = torch.randn(2, 3, 16, 16)
    threads = torch.get_num_threads()
    forward = prepare(Residual().eval(), members, x, schedule=Schedule(False, groups))
    assert forward.schedule == Schedule(False, groups)
    for _ in range(3):
        assert_equal(forward(x), run_loop(models, x))
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("shape", [(1, 3, 16, 16), (7, 3, 16, 16), (2, 3, 33, 21)])
def test_other_sizes_than_the_example(shape):
    models, members = build_members(Residual, 2)
    forward = prepare(Residual().eval(), members, torch.randn(2, 3, 16, 16))
    x = torch.randn(shape)
    assert_equal(forward(x), run_loop(models, x))


def test_input_and_members_stay_as_they_are():
    _, members = build_members(Residual, 2)
    x = torch.randn(2, 3, 16, 16)
    kept, stacked = x.clone(), {key: tensor.clone() for key, tensor in members.stacked.items()}
    forward = prepare(Residual().eval(), members, x)
    first = forward(x)
    assert torch.equal(first, forward(x))
    assert torch.equal(x, kept)
    assert all(torch.equal(members.stacked[key], stacked[key]) for key in stacked)


def test_meta_skeleton_is_enough():
    models, members = build_members(Residual, 2)
    x = torch.randn(2, 3, 16, 16)
    forward = prepare(Residual().eval().to("meta"), members, x)
    assert_equal(forward(x), run_loop(models, x))


def test_batch_norm_and_residual_leave_no_step_of_their_own(monkeypatch):
    leave_to_onednn(monkeypatch)
    _, members = build_members(Residual, 2)
    x = torch.randn(1, 3, 16, 16)
    forward = prepare(Residual().eval(), members, x, schedule=APART)
    with CountCalls() as counted:
        forward(x)
    steps = {name: n for name, n in counted.calls.items() if "mkldnn" in name}
    assert steps == {"mkldnn::_convolution_pointwise": 6, "mkldnn::_convolution_pointwise_": 2}
    assert not any("batch_norm" in name or "relu" in name for name in counted.calls)


@pytest.mark.parametrize("shared_norm", [True, False])
def test_shared_trunk_runs_once(shared_norm):
    models, members = build_members(Headed, 5, "trunk")
    if not shared_norm:  # a norm of each member's own must not turn the shared convolution into M of them
        for key in [key for key in members.shared if key.startswith("trunk.1.")]:
            members.stacked[key] = torch.stack([members.shared.pop(key)] * 5)
        members.stacked["trunk.1.running_mean"] += torch.rand(5, 8)
        for index, model in enumerate(models):
            model.trunk[1].running_mean.copy_(members.stacked["trunk.1.running_mean"][index])
    x = torch.randn(2, 3, 12, 12)
    forward = prepare(Headed().eval(), members, x, schedule=APART)
    assert_equal(forward(x), run_loop(models, x))
    with CountCalls() as counted:
        forward(x)
    assert counted.calls["mkldnn::_convolution_pointwise"] == (2 + 5 if shared_norm else 1 + 5 + 5)


def test_heads_behind_a_shared_trunk_are_one_batched_product():
    models, members = build_members(Heads, 5, "trunk")
    x = torch.randn(2, 3, 12, 12)
    forward = prepare(Heads().eval(), members, x)
    assert_equal(forward(x), run_loop(models, x))
    with CountCalls() as counted:
        forward(x)
    assert counted.calls["mkldnn::_convolution_pointwise"] == 1
    assert counted.calls["vmap_ensemble::run_member"] == 0
    assert counted.calls["aten::bmm"] + counted.calls["aten::mm"] + counted.calls["aten::addmm"] == 1


def test_all_members_equal():
    models, members = build_members(Headed, 3, "")
    x = torch.randn(2, 3, 12, 12)
    forward = prepare(Headed().eval(), members, x)
    got = forward(x)
    want = run_loop([models[0]] * 3, x)
    assert_equal(got, want)


def test_half_precision_without_kernels_of_its_own_is_refused(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: False)
    members = StackedMembers(names=("a",), stacked={"weight": torch.ones(1, 2, 2).half()}, shared={})
    with pytest.raises(UnsupportedModel, match=r"no fast convolution of torch.float16, only of .*torch.float32"):
        prepare(nn.Linear(2, 2).eval(), members, torch.randn(1, 2))


@pytest.mark.parametrize("members", [1, 2, 5])
@pytest.mark.parametrize("shared", [False, True])
def test_large_linear_layers_run_on_packed_weights(monkeypatch, members, shared):
    monkeypatch.setattr(values, "MIN_LINEAR_WEIGHTS", 12 * 400)
    states = [Plain().state_dict() for _ in range(members)]
    stacked = {key: torch.stack([state[key] for state in states]) for key in states[0]}
    whole = {"fc1.weight": stacked.pop("fc1.weight")[0]} if shared else {}
    stack = StackedMembers(tuple(f"m{index}" for index in range(members)), stacked, whole)
    x = torch.randn(3, 1, 14, 14)
    forward = prepare(Plain().eval(), stack, x, schedule=APART)  # else the faster order here, whose reason is another
    assert "and 1 linear layers [onednn: 1 of 2 layers (1 small)]" in forward.reason  # fc2 is
    for batch in (x, x[:1], torch.randn(17, 1, 14, 14)):
        torch.testing.assert_close(forward(batch), EnsembleForward(Plain().eval(), stack).loop(batch))


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="the CPU has no bfloat16")
@pytest.mark.parametrize("case", ["plain", "residual", "mobile"])
def test_bfloat16_is_as_close_to_float32_as_the_plain_loop(case):
    make, shape = CASES[case]
    models, members = build_members(make, 2)
    x, want = torch.randn(4, *shape), None
    half = {key: value.bfloat16() if value.is_floating_point() else value for key, value in members.stacked.items()}
    forward = prepare(make().eval(), StackedMembers(members.names, half, {}), x.bfloat16())
    want, got = run_loop(models, x), forward(x.bfloat16())
    if isinstance(want, dict):
        want, got = want["logits"], got["logits"]
    assert got.dtype == torch.bfloat16
    loop = run_loop([model.bfloat16() for model in models], x.bfloat16())
    loop = loop["logits"] if isinstance(loop, dict) else loop
    error, own = ((y.float() - want).abs().max() / want.abs().max() for y in (got, loop))
    assert error < max(2 * own, 1e-2)


def test_a_shared_value_is_not_overwritten_by_a_members_sum():
    models, members = build_members(HeadedResidual, 3, "trunk")
    x = torch.randn(2, 3, 10, 10)
    assert_equal(prepare(HeadedResidual().eval(), members, x, schedule=APART)(x), run_loop(models, x))


def test_a_model_without_convolutions_is_refused():
    _, members = build_members(lambda: nn.Sequential(nn.Linear(4, 2)), 2)
    with pytest.raises(UnsupportedModel, match="Sequential has no 2-d convolution"):
        prepare(nn.Sequential(nn.Linear(4, 2)).eval(), members, torch.randn(1, 4))


def test_control_flow_on_values_is_refused():
    class Branching(Plain):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)

    _, members = build_members(Branching, 2)
    with pytest.raises(UnsupportedModel, match=r"torch.fx can't trace Branching: .*control flow"):
        prepare(Branching().eval(), members, torch.randn(1, 1, 14, 14))


def test_training_mode_is_refused():
    _, members = build_members(Plain, 2)
    with pytest.raises(LoadError, match="expected a model in eval mode"):
        prepare(Plain().train(), members, torch.randn(1, 1, 14, 14))


def test_a_missing_weight_is_refused():
    _, members = build_members(Plain, 2)
    del members.stacked["conv2.weight"]
    with pytest.raises(LoadError, match=r"no member holds 'conv2.weight', which the architecture has"):
        prepare(Plain().eval(), members, torch.randn(1, 1, 14, 14))


def test_a_model_that_changes_from_call_to_call_is_refused():
    class Noisy(Plain):
        def forward(self, x):
            return super().forward(x + torch.rand_like(x))

    _, members = build_members(Noisy, 2)
    with pytest.raises(UnsupportedModel, match=r"member 'm0': the vmapped forward differs"):
        prepare(Noisy().eval(), members, torch.randn(1, 1, 14, 14))


def test_an_example_that_does_not_fit_is_refused():
    _, members = build_members(Plain, 2)
    with pytest.raises(UnsupportedModel, match="the example doesn't fit the model at its step 'convolve'"):
        prepare(Plain().eval(), members, torch.randn(1, 2, 14, 14))


@pytest.mark.parametrize(
    ("make", "schedule", "expected"), [(Heads, None, 1), (Patches, Schedule(True, 2), 1), (Plain, APART, 0)]
)
def test_steps_without_a_rule_are_one_vmapped_call(monkeypatch, make, schedule, expected):
    import vmap_ensemble.execution.cpu.prepared as module

    models, members = build_members(make, 2, "trunk" if make is Heads else None)
    x = torch.randn(2, *next((shape for known, shape in CASES.values() if known is make), (3, 12, 12)))
    forward = prepare(make().eval(), members, x, schedule=schedule)
    calls = []
    real = module.vmap
    monkeypatch.setattr(module, "vmap", lambda *a, **k: calls.append(1) or real(*a, **k))
    assert isinstance(forward, PreparedForward)
    assert_equal(forward(x), run_loop(models, x))
    assert len(calls) == expected


@pytest.mark.parametrize("schedule", [APART, Schedule(True, 3)])
def test_the_operator_has_the_rule_for_whoever_vmaps_it(monkeypatch, schedule):
    """The rule that the forward calls directly, by way of torch.func.vmap."""
    models, members = build_members(Patches, 3)
    x = torch.randn(2, 3, 16, 16)
    forward = prepare(Patches().eval(), members, x, schedule=schedule)
    monkeypatch.setattr(forward, "_leaves_steps", True)
    assert_equal(forward(x), run_loop(models, x))


@pytest.mark.parametrize("second_copy", [True, False])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_large_linear_layers_of_joined_members_run_on_packed_weights(monkeypatch, count, second_copy):
    """A single row in one call for all members, if its copy of the weights is allowed; more in calls per member."""
    monkeypatch.setattr(values, "MIN_LINEAR_WEIGHTS", 16 * 288)
    monkeypatch.setattr(pack_linears, "MAX_SECOND_COPY", count * 16 * 288 * 4 - (not second_copy))
    models, members = build_members(Flat, count)
    x = torch.randn(3, 1, 14, 14)
    forward = prepare(Flat().eval(), members, x, schedule=joint(members))
    assert "and 1 linear layers [onednn: 1 of 2 layers (1 small)" in forward.reason  # the last one is
    if load_library() is not None:
        told = "single rows: 1 of 1 layers" if second_copy else "0 of 1 layers (1 too large for a second copy)"
        assert told in forward.reason
    for batch in (x, x[:1], torch.randn(17, 1, 14, 14)):
        with CountCalls() as counted:
            got = forward(batch)
        together = second_copy and len(batch) == 1 and load_library() is not None
        assert counted.calls["mkldnn::_linear_pointwise"] == (0 if together else count)
        assert counted.calls["aten::relu"] == 0
        assert_equal(got, run_loop(models, batch))


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("kernels", [True, False])
def test_sums_of_unequal_shapes_are_left_to_the_plain_step(monkeypatch, kernels, count):
    if not kernels:
        monkeypatch.setattr(winograd, "load_library", lambda: None)
    models, members = build_members(Shifted, count)
    x = torch.randn(3, 3, 34, 34)
    assert_equal(prepare(Shifted().eval(), members, x, schedule=APART)(x), run_loop(models, x))


@needs_kernels
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("case", CASES)
def test_without_kernels_of_our_own_it_equals_the_loop(monkeypatch, case, count):
    """Another CPU, or no compiler: everything runs on oneDNN."""
    for module in (winograd, single_row):
        monkeypatch.setattr(module, "load_library", lambda: None)
    make, shape = CASES[case]
    models, members = build_members(make, count)
    x = torch.randn(2, *shape)
    assert_equal(prepare(make().eval(), members, x, schedule=APART)(x), run_loop(models, x))


@needs_kernels
@pytest.mark.parametrize("make_schedule", [lambda members: APART, joint])
def test_convolutions_of_3x3_pixels_are_computed_in_tiles(make_schedule):
    """With the pooling that follows one; every other size than the example's, too."""
    models, members = build_members(Deep, 3)
    x = torch.randn(2, 3, 40, 40)
    forward = prepare(Deep().eval(), members, x, schedule=make_schedule(members))
    assert "winograd: 3 of 4 layers (1 no multiple of " in forward.reason
    assert "onednn: 1 of 1 layers" in forward.reason
    for shape in ((2, 3, 40, 40), (1, 3, 40, 40), (9, 3, 16, 16), (1, 3, 19, 23), (2, 3, 8, 9)):
        batch = torch.randn(*shape)
        with CountCalls() as counted:
            got = forward(batch)
        assert counted.calls["aten::max_pool2d_with_indices"] == counted.calls["aten::maximum"] == 0
        assert_equal(got, run_loop(models, batch))


@pytest.mark.parametrize("fast", [Schedule(False, 1), Schedule(False, 2), Schedule(True, 6), Schedule(True, 3)])
def test_the_fastest_schedule_is_kept(monkeypatch, fast):
    """Each of them wins where its readings are the shortest."""
    models, members = build_members(Plain, 6)
    x = torch.randn(2, 1, 14, 14)

    def read(forward, example, about_s):
        forward(*example)
        return 1.0 if forward.schedule == fast else 1.1

    monkeypatch.setattr(schedule, "time_block", read)
    monkeypatch.setattr(schedule, "BUDGET_S", 600.0)  # a busy machine may take long to build them
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        forward = prepare(Plain().eval(), members, x)
        assert forward.schedule == fast
        assert forward.reason.endswith(str(fast))
        assert_equal(forward(x), run_loop(models, x))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("side", [32, 31])
def test_pooling_is_done_by_maxima_and_its_value_overwritten(side):
    models, members = build_members(Stem, 2)
    x = torch.randn(2, 3, side, side)
    forward = prepare(Stem().eval(), members, x, schedule=APART)
    with CountCalls() as counted:
        got = forward(x)
    assert_equal(got, run_loop(models, x))
    # The stem makes 16 of 31, too; only odd sides are left to PyTorch's own pooling.
    assert counted.calls["aten::max_pool2d_with_indices"] == 0
    assert counted.calls["mkldnn::_convolution_pointwise_"] == len(models)
    odd = torch.randn(2, 3, 29, 29)
    with CountCalls() as counted:
        got = forward(odd)
    assert_equal(got, run_loop(models, odd))
    assert counted.calls["aten::max_pool2d_with_indices"] == len(models)


def test_a_member_that_fails_on_its_thread_fails_the_call():
    threads = MemberThreads(2)

    def fail(job):
        raise ArithmeticError(f"job {job}")

    with pytest.raises(ArithmeticError, match="job"):
        threads.map(fail, [1, 2, 3])
    assert threads.map(lambda job: job * 2, [1, 2, 3]) == [2, 4, 6]
    threads.close()


def test_no_threads_are_refused():
    with pytest.raises(ValueError, match="groups is 0; expected 1 or more"):
        MemberThreads(0)


def test_members_on_their_threads_compute_with_their_share():
    before = torch.get_num_threads()
    threads = MemberThreads(2)
    assert set(threads.map(lambda _: torch.get_num_threads(), range(8))) == {max(1, before // 2)}
    assert torch.get_num_threads() == before
    threads.close()
