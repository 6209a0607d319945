"""CUDA graphs and streams as they are, where tests/unit has a fake: recordings, branches, attention, precision."""

import pytest
import torch
from torch import nn

from tests.unit.encoders.test_packing import HEADS, build, make_batch
from vmap_ensemble.core.forward import EnsembleForward
from vmap_ensemble.core.members import stack_members
from vmap_ensemble.core.proof import prove_equal
from vmap_ensemble.core.transfer import to_host
from vmap_ensemble.encoders.build import build_encoder_forward
from vmap_ensemble.errors import LoadError
from vmap_ensemble.execution.build import build_execution
from vmap_ensemble.execution.cuda.graphs import BatchRows, Recorded
from vmap_ensemble.execution.cuda.recorder import CudaRecorder
from vmap_ensemble.execution.register import ExecutionOptions

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU = torch.device("cuda:0")


def on_gpu(head, dtype):
    """A small encoder's forward there."""
    plain = build("bert", head, 2)
    members = stack_members({f"m{i}": plain.member_state(i) for i in range(2)}, GPU, dtype)
    return build_encoder_forward(HEADS[head].from_config(plain.model.config).eval(), members)


def test_replays_equal_the_plain_run():
    weight = torch.randn(3, 1, 4, 5, device=GPU)
    run = lambda x: {"y": (x[None, :, None] @ weight).squeeze(2)}  # noqa: E731
    recorded = Recorded(BatchRows(run, GPU, (2, 4)), run, CudaRecorder(GPU))
    for batch in (1, 2, 3, 4, 5, 1):
        x = torch.randn(batch, 4, device=GPU)
        torch.testing.assert_close(recorded(x)["y"], run(x)["y"])


def test_branches_of_one_recording_are_independent():
    recorder = CudaRecorder(GPU)
    x = torch.randn(64, 64, device=GPU)
    works = [lambda power=power: torch.linalg.matrix_power(x / 16, power) for power in range(1, 20)]
    recording = recorder.record(lambda: torch.stack(recorder.side_by_side(works)))
    x.copy_(torch.randn(64, 64, device=GPU))
    recording.replay()
    torch.testing.assert_close(recording.outputs, torch.stack([work() for work in works]))


def test_a_recording_that_waits_is_refused_and_the_next_one_works():
    recorder, x = CudaRecorder(GPU), torch.ones(3, device=GPU)
    with pytest.raises(LoadError, match="can't be recorded as a CUDA graph"):
        recorder.record(lambda: x * x.sum().item())
    recording = recorder.record(lambda: x + 1)
    x.fill_(4)
    recording.replay()
    assert recording.outputs.tolist() == [5, 5, 5]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head", ["base", "sequence", "question"])
def test_texts_of_any_length_in_one_bucket(head, dtype):
    forward = on_gpu(head, dtype)
    run = build_execution("cudagraph", forward, [make_batch([3, 20, 11])])
    for lengths in ([1, 38, 5, 5, 12], [38, 3, 6, 2, 13], [7]):
        prove_equal(forward, run, make_batch(lengths, 40))  # from the host, where texts are laid out


def test_convolutions_in_float32_are_not_refused():
    torch.backends.cudnn.allow_tf32 = True  # torch's default
    states = {}
    for seed in range(2):
        torch.manual_seed(seed)
        states[f"m{seed}"] = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(64 * 36, 5)).state_dict()
    model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(64 * 36, 5)).eval()
    forward = EnsembleForward(model, stack_members(states, GPU))
    run = build_execution("eager", forward, [(torch.randn(8, 64, 8, 8, device=GPU),)])
    assert run.proof.largest_difference < 1e-5
    assert not torch.backends.cudnn.allow_tf32


def test_auto_serves_encoders():
    forward = on_gpu("sequence", torch.float16)
    run = build_execution("auto", forward, [make_batch([3, 20, 11])], ExecutionOptions(budget_s=5.0))
    assert run.name == "cudagraph"


def test_answers_come_back_in_one_copy():
    tensors = [torch.arange(6, device=GPU).reshape(2, 3), torch.rand(4, device=GPU), torch.tensor([True], device=GPU)]
    with torch.profiler.profile() as profile:
        moved = to_host(tensors)
    for given, got in zip(tensors, moved, strict=True):
        assert torch.equal(given.cpu(), got)
    assert sum("Memcpy DtoH" in event.name for event in profile.events()) == 1
