"""Members and samples -> their forward in 8 bits in engines of others, by what each engine's own tools make of them.

Networks of images are quantised statically, with the ranges that values have on the samples; encoders dynamically,
with the ranges of the batch at hand.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measuring.measure import make_session
from benchmarks.measuring.rivals import export_networks
from vmap_ensemble.errors import EnsembleError
from vmap_ensemble.execution.cpu.onednn import products_saturate
from vmap_ensemble.execution.quiet import quietly

Forward = Callable[[Tensor], Tensor]


class StaticInt8:
    """All members of an image network as one graph of 8-bit numbers; each public method builds (B, ...) -> (M, B, C).

    Weights have a scale per output channel. On a CPU whose products of 8-bit numbers saturate, both engines are told
    to leave a bit of the weights unused, as they advise for it and as ours do.

    Args:
        networks: The members, float32, on a CPU.
        samples: Batches of inputs, (B', ...), that ranges are found on.
        folder: Scratch.
    """

    def __init__(self, networks: Sequence[nn.Module], samples: Sequence[Tensor], folder: Path) -> None:
        self.networks, self.samples, self.folder = list(networks), torch.cat(list(samples)), folder

    def onnxruntime(self, example: Tensor) -> Forward:
        """`onnxruntime.quantization.quantize_static`: QuantizeLinear and DequantizeLinear nodes, per channel.

        Raises:
            EnsembleError: The package is missing.
        """
        _want("onnxruntime", "onnx")
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        class Samples(CalibrationDataReader):
            def __init__(self, batches: Iterator[Tensor]) -> None:
                self.batches = batches

            def get_next(self) -> dict[str, Any] | None:
                batch = next(self.batches, None)
                return None if batch is None else {"x0": batch.numpy()}

        plain, fused, path = self._export(example), self.folder / "fused.onnx", self.folder / "int8.onnx"
        with quietly("root", "onnxruntime"):
            quant_pre_process(str(plain), str(fused), skip_symbolic_shape=True)
            quantize_static(
                str(fused),
                str(path),
                Samples(self._batches(len(example))),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                reduce_range=products_saturate(),
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
        session = make_session(str(path), torch.get_num_threads())
        return _whole_batches(len(example), lambda x: torch.from_numpy(session.run(None, {"x0": x.numpy()})[0]))

    def openvino(self, example: Tensor) -> Forward:
        """`nncf.quantize` of the graph as OpenVINO reads it.

        Raises:
            EnsembleError: A package is missing.
        """
        _want("openvino", "nncf")
        import openvino

        with contextlib.redirect_stdout(sys.stderr), quietly("nncf"):
            import nncf
            from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix

            batches = [batch.numpy() for batch in self._batches(len(example))]
            fix = OverflowFix.ENABLE if products_saturate() else OverflowFix.DISABLE
            model = nncf.quantize(
                openvino.Core().read_model(str(self._export(example))),
                nncf.Dataset(batches),
                subset_size=len(batches),
                target_device=nncf.TargetDevice.CPU,
                advanced_parameters=AdvancedQuantizationParameters(overflow_fix=fix),
            )
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": "f32",  # of what isn't in 8 bits
        }
        request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
        return _whole_batches(len(example), lambda x: torch.from_numpy(request.infer([x.numpy()])[0].copy()))

    def _export(self, example: Tensor) -> Path:
        return export_networks(self.networks, (example,), self.folder / f"batch{len(example)}.onnx")

    def _batches(self, size: int) -> Iterator[Tensor]:
        """All samples in batches of the graph's size; the last one is filled up from the first on."""
        missing = -len(self.samples) % size
        rows = torch.arange(len(self.samples) + missing) % len(self.samples)
        return iter(self.samples[rows].split(size))


def onnxruntime_dynamic(networks: Sequence[nn.Module], export: Callable[[nn.Module], bytes], folder: Path) -> Any:
    """`onnxruntime.quantization.quantize_dynamic` of each member: weights per output channel.

    Members of one graph would share a scale, so each has a session of its own.

    Args:
        networks: The members.
        export: A member -> a serialised ONNX model.
        folder: Scratch.

    Returns:
        One session a member.

    Raises:
        EnsembleError: The package is missing.
    """
    _want("onnxruntime", "onnx")
    from onnxruntime.quantization import QuantType, quantize_dynamic

    sessions = []
    for index, network in enumerate(networks):
        plain, path = folder / f"plain{index}.onnx", folder / f"int8-{index}.onnx"
        plain.write_bytes(export(network))
        with quietly("root", "onnxruntime"):
            quantize_dynamic(
                str(plain),
                str(path),
                per_channel=True,
                reduce_range=products_saturate(),
                weight_type=QuantType.QInt8,
            )
        plain.unlink()
        sessions.append(make_session(str(path), torch.get_num_threads()))
    return sessions


def _want(*packages: str) -> None:
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise EnsembleError(f"{' and '.join(missing)} not installed: pip install -r requirements-bench.txt")


def _whole_batches(size: int, run: Forward) -> Forward:
    """A graph of a fixed batch size, for batches that may be smaller."""

    def forward(x: Tensor) -> Tensor:
        if len(x) == size:
            return run(x)
        filled = torch.cat([x, x[:1].expand(size - len(x), *x.shape[1:])])
        return run(filled)[:, : len(x)]

    return forward
