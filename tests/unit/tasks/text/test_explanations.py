"""Explanations of tiny random encoders, against Captum called by hand on each of transformers' own members."""

from __future__ import annotations

import sys

import pytest
import torch

transformers = pytest.importorskip("transformers")
captum = pytest.importorskip("captum.attr")

from tests.unit.tasks.text import test_encoder_task as bert  # noqa: E402
from vmap_ensemble.encoders.forward import POSITIONS, count_real_tokens  # noqa: E402
from vmap_ensemble.errors import ItemError, RequestError, SettingsError  # noqa: E402
from vmap_ensemble.serving.requests import read_request  # noqa: E402

serve_anywhere = bert.serve
EXPLAIN = {"explain": "True"}
TEXT = "sarah lives in london . great"
WORDS = [("sarah", 0, 5), ("lives", 6, 11), ("in", 12, 14), ("london", 15, 21), (".", 22, 23), ("great", 24, 29)]


@pytest.fixture
def serve(serve_anywhere):
    """As the other tests of encoders serve, on one thread: thousands of tiny operators, where two would only wait."""
    before = torch.get_num_threads()

    def make(*arguments, **settings):
        made = serve_anywhere(*arguments, **settings)
        torch.set_num_threads(1)
        return made

    yield make
    torch.set_num_threads(before)


def liven(members):
    """Layer norms near 1, as trained ones are: words then move the scores by more than rounding does."""
    with torch.no_grad():
        for member in members.values():
            for name, parameter in member.named_parameters():
                if name.endswith("weight") and parameter.dim() == 1:
                    parameter.add_(1.0)


def explain(ask, handler, body, **headers):
    ((status, answer),) = ask(handler, [{"body": body}], [{**EXPLAIN, **headers}])
    assert status == 200, answer
    return answer


def by_hand(member, tokenizer, text, score, keep=(2, 3)):
    """(S,) what Captum says that the member's tokens add, and its delta; no code of ours but the positions."""
    encoded = tokenizer(text, return_tensors="pt")
    ids = encoded["input_ids"]
    baseline = torch.where(torch.isin(ids, torch.tensor(keep)), ids, tokenizer.pad_token_id)
    kind = member.config.model_type
    padding = 1 if kind == "mpnet" else member.config.pad_token_id
    places = POSITIONS.get(kind, count_real_tokens)(ids, padding)

    def forward(ids, places):
        return score(member(ids, attention_mask=torch.ones_like(ids), position_ids=places))

    integrate = captum.LayerIntegratedGradients(forward, member.base_model.embeddings)
    attributions, delta = integrate.attribute(
        ids, baselines=baseline, additional_forward_args=(places,), n_steps=50, return_convergence_delta=True
    )
    with torch.no_grad():
        ends = [forward(row, places).item() for row in (ids, baseline)]
    return attributions[0].sum(-1), delta.item(), ends


def joined(tokens):
    """Tokens of TEXT to words: [CLS] sarah lives in lon ##don . great [SEP]."""
    return [*tokens[1:4].tolist(), (tokens[4] + tokens[5]).item(), *tokens[6:8].tolist()]


def check_complete(row):
    assert sum(row["importances"]) == pytest.approx(row["value"] - row["baseline"] + row["delta"], abs=1e-6)


