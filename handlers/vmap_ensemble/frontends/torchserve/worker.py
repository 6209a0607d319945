"""Turns TorchServe's configuration of a model into what a worker process of it does."""

from __future__ import annotations

import logging
from typing import Any

from vmap_ensemble.serving.requests import SeveralParts


def quieten_worker() -> None:
    """Drop the line that ts/protocol/otf_message_handler.py logs per batch: under load Java reads every one."""
    logging.getLogger().setLevel(logging.WARNING)
    for name in ("vmap_ensemble", "ts.metrics"):  # metrics are log lines, too
        logging.getLogger(name).setLevel(logging.INFO)
    logging.getLogger().addFilter(_concerns_the_server)


def _concerns_the_server(record: logging.LogRecord) -> bool:
    """False for the traceback that ts/protocol/otf_message_handler.py logs of each body that isn't what it says.

    Such a body is answered and counted by ours, and whoever sends many of them would fill the log.
    """
    return (record.module, record.funcName) != ("otf_message_handler", "_retrieve_input_data")


def keep_parts_of_one_name() -> None:
    """Let this worker see all multipart parts that came under one name.

    TorchServe puts a request's parts into a dict by name (Service.retrieve_data_for_inference in ts/service.py), so
    that all but the last of one name are gone before a handler is called, and a client would get one answer to two
    files without a word. Afterwards such a name holds `SeveralParts`.
    """
    from ts.service import Service

    read = Service.retrieve_data_for_inference
    if getattr(read, "keeps_parts", False):
        return

    def read_all(batch: Any) -> Any:
        headers, rows, ids = read(batch)
        for row, request in zip(rows, batch, strict=True):
            names = [parameter["name"] for parameter in request["parameters"]]
            for name in {name for name in names if names.count(name) > 1}:
                values = [parameter["value"] for parameter in request["parameters"] if parameter["name"] == name]
                row[name] = SeveralParts(values)
        return headers, rows, ids

    read_all.keeps_parts = True  # type: ignore[attr-defined]
    Service.retrieve_data_for_inference = staticmethod(read_all)
