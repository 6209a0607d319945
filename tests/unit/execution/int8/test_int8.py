"""8-bit steps equal their definition to one step of their scale, and 8-bit members stay close to float32's."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.unit.execution.cpu.test_networks import APART, CASES, Headed, build_members
from vmap_ensemble.archive.precision import Precision
from vmap_ensemble.core.proof import prove_equal
from vmap_ensemble.errors import LoadError
from vmap_ensemble.execution.cpu.onednn import products_saturate
from vmap_ensemble.execution.graph.lowered_model import UnsupportedModel
from vmap_ensemble.execution.graph.steps import ACTIVATIONS
from vmap_ensemble.execution.int8 import kernels
from vmap_ensemble.execution.int8 import steps as q8
from vmap_ensemble.execution.int8.calibration import calibrate
from vmap_ensemble.execution.int8.forward import QuantisedForward, quantise_forward

CONVOLUTIONS = {
    "3x3": (8, 16, 3, [[1, 1], [1, 1], [1, 1], 1]),
    "first": (1, 8, 3, [[0, 0], [1, 1], [1, 1], 1]),
    "stride": (8, 16, 3, [[1, 1], [2, 2], [1, 1], 1]),
    "1x1": (16, 8, 1, [[0, 0], [1, 1], [1, 1], 1]),
    "dilated": (8, 8, 3, [[2, 2], [1, 1], [2, 2], 1]),
    "grouped": (8, 16, 3, [[1, 1], [1, 1], [1, 1], 4]),
    "depthwise": (16, 16, 5, [[2, 2], [1, 1], [1, 1], 16]),
}


def random_layer(case, activation, x_low=-1.0, other=None):
    """A layer with random numbers, its 8-bit input, and its exact result in float64 before it is 8 bits again."""
    inputs, outputs, size, (padding, stride, dilation, groups) = CONVOLUTIONS[case]
    torch.manual_seed(0)
    weight, scale = q8.quantise_weight(torch.randn(outputs, inputs // groups, size, size) * 0.2)
    into = q8.scale_of_range(x_low, 2.0)
    x = torch.randint(0, 256, (3, inputs, 12, 12), dtype=torch.uint8)
    bias = torch.randn(outputs)
    rows = scale.double()[:, None, None, None]
    exact = (x.double() - into.zero_point) * into.scale
    exact = F.conv2d(exact, weight.double() * rows, bias.double(), stride, padding, dilation, groups)
    residual = None
    if other is not None:
        residual = torch.randint(0, 256, exact.shape, dtype=torch.uint8)
        exact = exact + (residual.double() - other.zero_point) * other.scale
    exact = ACTIVATIONS[activation][0](exact)
    output = q8.scale_of_range(exact.min().item() * 0.9, exact.max().item() * 0.9)  # so that some are clipped
    return q8.Layer(weight, scale, bias, into, output, other), x, residual, exact


def steps_apart(got, exact, scale):
    """Largest distance to the exact value, clipped to the range, in steps of the scale."""
    steps = (exact / scale.scale + scale.zero_point).clamp(0, 255)
    return (got.double() - steps).abs().max().item()


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("case", list(CONVOLUTIONS))
def test_a_convolution_is_its_definition_to_half_a_step(case, activation):
    layer, x, _, exact = random_layer(case, activation)
    settings = CONVOLUTIONS[case][3]
    packed = kernels._pack_layer(layer, settings, list(x.shape))
    x = x.contiguous(memory_format=torch.channels_last)
    for got in (q8.convolve_u8(x, layer, settings, activation), kernels._convolve(x, packed, settings, activation)):
        assert got.dtype == torch.uint8
        assert steps_apart(got, exact, layer.output) <= 0.501  # 0.5 is rounding; 0.001 float32's own


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("low", [0.0, -1.5])
def test_a_residual_sum_is_its_definition_and_spares_the_residual_unless_told(low, activation):
    layer, x, residual, exact = random_layer("3x3", activation, other=q8.scale_of_range(low, 1.0))
    settings = CONVOLUTIONS["3x3"][3]
    packed = kernels._pack_layer(layer, settings, list(x.shape))
    x, residual = (t.contiguous(memory_format=torch.channels_last) for t in (x, residual))
    before = residual.clone()
    plain = q8.convolve_add_u8(x, residual, layer, settings, activation)
    kept = kernels._convolve_add(x, residual, packed, settings, activation)
    assert torch.equal(residual, before)
    in_place = kernels._convolve_add_in_place(x, residual, packed, settings, activation)
    for got in (plain, kept, in_place):
        assert steps_apart(got, exact, layer.output) <= 0.501
    # Whether it lies where the residual did is oneDNN's affair, and differs between versions of torch.


def test_a_linear_layer_gives_float32_of_its_8_bit_numbers():
    torch.manual_seed(0)
    weight, scale = q8.quantise_weight(torch.randn(20, 40))
    into, x, bias = q8.scale_of_range(-1.0, 3.0), torch.randint(0, 256, (5, 40), dtype=torch.uint8), torch.randn(20)
    layer = q8.Layer(weight, scale, bias, into)
    exact = F.linear((x.double() - into.zero_point) * into.scale, weight * scale.double()[:, None], bias.double())
    packed = kernels._pack_layer(layer, None, [5, 40])
    for got in (q8.linear_u8(x, layer), kernels._linear(x, packed)):
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [[2, 2, 0, 1, False], [(3, 3), 2, 1, 1, False], [3, 2, 0, 1, True]])
def test_max_pooling_of_8_bit_numbers_is_that_of_torch(settings):
    x = torch.randint(0, 256, (2, 16, 11, 11), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    pairs = [kernels._pair(size) for size in settings[:4]] + settings[4:]
    want = F.max_pool2d(x.double(), *settings)
    assert torch.equal(q8.max_pool_u8(x, settings).double(), want)
    assert torch.equal(kernels._max_pool(x, pairs).double(), want)


@pytest.mark.parametrize(("low", "high"), [(0.0, 6.0), (-2.0, 3.0), (1.0, 2.0), (-3.0, -1.0), (0.0, 0.0)])
def test_a_scale_holds_its_range_and_zero_exactly(low, high):
    scale = q8.scale_of_range(low, high)
    ends = q8.dequantise(q8.quantise(torch.tensor([low, 0.0, high]), scale), scale)
    torch.testing.assert_close(ends, torch.tensor([low, 0.0, high]), rtol=0, atol=scale.scale if high != low else 0)
    assert ends[1] == 0
    assert 0 <= scale.zero_point <= 255


def test_weights_are_rounded_per_output_channel():
    weight = torch.randn(4, 3, 3, 3) * torch.tensor([1e-3, 1.0, 50.0, 0.0])[:, None, None, None]
    rounded, scale = q8.quantise_weight(weight)
    error = (rounded.float() * scale[:, None, None, None] - weight).abs().amax((1, 2, 3))
    assert (error <= scale / 2 * 1.001).all()
    levels = q8.FEWER_WEIGHT_LEVELS if products_saturate() else q8.WEIGHT_LEVELS
    assert rounded[:3].abs().amax((1, 2, 3)).tolist() == [levels] * 3
    assert not rounded[3].any()


def quantised(make, count, shape, shared_prefix=None, schedule=None):
    """8-bit members, calibrated on the batch that is returned, and the float32 members."""
    models, members = build_members(make, count, shared_prefix)
    x = torch.randn(4, *shape)
    ranges = calibrate(make().eval(), members, [(x[:2],), (x[2:],)])
    return QuantisedForward(make().eval(), members, ranges, (x,), schedule), models, x


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("case", list(CASES))
def test_members_in_8_bits_equal_their_loop_and_stay_close_to_float32(case, count):
    make, shape = CASES[case]
    forward, models, x = quantised(make, count, shape)
    with torch.no_grad():
        got, want = forward(x), [model(x) for model in models]
        prove_equal(forward, forward, (x,), tolerance=2e-2)
    got = got if isinstance(got, dict) else {"": got}
    for index, one in enumerate(want):
        for key, own in (one if isinstance(one, dict) else {"": one}).items():
            assert (got[key][index] - own).abs().max() < 0.08 * own.abs().max()


def test_other_batch_sizes_than_the_examples_are_right():
    forward, _, x = quantised(*CASES["residual"][:1], 2, CASES["residual"][1])
    with torch.no_grad():
        torch.testing.assert_close(forward(x[:1]), forward(x)[:, :1], rtol=0, atol=2e-2)


def test_a_trunk_that_all_share_is_computed_once_and_heads_differ():
    forward, models, x = quantised(Headed, 3, (3, 12, 12), shared_prefix="trunk", schedule=APART)
    with torch.no_grad():
        got, want = forward(x), torch.stack([model(x) for model in models])
    assert (got - want).abs().max() < 0.08 * want.abs().max()
    assert _count(forward, x)["onednn.qconv_pointwise"] == 2 + 3


class _Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).rpartition(".")[0].replace("aten.", "")
        self.names[name] = self.names.get(name, 0) + 1
        return function(*args, **(kwargs or {}))


def _count(forward, x):
    with _Calls() as calls, torch.no_grad():
        forward(x)
    return calls.names


def test_values_stay_8_bit_between_layers():
    make, shape = CASES["residual"]
    forward, _, x = quantised(make, 2, shape, schedule=APART)
    names = _count(forward, x)
    assert names["quantize_per_tensor"] == 1  # the input, once for both members
    assert names["onednn.qconv_pointwise"] == 2 * 2
    assert names["onednn.qconv2d_pointwise"] == 2 * 2
    assert not {"convolution", "mkldnn._convolution_pointwise"} & set(names)


def test_ranges_are_those_of_the_layers_values():
    make, shape = CASES["residual"]
    models, members = build_members(make, 2)
    x = torch.randn(6, *shape)
    ranges = calibrate(make().eval(), members, [(x[:2],), (x[2:],)])
    assert ranges["x"] == [[x.min().item(), x.max().item()]]  # one for both: they share the input
    for index, model in enumerate(models):
        with torch.no_grad():
            stem = model.relu(model.stem_norm(model.stem(x)))
            inner = model.relu(model.a_norm(model.a(stem)) + stem)
        for name, value in (("stem", stem), ("a", inner)):
            want = torch.stack(value.aminmax())
            torch.testing.assert_close(torch.tensor(ranges[name][index]), want, rtol=1e-4, atol=1e-5)


def test_a_value_without_a_range_is_named():
    make, shape = CASES["plain"]
    _, members = build_members(make, 2)
    x = torch.randn(1, *shape)
    ranges = calibrate(make().eval(), members, [(x,)])
    del ranges["conv2"]
    with pytest.raises(LoadError, match=r"expected 2 ranges of 'conv2', got none.*--samples"):
        QuantisedForward(make().eval(), members, ranges, (x,))


def test_no_samples_no_calibration():
    make, _ = CASES["plain"]
    with pytest.raises(LoadError, match="at least one sample"):
        calibrate(make().eval(), build_members(make, 2)[1], [])


def test_a_model_without_convolutions_is_refused():
    make = lambda: nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 2))  # noqa: E731
    with pytest.raises(UnsupportedModel, match="no 2-d convolution"):
        calibrate(make().eval(), build_members(make, 2)[1], [(torch.randn(1, 300),)])


def test_a_model_whose_weights_stay_float32_is_refused():
    class Tokens(nn.Module):  # as in a vision transformer: the linear layers work on (B, tokens, hidden)
        def __init__(self):
            super().__init__()
            self.project, self.mix = nn.Conv2d(3, 300, 4, 4), nn.Linear(300, 300)

        def forward(self, x):
            return self.mix(self.project(x).flatten(2).transpose(1, 2)).mean(1)

    with pytest.raises(
        UnsupportedModel, match=r"only 1 layers with 14400 weights .* 90000 weights would stay float32"
    ):
        calibrate(Tokens().eval(), build_members(Tokens, 2)[1], [(torch.randn(1, 3, 8, 8),)])


def test_other_members_than_the_calibrated_ones_are_refused():
    forward, _, x = quantised(*CASES["plain"][:1], 2, CASES["plain"][1])
    with pytest.raises(LoadError, match="calibrated for the members a, b, the archive holds"):
        quantise_forward(forward, Precision("int8", 1, 0, 0.0, ("a", "b"), {"x": [[0, 1]]}), (x,))
    with pytest.raises(LoadError, match=r"no calibration.*--samples"):
        quantise_forward(forward, None, (x,))


def test_sums_of_the_largest_numbers_are_exact():
    """On a CPU without VNNI too, whose products of larger weights would saturate."""
    weight, scale = q8.quantise_weight(torch.ones(16, 64))
    x, into = torch.full((1, 64), 255, dtype=torch.uint8), q8.Scale(1.0, 0)
    layer = q8.Layer(weight, scale, None, into)
    got = kernels._linear(x, kernels._pack_layer(layer, None, [1, 64]))
    torch.testing.assert_close(got, torch.full((1, 16), 255.0 * 64))
