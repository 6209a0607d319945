"""Every mode gives the loop's values, or says why it can't be had; a file from elsewhere adds another."""

import importlib
import shutil
import sys
import threading

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from vmap_ensemble.archive.modes import AUTO_BUDGET_S, MODULES, mode_names
from vmap_ensemble.archive.settings import Settings, parse_settings
from vmap_ensemble.core.forward import EnsembleForward
from vmap_ensemble.core.members import StackedMembers
from vmap_ensemble.encoders.build import build_encoder_forward
from vmap_ensemble.errors import LoadError, SettingsError
from vmap_ensemble.execution import build, register
from vmap_ensemble.execution.build import build_execution
from vmap_ensemble.execution.compiled import mode as compiled_mode
from vmap_ensemble.execution.compiled.packages import CompiledForward
from vmap_ensemble.execution.cpu import onednn
from vmap_ensemble.execution.modes import ExecutionOptions
from vmap_ensemble.execution.register import find_mode

needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))


def build_forward(count=2, make=Net):
    torch.manual_seed(0)
    states = [make().state_dict() for _ in range(count)]
    stacked = {key: torch.stack([state[key] for state in states]) for key in states[0]}
    members = StackedMembers(names=tuple(f"m{i}" for i in range(count)), stacked=stacked, shared={})
    return EnsembleForward(make().eval(), members)


torch.manual_seed(0)  # a model here branches on the sum of its input
EXAMPLES = [(torch.randn(1, 1, 8, 8),), (torch.randn(3, 1, 8, 8),)]
SHORT = ExecutionOptions(budget_s=5.0)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("mode", ["reference", "eager", "prepared", "auto"])
def test_values_are_the_loops(mode, count):
    forward = build_forward(count)
    run = build_execution(mode, forward, EXAMPLES, SHORT)
    for args in EXAMPLES:
        torch.testing.assert_close(run(*args), forward.loop(*args), rtol=1e-5, atol=1e-6)


def test_a_named_mode_is_what_serves():
    run = build_execution("reference", build_forward(), EXAMPLES)
    assert (run.name, run.reason, run.candidates[0].difference) == ("reference", "asked for", 0.0)


