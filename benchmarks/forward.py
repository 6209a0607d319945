"""A network, members and a batch -> the times of every way to run the ensemble on this machine, side by side.

    python -m benchmarks.forward --model resnet18 --members 4 --batch 1 --json forward.json

Every row has the largest difference to the plain loop, relative to the loop's largest output. Members have random
weights and batch statistics of their own. A rival that isn't installed, or fails, is a row with the reason.
"""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import describe_machine, make_session, measure_interleaved, print_timings, write_json
from vmap_ensemble.convolution import prepare
from vmap_ensemble.execution import ExecutionOptions, build_execution
from vmap_ensemble.forward import EnsembleForward
from vmap_ensemble.members import StackedMembers
from vmap_ensemble.mnist_net import MnistNet

SHAPES = {"mnist": (1, 28, 28), "resnet18": (3, 224, 224), "resnet50": (3, 224, 224)}
Call = Callable[[], Any]


def build_network(name: str) -> nn.Module:
    """The architecture in eval mode, with random weights."""
    if name == "mnist":
        return MnistNet().eval()
    from torchvision import models

    return getattr(models, name)(weights=None).eval()


def build_members(name: str, count: int) -> list[nn.Module]:
    """Networks that differ in weights and in batch statistics, as trained ones do."""
    networks = [build_network(name) for _ in range(count)]
    for network in networks:
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    return networks


def stack_networks(networks: list[nn.Module]) -> StackedMembers:
    """The networks' state dicts as the ensemble holds them."""
    states = [network.state_dict() for network in networks]
    stacked = {key: torch.stack([state[key] for state in states]) for key in states[0]}
    return StackedMembers(names=tuple(f"m{index}" for index in range(len(networks))), stacked=stacked, shared={})


