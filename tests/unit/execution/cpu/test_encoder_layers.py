"""The kernel of whole encoders against torch's own operators, for every instruction set that this CPU has."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from vmap_ensemble.execution.cpu import encoder_layers, kernel_library
from vmap_ensemble.execution.cpu.encoder_layers import (
    ACTIVATIONS,
    LayerForm,
    LayerTensors,
    PackedLayers,
    round_rows,
    round_weight,
)
from vmap_ensemble.execution.cpu.kernel_library import (
    INSTRUCTION_SETS,
    InstructionSet,
    build_library,
    capability,
    instruction_set,
)

HIDDEN, INNER, HEADS = 64, 96, 4
PLAIN = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
# The last two are chunked: by one thread, and by two.
TEXTS = ([1], [2, 3], [7, 1, 30], [100], [96, 97, 3])


# What is around the CPU's own products of 8-bit numbers, on CPUs that have none.
EMULATED = InstructionSet("emulated", 8, ("-mavx2", "-mfma", "-DINTEGER_PRODUCTS"))
SETS = {**INSTRUCTION_SETS, "emulated": EMULATED}


@pytest.fixture(autouse=True, params=SETS)
def _instructions(request, monkeypatch):
    """Each library that this CPU can run: the sets are in order, but for the last."""
    names = list(INSTRUCTION_SETS)
    if instruction_set() is None or (
        request.param in names and names.index(request.param) > names.index(capability())
    ):
        pytest.skip(f"no {request.param} here")
    library = kernel_library._open(build_library(SETS[request.param], kernel_library.CACHE))
    for module in (encoder_layers, kernel_library):
        monkeypatch.setattr(module, "load_library", lambda: library)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def form_of(**changes):
    form = {"hidden": HIDDEN, "inner": INNER, "heads": HEADS, "activation": "gelu", "epsilon": 1e-12, "scale": 0.25}
    return LayerForm(**{**form, **changes})


def draw_layers(form, members, count):
    generator = torch.Generator().manual_seed(members)
    hidden, inner = form.hidden, form.inner

    def draw(*size, around=0.0):
        return around + torch.randn(members, *size, generator=generator) * (
            0.1 if len(size) == 1 else size[1] ** -0.5
        )

    matrices = [(3 * hidden, hidden), (hidden, hidden), (inner, hidden), (hidden, inner)]
    layers = []
    for _ in range(count):
        joined, out, up, down = [(draw(*size), draw(size[0])) for size in matrices]
        norms = [(draw(hidden, around=1.0), draw(hidden)) for _ in range(2)]
        layers.append(LayerTensors(*joined, *out, *norms[0], *up, *down, *norms[1]))
    return layers


def run_plainly(form, layers, member, x, lengths, int8=False):
    """(T, H) of one member by torch."""

    def multiply(rows, weight, bias):
        if int8:
            (rounded, steps), rows = round_weight(weight), round_rows(rows)
            weight = rounded * steps.unsqueeze(-1)
        return F.linear(rows, weight, bias)

    for layer in layers:
        w = [tensor[member % len(tensor)] for tensor in layer.in_order()]
        texts = []
        for text in multiply(x, *w[:2]).split(lengths):
            query, key, value = text.view(len(text), 3, form.heads, -1).permute(1, 2, 0, 3)
            scores = (query @ key.mT * form.scale).softmax(-1)
            texts.append((scores @ value).transpose(0, 1).reshape(len(text), -1))
        x = F.layer_norm(multiply(torch.cat(texts), *w[2:4]) + x, (form.hidden,), *w[4:6], form.epsilon)
        wide = PLAIN[form.activation](multiply(x, *w[6:8]))
        x = F.layer_norm(multiply(wide, *w[8:10]) + x, (form.hidden,), *w[10:12], form.epsilon)
    return x


def assert_runs(form, members, lengths, *, own_rows=True, own_layers=True, at_a_time=1):
    layers = draw_layers(form, members if own_layers else 1, 2)
    x = torch.randn(members if own_rows else 1, sum(lengths), form.hidden, generator=torch.Generator().manual_seed(1))
    packed, sizes = PackedLayers(form, layers), torch.tensor(lengths)
    starts = sizes.cumsum(0) - sizes
    expected = torch.stack([run_plainly(form, layers, m, x[m % len(x)], lengths) for m in range(members)])
    got = packed.run(x, starts, sizes, at_a_time=at_a_time)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    first = packed.run(x, starts, sizes, first_only=True, at_a_time=at_a_time)
    torch.testing.assert_close(first, expected[:, starts], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("threads", "lengths"), list(itertools.product([1, 2, 3], TEXTS)))
def test_equals_torch(threads, lengths):
    torch.set_num_threads(threads)
    for members, at_a_time in itertools.product([1, 2, 5], [1, 2]):
        assert_runs(form_of(), members, lengths, at_a_time=at_a_time)


@pytest.mark.parametrize(("threads", "lengths"), list(itertools.product([1, 2], TEXTS)))
def test_int8_equals_the_same_numbers_in_torch(threads, lengths):
    torch.set_num_threads(threads)
    form, sizes = form_of(), torch.tensor(lengths)
    layers, starts = draw_layers(form, 2, 2), sizes.cumsum(0) - sizes
    x = torch.randn(2, sum(lengths), HIDDEN, generator=torch.Generator().manual_seed(1))
    got = PackedLayers(form, layers, int8=True).run(x, starts, sizes, at_a_time=2)
    expected = torch.stack([run_plainly(form, layers, m, x[m], lengths, int8=True) for m in range(2)])
    # A number on the edge of two steps may fall either way; that is little beside what 8 bits change.
    torch.testing.assert_close(got, expected, rtol=0, atol=0.05)
    whole = torch.stack([run_plainly(form, layers, m, x[m], lengths) for m in range(2)])
    changed = (expected - whole).abs().mean()
    assert changed > 1e-4
    assert (got - expected).abs().mean() < 0.5 * changed


def test_int8_of_zeros_and_of_what_is_not_finite():
    form, layers = form_of(), draw_layers(form_of(), 1, 1)
    layers[0].up[:, 3] = 0.0
    x = torch.zeros(1, 5, HIDDEN)
    packed, texts = PackedLayers(form, layers, int8=True), (torch.tensor([0, 2]), torch.tensor([2, 3]))
    expected = run_plainly(form, layers, 0, x[0], [2, 3], int8=True)
    torch.testing.assert_close(packed.run(x, *texts)[0], expected, rtol=0, atol=0.05)
    x[0, 3, 1] = float("inf")
    got = packed.run(x, *texts)[0]
    assert bool(got[:2].isfinite().all())
    assert bool(got[2:].isnan().all())


def test_weights_in_8_bits():
    weight = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0]])
    rounded, steps = round_weight(weight)
    assert rounded.tolist() == [[64, -127, 32], [0, 0, 0]]
    torch.testing.assert_close(steps, torch.tensor([2 / 127, 0.0]))
    torch.testing.assert_close(round_rows(weight), rounded * steps.unsqueeze(-1))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    assert_runs(form_of(activation=activation), 2, [3, 9])


@pytest.mark.parametrize("changes", [{"heads": 1}, {"heads": 16}, {"hidden": 384, "inner": 512, "heads": 6}], ids=str)
def test_forms(changes):
    assert_runs(form_of(**changes), 2, [5, 40])


def test_members_may_share_rows_or_layers():
    for own_rows, own_layers in ((True, False), (False, True)):
        assert_runs(form_of(), 3, [4, 2], own_rows=own_rows, own_layers=own_layers, at_a_time=3)


def test_texts_may_lie_in_any_order():
    form, lengths = form_of(), torch.tensor([4, 9, 2])
    packed = PackedLayers(form, draw_layers(form, 2, 2))
    x = torch.randn(2, 15, HIDDEN)
    starts = torch.tensor([11, 2, 0])  # as if sorted by length
    got = packed.run(x, starts, lengths, first_only=True)
    for text, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        alone = packed.run(x[:, start : start + length], torch.tensor([0]), torch.tensor([length]), first_only=True)
        torch.testing.assert_close(got[:, text], alone[:, 0], rtol=1e-5, atol=1e-6)


def test_what_is_not_finite_stays_so_and_with_its_text():
    form, lengths = form_of(), torch.tensor([4, 9])
    packed = PackedLayers(form, draw_layers(form, 1, 2))
    x = torch.randn(1, 13, HIDDEN)
    expected = packed.run(x, torch.tensor([0, 4]), lengths)
    x[0, 2, 5] = float("nan")
    got = packed.run(x, torch.tensor([0, 4]), lengths)
    assert bool(got[0, :4].isnan().all())
    torch.testing.assert_close(got[0, 4:], expected[0, 4:])


def test_large_scores_and_values_do_not_overflow():
    form = form_of(activation="gelu_tanh", scale=1e4)
    assert_runs(form, 1, [3, 6])
    layers = draw_layers(form, 1, 1)
    layers[0].up_bias.fill_(1e4), layers[0].up_bias[:, ::2].fill_(-1e4)
    x = torch.randn(1, 5, HIDDEN)
    got = PackedLayers(form, layers).run(x, torch.tensor([0]), torch.tensor([5]))
    torch.testing.assert_close(got[0], run_plainly(form, layers, 0, x[0], [5]), rtol=1e-4, atol=1e-4)


def test_reasons_against_a_form(monkeypatch):
    panel = encoder_layers.load_library().encoder_panel()
    assert form_of().reasons_against() == []
    odd = form_of(inner=INNER + 1).reasons_against()
    assert odd == [f"widths {HIDDEN} and {INNER + 1} aren't multiples of {panel}"]
    assert form_of(heads=5).reasons_against() == ["5 heads on a width of 64"]
    assert form_of(hidden=1024, heads=1).reasons_against() == ["1 heads on a width of 1024"]
    assert form_of(activation="silu").reasons_against() == ["activation silu"]
    monkeypatch.setattr(encoder_layers, "load_library", lambda: None)
    assert form_of().reasons_against() == ["no kernel here"]


@pytest.mark.parametrize(
    "x", [torch.zeros(3, 4, HIDDEN), torch.zeros(2, 4, 32), torch.zeros(2, 4, HIDDEN).double()], ids=len
)
def test_other_rows_are_refused(x):
    packed = PackedLayers(form_of(), draw_layers(form_of(), 2, 1))
    with pytest.raises(RuntimeError, match=rf"encoder layers: expected float32 \(2, T, {HIDDEN}\), got {x.dtype}"):
        packed.run(x, torch.tensor([0]), torch.tensor([4]))
