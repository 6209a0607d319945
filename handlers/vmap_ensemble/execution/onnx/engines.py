"""Turns a file of ONNX into a callable on torch's tensors, run by ONNX Runtime or OpenVINO."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Tensors in the order of the graph's inputs -> tensors in the order of its outputs.
Engine = Callable[[Sequence[Tensor]], list[Tensor]]


def load_onnxruntime(path: Path, inputs: Sequence[str], outputs: Sequence[str], device: torch.device) -> Engine:
    """ONNX Runtime with all optimisations, on torch's number of threads; on a GPU without copies through the host.

    Args:
        path: The graph's file.
        inputs: Names of its inputs.
        outputs: Names of its outputs.
        device: Of the tensors; CUDA needs the package onnxruntime-gpu.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    # Threads that go on spinning would take torch's cores, which decode the next batch.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    wanted: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda":
        wanted = [("CUDAExecutionProvider", {"device_id": device.index or 0})]
    session = onnxruntime.InferenceSession(str(path), options, providers=wanted)
    if device.type == "cuda" and "CUDAExecutionProvider" not in session.get_providers():
        raise RuntimeError("the installed onnxruntime has no CUDA: expected the package onnxruntime-gpu")

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        feed = {name: tensor.numpy() for name, tensor in zip(inputs, tensors, strict=True)}
        return [torch.from_numpy(array) for array in session.run(list(outputs), feed)]

    def run_bound(tensors: Sequence[Tensor]) -> list[Tensor]:
        binding = session.io_binding()
        kept = [tensor.contiguous() for tensor in tensors]
        for name, tensor in zip(inputs, kept, strict=True):
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.from_dlpack(torch.to_dlpack(tensor)))
        for name in outputs:
            binding.bind_output(name, "cuda", device.index or 0)
        torch.cuda.current_stream(device).synchronize()  # it runs on a stream of its own
        session.run_with_iobinding(binding)
        return [torch.from_dlpack(value.to_dlpack()) for value in binding.get_outputs()]

    return run if device.type == "cpu" else run_bound


def load_openvino(path: Path, inputs: Sequence[str], outputs: Sequence[str], device: torch.device) -> Engine:
    """OpenVINO for the shortest time of one call, in float32, on torch's number of threads; a CPU's alone."""
    import openvino

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        # Without it bfloat16 is used where the CPU has it, whose numbers are others.
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = openvino.Core().compile_model(str(path), "CPU", settings).create_infer_request()

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        feed = {name: tensor.numpy() for name, tensor in zip(inputs, tensors, strict=True)}
        found: Any = request.infer(feed)
        return [torch.from_numpy(found[name].copy()) for name in outputs]  # its own are written over by the next call

    return run