def test_compiled_is_compile_of_vmap_where_that_makes_no_grouped_convolutions(monkeypatch):
    compiled, sizes = [], []

    def compile_(function):
        compiled.append(function)
        return lambda x: sizes.append(len(x)) or function(x)

    monkeypatch.setattr(torch, "compile", compile_)
    forward = build_forward(2, lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))
    run = build_execution("compiled", forward, EXAMPLES)
    assert sizes[:2] == [1, 3]  # at load, so that no request waits for a compiler
    torch.testing.assert_close(run(*EXAMPLES[1]), forward.loop(*EXAMPLES[1]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(compiled[0](*EXAMPLES[0]), forward(*EXAMPLES[0]))
    assert len(compiled) == 1


def test_compiled_on_a_gpu_is_compile_of_vmap(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    forward = build_forward()
    monkeypatch.setattr(StackedMembers, "device", torch.device("cuda"))
    build_execution("compiled", forward, EXAMPLES)
    assert len(compiled) == 1


@pytest.mark.parametrize(
    ("device", "precision", "expected"),
    [("cuda", "highest", ["highest"]), ("cuda", "high", ["high"]), ("cuda", None, []), ("cpu", "highest", [])],
)
def test_float32_on_a_gpu_is_computed_as_the_options_say(monkeypatch, device, precision, expected):
    said = []
    monkeypatch.setattr(build, "set_float32_precision", said.append)
    forward = build_forward()
    monkeypatch.setattr(StackedMembers, "device", torch.device(device))
    build_execution("eager", forward, EXAMPLES, ExecutionOptions(float32_matmul_precision=precision))
    assert said == expected


def test_the_loop_of_a_model_that_can_not_be_copied_swaps_weights(caplog):
    class Locked(Net):
        def __init__(self):
            super().__init__()
            self.lock = threading.Lock()

    forward = build_forward(2, Locked)
    run = build_execution("reference", forward, EXAMPLES)
    assert "the loop swaps weights: Locked can't be copied" in caplog.text
    torch.testing.assert_close(run(*EXAMPLES[1]), forward.loop(*EXAMPLES[1]), rtol=0, atol=0)


def test_compiled_encoders_run_on_plain_weights(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=50, **sizes)
    states = [BertForSequenceClassification(config).state_dict() for _ in range(2)]
    members = StackedMembers(("a", "b"), {key: torch.stack([s[key] for s in states]) for key in states[0]}, {})
    forward = build_encoder_forward(BertForSequenceClassification(config).eval(), members)
    args = torch.randint(5, 50, (2, 4)), torch.ones(2, 4, dtype=torch.long)
    asked = []
    monkeypatch.setattr(onednn, "LINEAR", lambda *args: asked.append(args))
    run = build_execution("compiled", forward, [args])
    torch.testing.assert_close(run(*args).logits, forward.loop(*args).logits, rtol=1e-5, atol=1e-6)
    assert (len(compiled), asked) == (1, [])
    assert forward.rules()._prepacked  # the members' own forward keeps its


@needs_compiler
@pytest.mark.timeout(300)
def test_compiled_convolutions_are_native_code_of_unrolled_members():
    forward = build_forward()
    run = build_execution("compiled", forward, EXAMPLES[:1])  # one size: compiling takes long
    assert isinstance(run.run, CompiledForward)
    assert [(package.smallest, package.largest) for package in run.run.packages] == [(1, 1)]
    for batch in (1, 3):
        x = torch.randn(batch, 1, 8, 8)
        torch.testing.assert_close(run(x), forward.loop(x), rtol=1e-5, atol=1e-6)


def fail_to_compile(*args):
    raise RuntimeError("no C++ compiler\nmore lines")


def test_compiling_that_was_asked_for_and_fails_is_an_error(monkeypatch):
    monkeypatch.setattr(compiled_mode, "compile_here", fail_to_compile)
    with pytest.raises(LoadError, match=r"execution 'compiled' can't be had: RuntimeError: no C\+\+ compiler$"):
        build_execution("compiled", build_forward(), EXAMPLES)


def test_an_unknown_mode_is_refused():
    with pytest.raises(
        SettingsError, match=r"execution: expected one of auto, eager, .*, got 'eagre'; did you mean 'eager'\?$"
    ):
        build_execution("eagre", build_forward(), EXAMPLES)


def test_a_setting_is_checked_against_the_same_names():
    with pytest.raises(SettingsError, match=r"^here: execution: expected one of auto, .*; did you mean 'prepared'\?"):
        parse_settings({"execution": "prepare"}, Settings, "here")
    schema = TypeAdapter(Settings).json_schema()["properties"]["execution"]
    assert (
        schema["enum"]
        == mode_names()
        == [
            *("auto", "eager", "prepared", "compiled"),
            *("branches", "compiled_branches", "cudagraph", "cudagraph_fused", "cudagraph_loop"),
            *("onnxruntime", "openvino", "reference"),
        ]
    )


def test_there_is_one_budget():
    assert Settings().execution_budget_s == ExecutionOptions().budget_s == AUTO_BUDGET_S


def test_no_example_is_refused():
    with pytest.raises(LoadError, match="expected at least one example"):
        build_execution("auto", build_forward(), [])


def test_prepared_without_convolutions_is_refused_if_asked_for():
    forward = build_forward(2, lambda: nn.Sequential(nn.Linear(4, 2)))
    with pytest.raises(LoadError, match="Sequential has no 2-d convolution"):
        build_execution("prepared", forward, [(torch.randn(1, 4),)])


def test_cudagraph_is_refused_on_a_cpu():
    with pytest.raises(LoadError, match="execution 'cudagraph': expected the members on a CUDA device, got cpu"):
        build_execution("cudagraph", build_forward(), EXAMPLES)


def test_what_fails_at_its_first_call_is_an_error_that_names_the_mode():
    class Branching(Net):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 and self.fc.bias.sum() > 0 else -x)

    with pytest.raises(
        LoadError, match=r"^execution 'eager' fails on the sample that would prove it: RuntimeError: vmap"
    ):
        build_execution("eager", build_forward(2, Branching), EXAMPLES)


def test_the_description_has_what_serves_why_and_the_proof():
    described = build_execution("prepared", build_forward(), EXAMPLES).describe()
    (candidate,) = described["candidates"]
    assert (described["serves"], described["reason"]) == ("prepared", "asked for")
    assert described["proof"]["largest_difference"] == candidate["difference"] < 1e-5
    assert candidate["refused"] is None


class One(EnsembleForward):
    only_mode, reason, channels_last = "one", "that is how it is", True


@pytest.mark.parametrize("mode", ["auto", "eager"])
def test_a_forward_of_one_mode_runs_in_it(mode):
    forward = build_forward()
    only = One(Net().eval(), forward.members)
    run = build_execution(mode, only, EXAMPLES)
    assert (run.run, run.name, run.reason) == (only, "one", "asked for: that is how it is")
    assert run.channels_last
    assert run.proof.largest_difference < 1e-5


def test_a_forward_of_more_than_one_vmap_without_a_preparation_is_not_prepared():
    class More(EnsembleForward):
        one_vmap = None

    forward = More(Net().eval(), build_forward().members)
    with pytest.raises(LoadError, match="execution 'prepared': More is more than one call of vmap, and brings no"):
        build_execution("prepared", forward, EXAMPLES)
    assert build_execution("reference", forward, EXAMPLES).run == forward.loop


OWN = """
from vmap_ensemble.execution.register import Built, mode

@mode("halves", what="two halves of the members", place=9)
def build(forward, examples, options):
    import torch
    half = len(forward.members.names) // 2
    parts = forward.part(0, half), forward.part(half, len(forward.members.names))
    return Built(lambda x: torch.cat([part(x) for part in parts]))
"""


@pytest.fixture
def own_mode(tmp_path, monkeypatch):
    """A file from outside of the package, the one thing that a further mode needs."""
    (tmp_path / "halves_mode.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("halves_mode")
    yield "halves"
    for names in (MODULES, register._MODES):
        del names["halves"]
    del sys.modules["halves_mode"]


def test_a_file_from_elsewhere_adds_a_mode(own_mode):
    forward = build_forward(4)
    run = build_execution(own_mode, forward, EXAMPLES)
    torch.testing.assert_close(run(*EXAMPLES[1]), forward.loop(*EXAMPLES[1]), rtol=1e-5, atol=1e-6)
    assert parse_settings({"execution": own_mode}, Settings, "here").execution == own_mode
    assert own_mode in [row.name for row in build_execution("auto", forward, EXAMPLES, SHORT).candidates]
    with pytest.raises(SettingsError, match=r"expected one of auto, .*, halves, got 'thirds'"):
        build_execution("thirds", forward, EXAMPLES)


def test_a_name_is_registered_once(own_mode):
    with pytest.raises(SettingsError, match=r"^execution 'halves' in .*: expected a new name, halves_mode has it$"):
        register.mode(own_mode, what="another")(lambda *_: None)


def test_a_file_that_registers_no_mode_is_named(monkeypatch):
    monkeypatch.setitem(MODULES, "nothing", "json")
    with pytest.raises(LoadError, match=r"^execution 'nothing': expected json to register it, it doesn't$"):
        find_mode("nothing")
    with pytest.raises(SettingsError, match="expected one of auto"):
        find_mode("unheard")
