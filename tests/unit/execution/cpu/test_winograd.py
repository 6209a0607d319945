"""Winograd's convolution equals torch's in float64, on every instruction set that this CPU has."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from vmap_ensemble.execution.cpu import kernel_library, single_row, winograd
from vmap_ensemble.execution.cpu.kernel_library import INSTRUCTION_SETS, load_library
from vmap_ensemble.execution.cpu.layers import ConvolutionLayer
from vmap_ensemble.execution.cpu.winograd import WinogradWeights, convolve_tiles, fastest_tile, reasons_against
from vmap_ensemble.execution.graph.patterns import ConvolveSettings

pytestmark = pytest.mark.skipif(load_library() is None, reason="no kernels for this machine")
# Of the largest output, for up to 512 channels; oneDNN's direct convolution differs by 4e-7 to 1e-6.
TOLERANCE = {2: 2e-6, 4: 5e-6}
PLAIN = ConvolveSettings([1, 1], [1, 1], [1, 1], 1)


@pytest.fixture(params=INSTRUCTION_SETS)
def lanes(request, monkeypatch):
    """Run the kernels of one instruction set; gives its lanes."""
    names = list(INSTRUCTION_SETS)
    if names.index(request.param) > names.index(kernel_library.capability()):
        pytest.skip(f"this CPU has no {request.param}")
    monkeypatch.setattr(kernel_library, "capability", lambda: request.param)
    library = load_library.__wrapped__()
    for module in (winograd, single_row, kernel_library):
        monkeypatch.setattr(module, "load_library", lambda: library)
    return INSTRUCTION_SETS[request.param].lanes


@pytest.fixture(params=[1, 2, 5])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def make_layer(shape, filters, groups=1):
    x = torch.randn(shape).to(memory_format=torch.channels_last)
    weight = torch.randn(filters, shape[1] // groups, 3, 3) / (3 * shape[1] ** 0.5)
    return x, weight, torch.randn(filters)


def assert_close(got, want, tile):
    assert got.shape == want.shape
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert (got - want).abs().max() <= TOLERANCE[tile] * want.abs().max()


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize(
    ("shape", "filters", "groups", "padding"),
    [
        ((1, 16, 8, 8), 16, 1, (1, 1)),
        ((2, 32, 9, 7), 48, 1, (0, 0)),  # no multiple of a tile, of a panel of filters
        ((3, 16, 1, 1), 80, 1, (1, 1)),  # smaller than the kernel
        ((1, 48, 5, 6), 48, 3, (2, 0)),
        ((1, 96, 14, 14), 192, 3, (1, 0)),
        ((5, 64, 12, 12), 128, 1, (1, 1)),  # several blocks
        ((1, 512, 3, 3), 512, 1, (1, 1)),  # fewer tiles than threads
    ],
)
def test_equals_torch(lanes, threads, tile, shape, filters, groups, padding):
    x, weight, bias = make_layer(shape, filters, groups)
    packed = WinogradWeights.of(weight, tile, groups)
    want = F.conv2d(x.double(), weight.double(), bias.double(), padding=padding, groups=groups)
    assert_close(convolve_tiles(x, None, packed, bias, padding, "none", False, False), want, tile)
    other = torch.randn(want.shape).to(memory_format=torch.channels_last)
    added = F.relu(want + other)
    assert_close(convolve_tiles(x, other, packed, bias, padding, "relu", False, False), added, tile)
    in_place = convolve_tiles(x, other, packed, bias, padding, "relu", True, False)
    assert in_place.data_ptr() == other.data_ptr()
    assert_close(in_place, added, tile)
    if min(want.shape[2:]) > 1:
        halved = convolve_tiles(x, None, packed, None, padding, "relu", False, True)
        assert_close(halved, F.max_pool2d(F.relu(want - bias[:, None, None]), 2), tile)


@pytest.mark.parametrize("tile", [2, 4])
def test_images_of_another_memory_format_and_no_images(lanes, tile):
    x, weight, bias = make_layer((2, 16, 6, 6), 16)
    packed = WinogradWeights.of(weight, tile, 1)
    want = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    assert_close(convolve_tiles(x.contiguous(), None, packed, bias, (1, 1), "none", False, False), want, tile)
    assert convolve_tiles(x[:0], None, packed, bias, (1, 1), "none", False, False).shape == (0, 16, 6, 6)


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("halved", [False, True])
def test_what_is_not_a_number_stays_so(lanes, tile, halved):
    x, weight, bias = make_layer((1, 16, 8, 8), 16)
    x[0, 3, 4, 4] = float("nan")
    got = convolve_tiles(x, None, WinogradWeights.of(weight, tile, 1), bias, (1, 1), "relu", False, halved)
    want = F.relu(F.conv2d(x, weight, bias, padding=1))
    want = F.max_pool2d(want, 2) if halved else want
    assert got[want.isnan()].isnan().all()
    assert not got[..., 0, 0].isnan().any()  # a tile that it has no part in


def test_wrong_images_are_refused():
    x, weight, bias = make_layer((1, 16, 2, 2), 16)
    packed = WinogradWeights.of(weight, 2, 1)
    with pytest.raises(
        RuntimeError, match=r"\(B, 16, H, W\) of at least 3x3 with its padding, got torch.float32 \(1, 16, 2"
    ):
        convolve_tiles(x, None, packed, bias, (0, 0), "none", False, False)
    with pytest.raises(RuntimeError, match=r"got torch.float32 \(1, 32, 8, 8\) padded by \(1, 1\)"):
        convolve_tiles(torch.randn(1, 32, 8, 8), None, packed, bias, (1, 1), "none", False, False)
    with pytest.raises(RuntimeError, match=r"expected float32 .* got torch.float64 \(1, 16, 2, 2\)"):
        convolve_tiles(x.double(), None, packed, bias, (1, 1), "none", False, False)


def test_a_residual_is_expanded_to_the_output_or_refused():
    x, weight, bias = make_layer((3, 16, 6, 6), 16)
    packed = WinogradWeights.of(weight, 2, 1)
    want = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    for shape in ((1, 16, 6, 6), (3, 16, 1, 1), (16, 1, 1)):
        other = torch.randn(shape)
        assert_close(convolve_tiles(x, other, packed, bias, (1, 1), "none", False, False), want + other, 2)
    with pytest.raises(RuntimeError, match="expanded size"):
        convolve_tiles(x, torch.randn(2, 16, 6, 6), packed, bias, (1, 1), "none", False, False)


@pytest.mark.parametrize(
    ("shape", "output", "tile"),
    [
        ((64, 64, 3, 3), (1, 64, 56, 56), 4),
        ((128, 128, 3, 3), (1, 128, 28, 28), 4),
        ((256, 256, 3, 3), (1, 256, 14, 14), 2),  # 4x4 tiles would read four times as many weights
        ((512, 512, 3, 3), (1, 512, 7, 7), None),  # too little is won for so many weights
        ((512, 512, 3, 3), (8, 512, 7, 7), 4),
        ((512, 512, 3, 3), (1, 512, 2, 2), None),  # one tile: nothing but weights to read
    ],
)
def test_the_tile_weighs_products_against_weights(lanes, shape, output, tile):
    layer = ConvolutionLayer(torch.float32, shape, PLAIN, "relu", output, output)
    assert fastest_tile(layer) == tile
    assert reasons_against(layer) == ([] if tile else ["little gained"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.bfloat16}, "bfloat16"),
        ({"shape": (64, 64, 5, 5)}, "not 3x3"),
        ({"shape": (64, 3, 3, 3)}, "no multiple of 8 channels"),
        ({"shape": (60, 64, 3, 3)}, "no multiple of 8 channels"),
        ({"settings": PLAIN._replace(stride=[2, 2])}, "strided"),
        ({"settings": PLAIN._replace(dilation=[2, 2])}, "dilated"),
        ({"settings": PLAIN._replace(padding=[-1, 0])}, "negatively padded"),
        ({"settings": PLAIN._replace(groups=64), "shape": (64, 1, 3, 3)}, "no multiple of 8 channels"),
        ({"activation": "swish"}, "with swish"),
        ({"output": (64, 56, 56)}, "not of a batch"),
        ({"unequal_sum": True}, "unequal sum"),
    ],
)
def test_other_convolutions_stay_direct_and_say_why(change, reason, monkeypatch):
    monkeypatch.setattr(winograd, "instruction_set", lambda: INSTRUCTION_SETS["AVX2"])
    layer = ConvolutionLayer(torch.float32, (64, 64, 3, 3), PLAIN, "relu", (1, 64, 56, 56), (1, 64, 56, 56))
    assert reasons_against(layer) == []
    assert reasons_against(dataclasses.replace(layer, **change)) == [reason]


def test_all_reasons_are_told_and_a_missing_library_is_one(monkeypatch):
    asked = []
    monkeypatch.setattr(winograd, "load_library", lambda: asked.append(1))
    layer = ConvolutionLayer(torch.float32, (64, 64, 3, 3), PLAIN, "relu", (1, 64, 56, 56), (1, 64, 56, 56))
    wide = dataclasses.replace(layer, shape=(64, 64, 7, 7), settings=PLAIN._replace(stride=[2, 2]))
    assert reasons_against(wide) == ["not 3x3", "strided"]
    assert not asked  # the answer may take a compiler
    assert reasons_against(layer) == ["no kernel here"]
    with pytest.raises(ValueError, match="ask `reasons_against` before"):
        winograd.Winograd().pack(dataclasses.replace(layer, output=(1, 64, 1, 1)), torch.randn(64, 64, 3, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("zeros", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize(("count", "filters", "columns"), [(1, 16, 40), (3, 128, 300), (2, 208, 65), (5, 1008, 16)])
def test_a_single_row_equals_torch(lanes, threads, dtype, zeros, count, filters, columns):
    weight, bias = torch.randn(count, filters, columns, dtype=dtype), torch.randn(count, filters, dtype=dtype)
    x = (torch.rand(count, 1, columns) + 0.1) * (torch.rand(count, 1, columns) >= zeros)
    x = x.to(dtype)
    matrices = single_row.RowMatrices.of(weight)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-3  # bfloat16 has 8 bits: 4e-3 is one rounding
    for own_bias, activation in ((bias, "none"), (None, "relu")):
        want = torch.bmm(x.double(), weight.double().mT)
        want = want if own_bias is None else want + own_bias.double().unsqueeze(1)
        want = F.relu(want) if activation == "relu" else want
        got = matrices.multiply(x, own_bias, activation)
        assert got.dtype == dtype
        assert (got - want).abs().max() <= tolerance * want.abs().max()


def test_a_single_row_is_not_multiplied_so_where_zeros_matter_or_do_not_fit(lanes):
    weight = torch.randn(2, 32, 20)
    assert single_row.reasons_against(weight) == []
    assert single_row.reasons_against(weight.double()) == ["float64 on cpu"]
    assert single_row.reasons_against(weight[:, :20].contiguous()) == [f"no multiple of {lanes} outputs"]
    weight[1, 3, 4] = float("inf")  # 0 * inf is no number
    assert single_row.reasons_against(weight) == ["not finite"]
    with pytest.raises(ValueError, match="not finite"):
        single_row.RowMatrices.of(weight)


def test_other_rows_than_the_matrices_take_are_refused():
    matrices = single_row.RowMatrices.of(torch.randn(2, 32, 20))
    for x in (torch.randn(2, 1, 19), torch.randn(2, 2, 20), torch.randn(3, 1, 20), torch.randn(2, 1, 20).double()):
        with pytest.raises(RuntimeError, match=r"linear layer: expected torch.float32 \(2, 1, 20\), got torch.float"):
            matrices.multiply(x, None, "none")


def test_bfloat16_rounds_as_torch_does(lanes):
    """Ties to even; infinities and what is not a number stay."""
    values = torch.tensor([1.00390625, 1.01171875, -1.00390625, 3.4e38, float("inf"), float("nan"), 1e-40, 0.1])
    bias = torch.zeros(1, 16, dtype=torch.bfloat16)
    high, low = values.to(torch.bfloat16), (values - values.to(torch.bfloat16)).to(torch.bfloat16)
    weight = torch.zeros(1, 16, 2, dtype=torch.bfloat16)
    weight[0, :8, 0], weight[0, :8, 1] = high.nan_to_num(1.0, 2.0), low.nan_to_num(0.0)
    x = torch.ones(1, 1, 2, dtype=torch.bfloat16)
    got = single_row.RowMatrices.of(weight).multiply(x, bias, "none")[0, 0]
    assert torch.equal(got, weight[0].float().sum(1).to(torch.bfloat16))
    x[0, 0, 0] = float("nan")
    assert single_row.RowMatrices.of(weight).multiply(x, bias, "relu").isnan().all()