@pytest.mark.parametrize("kind", bert.CONFIGS)
def test_importances_are_the_members_weighted_ones(kind, serve, ask):
    weights = {"m0": 1.0, "m1": 3.0}
    handler, members, tokenizer = serve(
        "sequence_classification", bert.CONFIGS[kind](num_labels=3), change=liven, weights=weights, temperature=2.0
    )
    ((_, prediction),) = ask(handler, [{"body": TEXT.encode()}])
    (row,) = explain(ask, handler, TEXT.encode())["explanations"]
    assert (row["label"], row["index"]) == (prediction["prediction"]["label"], prediction["prediction"]["index"])
    assert row["value"] == pytest.approx(prediction["prediction"]["probability"], rel=1e-4)
    assert [(w["word"], w["start"], w["end"]) for w in row["words"]] == WORDS
    own = [
        by_hand(member, tokenizer, TEXT, lambda output: (output.logits / 2.0).softmax(-1)[:, row["index"]])
        for member in members.values()
    ]
    expected = sum(share * tokens for share, (tokens, _, _) in zip((0.25, 0.75), own, strict=True))
    assert row["importances"] == pytest.approx(joined(expected), rel=1e-3, abs=2e-7)
    assert row["delta"] == pytest.approx(0.25 * own[0][1] + 0.75 * own[1][1], abs=1e-5)
    assert row["baseline"] == pytest.approx(0.25 * own[0][2][1] + 0.75 * own[1][2][1], rel=1e-4)
    check_complete(row)
    assert max(map(abs, row["importances"])) > 1e-3


def test_targets_are_classes_by_label_number_or_all(serve, ask):
    config = bert.CONFIGS["bert"](num_labels=3, id2label={0: "bad", 1: "fine", 2: "2x"})
    handler, _, _ = serve("sequence_classification", config)
    wanted = [({"target": "all"}, [0, 1, 2]), ({"target": ["2x", 0]}, [2, 0]), ({"target": 1}, [1])]
    rows = {}
    for option, indices in wanted:
        answer = explain(ask, handler, {"text": TEXT, **option})
        assert [row["index"] for row in answer["explanations"]] == indices
        rows.update({row["index"]: row for row in answer["explanations"]})
    by_header = explain(ask, handler, TEXT.encode(), **{"X-Ensemble-Target": "bad, 2"})["explanations"]
    assert [row["index"] for row in by_header] == [0, 2]
    # probabilities of all classes sum to 1, so what a word adds to them sums to 0
    for three in zip(*(rows[index]["importances"] for index in range(3)), strict=True):
        assert sum(three) == pytest.approx(0, abs=1e-5)
    ((status, answer),) = ask(handler, [{"body": {"text": TEXT, "target": "good"}}], [EXPLAIN])
    assert (status, "unknown 'good'" in answer["error"]["message"]) == (422, True)


def test_a_mean_of_logits_is_explained_by_log_probabilities(serve, ask):
    handler, members, tokenizer = serve(
        "sequence_classification", bert.CONFIGS["bert"](num_labels=3), aggregation="mean_logit"
    )
    answer = explain(ask, handler, {"text": TEXT, "target": "all"})
    assert answer["explains"] == "log_probability"
    ((_, prediction),) = ask(handler, [{"body": {"text": TEXT, "top_k": 3}}])
    values = torch.tensor([row["value"] for row in answer["explanations"]])
    for row in prediction["top_k"]:
        assert values.softmax(-1)[row["index"]].item() == pytest.approx(row["probability"], rel=1e-4)
    own = [by_hand(m, tokenizer, TEXT, lambda o: o.logits.log_softmax(-1)[:, 1])[0] for m in members.values()]
    expected = joined((own[0] + own[1]) / 2)
    assert answer["explanations"][1]["importances"] == pytest.approx(expected, rel=1e-3, abs=2e-7)


def test_several_labels_and_numbers(serve, ask):
    config = bert.CONFIGS["bert"](num_labels=3, problem_type="multi_label_classification")
    handler, _, _ = serve("sequence_classification", config)
    ((_, prediction),) = ask(handler, [{"body": TEXT.encode()}])
    rows = explain(ask, handler, TEXT.encode())["explanations"]
    chosen = {row["index"]: row["probability"] for row in prediction["labels"] or prediction["top_k"][:1]}
    assert {row["index"]: pytest.approx(row["value"], rel=1e-4) for row in rows} == chosen
    handler, _, _ = serve("sequence_classification", bert.CONFIGS["bert"](num_labels=1))
    ((_, prediction),) = ask(handler, [{"body": TEXT.encode()}])
    answer = explain(ask, handler, TEXT.encode())
    (row,) = answer["explanations"]
    assert answer["explains"] == "value"
    assert row["value"] == pytest.approx(prediction["prediction"]["values"][0], rel=1e-4)
    for one in (*rows, row):
        check_complete(one)


