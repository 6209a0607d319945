"""What a worker of ours doesn't log: TorchServe's own traceback of each body that isn't the JSON it says it is."""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator

import pytest

pytest.importorskip("ts")

from ts.protocol import otf_message_handler

from vmap_ensemble.frontends.torchserve.worker import quieten_worker


class Connection:
    """Bytes as a worker reads them from its socket."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def recv(self, count: int) -> bytes:
        part, self.data = self.data[:count], self.data[count:]
        return part


def read_body(kind: str, body: bytes) -> object:
    """TorchServe's own reading of one input: name, content type and value, each behind its length."""
    parts = (b"body", kind.encode(), body)
    data = b"".join(struct.pack("!i", len(part)) + part for part in parts)
    return otf_message_handler._retrieve_input_data(Connection(data))


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """The process' logging as Python starts it, whichever handler was loaded in it before; put back afterwards."""
    root = logging.getLogger()
    loggers = [root, *map(logging.getLogger, ("vmap_ensemble", "ts.metrics"))]
    levels, filters = [logger.level for logger in loggers], root.filters
    root.filters = []
    root.setLevel(logging.WARNING)
    yield
    root.filters = filters
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


BODIES = [("application/json", b'{"secret": '), ("application/json", b"\xff"), ("text/plain", b"\xff")]


@pytest.mark.parametrize(("kind", "body"), BODIES)
def test_torchserve_itself_logs_a_traceback_of_such_a_body(caplog, kind, body):
    read_body(kind, body)
    assert caplog.records[0].exc_info


@pytest.mark.parametrize(("kind", "body"), BODIES)
def test_a_quiet_worker_does_not(caplog, kind, body):
    quieten_worker()
    assert read_body(kind, body)["value"] == body
    assert not caplog.records


def test_what_concerns_the_server_is_still_logged(caplog):
    quieten_worker()
    logging.warning("disk is full")
    logging.getLogger("vmap_ensemble.x").info("loaded")
    assert caplog.messages == ["disk is full", "loaded"]
