"""Turns one request body into one gRPC prediction, by the project's own client."""

from __future__ import annotations

from pathlib import Path

from vmap_ensemble.client.grpc import GrpcClient


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
    """One call: the answer's bytes. `fields` are further inputs, such as {"detail": b"members"}."""
    with GrpcClient(address, model, key=key, certificate=certificate, timeout_s=timeout_s) as client:
        return client.predict_bytes(body, fields)


def stream_grpc(address: str, model: str, body: bytes, *, timeout_s: float = 60.0) -> list[bytes]:
    """One call of the RPC that answers with a stream: the bytes of each answer, once the server has ended it."""
    with GrpcClient(address, model, timeout_s=timeout_s) as client:
        return client.stream(body)