def test_entities_are_explained_as_they_are_answered(serve, ask):
    handler, _, _ = serve("token_classification", bert.CONFIGS["bert"](num_labels=5, id2label=bert.BIO), count=3)
    ((_, prediction),) = ask(handler, [{"body": TEXT.encode()}])
    rows = explain(ask, handler, TEXT.encode())["explanations"]
    assert prediction["entities"]
    for entity, row in zip(prediction["entities"], rows, strict=True):
        assert {k: row[k] for k in ("entity", "text", "start", "end")} == {k: entity[k] for k in entity if k in row}
        assert row["value"] == pytest.approx(entity["probability"], rel=1e-4)
        check_complete(row)
    kind = prediction["entities"][-1]["entity"]
    of_kind = [e["start"] for e in prediction["entities"] if e["entity"] == kind]
    for target, starts in ((kind, of_kind), (0, [prediction["entities"][0]["start"]])):
        got = explain(ask, handler, {"text": TEXT, "target": target})["explanations"]
        assert [row["start"] for row in got] == starts
    ((status, answer),) = ask(handler, [{"body": {"text": TEXT, "target": "ORG"}}], [EXPLAIN])
    assert (status, "LOC, PER" in answer["error"]["message"]) == (422, True)


def test_answers_are_explained_by_start_and_end(serve, ask):
    handler, _, _ = serve("question_answering", bert.CONFIGS["bert"]())
    body = {"question": "what is it ?", "context": "sarah lives in london . it is great"}
    ((_, prediction),) = ask(handler, [{"body": body}])
    for target, span in ((0, prediction["top_k"][0]), (2, prediction["top_k"][2])):
        start, end = explain(ask, handler, {**body, "target": target})["explanations"]
        assert (start["position"], end["position"]) == ("start", "end")
        assert (start["answer"], start["start"], end["end"]) == (span["answer"], span["start"], span["end"])
        assert start["value"] * end["value"] == pytest.approx(span["score"], rel=1e-4)
        check_complete(start)
        check_complete(end)
    for word in start["words"]:
        assert body[word["of"]][word["start"] : word["end"]] == word["word"]
    assert {word["of"] for word in start["words"]} == {"question", "context"}
    nothing = explain(ask, handler, {**body, "target": "no_answer"})["explanations"]
    assert nothing[0]["value"] * nothing[1]["value"] == pytest.approx(prediction["no_answer"]["score"], rel=1e-4)
    default = explain(ask, handler, body)["explanations"][0]
    assert default["answer"] == prediction["prediction"]["answer"]


def test_an_answer_in_a_long_context_is_explained_in_its_window(serve, ask):
    handler, _, _ = serve("question_answering", bert.CONFIGS["bert"](), max_length=24, doc_stride=6)
    body = {"question": "what", "context": "sarah lives in london . " * 12 + "new york is great"}
    ((_, prediction),) = ask(handler, [{"body": body}])
    start, end = explain(ask, handler, {**body, "target": 0})["explanations"]
    assert start["value"] * end["value"] == pytest.approx(prediction["top_k"][0]["score"], rel=1e-4)
    places = [word for word in start["words"] if word["of"] == "context"]
    assert places[0]["start"] <= start["start"] < start["end"] <= places[-1]["end"]
    assert len(start["words"]) < 24


def test_masks_are_explained_and_stay_in_the_baseline(serve, ask):
    handler, members, tokenizer = serve("fill_mask", bert.CONFIGS["bert"]())
    text = "the goal of [MASK] is it"
    ((_, prediction),) = ask(handler, [{"body": text.encode()}])
    (row,) = explain(ask, handler, text.encode())["explanations"]
    first = prediction["masks"][0][0]
    assert (row["token"], row["index"]) == (first["token"], first["index"])
    assert row["value"] == pytest.approx(first["probability"], rel=1e-4)
    own = [
        by_hand(m, tokenizer, text, lambda o: o.logits[:, 4].softmax(-1)[:, row["index"]], (2, 3, 4))
        for m in members.values()
    ]
    expected = (own[0][0] + own[1][0]) / 2
    assert row["importances"] == pytest.approx(expected[1:-1].tolist(), rel=1e-3, abs=2e-7)
    assert row["importances"][3] == 0
    (asked,) = explain(ask, handler, {"text": text, "target": "york"})["explanations"]
    assert asked["token"] == "york"
    ((status, _),) = ask(handler, [{"body": {"text": text, "target": "unheard"}}], [EXPLAIN])
    assert status == 422


