"""Turns one request body into one gRPC prediction.

The three messages are built from descriptors here instead of generated files: TorchServe's wheel ships no .proto,
and field numbers are all that has to agree (frontend/server/src/main/resources/proto/inference.proto of 0.12).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PACKAGE = "org.pytorch.serve.grpc.inference"
Field = descriptor_pb2.FieldDescriptorProto


def _build_messages() -> tuple[type[Any], type[Any]]:
    file = descriptor_pb2.FileDescriptorProto(name="predictions.proto", package=PACKAGE, syntax="proto3")
    request = file.message_type.add(name="PredictionsRequest")
    optional, string, data = Field.LABEL_OPTIONAL, Field.TYPE_STRING, Field.TYPE_BYTES
    request.field.add(name="model_name", number=1, label=optional, type=string)
    request.field.add(name="model_version", number=2, label=optional, type=string)
    entry = request.nested_type.add(name="InputEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, label=optional, type=string)
    entry.field.add(name="value", number=2, label=optional, type=data)
    request.field.add(
        name="input",
        number=3,
        label=Field.LABEL_REPEATED,
        type=Field.TYPE_MESSAGE,
        type_name=f".{PACKAGE}.PredictionsRequest.InputEntry",
    )
    response = file.message_type.add(name="PredictionResponse")
    response.field.add(name="prediction", number=1, label=optional, type=data)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    names = (f"{PACKAGE}.PredictionsRequest", f"{PACKAGE}.PredictionResponse")
    first, second = (message_factory.GetMessageClass(pool.FindMessageTypeByName(name)) for name in names)
    return first, second


PredictionsRequest, PredictionResponse = _build_messages()


def predict_grpc(
    address: str,
    model: str,
    body: bytes,
    *,
    fields: dict[str, bytes] | None = None,
    key: str = "",
    certificate: Path | None = None,
    timeout_s: float = 60.0,
) -> bytes:
    """Asks for one prediction over gRPC.

    Args:
        address: host:port.
        model: registered name.
        body: the request's payload, sent as the input `data`.
        fields: further inputs, such as {"detail": b"members"}.
        key: the inference key, where the server asks for one.
        certificate: PEM file of a TLS server's certificate; without it the channel has no TLS.
        timeout_s: raises grpc.RpcError afterwards.

    Returns:
        The bytes of the answer.

    Raises:
        grpc.RpcError: the server refused or failed.
    """
    with _open_call("Predictions", address, key, certificate) as call:
        request = PredictionsRequest(model_name=model, input={"data": body, **(fields or {})})
        return bytes(call(request, timeout=timeout_s).prediction)


def stream_grpc(address: str, model: str, body: bytes, *, timeout_s: float = 60.0) -> list[bytes]:
    """Asks for one prediction over the RPC that answers with a stream; as `predict_grpc`.

    Returns:
        The bytes of each answer, once the server has ended the stream.
    """
    with _open_call("StreamPredictions", address, streams=True) as call:
        request = PredictionsRequest(model_name=model, input={"data": body})
        return [bytes(answer.prediction) for answer in call(request, timeout=timeout_s)]


@contextmanager
def _open_call(
    name: str, address: str, key: str = "", certificate: Path | None = None, streams: bool = False
) -> Iterator[Any]:
    """An RPC of the inference service, which takes one message, and its channel for as long as it is used."""
    # TorchServe reads the key only next to this protocol entry (TokenAuthorization's gRPC interceptor).
    metadata = (("protocol", "gRPC"), ("authorization", f"Bearer {key}")) if key else ()
    with _open_channel(address, certificate) as channel:
        kind = channel.unary_stream if streams else channel.unary_unary
        call = kind(
            f"/{PACKAGE}.InferenceAPIsService/{name}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=PredictionResponse.FromString,
        )
        yield lambda request, timeout: call(request, timeout=timeout, metadata=metadata)


def _open_channel(address: str, certificate: Path | None) -> grpc.Channel:
    if certificate is None:
        return grpc.insecure_channel(address)
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(certificate.read_bytes()))
