"""The whole life of a batch in a real handler: options, envelopes, neighbours, errors, metrics."""

from __future__ import annotations

import base64
import json
import logging
import random
import threading

import numpy as np
import pytest
import torch

pytest.importorskip("ts")

from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl

from mnist_handler import MnistHandler
from vmap_ensemble.core.forward import EnsembleForward
from vmap_ensemble.errors import LoadError, SettingsError

METRICS_FILE = "config/metrics.yaml"


def tensor(seed):
    return np.random.default_rng(seed).normal(size=(1, 28, 28)).astype(np.float32)


def row(seed, **keys):
    return {"body": {"data": tensor(seed).tolist(), **keys}}


def plain(models, seed, names=None):
    """Mean of the members' own softmax, by plain PyTorch."""
    x = torch.from_numpy(tensor(seed))[None]
    with torch.inference_mode():
        own = [model(x).softmax(-1) for name, model in models.items() if names is None or name in names]
    return torch.stack(own).mean(0)[0]


def close(ours, reference):
    """Equal up to float32 noise."""
    if isinstance(ours, dict):
        return ours.keys() == reference.keys() and all(close(ours[k], reference[k]) for k in ours)
    if isinstance(ours, list):
        return len(ours) == len(reference) and all(map(close, ours, reference))
    return ours == pytest.approx(reference, abs=2e-6) if isinstance(ours, float) else ours == reference


@pytest.mark.parametrize("count", [1, 2, 5])
def test_answer_equals_plain_members(count, make_mnist, ask):
    handler, models = make_mnist(count)
    ((status, answer),) = ask(handler, [row(3, top_k=10)])
    expected = plain(models, 3)
    assert status == 200
    assert answer["prediction"]["index"] == int(expected.argmax())
    for entry in answer["top_k"]:
        assert entry["probability"] == pytest.approx(expected[entry["index"]].item(), rel=1e-5)
    assert answer["ensemble"] == {"size": count, "used": count}


def test_batch_equals_single_calls_in_any_order(make_mnist, ask):
    handler, _ = make_mnist(3)
    rows = [row(seed, top_k=10, detail="members") for seed in range(12)]
    random.Random(0).shuffle(rows)
    batched = ask(handler, rows)
    assert all(close(b[1], ask(handler, [r])[0][1]) for b, r in zip(batched, rows, strict=True))


def test_batch_of_mixed_subsets_is_one_forward_and_equals_each_alone(make_mnist, ask):
    handler, models = make_mnist(3)
    subsets = [["m0"], ["m1", "m2"], None, ["m2", "m0"]]
    rows = [row(i, top_k=10, **({"subset": s} if s else {})) for i, s in enumerate(subsets)]
    calls, run = [], handler.ensemble.run
    handler.ensemble.run = lambda *args: calls.append(1) or run(*args)
    replies = ask(handler, rows)
    assert len(calls) == 1
    for seed, (subset, (_, answer)) in enumerate(zip(subsets, replies, strict=True)):
        expected = plain(models, seed, subset)
        assert answer["prediction"]["probability"] == pytest.approx(expected.max().item(), rel=1e-5)
        assert close(answer, ask(handler, [rows[seed]])[0][1])


@pytest.mark.parametrize(
    ("extra", "headers"),
    [
        ({}, {"X-Ensemble-Detail": "members", "X-Ensemble-Subset": "m2, m0", "X-Ensemble-Top-K": "2"}),
        ({}, {"x-ensemble-DETAIL": "members", "X-ENSEMBLE-SUBSET": "m0,m2", "x-ensemble-top-k": "2"}),
        ({"detail": b"members", "subset": b"m0,m2", "top_k": b"2"}, {}),
        ({"detail": "members", "subset": ["m0", "m2"], "top_k": 2}, {}),
    ],
)
def test_options_by_header_and_multipart_field(extra, headers, make_mnist, ask, digit):
    handler, _ = make_mnist(3)
    ((status, answer),) = ask(handler, [{"data": digit(), **extra}], [headers])
    assert status == 200
    assert [m["name"] for m in answer["members"]] == ["m0", "m2"]
    assert len(answer["top_k"]) == 2
    assert answer["ensemble"]["subset"] == ["m0", "m2"]


