"""Several devices give one device's outputs; on a CPU, which stands for all of them."""

import copy

import pytest
import torch
from torch import nn

from tests.unit.encoders.test_packing import build as build_encoder
from tests.unit.encoders.test_packing import make_batch
from vmap_ensemble import Ensemble
from vmap_ensemble.archive.settings import Settings, parse_settings
from vmap_ensemble.core.forward import EnsembleForward
from vmap_ensemble.core.members import move_members, stack_members
from vmap_ensemble.encoders.build import build_encoder_forward
from vmap_ensemble.errors import LoadError, SettingsError
from vmap_ensemble.execution import devices
from vmap_ensemble.execution.devices import OnDevices, build_on_devices, move_args
from vmap_ensemble.execution.register import ExecutionOptions

CPU = torch.device("cpu")
TWO = [CPU, CPU]
EXAMPLES = [(torch.randn(1, 6, generator=torch.Generator().manual_seed(0)),), (torch.randn(4, 6),)]


def make():
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def make_states(count):
    states = {}
    for seed in range(count):
        torch.manual_seed(seed)
        states[f"m{seed}"] = make().state_dict()
    return states


def make_forward(count):
    return EnsembleForward(make().eval(), stack_members(make_states(count)))


def joined(forward):
    return lambda members: EnsembleForward(copy.deepcopy(forward.model), members)


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_spreading_members_and_splitting_batches_change_nothing(count, batch):
    forward, x = make_forward(count), torch.randn(batch, 6)
    spread = OnDevices([(CPU, forward.part(0, 1)), (CPU, forward.part(1, count))], axis=0)
    split = OnDevices([(CPU, forward), (CPU, forward), (CPU, forward)], axis=1)
    for run in (spread, split):
        torch.testing.assert_close(run(x), forward.loop(x), rtol=1e-5, atol=1e-6)


def test_rows_are_shared_out_evenly_and_no_device_gets_none():
    sizes = []
    run = lambda x: sizes.append(len(x)) or x[None]  # noqa: E731
    split = OnDevices([(CPU, run)] * 3, axis=1)
    for batch in (1, 2, 8):
        split(torch.randn(batch, 6))
    assert sizes == [1, 1, 1, 2, 3, 3]


@pytest.mark.parametrize("fastest", ["one device", "batches split among cpu, cpu", "members spread over cpu, cpu"])
def test_the_fastest_way_serves_and_all_are_listed(monkeypatch, fastest):
    timed = iter([name for name in ("one device", "batches split", "members spread") for _ in EXAMPLES])
    monkeypatch.setattr(devices, "time_block", lambda *_: 0.001 if fastest.startswith(next(timed)) else 0.002)
    forward = make_forward(3)
    run = build_on_devices("eager", forward, joined(forward), TWO, EXAMPLES, ExecutionOptions())
    assert run.name == "eager"
    assert run.reason == f"asked for; {fastest}, the fastest of 3 ways"
    rows = {row.name: row.latency_ms for row in run.candidates}
    assert rows[fastest] == [1.0, 1.0]
    assert run.proof.largest_difference < 1e-5
    for args in EXAMPLES:
        torch.testing.assert_close(run(*args), forward.loop(*args), rtol=1e-5, atol=1e-6)


def test_a_device_that_fails_leaves_the_first_one(caplog):
    def fail(_members):
        raise torch.OutOfMemoryError("tried to allocate 9 TiB")

    forward = make_forward(2)
    run = build_on_devices("eager", forward, fail, TWO, EXAMPLES, ExecutionOptions())
    assert run.reason == "asked for; one device, the fastest of 1 ways"
    refused = {row.name: row.refused for row in run.candidates if row.refused}
    assert refused == dict.fromkeys(
        ("batches split among cpu, cpu", "members spread over cpu, cpu"),
        "OutOfMemoryError: tried to allocate 9 TiB",
    )
    assert "members spread over cpu, cpu can't be had" in caplog.text


def test_encoders_on_several_devices(monkeypatch):
    forward = build_encoder("bert", "sequence", 3)
    timed = iter([0.003, 0.002, 0.001])
    monkeypatch.setattr(devices, "time_block", lambda *_: next(timed))
    join = lambda members: build_encoder_forward(copy.deepcopy(forward.model), members)  # noqa: E731
    args = make_batch([3, 20, 11])
    run = build_on_devices("eager", forward, join, TWO, [args], ExecutionOptions())
    assert "members spread" in run.reason
    torch.testing.assert_close(run(*args).logits, forward.loop(*args).logits, rtol=1e-5, atol=1e-5)


def test_what_is_no_vmapped_forward_is_refused():
    class Only(EnsembleForward):
        only_mode = "only"

    forward = make_forward(2)
    only = Only(make().eval(), forward.members)
    with pytest.raises(LoadError, match="devices: expected members of one vmapped forward, got Only"):
        build_on_devices("auto", only, joined(forward), TWO, EXAMPLES, ExecutionOptions())


def test_arguments_on_the_host_stay_there():
    away, here = torch.ones(2, device="meta"), torch.ones(2)
    moved = move_args((away, None, here), torch.device("meta"))
    assert [getattr(leaf, "device", None) for leaf in moved] == [away.device, None, CPU]


def test_members_move_with_their_ties():
    states = make_states(2)
    for state in states.values():
        state["again"] = state["0.weight"]
    members = move_members(stack_members(states), torch.device("meta"))
    assert {tensor.device.type for tensor in members.tensors()} == {"meta"}
    assert members.stacked["again"] is members.stacked["0.weight"]


def test_the_library_takes_several_devices():
    settings = {"devices": ["cpu", "cpu"], "execution": "eager"}
    ensemble = Ensemble.of(make(), make_states(2), example=EXAMPLES[1][0], settings=settings)
    assert "the fastest of 3 ways" in ensemble.execution.reason
    x = torch.randn(3, 6)
    torch.testing.assert_close(ensemble.outputs(x), make_forward(2).loop(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("block", "told"),
    [
        ({"devices": ["cpu", "cpu"], "device": "cpu"}, "devices: expected no 'device' beside it, got 'cpu'"),
        ({"devices": ["cpu"]}, "devices: List should have at least 2 items"),
    ],
)
def test_devices_are_said_once_and_are_several(block, told):
    with pytest.raises(SettingsError, match=told):
        parse_settings(block, Settings, "here")
