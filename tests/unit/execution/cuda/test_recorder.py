"""Which stream a work runs on, what waits for what, what is told where nothing can be recorded: by a fake CUDA."""

from contextlib import contextmanager

import pytest
import torch

from vmap_ensemble.errors import LoadError
from vmap_ensemble.execution.cuda.recorder import WARM_UP_RUNS, CudaRecorder


class Stream:
    """Writes down, in the events of all, what it waits for."""

    def __init__(self, events, name):
        self.events, self.name = events, name

    def wait_stream(self, other):
        self.events.append(f"{self.name} waits for {other.name}")


class Graph:
    def pool(self):
        return "pool"

    def replay(self):
        pass


@pytest.fixture
def events(monkeypatch):
    """CUDA on any machine: what is done with streams and graphs, in order."""
    done, current = [], [Stream([], "main")]
    current[0].events = done
    made = iter(range(100))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(done, f"stream {next(made)}"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)

    @contextmanager
    def stream(chosen):
        current.append(chosen)
        yield
        current.pop()

    @contextmanager
    def graph(_graph, pool, stream, capture_error_mode):
        done.append(f"record in {pool}")
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    return done


def recorder(streams=8):
    return CudaRecorder(torch.device("cuda:0"), streams)


def ran_on(number):
    """A work that says where it ran."""

    def work():
        return number, torch.cuda.current_stream(None).name

    return work


def test_works_go_to_streams_in_turn_between_fork_and_join(events):
    own = recorder(streams=2)
    found = own.side_by_side([ran_on(number) for number in range(3)])
    assert found == [(0, "stream 0"), (1, "stream 1"), (2, "stream 0")]
    forks = ["stream 0 waits for main", "stream 1 waits for main"]
    joins = ["main waits for stream 0", "main waits for stream 1"]
    assert events == [*forks, *joins]
    own.side_by_side([ran_on(0), ran_on(1)])
    assert len(events) == 8  # the same two streams again


def test_few_works_take_few_streams(events):
    recorder().side_by_side([ran_on(0)])
    assert events == ["stream 0 waits for main", "main waits for stream 0"]


def test_a_first_run_chooses_its_kernels_before_the_recording_and_memory_is_shared(events):
    own, runs = recorder(), []
    for expected in (None, "pool"):
        events.clear()
        recording = own.record(lambda: runs.append(torch.cuda.current_stream(None).name) or "outputs")
        assert recording.outputs == "outputs"
        assert events[-1] == f"record in {expected}"
        assert len(set(runs[-1 - WARM_UP_RUNS :])) == 1  # all of them on one stream, which is not the caller's
        assert runs[-1] != "main"


def test_what_can_not_be_recorded_says_why(events, monkeypatch):
    @contextmanager
    def graph(*_, **__):
        try:
            yield
        finally:
            raise torch.AcceleratorError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "graph", graph)
    runs = []

    def work():
        runs.append(1)
        if len(runs) > WARM_UP_RUNS:
            raise RuntimeError("Cannot copy between CPU and CUDA tensors\nmore")

    told = r"^can't be recorded as a CUDA graph: RuntimeError: Cannot copy between CPU and CUDA tensors$"
    with pytest.raises(LoadError, match=told):
        recorder().record(work)


def test_memory_that_runs_out_while_recording_stays_what_it_is(events):
    runs = []

    def work():
        runs.append(1)
        if len(runs) > WARM_UP_RUNS:
            raise torch.OutOfMemoryError("tried to allocate 9 TiB")

    with pytest.raises(torch.OutOfMemoryError):
        recorder().record(work)