def test_explanations_share_a_batch_and_hurt_no_neighbour(serve, ask):
    handler, _, _ = serve("sequence_classification", bert.CONFIGS["bert"](num_labels=3), count=3)
    good = {"body": TEXT.encode()}
    ((_, before),) = ask(handler, [good])
    rows = [good, good, {"body": b""}, good, good, {"body": b"\xff"}]
    subset = {"X-Ensemble-Subset": "m1", "X-Ensemble-Detail": "members"}
    headers = [{}, EXPLAIN, EXPLAIN, {**EXPLAIN, **subset}, {**EXPLAIN, "X-Ensemble-Subset": "m9"}, EXPLAIN]
    replies = ask(handler, rows, headers)
    assert [status for status, _ in replies] == [200, 200, 400, 200, 422, 400]
    assert replies[0][1] == before
    alone = explain(ask, handler, TEXT.encode(), **subset)
    one = replies[3][1]
    assert one == alone
    assert one["ensemble"] == {"size": 3, "used": 1, "subset": ["m1"]}
    (row,) = one["explanations"]
    (member,) = row["members"]
    assert (member["name"], member["importances"]) == ("m1", row["importances"])
    # nothing is left in the model: it predicts what it did
    assert ask(handler, [good])[0][1] == before


def test_every_item_of_a_list_is_explained(serve, ask):
    handler, _, _ = serve("sequence_classification", bert.CONFIGS["bert"](num_labels=3))
    single = [explain(ask, handler, {"text": text}) for text in (TEXT, "bad")]
    assert explain(ask, handler, [TEXT, "bad"]) == single
    assert explain(ask, handler, {"instances": [TEXT, {"text": "bad"}]}) == {"predictions": single}


