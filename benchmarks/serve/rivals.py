"""Checkpoints -> a running TorchServe that answers the mean of their probabilities; one class per way to do so."""

from __future__ import annotations

import json
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from torch import Tensor

from benchmarks.serve.archives import CLASSES, Subject, pack_ours, pack_stock, pack_workflow
from scripts.private_torchserve import TorchServe
from scripts.torchserve_process import ServerError, explain_failure


@dataclass(frozen=True)
class Setting:
    """What is the same for all rivals.

    Attributes:
        subject: what is served.
        files: one checkpoint per member.
        folder: scratch.
        cores: all torch threads of a rival together, as far as its workers can be given fewer.
        batch_size, delay_ms: TorchServe's batchSize and maxBatchDelay of every model.
    """

    subject: Subject
    files: list[Path]
    folder: Path
    cores: int
    batch_size: int
    delay_ms: int


class Rival(ABC):
    """One way to serve the ensemble.

    Attributes:
        name: in the table.
        text: one line for readers.
    """

    name: str
    text: str

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.paths = [f"/predictions/{name}" for name in self.model_names()]

    def model_names(self) -> list[str]:
        """The models that are registered; one worker each."""
        return ["ens"]

    @abstractmethod
    def pack(self) -> dict[str, Path]:
        """Name of a model -> its archive."""

    def batching(self) -> dict[str, Any]:
        """The model-config yaml of every archive; the cores are shared out among the workers."""
        threads = max(1, self.setting.cores // len(self.model_names()))
        handler = {"threads": threads, **self.handler_options()}
        size, delay = self.setting.batch_size, self.setting.delay_ms
        return {"batchSize": size, "maxBatchDelay": delay, "minWorkers": 1, "maxWorkers": 1, "handler": handler}

    def handler_options(self) -> dict[str, str]:
        """What the stock handlers read from the yaml beside the threads."""
        return {"input": self.setting.subject.input}

    @contextmanager
    def serve(self) -> Iterator[TorchServe]:
        """Run a TorchServe of its own with all workers ready."""
        with TorchServe(self.pack(), batching=self.batching(), timeout_s=300) as server:
            yield server

    def read(self, answer: Any) -> list[float]:
        """An answer's probability of every class."""
        return [float(answer[str(index)]) for index in range(CLASSES)]

    def ask(self, server: TorchServe, body: bytes) -> Tensor:
        """(classes,) probabilities that a client gets for one picture.

        Raises:
            ServerError: the answer is no 200.
        """
        rows = []
        with server.client() as client:
            for path in self.paths:
                answer = client.post(path, content=body, headers={"Content-Type": "application/octet-stream"})
                if answer.status_code != 200:
                    raise ServerError(f"{self.name}: {path} answered {answer.status_code}: {answer.text[:200]}")
                rows.append(self.read(json.loads(answer.text)))
        return torch.tensor(rows).mean(0)


class Ours(Rival):
    """One archive, one worker, one forward."""

    name = "ours"
    text = "one archive of this project, one worker"
    execution = "auto"

    def pack(self) -> dict[str, Path]:
        """Build it as ./archive.sh does."""
        return {"ens": pack_ours(self.setting.subject, self.setting.files, self.setting.folder, self.execution)}

    def handler_options(self) -> dict[str, str]:
        """None: our handler refuses what it doesn't know."""
        return {}

    def read(self, answer: Any) -> list[float]:
        """All classes are in the top k, sorted by probability."""
        found = {row["index"]: row["probability"] for row in answer["top_k"]}
        return [float(found[index]) for index in range(CLASSES)]


class OursReference(Ours):
    """Our archive told to run the plain loop: what the forward alone changes."""

    name = "ours_reference"
    text = 'the same archive with "execution": "reference", the plain loop'
    execution = "reference"


class OursTwice(Ours):
    """Our archive with two workers: one decodes while the other computes, each with a copy of all members."""

    name = "ours_two_workers"
    text = "the same archive with two workers that share the cores"

    def batching(self) -> dict[str, Any]:
        """Two workers, each with half of the cores."""
        threads = max(1, self.setting.cores // 2)
        return {**super().batching(), "minWorkers": 2, "maxWorkers": 2, "handler": {"threads": threads}}


class Separate(Rival):
    """N models; whoever asks has to ask all of them."""

    name = "separate"
    text = "every member registered as a model, one worker each; the client asks all and averages"

    def model_names(self) -> list[str]:
        """One per member."""
        return [f"m{index}" for index in range(len(self.setting.files))]

    def pack(self) -> dict[str, Path]:
        """One stock archive per member."""
        subject, folder = self.setting.subject, self.setting.folder
        pairs = zip(self.model_names(), self.setting.files, strict=True)
        return {name: pack_stock(subject, name, "member.py", file, folder) for name, file in pairs}


class Loop(Rival):
    """One worker that asks its modules one after another."""

    name = "loop"
    text = "one archive with a handler that loops over the members, one worker"

    def pack(self) -> dict[str, Path]:
        """One stock archive with all checkpoints."""
        first, *others = self.setting.files
        subject, folder = self.setting.subject, self.setting.folder
        return {"ens": pack_stock(subject, "ens", "loop.py", first, folder, tuple(others))}


class Workflow(Separate):
    """TorchServe's own way to combine models; the average is one more worker."""

    name = "workflow"
    text = "TorchServe's workflow of the members' archives with a function that averages"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.paths = ["/wfpredict/ens"]

    @contextmanager
    def serve(self) -> Iterator[TorchServe]:
        """Start TorchServe without models, then register the workflow, which registers them."""
        store = self.setting.folder / "workflows"
        store.mkdir(exist_ok=True)
        shutil.move(pack_workflow(len(self.setting.files), self.batching(), self.setting.folder), store / "ens.war")
        server = TorchServe(
            self.pack(), batching=self.batching(), settings={"workflow_store": str(store)}, timeout_s=300
        )
        server.launch.models.clear()
        with server:
            self._register(server)
            yield server

    def _register(self, server: TorchServe) -> None:
        _wait_for_ping(server)
        with server.client("management") as client:
            answer = client.post("/workflows", params={"url": "ens.war"}, timeout=300)
        if answer.status_code != 200:
            raise ServerError(f"workflow: {answer.text[:300]}\n{explain_failure(server.launch)}")


def _wait_for_ping(server: TorchServe, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            with server.client() as client:
                if client.get("/ping").status_code == 200:
                    return
        except httpx.HTTPError:
            time.sleep(0.2)
    raise ServerError(f"no answer from TorchServe within {timeout_s:.0f} s:\n{explain_failure(server.launch)}")


RIVALS: dict[str, type[Rival]] = {
    rival.name: rival for rival in (Separate, Ours, Loop, Workflow, OursReference, OursTwice)
}