def test_option_field_sent_as_json_beside_an_image(make_mnist, ask, digit):
    handler, _ = make_mnist(2)
    headers = {"data": {"content-type": "image/png"}, "subset": {"content-type": "application/json"}}
    ((status, answer),) = ask(handler, [{"data": digit(), "subset": ["m1"]}], [headers])
    assert (status, answer["ensemble"]["used"]) == (200, 1)


def test_kserve_v1_and_v2(make_mnist, ask):
    handler, _ = make_mnist(2)
    alone = [ask(handler, [row(seed)])[0][1] for seed in (0, 1)]
    v1 = {"body": {"instances": [{"data": tensor(0).tolist()}, tensor(1).tolist()]}}
    flat = np.stack([tensor(0), tensor(1)])
    v2 = {
        "body": {
            "id": "7",
            "inputs": [{"name": "x", "shape": list(flat.shape), "datatype": "FP32", "data": flat.ravel().tolist()}],
            "parameters": {"top_k": 5},
        }
    }
    (_, first), (_, second) = ask(handler, [v1, v2])
    assert close(first, {"predictions": alone})
    assert second["id"] == "7"
    assert close([json.loads(text) for text in second["outputs"][0]["data"]], alone)


def test_base64_and_bytes_as_over_grpc_equal_the_file(make_mnist, ask, digit):
    handler, _ = make_mnist(2)
    text = base64.b64encode(digit()).decode()
    rows = [
        {"body": digit()},
        {"data": bytearray(digit())},
        {"body": {"b64": text}},
        {"data": json.dumps({"data": "data:image/png;base64," + text}).encode()},
        {"image": digit()},
    ]
    replies = ask(handler, rows)
    assert [status for status, _ in replies] == [200] * 5
    assert all(close(answer, replies[0][1]) for _, answer in replies)


DEEP = json.loads("[" * 900 + "1" + "]" * 900)
BAD = {
    "empty": ({"body": b""}, 400, "empty"),
    "no body": ({}, 400, "no body"),
    "text": ({"body": b"I am no image"}, 415, "not an image"),
    "string": ({"body": "I am no image"}, 415, "text"),
    "broken json": ({"body": b'{"a":'}, 400, "not valid JSON"),
    "deep json": ({"body": b'{"data":' + b"[" * 200_000}, 400, "not valid JSON"),
    "deep list": ({"body": {"data": DEEP}}, 422, "lists"),
    "nan": ({"body": b'{"data": [NaN, Infinity]}'}, 422, "finite"),
    "too large for float32": ({"body": {"data": [1e300]}}, 422, "finite"),
    "ragged": ({"body": {"data": [[1, 2], [3]]}}, 422, "lists"),
    "strings": ({"body": {"data": ["1", "2"]}}, 422, "numbers"),
    "bools": ({"body": {"data": [True]}}, 422, "numbers"),
    "huge int": ({"body": {"data": [10**400]}}, 422, "numbers"),
    "empty list": ({"body": {"data": []}}, 422, "not empty"),
    "wrong shape": ({"body": {"data": [[1.0]]}}, 422, r"[1, 28, 28], got [1, 1]"),
    "number": ({"body": 3}, 400, "int"),
    "null": ({"body": None}, 400, "empty"),
    "unknown subset": (row(0, subset="zz"), 422, "unknown member 'zz'; known: m0, m1"),
    "surrogate": (row(0, subset="\ud800"), 422, "unknown member"),
    "subset of numbers": (row(0, subset=[1]), 400, "subset"),
    "empty subset": (row(0, subset=","), 400, "subset"),
    "top_k 0": (row(0, top_k=0), 400, "top_k"),
    "top_k bool": (row(0, top_k=True), 400, "top_k"),
    "detail": (row(0, detail="all"), 400, "detail"),
    "no data": ({"body": {"x": 1}}, 400, "unknown key 'x'; known keys: data, b64, image"),
    "no instances": ({"body": {"instances": []}}, 400, "empty"),
    "many instances": ({"body": {"instances": [0] * 2000}}, 413, "2000"),
    "v2 shape": ({"body": {"inputs": [{"name": "x", "shape": 5, "data": [1]}]}}, 400, "sizes"),
    "v2 nothing": ({"body": {"inputs": [{"name": "x", "shape": [10**9, 0], "data": []}]}}, 400, "sizes"),
    "v2 count": ({"body": {"inputs": [{"name": "x", "shape": [3], "data": [1]}]}}, 400, "don't fill"),
    "v2 mixed": ({"body": {"inputs": [{"name": "x", "shape": [2], "data": [[1, 2], 3]}]}}, 400, "side by side"),
    "v2 data": ({"body": {"inputs": [{"name": "x", "data": 3}]}}, 400, "expected a list"),
    "v2 twice": ({"body": {"inputs": [{"name": "x", "data": [1]}] * 2}}, 400, "several"),
    "v2 rows": (
        {"body": {"inputs": [{"name": "x", "data": [1]}, {"name": "y", "data": [1, 2]}]}},
        400,
        "same first size",
    ),
}


