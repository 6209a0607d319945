"""Turns an ensemble into a web application: a page, what it tells of the ensemble, and every server's addresses."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from vmap_ensemble.ensemble import Ensemble
from vmap_ensemble.frontends.demo.figures import REPLY, Figures
from vmap_ensemble.frontends.door import METHODS, ROUTES, Door, Taken, open_taken
from vmap_ensemble.frontends.gathering import Gathering
from vmap_ensemble.frontends.limits import MOST_BYTES
from vmap_ensemble.serving.batch import Incoming, Reply, answer_batch
from vmap_ensemble.tasks.images.task import ImageTask
from vmap_ensemble.tasks.task import Task

FILES = {"/": "page.html", "/page.css": "page.css", "/page.js": "page.js"}
# A page of another site that has its name lead to 127.0.0.1 is refused by the name that it asks with.
HOSTS = ["127.0.0.1", "localhost", "[::1]"]
# Nothing comes from another host and nothing goes there; a picture that was dropped is shown from memory.
POLICY = "default-src 'self'; img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
HEADERS = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
BATCH_SIZE = 8


class Demo:
    """One ensemble behind a page.

    Args:
        ensemble: What is asked.
        name: What clients ask for: /predictions/NAME.
    """

    def __init__(self, ensemble: Ensemble, name: str) -> None:
        self.ensemble, self.name, self.figures = ensemble, name, Figures()
        self._gathering = Gathering(self._answer, BATCH_SIZE)
        self._door = Door({name: self._ask}, MOST_BYTES)

    def application(self) -> Starlette:
        """What an ASGI server runs."""
        routes = [Route(path, _file(name)) for path, name in FILES.items()]
        routes += [Route("/about", self._tell_about), Route("/figures", self._tell_figures)]
        # A method, for Starlette takes other callables for applications. The door itself refuses GET, in its words.
        door, methods = self._door.__call__, [*METHODS, "GET"]
        routes += [Route(f"/{kind}/{{name:path}}", door, methods=methods) for kind in ROUTES]
        return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS)])

    def about(self) -> dict[str, Any]:
        """What the page has to know of the ensemble."""
        task = self.ensemble.task
        own = self.ensemble.summary()
        return {
            "name": self.name,
            "ensemble": own["ensemble"],
            "architecture": own["architecture"],
            "device": own["device"],
            "dtype": own["dtype"],
            "execution": own["execution"]["serves"],
            "members": list(self.ensemble.names),
            "labels": len(task.labels),
            "input": _input_of(task),
            # A picture is brought along by whoever asks; a text or numbers are there to begin with.
            "sample": None if isinstance(task, ImageTask) else json.loads(task.sample_request()),
            "explains": type(task).explain is not Task.explain,
        }

    async def _ask(self, taken: Taken) -> Reply:
        started = time.perf_counter()
        incoming = open_taken(taken, self.figures.record)
        reply = incoming if isinstance(incoming, Reply) else await self._gathering.ask(incoming)
        self.figures.record(REPLY, time.perf_counter() - started, str(reply.status))
        return reply

    def _answer(self, batch: list[Incoming]) -> list[Reply]:
        return answer_batch(self.ensemble, batch, self.figures.record)

    async def _tell_about(self, request: Request) -> Response:
        return JSONResponse(self.about(), headers=HEADERS)

    async def _tell_figures(self, request: Request) -> Response:
        return JSONResponse(self.figures.summary(), headers={**HEADERS, "Cache-Control": "no-store"})


def _input_of(task: Task) -> str:
    """What the page asks for: a picture, texts, or numbers as JSON."""
    if isinstance(task, ImageTask):
        return "picture"
    return "text" if task.reads_texts else "json"


def _file(name: str) -> Callable[[Request], Awaitable[Response]]:
    async def send(request: Request) -> Response:
        return FileResponse(Path(__file__).with_name(name), headers=HEADERS)

    return send
