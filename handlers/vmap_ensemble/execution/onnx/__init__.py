"""The forward as ONE ONNX graph, for ONNX Runtime, OpenVINO and what else reads the format."""
