"""Turns the SDK's requests into bodies of KServe v2 that the data plane reads, and its replies into the SDK's."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

from kserve import InferInput, InferOutput, InferRequest, InferResponse
from kserve.errors import InvalidInput
from kserve.protocol.infer_type import to_http_parameters

from vmap_ensemble.errors import RequestError
from vmap_ensemble.serving.batch import Reply
from vmap_ensemble.serving.kserve import quote


def read_tensors(request: InferRequest) -> dict[str, Any]:
    """A request over gRPC, or one with tensors in binary, as the JSON that would say the same.

    Raises:
        RequestError: 400 where the data of an input isn't of its datatype or shape.
    """
    body: dict[str, Any] = {"inputs": [_read_input(tensor) for tensor in request.inputs]}
    if request.id:
        body["id"] = request.id
    if request.parameters:
        body["parameters"] = to_http_parameters(request.parameters)
    return body


def _read_input(tensor: InferInput) -> dict[str, Any]:
    parameters = dict(tensor.parameters or {})
    data = _read_data(tensor)
    if any(isinstance(value, bytes) for value in data):
        data = _as_text(data, parameters, tensor.name)
    return {
        "name": tensor.name,
        "shape": tensor.shape,
        "datatype": tensor.datatype,
        "data": data,
        "parameters": parameters,
    }


def _read_data(tensor: InferInput) -> list[Any]:
    if tensor.data:
        return list(tensor.data)
    try:  # raw contents, which the SDK reads into an array alone
        values: list[Any] = tensor.as_numpy().ravel().tolist()
        return values
    except (InvalidInput, ValueError, struct.error):
        raise RequestError(400, f"inputs.{quote(tensor.name)}: the data isn't of its datatype and shape") from None


def _as_text(data: list[Any], parameters: dict[str, Any], name: str) -> list[str]:
    """BYTES as JSON has them: text, or base64 where one of them is none, such as a picture."""
    try:
        return [value.decode("utf-8") for value in data]
    except UnicodeDecodeError:
        if "content_type" in parameters:
            raise RequestError(400, f"inputs.{quote(name)}.data: expected text") from None
    parameters["content_type"] = "base64"
    return [base64.b64encode(value).decode("ascii") for value in data]


def to_response(reply: Reply) -> InferResponse:
    """The reply to a request of KServe v2 as the SDK sends it."""
    body = json.loads(reply.text)
    outputs = [InferOutput(**output) for output in body["outputs"]]
    return InferResponse(body.get("id"), body["model_name"], outputs)