def test_every_bad_request_fails_alone_and_says_why(make_mnist, ask):
    handler, _ = make_mnist(2)
    good = ask(handler, [row(5)])[0][1]
    rows = [row(5)]
    for bad, _, _ in BAD.values():
        rows += [bad, row(5)]
    replies = ask(handler, rows)
    assert all(status == 200 and close(answer, good) for status, answer in replies[::2])
    for (name, (_, status, part)), (got, body) in zip(BAD.items(), replies[1::2], strict=True):
        assert (got, body["error"]["code"]) == (status, status), (name, body)
        assert part in body["error"]["message"], (name, body)
        assert "Traceback" not in str(body)
        assert str(handler.place.folder) not in str(body)


def test_form_encoding_is_explained(make_mnist, ask):
    handler, _ = make_mnist(1)
    headers = [{"Content-Type": "application/x-www-form-urlencoded"}]
    ((status, body),) = ask(handler, [{"hello": b""}], headers)
    assert status == 400
    assert "curl -T FILE" in body["error"]["message"]


def test_huge_top_k_gives_all_classes(make_mnist, ask):
    handler, _ = make_mnist(2)
    ((status, answer), (_, other)) = ask(handler, [row(0, top_k=10**30), row(1)])
    assert (status, len(answer["top_k"]), len(other["top_k"])) == (200, 10, 5)


class Strange(MnistHandler):
    """Explains by something JSON doesn't know; `answers` may be broken."""

    def explain(self, asked, examples, options):
        return {"set": {1}}


def test_explain_describe_and_predict_in_one_batch(make_mnist, ask):
    handler, _ = make_mnist(2, handler=Strange)
    replies = ask(handler, [row(0), row(0), row(0)], [{}, {"explain": "True"}, {"describe": "True"}])
    assert [status for status, _ in replies] == [200, 500, 200]
    assert replies[2][1]["size"] == 2
    assert len(replies[2][1]["members"][0]["sha256"]) == 64
    plain_handler, _ = make_mnist(2)
    assert ask(plain_handler, [row(0)], [{"explain": "True"}])[0][0] == 501


def test_answer_that_cannot_be_serialised_hurts_no_neighbour(make_mnist, ask):
    handler, _ = make_mnist(2)
    answers = handler.answers

    def broken(outputs, weights, options, examples):
        given = answers(outputs, weights, options, examples)
        given[0].body["x"] = float("nan")
        return given

    handler.answers = broken
    assert [status for status, _ in ask(handler, [row(0), row(1)])] == [500, 200]
    handler.answers = lambda *args: []
    assert [status for status, _ in ask(handler, [row(0), {"body": b""}])] == [500, 400]


