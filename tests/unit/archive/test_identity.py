"""Which archive gave an answer: the version it was built with, and a hash that any change of its files changes."""

from __future__ import annotations

import json

import pytest

from vmap_ensemble import Ensemble
from vmap_ensemble.archive.identity import DESCRIPTION, identify
from vmap_ensemble.archive.manifest import MANIFEST_FILE, hash_file
from vmap_ensemble.models.mnist import MnistNet
from vmap_ensemble.serving.batch import Incoming, answer_batch
from vmap_ensemble.tasks.answers import significant


@pytest.fixture
def make(make_archive, make_model):
    """A function: settings -> the folder of an archive of two digits' networks, of version 2.1."""

    def build(**settings):
        states = {f"m{seed}": make_model(MnistNet, seed).state_dict() for seed in range(2)}
        folder = make_archive(states, {"handler": "mnist_handler.py", "execution": "eager", **settings})
        (folder / DESCRIPTION).parent.mkdir(exist_ok=True)
        (folder / DESCRIPTION).write_text(json.dumps({"model": {"modelVersion": "2.1"}}))
        return folder

    return build


def test_answers_say_who_gave_them_where_they_are_asked(make, digit):
    folder = make()
    ensemble = Ensemble.load(folder)
    plain, detailed = ensemble.predict([digit()]) + ensemble.predict([digit()], detail=True)
    assert "archive" not in plain.body
    assert detailed.body["archive"] == {"version": "2.1", "sha256": identify(folder).sha256}
    files = {
        row["name"]: hash_file(folder / "members" / f"{row['name']}.safetensors") for row in detailed.body["members"]
    }
    assert {row["name"]: row["sha256"] for row in detailed.body["members"]} == files
    assert ensemble.describe().to_dict()["archive"] == detailed.body["archive"]


def test_every_answer_says_it_where_the_settings_do(make, digit):
    ensemble = Ensemble.load(make(identify_answers=True, response="torchserve"))
    (reply,) = answer_batch(ensemble, [Incoming({"body": digit()}, {})])
    assert json.loads(reply.text)["archive"]["version"] == "2.1"


def test_the_hash_is_of_what_decides_answers(make):
    folder = make()
    before = identify(folder).sha256
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "left.pyc").write_bytes(b"of a worker")
    assert identify(folder).sha256 == before
    for name in (MANIFEST_FILE, "setup_config.json", "index_to_name.json"):
        with (folder / name).open("a") as file:
            file.write(" ")
        assert identify(folder).sha256 != before
        before = identify(folder).sha256


def test_members_in_memory_have_no_archive(make_model):
    model = MnistNet()
    states = {"a": make_model(MnistNet, 0).state_dict(), "b": make_model(MnistNet, 1).state_dict()}
    ensemble = Ensemble.of(model, states, settings={"input_shape": [1, 28, 28], "identify_answers": True})
    (answer,) = ensemble.predict([[[[0.5] * 28] * 28]], detail=True)
    assert "archive" not in answer.body
    assert all("sha256" not in row for row in answer.body["members"])


def test_digits_are_a_float32s():
    body = {
        "p": 1 / 3,
        "values": [[123456.789, -2e-12]],
        "index": 123456789,
        "used": True,
        "label": "a",
        "none": None,
    }
    rounded = significant(body)
    assert rounded == {**body, "p": 0.3333333, "values": [[123456.8, -2e-12]]}
    assert rounded["used"] is True
