"""Turns items into predictions over TorchServe's gRPC interface, unary or as a stream.

The messages are built from descriptors instead of generated files: TorchServe's wheel ships no .proto, and field
numbers are all that has to agree (frontend/server/src/main/resources/proto/inference.proto of 0.12).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from vmap_ensemble.client.answers import Item, Prediction, body_of, options_of, predictions_of, read_answer

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


class GrpcClient:
    """Asks one model of a TorchServe.

    Args:
        address: host:port of the inference interface, such as `127.0.0.1:7070`.
        name: What the model is registered as.
        version: One version of it; the default by default.
        key: The inference key, where the server asks for one.
        certificate: PEM file of a TLS server's certificate; without it the channel has no TLS.
        timeout_s: Of a whole call; grpc.RpcError afterwards.

    Note:
        The server's own failures are raised as grpc.RpcError. A request that the model refuses is a Refused: gRPC
        hands on no status of a single request, so it is read from the answer.
    """

    def __init__(
        self,
        address: str,
        name: str,
        *,
        version: str = "",
        key: str = "",
        certificate: Path | None = None,
        timeout_s: float = 60.0,
    ) -> None:
        self.name, self.version, self.timeout_s = name, version, timeout_s
        # TorchServe reads the key only next to this protocol entry (TokenAuthorization's gRPC interceptor).
        self._metadata = (("protocol", "gRPC"), ("authorization", f"Bearer {key}")) if key else ()
        if certificate is None:
            self._channel = grpc.insecure_channel(address)
        else:
            self._channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(certificate.read_bytes()))

    def __enter__(self) -> GrpcClient:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()

    def predict(
        self,
        item: Item | Sequence[Item],
        *,
        detail: bool = False,
        subset: Sequence[str] | None = None,
        top_k: int | None = None,
    ) -> Prediction | list[Prediction]:
        """Ask for one item, or for a list of them as one request.

        Raises:
            Refused: The model has no answer.
            grpc.RpcError: The server failed, or wasn't reached.
        """
        fields = {key: value.encode() for key, value in options_of(detail, subset, top_k).items()}
        return predictions_of(read_answer(200, self.predict_bytes(body_of(item)[0], fields).decode()))

    def predict_bytes(self, body: bytes, fields: Mapping[str, bytes] | None = None) -> bytes:
        """One call as it is: the payload and further inputs in, the answer's bytes out."""
        return bytes(self._call("Predictions", body, fields or {}).prediction)

    def stream(self, body: bytes) -> list[bytes]:
        """The RPC that answers with a stream: each answer's bytes, once the server has ended it."""
        return [bytes(answer.prediction) for answer in self._call("StreamPredictions", body, {})]

    def _call(self, name: str, body: bytes, fields: Mapping[str, bytes]) -> Any:
        kind = self._channel.unary_stream if name == "StreamPredictions" else self._channel.unary_unary
        call = kind(
            f"/{PACKAGE}.InferenceAPIsService/{name}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=PredictionResponse.FromString,
        )
        request = PredictionsRequest(model_name=self.name, model_version=self.version, input={"data": body, **fields})
        return call(request, timeout=self.timeout_s, metadata=self._metadata)