@pytest.mark.parametrize(("error", "status"), [(ValueError("secret"), 500), (torch.OutOfMemoryError(), 507)])
def test_forward_that_fails_for_one_example(error, status, make_mnist, ask, caplog):
    handler, _ = make_mnist(2)
    run = handler.ensemble.run

    def failing(x):
        if (x == 77).any():
            raise error
        return run(x)

    handler.ensemble.run = failing
    bad = {"body": {"data": np.full((1, 28, 28), 77.0).tolist()}}
    with caplog.at_level(logging.DEBUG):
        replies = ask(handler, [row(0), bad, row(1)])
    assert [s for s, _ in replies] == [200, status, 200]
    assert "secret" not in caplog.text + str(replies)


def test_request_contents_are_not_logged(make_mnist, ask, caplog):
    handler, _ = make_mnist(1)
    with caplog.at_level(logging.DEBUG):
        ask(handler, [{"body": "mysecret text"}, row(0, subset="mysecret"), {"body": b'{"mysecret'}])
    assert "mysecret" not in caplog.text


def spoil(name, model):
    if name == "m1":
        model.fc2.bias.data[0] = float("nan")


def test_member_that_is_not_finite_is_left_out_named_and_counted(make_mnist, ask):
    cache = MetricsCacheYamlImpl(config_file_path=METRICS_FILE)
    cache.initialize_cache()
    handler, models = make_mnist(3, change=spoil, metrics=cache)
    recorded = []
    handler.metrics.record = lambda *call: recorded.append(call)
    (_, answer), (status, body) = ask(handler, [row(0, top_k=10), row(0, subset="m1")])
    assert answer["ensemble"] == {"size": 3, "used": 2, "left_out": ["m1"]}
    expected = plain(models, 0, ["m0", "m2"])
    assert answer["prediction"]["probability"] == pytest.approx(expected.max().item(), rel=1e-5)
    assert ("EnsembleNonFiniteMembers", 1, "m1") in recorded
    assert ("EnsembleRefusedRequests", 1, "500", "failed") in recorded
    assert (status, body["error"]["message"]) == (500, "no member gave a finite output for this input")


def test_wrong_weights_are_refused(make_mnist):
    with pytest.raises(SettingsError, match=r"unknown \['x'\], missing \['m0', 'm1'\]"):
        make_mnist(2, {"weights": {"x": 1}})


def test_archive_whose_proof_fails_is_not_served(make_mnist, caplog, monkeypatch):
    plain = EnsembleForward.__call__

    def wrong_for_m1(self, *args):
        outputs = plain(self, *args).clone()
        outputs[1] += 0.01  # far beyond rounding, whatever the processor
        return outputs

    monkeypatch.setattr(EnsembleForward, "__call__", wrong_for_m1)
    with pytest.raises(LoadError, match="m1"):
        make_mnist(2, {"execution": "eager"})
    assert "cannot serve ens" in caplog.text


def test_a_subset_without_weight_is_refused_alone(make_mnist, ask, digit):
    handler, _ = make_mnist(2, {"weights": {"m0": 0.0, "m1": 1.0}})
    rows = [{"body": digit()}, {"body": digit()}]
    replies = ask(handler, rows, [{"x-ensemble-subset": "m0"}, {}])
    assert replies[0][0] == 422
    assert "no weight" in replies[0][1]["error"]["message"]
    assert replies[1][0] == 200


class Threaded(MnistHandler):
    """Parses two items at a time, or waits forever."""

    threads_from_bytes = 0
    together = threading.Barrier(2)

    def transform(self, image, row):
        self.together.wait(timeout=30)
        super().transform(image, row)


def test_items_are_parsed_in_threads_and_a_bad_one_fails_alone(make_mnist, ask, digit):
    plain_handler, _ = make_mnist(2)
    handler, _ = make_mnist(2, handler=Threaded, config={"handler": {"threads": 2}})
    images = [{"body": digit(seed)} for seed in range(4)]
    rows = [images[0], {"body": b"no image"}, images[1], {"body": b""}, images[2], images[3]]
    replies = ask(handler, rows)
    assert [status for status, _ in replies] == [200, 415, 200, 400, 200, 200]
    expected = ask(plain_handler, images)
    for (_, answer), (_, own) in zip([replies[i] for i in (0, 2, 4, 5)], expected, strict=True):
        assert close(answer, own)
