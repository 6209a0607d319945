"""Members and a batch -> calls without arguments, one for each way to run the ensemble."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measuring.measure import make_session
from benchmarks.measuring.networks import Args, Network, device_of, parameter_bytes, states_of, to_tensor
from vmap_ensemble.archive.modes import AUTO_BUDGET_S
from vmap_ensemble.core.members import stack_members
from vmap_ensemble.errors import EnsembleError
from vmap_ensemble.execution.build import build_execution
from vmap_ensemble.execution.compiled.native_code import reasons_against, write_native_code
from vmap_ensemble.execution.compiled.packages import CompiledForward
from vmap_ensemble.execution.cuda.recorder import CudaRecorder
from vmap_ensemble.execution.modes import ExecutionOptions
from vmap_ensemble.execution.onnx.graph import export_members
from vmap_ensemble.execution.onnx.graph import reasons_against as no_graph
from vmap_ensemble.execution.onnx.packages import write_onnx
from vmap_ensemble.execution.quiet import quietly

Call = Callable[[], Tensor]
# Weights of all members in one ONNX file: a protobuf holds 2 GiB.
GRAPH_LIMIT_BYTES = 1.8 * 2**30


class Unrolled(nn.Module):
    """The loop over members as one module, for compilers and exporters."""

    def __init__(self, networks: list[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, *args: Tensor) -> Tensor:
        """(B, ...) -> (M, B, ...)."""
        return torch.stack([to_tensor(network(*args)) for network in self.networks])


def export_networks(networks: list[nn.Module], args: Args, path: Path) -> Path:
    """Write one ONNX graph of all networks, for batches of this size alone, unless the file is there.

    Args:
        networks: Below `GRAPH_LIMIT_BYTES` together.
        args: One batch; inputs are called x0, x1, ...
        path: Of the file, weights included.
    """
    if not path.exists():
        names = [f"x{index}" for index in range(len(args))]
        with quietly():  # of the exporter's own making, thousands of lines
            torch.onnx.export(
                Unrolled(networks).eval(),
                args,
                str(path),
                input_names=names,
                dynamo=True,
                verbose=False,
                external_data=False,
            )
    return path


class Rivals:
    """The ways to run one ensemble on one batch; each public method builds a call.

    Args:
        network: what the members are.
        networks: the members.
        args: one batch.
        folder: scratch.
        auto_s: seconds that mode `auto` may measure.
    """

    def __init__(
        self,
        network: Network,
        networks: list[nn.Module],
        args: Args,
        folder: Path,
        auto_s: float = AUTO_BUDGET_S,
    ) -> None:
        self.network, self.networks, self.args, self.folder = network, networks, args, folder
        self.auto_s = auto_s
        self.members = stack_members(states_of(networks), device=device_of(networks[0]), share=False)
        self.notes: dict[str, str] = {}

    def loop(self) -> Call:
        """The members one after another, eagerly."""
        unrolled = Unrolled(self.networks).eval()
        return lambda: unrolled(*self.args)

    def loop_compiled(self) -> Call:
        """Frozen: weights become constants, which Inductor folds and prepacks."""
        import torch._inductor.config as inductor

        unrolled = Unrolled(copy.deepcopy(self.networks)).eval()
        with inductor.patch(freezing=True):
            compiled = torch.compile(unrolled, dynamic=False)
            compiled(*self.args)
        return lambda: compiled(*self.args)

    def loop_graph(self) -> Call:
        """The eager loop recorded as one CUDA graph, on inputs that stay in place: only its kernels are left."""
        self._want_gpu()
        recording = CudaRecorder(self.args[0].device).record(self.loop())

        def call() -> Tensor:
            recording.replay()
            return recording.outputs

        return call

    def loop_reduce_overhead(self) -> Call:
        """`torch.compile` of the loop as one module, with CUDA graphs."""
        self._want_gpu()
        compiled = torch.compile(Unrolled(self.networks).eval(), mode="reduce-overhead", dynamic=False)
        for _ in range(3):  # compiles, records, replays
            compiled(*self.args)
        return lambda: compiled(*self.args)

    def onnxruntime_per_member(self) -> Call:
        """One ONNX Runtime session per member."""
        sessions = [self._session([network], f"member{i}") for i, network in enumerate(self.networks)]
        feed = self._feed()
        return lambda: torch.cat([torch.from_numpy(session.run(None, feed)[0]) for session in sessions])

    def onnxruntime_one_graph(self) -> Call:
        """One ONNX Runtime session with all members."""
        session = self._session(self.networks, "all")
        feed = self._feed()
        return lambda: torch.from_numpy(session.run(None, feed)[0])

    def _feed(self) -> dict[str, Any]:
        return {f"x{index}": tensor.numpy() for index, tensor in enumerate(self.args)}

    def _want_gpu(self) -> None:
        if not self.args[0].is_cuda:
            raise EnsembleError("compared on a GPU only")

    def _refuse_gpu(self) -> None:
        if self.args[0].is_cuda:
            raise EnsembleError("compared on a CPU only")

    def _session(self, networks: list[nn.Module], name: str) -> Any:
        return make_session(self._export(networks, name), torch.get_num_threads())

    def _export(self, networks: list[nn.Module], name: str) -> str:
        self._refuse_gpu()
        size = sum(map(parameter_bytes, networks))
        if size > GRAPH_LIMIT_BYTES:
            raise EnsembleError(f"{size / 2**30:.1f} GiB of weights don't fit one ONNX file")
        return str(export_networks(networks, self.args, self.folder / f"{name}.onnx"))

    def openvino(self) -> Call:
        """One OpenVINO graph with all members."""
        import openvino

        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            # Without it bfloat16 is used where the CPU has it, which isn't the same work.
            "INFERENCE_PRECISION_HINT": "f32",
        }
        model = openvino.Core().compile_model(self._export(self.networks, "all"), "CPU", settings)
        request = model.create_infer_request()
        feed = list(self._feed().values())
        return lambda: torch.from_numpy(request.infer(feed)[0].copy())

    def stock_vmap(self) -> Call:
        """torch.func.vmap as it comes."""
        forward = self.network.stock(self.network.build(), self.members)
        return lambda: to_tensor(forward(*self.args))

    def ours_eager(self) -> Call:
        """Mode `eager`: one vmapped call with our rules."""
        return self._ours("eager")

    def ours_prepared(self) -> Call:
        """Mode `prepared`."""
        return self._ours("prepared")

    def ours_compiled(self) -> Call:
        """Mode `compiled`, compiled at load."""
        return self._ours("compiled")

    def ours_ahead_of_time(self) -> Call:
        """Mode `compiled` on native code as `./archive.sh --compile` packs it, for batches of 1 and of 2 to B."""
        forward = self.network.join(self.network.build(), self.members)
        reasons = ["compiled on a CPU only"] if self.args[0].is_cuda else reasons_against(forward, self.args)
        if reasons:
            raise EnsembleError(f"no native code: {'; '.join(reasons)}")
        root = self.folder / "archive"
        root.mkdir(exist_ok=True)
        write_native_code(forward, self.args[0], len(self.args[0]), root)
        packed = CompiledForward(root, forward.members, self.args[0].shape[1:])
        return self._ours("compiled", "ours_ahead_of_time", ExecutionOptions(packed=lambda: packed))

    def ours_cudagraph(self) -> Call:
        """Mode `cudagraph`."""
        return self._ours("cudagraph")

    def ours_cudagraph_fused(self) -> Call:
        """Mode `cudagraph_fused`."""
        return self._ours("cudagraph_fused")

    def ours_branches(self) -> Call:
        """Mode `branches`."""
        return self._ours("branches")

    def ours_compiled_branches(self) -> Call:
        """Mode `compiled_branches`."""
        return self._ours("compiled_branches")

    def ours_auto(self) -> Call:
        """Mode `auto`, what an archive serves by default."""
        return self._ours("auto", options=ExecutionOptions(budget_s=self.auto_s))

    def ours_auto_onnx(self) -> Call:
        """Mode `auto` on an archive that `./archive.sh --onnx` has packed the members' graph into."""
        forward = self.network.join(self.network.build(), self.members)
        reasons = ["compared on a CPU only"] if self.args[0].is_cuda else no_graph(forward)
        if reasons:
            raise EnsembleError("; ".join(reasons))
        root = self.folder / "onnx-archive"
        root.mkdir(exist_ok=True)
        write_onnx(export_members(forward, self.args), forward.members, root)
        return self._ours("auto", "ours_auto_onnx", ExecutionOptions(graph_folder=root))

    def _ours(self, mode: str, name: str = "", options: ExecutionOptions | None = None) -> Call:
        forward = self.network.join(self.network.build(), self.members)
        execution = build_execution(mode, forward, [self.args], options or ExecutionOptions())
        self.notes[name or f"ours_{mode}"] = f"{execution.name}: {execution.reason}"
        return lambda: to_tensor(execution(*self.args))