class _All(nn.Module):
    """The unrolled loop as one module, for compilers and exporters."""

    def __init__(self, networks: list[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([network(x) for network in self.networks])


class Rivals:
    """The ways to run one ensemble on one batch; each method builds a call without arguments."""

    def __init__(self, model: str, networks: list[nn.Module], x: Tensor, folder: Path) -> None:
        self.model, self.networks, self.x, self.folder = model, networks, x, folder
        self.members = stack_networks(networks)

    def loop(self) -> Call:
        return lambda: torch.stack([network(self.x) for network in self.networks])

    def loop_compiled(self) -> Call:
        """Frozen: weights become constants, which Inductor folds and prepacks."""
        import torch._inductor.config as inductor

        inductor.freezing = True
        compiled = torch.compile(_All(copy.deepcopy(self.networks)).eval())
        return lambda: compiled(self.x)

    def onnxruntime_per_member(self) -> Call:
        sessions = [self._session(network, f"member{i}") for i, network in enumerate(self.networks)]
        feed = {"x": self.x.numpy()}
        return lambda: torch.stack([torch.from_numpy(session.run(None, feed)[0]) for session in sessions])

    def onnxruntime_one_graph(self) -> Call:
        session = self._session(_All(self.networks).eval(), "all")
        feed = {"x": self.x.numpy()}
        return lambda: torch.from_numpy(session.run(None, feed)[0])

    def _session(self, network: nn.Module, name: str) -> Any:
        return make_session(self._export(network, name), torch.get_num_threads())

    def _export(self, network: nn.Module, name: str) -> str:
        path = self.folder / f"{name}.onnx"
        if not path.exists():
            with warnings.catch_warnings():  # of the exporter's own making, thousands of lines
                warnings.simplefilter("ignore")
                torch.onnx.export(network, (self.x,), str(path), input_names=["x"], dynamo=True, verbose=False)
        return str(path)

    def openvino(self) -> Call:
        import openvino

        core = openvino.Core()
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            # Without it bfloat16 is used where the CPU has it, which isn't the same work.
            "INFERENCE_PRECISION_HINT": "f32",
        }
        request = core.compile_model(
            self._export(_All(self.networks).eval(), "all"), "CPU", settings
        ).create_infer_request()
        feed = self.x.numpy()
        return lambda: torch.from_numpy(request.infer([feed])[0].copy())

    def stock_vmap(self) -> Call:
        forward = EnsembleForward(build_network(self.model), self.members)
        return lambda: forward(self.x)

    def stock_vmap_compiled(self) -> Call:
        forward = EnsembleForward(build_network(self.model), self.members)
        compiled = torch.compile(lambda x: forward(x))
        return lambda: compiled(self.x)

    def ours_folded(self) -> Call:
        forward = prepare(build_network(self.model), self.members, self.x, packed=False)
        return lambda: forward(self.x)

    def ours_prepared(self) -> Call:
        forward = prepare(build_network(self.model), self.members, self.x)
        print(f"ours prepared: {forward.reason}")
        return lambda: forward(self.x)

    def ours_auto(self) -> Call:
        forward = EnsembleForward(build_network(self.model), self.members)
        execution = build_execution("auto", forward, [(self.x,)], ExecutionOptions())
        print(f"ours auto: {execution.name}, {execution.reason}")
        return lambda: execution(self.x)


RIVALS = (
    "loop",
    "loop_compiled",
    "onnxruntime_per_member",
    "onnxruntime_one_graph",
    "openvino",
    "stock_vmap",
    "stock_vmap_compiled",
    "ours_folded",
    "ours_prepared",
    "ours_auto",
)


def compare_rivals(model: str, count: int, x: Tensor, names: list[str], seconds: float) -> dict[str, Any]:
    """Build each rival, compare it with the loop, and time them in turns.

    Args:
        model: One of `SHAPES`.
        count: M.
        x: (B, ...) batch on the CPU.
        names: Which of `RIVALS`; the loop is always among them, and first.
        seconds: About how long measuring takes, without building.

    Returns:
        "timings": one Timing a rival; "differences": name -> largest relative difference to the loop;
        "left_out": name -> why a rival isn't there.
    """
    networks = build_members(model, count)
    left_out: dict[str, str] = {}
    calls: dict[str, Call] = {}
    differences: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        rivals = Rivals(model, networks, x, Path(folder))
        want = rivals.loop()()
        for name in ["loop", *(name for name in names if name != "loop")]:
            try:
                call = getattr(rivals, name)()
                got = call()
            except Exception as error:
                left_out[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                print(f"{name} is left out: {left_out[name]}")
                continue
            differences[name] = float((got - want).abs().max() / want.abs().max())
            calls[name] = call
        timings = _measure(calls, x.device, seconds)
    return {"timings": timings, "differences": differences, "left_out": left_out}


def _measure(calls: dict[str, Call], device: torch.device, seconds: float) -> Any:
    """Blocks of 4 calls in turns: warm caches as in a server, and short enough to meet the same noise."""
    block = 4
    trial = measure_interleaved(calls, device, warmup=2, iterations=2, block=2)
    round_s = block * sum(timing.mean_ms for timing in trial) / 1e3
    rounds = min(100, max(3, math.ceil(seconds / round_s)))
    return measure_interleaved(calls, device, warmup=block, iterations=rounds * block, block=block)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=sorted(SHAPES), default="resnet18")
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, help="torch threads, and those of the other runtimes")
    parser.add_argument("--seconds", type=float, default=60.0, help="about how long to measure")
    parser.add_argument("--only", nargs="+", choices=RIVALS, default=list(RIVALS), help="rivals beside the loop")
    parser.add_argument("--json", type=Path, help="file for the figures")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Compare, print, and write JSON if asked."""
    options = parse_arguments(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    x = torch.randn(options.batch, *SHAPES[options.model])
    with torch.no_grad():
        found = compare_rivals(options.model, options.members, x, options.only, options.seconds)
    machine = describe_machine(x.device)
    print(
        f"\n{options.model}, {options.members} members, batch {options.batch}; {machine['cpu']}, "
        f"{machine['threads']} threads, torch {machine['torch']}"
    )
    print_timings(found["timings"])
    for name, difference in found["differences"].items():
        print(f"{name}: largest difference to the loop {difference:.1e} of its largest output")
    if options.json:
        facts = {key: value for key, value in found.items() if key != "timings"}
        setting = {"model": options.model, "members": options.members, "batch": options.batch}
        write_json(options.json, machine, found["timings"], **setting, **facts)


if __name__ == "__main__":
    main()