def test_work_is_bounded(serve, ask, monkeypatch):
    handler, _, _ = serve("sequence_classification", bert.CONFIGS["bert"](num_labels=3), max_explanations=3)
    good = {"body": b"bad"}
    many = [{"body": ["bad"] * 4}, {"body": {"instances": ["bad"] * 2, "target": "all"}}, good]
    replies = ask(handler, many, [EXPLAIN, EXPLAIN, {}])
    assert [status for status, _ in replies] == [413, 413, 200]
    assert "at most 3" in replies[0][1]["error"]["message"]

    def exhaust(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("vmap_ensemble.tasks.text.explanations.explainer.Explainer.__call__", exhaust)
    assert [status for status, _ in ask(handler, [good, good], [EXPLAIN, {}])] == [507, 200]


def test_steps_and_chunks_are_settings(serve, ask):
    few = {"explanation_steps": 6, "explanation_batch_size": 4}
    config = bert.CONFIGS["bert"](num_labels=3)
    handler, _, _ = serve("sequence_classification", config, change=liven, **few)
    (rough,) = explain(ask, handler, TEXT.encode())["explanations"]
    sizes = []
    member = handler.ensemble.forward.member
    handler.ensemble.forward.member = lambda index, ids, *rest: (sizes.append(len(ids)), member(index, ids, *rest))[1]
    (again,) = explain(ask, handler, TEXT.encode())["explanations"]
    assert again == rough
    assert max(sizes) == 4
    handler, _, _ = serve("sequence_classification", config, change=liven, explanation_steps=40)
    (fine,) = explain(ask, handler, TEXT.encode())["explanations"]
    assert abs(fine["delta"]) < abs(rough["delta"])


def test_a_member_that_gives_nan_is_left_out(serve, ask):
    def spoil(members):
        with torch.no_grad():
            members["m1"].classifier.bias.fill_(torch.nan)

    config = bert.CONFIGS["bert"](num_labels=3)
    handler, _, _ = serve("sequence_classification", config, count=3, change=spoil)
    answer = explain(ask, handler, TEXT.encode())
    assert answer["ensemble"] == {"size": 3, "used": 2, "left_out": ["m1"]}
    check_complete(answer["explanations"][0])
    ((status, _),) = ask(handler, [{"body": TEXT.encode()}], [{**EXPLAIN, "X-Ensemble-Subset": "m1"}])
    assert status == 500


@pytest.mark.parametrize(
    ("mode", "settings", "words"),
    [
        ("sequence_classification", {"captum_explanation": "False"}, "captum_explanation is false"),
        ("embedding", {"embedding_name": "bert"}, "mode 'embedding' has nothing to explain"),
    ],
)
def test_what_is_not_explained_says_so(mode, settings, words, serve, ask):
    handler, _, _ = serve(mode, bert.CONFIGS["bert"](), **settings)
    (status, answer), (other, _) = ask(handler, [{"body": TEXT.encode()}] * 2, [EXPLAIN, {}])
    assert (status, other) == (501, 200)
    assert words in answer["error"]["message"]


def test_without_captum_explanations_say_what_to_install(serve, ask, monkeypatch):
    handler, _, _ = serve("sequence_classification", bert.CONFIGS["bert"]())
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    (status, answer), (other, _) = ask(handler, [{"body": TEXT.encode()}] * 2, [EXPLAIN, {}])
    assert (status, other) == (501, 200)
    assert "requirements-bert.txt" in answer["error"]["message"]


def test_embedding_name_is_torchserves_or_a_module(serve, ask):
    config = bert.CONFIGS["bert"](num_labels=3)
    default, named, words = (
        explain(ask, serve("sequence_classification", config, embedding_name=name)[0], TEXT.encode())
        for name in ("", "bert", "bert.embeddings.word_embeddings")
    )
    assert named == default
    assert words != default  # the path through the words alone is another one, between the same ends
    assert words["explanations"][0]["value"] == default["explanations"][0]["value"]
    check_complete(words["explanations"][0])
    with pytest.raises(SettingsError, match=r"embedding_name: BertForSequenceClassification has no module 'roberta'"):
        serve("sequence_classification", config, embedding_name="roberta")


@pytest.mark.parametrize(
    ("value", "expected"),
    [("a, 2,a", ("a", "2")), ([1, "b"], (1, "b")), (3, (3,)), (b"all", ("all",))],
)
def test_targets_are_read_from_anywhere(value, expected):
    assert read_request({"body": {"text": "x"}, "target": value}, {}).options[0].target == expected


@pytest.mark.parametrize("value", ["", ",", [], True, [1.5], {"a": 1}])
def test_targets_that_make_no_sense_are_refused(value):
    with pytest.raises(RequestError, match="target: expected labels or numbers"):
        read_request({"body": {"text": "x", "target": value}}, {})


def test_an_item_of_a_list_that_cant_be_explained_is_named(serve, ask):
    handler, _, _ = serve("sequence_classification", bert.CONFIGS["bert"](num_labels=3))
    body = {"instances": [{"text": "a"}, {"text": ""}]}
    ((status, answer),) = ask(handler, [{"body": body}], [EXPLAIN])
    assert (status, answer["error"]["message"]) == (400, "item 1: text: the text is empty")
    with pytest.raises(ItemError, match=r"^item 1: text: the text is empty"):
        handler.ensemble.explain(["a", ""])


def test_explanations_keep_to_the_tokens_of_a_request(serve, ask):
    handler, _, _ = serve("sequence_classification", bert.CONFIGS["bert"](num_labels=3), max_request_tokens=7)
    for texts, expected in ((["a sample text"], 200), (["a sample text", "great"], 413)):
        ((status, _),) = ask(handler, [{"body": texts}], [EXPLAIN])
        assert status == expected
