"""What people write for Ray Serve who have N checkpoints: one deployment that calls its modules one after another."""

from __future__ import annotations

import io
from typing import Any

import torch
from PIL import Image
from ray import serve
from ray.serve import Application
from starlette.requests import Request
from starlette.responses import JSONResponse

from benchmarks.serve.archives import SUBJECTS


class Loop:
    """All members in one replica, one request at a time through each of them.

    Args:
        handler: What is served, a key of SUBJECTS.
        files: One checkpoint per member.
        threads: Torch's.
    """

    def __init__(self, handler: str, files: list[str], threads: int) -> None:
        torch.set_num_threads(threads)
        subject = SUBJECTS[handler]
        self.transform, self.members = subject.transform, []
        for file in files:
            self.members.append(subject.build().eval())
            self.members[-1].load_state_dict(torch.load(file, weights_only=True))

    async def __call__(self, request: Request) -> JSONResponse:
        """One picture as the body -> {class: mean of the members' probabilities}."""
        x = self.transform(Image.open(io.BytesIO(await request.body()))).unsqueeze(0)
        with torch.inference_mode():
            rows = [member(x).softmax(1)[0] for member in self.members]
            means = torch.stack(rows).mean(0).tolist()
        return JSONResponse({str(index): value for index, value in enumerate(means)})


def app(args: dict[str, Any]) -> Application:
    """The application that `serve run` builds; `args` are those of `Loop`."""
    return serve.deployment(name="ens")(Loop).bind(**args)
