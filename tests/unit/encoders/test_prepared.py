"""The flat graph of an encoder against the plain loop over members."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from tests.unit.encoders.test_packing import CONFIGS, HEADS, WITH_TYPES, assert_equal, build, make_batch
from vmap_ensemble.core.members import stack_members
from vmap_ensemble.encoders import attention as attention_module
from vmap_ensemble.encoders import graph_run, native
from vmap_ensemble.encoders import prepared as prepared_module
from vmap_ensemble.encoders import trace as encoder_trace
from vmap_ensemble.encoders.attention import attend_joined, attend_packed
from vmap_ensemble.encoders.build import build_encoder_forward
from vmap_ensemble.encoders.forward import PackedEncoderForward
from vmap_ensemble.encoders.graph_run import GraphRun
from vmap_ensemble.encoders.native import NativeRun
from vmap_ensemble.encoders.packing import pack
from vmap_ensemble.encoders.prepared import PreparedEncoder
from vmap_ensemble.errors import LoadError
from vmap_ensemble.execution.build import build_execution
from vmap_ensemble.execution.cpu.encoder_layers import LayerForm, PackedLayers
from vmap_ensemble.execution.cpu.kernel_library import load_library
from vmap_ensemble.execution.cpu.onednn import LINEAR, LINEAR_ADD
from vmap_ensemble.execution.cpu.schedule import Schedule
from vmap_ensemble.execution.graph.lowered_model import UnsupportedModel

PACKABLE = [name for name in CONFIGS if name != "mpnet"]  # bert is the first
LENGTHS = ([1], [2], [17], [38], [1, 1], [7, 7, 7], [38, 1, 2, 5, 5, 30])


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny operators on several threads wait for one another; groups of members have threads of their own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[NativeRun, GraphRun], ids=["native", "graph"])
def kind(request, monkeypatch):
    """Layers in one call of the kernel, and as a graph, as where there is no kernel."""
    if request.param is GraphRun:
        monkeypatch.setattr(LayerForm, "reasons_against", lambda _form: ["not in this test"])
    elif load_library() is None:
        pytest.skip("no kernel for this machine")
    return request.param


@pytest.fixture
def as_graph(monkeypatch):
    monkeypatch.setattr(LayerForm, "reasons_against", lambda _form: ["not in this test"])


def inputs_of(architecture, lengths):
    ids, mask = make_batch(lengths, padding=CONFIGS[architecture]["pad_token_id"])
    types = torch.randint(0, 2, ids.shape) if architecture in WITH_TYPES else None
    return (ids, mask, types) if types is not None else (ids, mask)


def share_cores(prepared, groups):
    prepared.at_a_time = dict.fromkeys(prepared.at_a_time, groups)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("architecture", "head"), [*(("bert", head) for head in HEADS), *((name, "sequence") for name in PACKABLE[1:])]
)
def test_equals_the_loop_for_every_batch(architecture, head, groups, kind):
    forward = build(architecture, head, 2)
    with torch.inference_mode():
        prepared = PreparedEncoder(forward, inputs_of(architecture, [4]))
        assert type(prepared._run) is kind
        share_cores(prepared, groups)
        for lengths in LENGTHS:
            inputs = inputs_of(architecture, lengths)
            assert_equal(prepared(*inputs), forward.loop(*inputs), inputs[1], head)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("members", [1, 2, 5])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_number_of_members(members, context, groups, kind):
    forward = build("bert", "sequence", members)
    inputs = inputs_of("bert", [6, 20, 6])
    with context():
        prepared = PreparedEncoder(forward, inputs)
        share_cores(prepared, groups)
        assert_equal(prepared(*inputs), forward.loop(*inputs), inputs[1], "sequence")


@pytest.mark.parametrize("own", [("classifier",), ("query", "classifier"), ("layer.1", "classifier"), ()])
def test_what_members_share_is_computed_once(own, kind):
    config = AutoConfig.for_model("bert", **CONFIGS["bert"])
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    states = {}
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        states[f"m{seed}"] = {
            key: torch.randn(tensor.shape, generator=generator) * 0.1 if any(part in key for part in own) else tensor
            for key, tensor in model.state_dict().items()
        }
    forward = build_encoder_forward(model, stack_members(states))
    inputs = inputs_of("bert", [3, 20, 11])
    with torch.inference_mode():
        prepared = PreparedEncoder(forward, inputs)
        assert_equal(prepared(*inputs), forward.loop(*inputs), inputs[1], "sequence")
    if kind is GraphRun:
        shared = sum(node.target is attend_joined for node in prepared._run._run._parts.trunk.graph.nodes)
    else:
        shared = sum(layers.count for layers in prepared._run._layers if layers.members == 1)
    assert shared == {("query", "classifier"): 0, ("layer.1", "classifier"): 1}.get(own, 2)


@pytest.mark.parametrize("own", ["embeddings", "layer.0"])
def test_shared_layers_behind_members_own_rows(own, kind):
    config = AutoConfig.for_model("bert", **CONFIGS["bert"])
    model = AutoModelForSequenceClassification.from_config(config).eval()
    states = {
        f"m{seed}": {
            key: t + 0.1 * seed * (own in key and t.is_floating_point()) for key, t in model.state_dict().items()
        }
        for seed in range(3)
    }
    forward = build_encoder_forward(model, stack_members(states))
    inputs = inputs_of("bert", [3, 20, 11])
    with torch.inference_mode():
        prepared = PreparedEncoder(forward, inputs)
        assert_equal(prepared(*inputs), forward.loop(*inputs), inputs[1], "sequence")
        if kind is NativeRun:
            expected = {"embeddings": [(2, 1)], "layer.0": [(1, 3), (1, 1)]}[own]
            assert [(layers.count, layers.members) for layers in prepared._run._layers] == expected


def test_batches_run_on_the_graph_unless_token_types_are_new(monkeypatch):
    forward = build("bert", "sequence", 2)
    with torch.inference_mode():
        prepared = PreparedEncoder(forward, inputs_of("bert", [4]))
        calls = []
        monkeypatch.setattr(prepared, "_plainly", lambda *args: calls.append(args) or forward(*args))
        ids, mask, _ = inputs_of("bert", [3, 5])
        assert_equal(prepared(ids, mask), forward.loop(ids, mask), mask, "sequence")
    assert len(calls) == 1


def test_layers_are_four_products(as_graph):
    forward = build("bert", "base", 2)
    prepared = PreparedEncoder(forward, inputs_of("bert", [4]))
    nodes = list(prepared._run._run._body.program.graph.nodes)
    products = [node for node in nodes if node.target in (LINEAR, LINEAR_ADD, torch.nn.functional.linear)]
    assert len(products) == 2 * 4 + 1  # layers of QKV, out, up and down; and the pooler
    assert sum(node.target is LINEAR_ADD for node in nodes) == 2 * 2  # the residuals
    names = [str(node.target) for node in nodes]
    assert not [name for name in names if "gelu" in name or "clone" in name or "dropout" in name]


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"])
def test_activations(activation, kind):
    config = AutoConfig.for_model("bert", **{**CONFIGS["bert"], "hidden_act": activation})
    states = {}
    for seed in range(2):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_config(config).eval()
        states[f"m{seed}"] = model.state_dict()
    forward = build_encoder_forward(model, stack_members(states))
    inputs = inputs_of("bert", [3, 9])
    with torch.inference_mode():
        prepared = PreparedEncoder(forward, inputs)
        assert_equal(prepared(*inputs), forward.loop(*inputs), inputs[1], "sequence")
    assert type(prepared._run) is (GraphRun if activation in ("gelu_new", "silu") else kind)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("scores", [1, 2**18])
def test_joined_attention_stays_within_a_text(threads, scores, monkeypatch):
    monkeypatch.setattr(attention_module, "SCORES", scores)
    torch.set_num_threads(threads)
    packing = pack((torch.arange(130) < torch.tensor([[3], [130], [3], [7]])).long())
    query, key, value = torch.randn(3, 1, 2, 143, 4).unbind()
    joined = torch.cat([t.transpose(1, 2).reshape(1, 143, 8) for t in (query, key, value)], dim=2)
    table = torch.tensor([(group.start, group.count, group.length) for group in packing.groups])
    got = attend_joined(joined, table, 2, 0.5)
    expected = attend_packed(query, key, value, packing, 0.5).reshape(1, 143, 8)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    alone = torch.ops.vmap_ensemble.attend_packed(query, key, value, table, 0.5)
    torch.testing.assert_close(alone.reshape(1, 143, 8), expected, rtol=1e-5, atol=1e-6)


def test_attention_whose_products_cannot_be_joined(monkeypatch):
    monkeypatch.setattr(encoder_trace, "_product_behind", lambda _node: None)
    forward = build("bert", "sequence", 2)
    inputs = inputs_of("bert", [3, 20, 3])
    with torch.inference_mode():
        prepared = PreparedEncoder(forward, inputs)
        assert_equal(prepared(*inputs), forward.loop(*inputs), inputs[1], "sequence")


def test_packed_matrices_are_kept_once():
    forward = build("bert", "sequence", 2)
    weight = forward.members.stacked["bert.encoder.layer.0.output.dense.weight"]
    assert forward.packed_weights(weight) is forward.rules()._prepacked[weight.data_ptr()][1]
    assert len(forward.packed_weights(torch.randn(3, 4, 5))) == 3


def test_cores_are_shared_as_was_measured_fastest(monkeypatch):
    torch.set_num_threads(2)
    forward = build("bert", "sequence", 2)
    slow = {16: 1, 128: 2}  # tokens -> the number of groups that takes longer

    def time_block(prepared, inputs, about_s):
        tokens = int(inputs[1].sum())
        return 2.0 if prepared.at_a_time[tokens] == slow[tokens] else 1.0

    monkeypatch.setattr(prepared_module, "time_block", time_block)
    prepared = PreparedEncoder(forward, inputs_of("bert", [4]))
    assert prepared.at_a_time == {16: 2, 128: 1}
    used, whole = [], prepared._run
    monkeypatch.setattr(prepared, "_run", lambda arguments, groups: used.append(groups) or whole(arguments, groups))
    for lengths in ([5], [38, 38, 38]):
        prepared(*inputs_of("bert", lengths))
    assert used == [2, 1]


def test_the_graph_gives_members_threads_of_their_own(as_graph, monkeypatch):
    prepared = PreparedEncoder(build("bert", "sequence", 2), inputs_of("bert", [4]))
    share_cores(prepared, 2)
    prepared(*inputs_of("bert", [5]))
    assert prepared._run._run.schedule == Schedule(False, 2)


def test_execution_prepared_serves_it():
    forward = build("bert", "sequence", 2)
    execution = build_execution("prepared", forward, [inputs_of("bert", [7])])
    assert isinstance(execution.run, PreparedEncoder)


def test_auto_measures_it_on_every_example():
    forward = build("bert", "sequence", 2)
    execution = build_execution("auto", forward, [inputs_of("bert", [7]), inputs_of("bert", [20, 3, 9])])
    candidate = next(candidate for candidate in execution.candidates if candidate.name == "prepared")
    assert candidate.refused is None
    assert len(candidate.latency_ms) == 2
    assert candidate.difference < 1e-5


def test_other_types_are_refused():
    forward = build("bert", "sequence", 2)
    for tensors in (forward.members.stacked, forward.members.shared):
        tensors.update({key: t.double() for key, t in tensors.items() if t.is_floating_point()})
    with pytest.raises(UnsupportedModel, match="expected float32 weights on a CPU"):
        PreparedEncoder(forward, inputs_of("bert", [4]))


def test_a_model_that_decides_by_values_is_refused(monkeypatch):
    forward = build("bert", "sequence", 2)
    whole = PackedEncoderForward.run_state

    def decide(self, state, packing, ids, *others):
        return whole(self, state, packing, ids if bool(ids.sum() > 0) else ids + 1, *others)

    monkeypatch.setattr(PackedEncoderForward, "run_state", decide)
    with pytest.raises(UnsupportedModel, match="the encoder can't be traced"):
        PreparedEncoder(forward, inputs_of("bert", [4]))


def test_a_graph_that_differs_is_refused(kind, monkeypatch):
    forward = build("bert", "sequence", 2)
    whole = graph_run.pack_layers

    def spoil(lowered, pack_weight):
        packed = whole(lowered, pack_weight)
        bias = next(name for name in lowered.slots if name.endswith("classifier_bias"))
        lowered.slots[bias] = lowered.slots[bias] + 1
        return packed

    for module in (graph_run, native):
        monkeypatch.setattr(module, "pack_layers", spoil)
    with pytest.raises(LoadError, match="the graph differs from the forward"):
        PreparedEncoder(forward, inputs_of("bert", [4]))


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 28},  # no multiple of the kernel's vectors
        {"intermediate_size": 40},
        {"layer_norm_eps": 1e-3},
        {"hidden_act": "silu"},
    ],
    ids=str,
)
def test_layers_that_the_kernel_does_not_take_run_as_a_graph(change, kind):
    config = AutoConfig.for_model("bert", **{**CONFIGS["bert"], **change})
    model = AutoModelForSequenceClassification.from_config(config).eval()
    forward = build_encoder_forward(model, stack_members({"a": model.state_dict()}))
    inputs = inputs_of("bert", [3, 9])
    with torch.inference_mode():
        prepared = PreparedEncoder(forward, inputs)
        assert_equal(prepared(*inputs), forward.loop(*inputs), inputs[1], "sequence")
    assert type(prepared._run) is (kind if "layer_norm_eps" in change else GraphRun)


def test_layers_whose_heads_were_pruned_run_as_a_graph():
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("bert", **CONFIGS["bert"])).eval()
    for layer in model.bert.encoder.layer:  # half of the heads: of 32 columns 16 are left
        attention = layer.attention
        attention.self.num_attention_heads, attention.self.all_head_size = 2, 16
        for name in ("query", "key", "value"):
            setattr(attention.self, name, torch.nn.Linear(32, 16))
        attention.output.dense = torch.nn.Linear(16, 32)
    forward = build_encoder_forward(model.eval(), stack_members({"a": model.state_dict()}))
    inputs = inputs_of("bert", [3, 9])
    with torch.inference_mode():
        prepared = PreparedEncoder(forward, inputs)
        assert type(prepared._run) is GraphRun
        assert_equal(prepared(*inputs), forward.loop(*inputs), inputs[1], "sequence")


def test_a_head_that_reads_first_tokens_spares_the_rest_of_the_last_layer(monkeypatch):
    if load_library() is None:
        pytest.skip("no kernel for this machine")
    asked, whole = [], PackedLayers.run

    def run(self, *args, first_only, **others):
        asked.append(first_only)
        return whole(self, *args, first_only=first_only, **others)

    monkeypatch.setattr(PackedLayers, "run", run)
    for head in ("sequence", "token", "base"):
        PreparedEncoder(build("bert", head, 1), inputs_of("bert", [4]))(*inputs_of("bert", [3, 5]))
        assert set(asked) == {head == "sequence"}
        asked.clear()
