#!/usr/bin/env bash
# kserve 0.21.0: each prediction over REST asks the model's `healthy()` twice, before `predict` is called.
#
# A good engineer would guess that `healthy()` belongs to probes, every few seconds, and make it a real prediction, as
# the documentation of readiness suggests. The endpoint asks it, and so does the data plane behind the endpoint; if the
# second answer is false, `load()` runs within the request.
# Seen: 3 predictions call healthy() 6 times; a model that is unhealthy once, in between, is loaded again.
# So `healthy()` must be cheap, and a real prediction must run elsewhere, its outcome remembered.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check kserve==0.21.0

"$work/venv/bin/python" - <<'PYTHON'
import asyncio

import httpx
from fastapi import FastAPI
from kserve import Model
from kserve.model_repository import ModelRepository
from kserve.protocol.dataplane import DataPlane
from kserve.protocol.rest.v1_endpoints import register_v1_endpoints


class Counting(Model):
    def __init__(self):
        super().__init__("counting")
        self.ready, self.asked, self.loaded, self.answers = True, 0, 0, iter([])

    async def healthy(self):
        self.asked += 1
        return next(self.answers, True)

    def load(self):
        self.loaded += 1
        return True

    def predict(self, payload, headers=None, response_headers=None):
        return {"predictions": [len(payload["instances"])]}


async def main():
    model, models, app = Counting(), ModelRepository(), FastAPI()
    models.update(model)
    register_v1_endpoints(app, DataPlane(models), None)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://here") as client:
        for _ in range(3):
            answer = await client.post("/v1/models/counting:predict", json={"instances": [1, 2]})
            assert (answer.status_code, answer.json()) == (200, {"predictions": [2]}), answer.text
        asked = model.asked
        model.answers = iter([True, False])
        await client.post("/v1/models/counting:predict", json={"instances": [1]})
    print(f"healthy() was called {asked} times by 3 predictions; load() {model.loaded} time by one in between")
    assert (asked, model.loaded) == (6, 1), (asked, model.loaded)


asyncio.run(main())
PYTHON
echo "confirmed"
