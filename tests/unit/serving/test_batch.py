"""Batches of requests at the data plane that servers share: subsets per item, items named in errors, statuses."""

from __future__ import annotations

import base64
import json

import pytest
import torch

from vmap_ensemble import errors
from vmap_ensemble.ensemble import Ensemble
from vmap_ensemble.execution.choice_cache import Candidate
from vmap_ensemble.models.mnist import MnistNet
from vmap_ensemble.serving.batch import Incoming, answer_batch
from vmap_ensemble.serving.statuses import REASONS, STATUSES, reason_of, status_of


@pytest.fixture
def ensemble(make_archive, make_model):
    def make(**settings):
        states = {f"m{seed}": make_model(MnistNet, seed).state_dict() for seed in range(3)}
        return Ensemble.load(make_archive(states, {"handler": "mnist_handler.py", **settings}))

    return make


def ask(ensemble, *bodies, headers=None):
    replies = answer_batch(ensemble, [Incoming({"body": body}, headers or {}) for body in bodies])
    return [(reply.status, json.loads(reply.text)) for reply in replies]


def test_a_tenants_item_is_answered_by_that_tenants_members_alone(ensemble, digit):
    ens = ensemble()
    text = base64.b64encode(digit()).decode()
    ((status, body),) = ask(ens, {"instances": [{"b64": text, "subset": [name]} for name in ens.names]})
    assert status == 200
    for name, answer in zip(ens.names, body["predictions"], strict=True):
        ((_, alone),) = ask(ens, digit(), headers={"x-ensemble-subset": name})
        assert answer["ensemble"] == {"size": 3, "used": 1, "subset": [name]}
        assert answer["prediction"]["probability"] == pytest.approx(alone["prediction"]["probability"], abs=2e-6)


def test_a_subset_can_be_required(ensemble, digit):
    ens = ensemble(require_subset=True)
    text = base64.b64encode(digit()).decode()
    some = {"instances": [{"b64": text, "subset": "m0"}, {"b64": text}]}
    (none, one, part) = ask(ens, digit(), {"b64": text, "subset": "m1"}, some)
    assert (none[0], one[0], part[0]) == (422, 200, 422)
    assert "expected names of members, got none; known: m0, m1, m2" in none[1]["error"]["message"]
    assert part[1]["error"]["message"].startswith("item 1: subset:")


def test_lists_of_pictures_are_batches_whose_errors_name_the_item(ensemble, digit):
    ens = ensemble()
    texts = [base64.b64encode(digit(seed)).decode() for seed in range(3)]
    (good, bad) = ask(ens, [*texts], [texts[0], {"b64": "aGk="}, texts[1]])
    assert (good[0], len(good[1])) == (200, 3)
    assert bad[0] == 415
    assert bad[1]["error"]["message"].startswith("item 1: ")


def test_explanations_and_descriptions_lie_among_predictions(ensemble, digit):
    ens = ensemble()
    batch = [
        Incoming({"body": digit()}, {}),
        Incoming({"body": digit()}, {}, "explain"),
        Incoming({"body": b""}, {}, "describe"),
    ]
    replies = answer_batch(ens, batch)
    assert [reply.status for reply in replies] == [200, 501, 200]
    assert json.loads(replies[2].text) == json.loads(ens.describe().to_json())


def test_what_happened_is_recorded(ensemble, digit):
    recorded = []
    answer_batch(
        ensemble(), [Incoming({"body": digit()}, {}), Incoming({"body": b"x"}, {})], lambda *row: recorded.append(row)
    )
    assert ("EnsembleBatchSize", 1) in recorded
    assert ("EnsembleRefusedRequests", 1, "415", "unknown_kind") in recorded
    assert any(name == "EnsembleMutualInformation" and value >= 0 for name, value, *_ in recorded)


def test_abstentions_and_the_members_that_were_named_are_counted(ensemble, digit):
    recorded = []
    ens = ensemble(abstain_below_probability=1.0)
    named = {"x-ensemble-subset": f"{ens.names[0]},{ens.names[1]}"}
    batch = [Incoming({"body": digit()}, {}), Incoming({"body": digit()}, named)]
    answer_batch(ens, batch, lambda *row: recorded.append(row))
    assert recorded.count(("EnsembleAbstentions", 1)) == 2
    members = [row for row in recorded if row[0] == "EnsembleMemberAnswers"]
    assert members == [("EnsembleMemberAnswers", 1, ens.names[0]), ("EnsembleMemberAnswers", 1, ens.names[1])]


def test_members_that_would_have_answered_otherwise_are_counted(ensemble, digit):
    recorded = []
    batch = [Incoming({"body": digit(seed)}, {"x-ensemble-detail": "members"}) for seed in range(12)]
    replies = answer_batch(ensemble(), batch, lambda *row: recorded.append(row))
    bodies = [json.loads(reply.text) for reply in replies]
    expected = [
        ("EnsembleDissentingMembers", 1, member["name"])
        for body in bodies
        for member in body["members"]
        if member["index"] != body["prediction"]["index"]
    ]
    assert 0 < len(expected) < 36
    assert [row for row in recorded if row[0] == "EnsembleDissentingMembers"] == expected


def test_what_auto_merely_tried_is_no_fallback(ensemble):
    ens = ensemble()
    ens.execution.candidates.append(Candidate("cudagraph", refused="no GPU"))
    assert ens.fallbacks() == []
    ens.alone = True
    assert ens.fallbacks() == ["rows run alone"]


def test_every_status_of_ours_has_a_reason():
    assert set(STATUSES.values()) <= set(REASONS)
    assert reason_of(418) == "other"


def test_every_error_of_an_item_has_a_status():
    def kinds(kind):
        return [kind, *(below for child in kind.__subclasses__() for below in kinds(child))]

    for kind in kinds(errors.ItemError):
        error = kind(418, "x") if kind is errors.RequestError else kind("x")
        assert status_of(error) == (418 if kind is errors.RequestError else STATUSES.get(kind, 500))


def test_a_batch_that_runs_out_of_memory_is_answered_one_by_one(ensemble, digit):
    ens = ensemble()
    run = ens.run

    def small(x):
        if len(x) > 1:
            raise torch.OutOfMemoryError
        return run(x)

    ens.run = small
    assert [status for status, _ in ask(ens, digit(0), digit(1))] == [200, 200]
