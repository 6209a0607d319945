"""What the answers of every text mode say: ranges, ties, abstaining, cuts; each against the documented schema."""

from __future__ import annotations

import json

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tests.unit.tasks.test_classification import check  # noqa: E402
from tests.unit.tasks.text import test_encoder_task as bert  # noqa: E402
from tests.unit.tasks.text.test_windows import LABELS, mode_of, words_tokenizer  # noqa: E402
from vmap_ensemble.archive.settings import parse_settings  # noqa: E402
from vmap_ensemble.errors import NotOffered, SettingsError  # noqa: E402
from vmap_ensemble.tasks.answers import Options, dump_json  # noqa: E402
from vmap_ensemble.tasks.text.question_answering import QuestionAnswering  # noqa: E402
from vmap_ensemble.tasks.text.sequence_classification import MultiLabel, Regression, SingleLabel  # noqa: E402
from vmap_ensemble.tasks.text.settings import TextSettings  # noqa: E402
from vmap_ensemble.tasks.text.token_classification import TokenClassification  # noqa: E402

serve = bert.serve
FORMS = {
    "sequence_classification": "ClassAnswer",
    "token_classification": "EntitiesAnswer",
    "question_answering": "QuestionAnswer",
    "fill_mask": "MasksAnswer",
    "embedding": "EmbeddingAnswer",
}
ABSTAIN = {"abstain_below_probability": 1.0}


@pytest.mark.parametrize("mode", FORMS)
def test_every_modes_answers_follow_the_schema(mode, serve, ask):
    settings = {} if mode == "embedding" else {"abstain_above_mutual_information": 0.0}
    labels = {} if mode == "question_answering" else {"num_labels": 5, "id2label": bert.BIO}
    handler, _, _ = serve(mode, bert.CONFIGS["bert"](**labels), **settings)
    (item,) = handler.mode.sample_items(1)
    item = item if isinstance(item, dict) else {"text": item}
    rows = [{"body": {**item, "detail": "members", "subset": "m0"}}, {"body": item}, {"body": {"instances": [item]}}]
    for (status, body), form in zip(ask(handler, rows), (FORMS[mode], FORMS[mode], "KServeV1"), strict=True):
        assert status == 200
        check(body, form)
        check(body, "Answer" if form != "KServeV1" else form)


@pytest.mark.parametrize(
    ("kind", "form"),
    [("multi_label_classification", "LabelsAnswer"), ("regression", "NumbersAnswer"), (None, "ClassAnswer")],
)
def test_every_kind_of_classification_follows_the_schema(kind, form, serve, ask):
    handler, _, _ = serve("sequence_classification", bert.CONFIGS["bert"](num_labels=3, problem_type=kind))
    rows = [{"body": {"text": text, "detail": "members"}} for text in ("a great movie", "a sample " * 60)]
    replies = ask(handler, rows)
    for _, body in replies:
        check(body, form)
    assert [body.get("truncated") for _, body in replies] == [None, True]


@pytest.mark.parametrize("members", [2, 10, 11, 14, 49])
def test_sure_labels_are_numbers_within_their_range(members):
    names = [f"m{i}" for i in range(members)]
    mode = MultiLabel(TextSettings(), words_tokenizer(), LABELS, names)
    logits = torch.tensor([200.0, -200.0, 40.0]).expand(members, 1, 3)
    (answer,) = mode.answers({"logits": logits}, torch.ones(members, 1), [Options(detail=True)], [mode.encode("w1")])
    check(answer.body, "LabelsAnswer")
    dump_json(answer.body)
    assert answer.body["uncertainty"]["predictive_entropy"] < 1e-5
    assert [row["index"] for row in answer.body["labels"]] == [0, 2]
    weights = torch.tensor([2.0, 4.0, 1.0] + [1.0] * members)[:members, None]
    (answer,) = mode.answers({"logits": logits}, weights, [Options()], [mode.encode("w1")])
    check(answer.body, "LabelsAnswer")


def test_large_numbers_of_a_regression_are_numbers():
    mode = mode_of(Regression, words_tokenizer())
    values = torch.tensor([3e38, -3e38]).reshape(2, 1, 1)
    (answer,) = mode.answers({"logits": values}, torch.ones(2, 1), [Options()], [mode.encode("w1")])
    assert answer.body["prediction"]["values"] == [0.0]
    assert answer.body["uncertainty"]["standard_deviation"] == [pytest.approx(3e38, rel=1e-6)]


def question(window, votes):
    """Start and end logits of members that vote for words, each with its strength."""
    logits = torch.zeros(len(votes), 1, len(window))
    for m, (place, strength) in enumerate(votes):
        logits[m, 0, place] = strength
    return {"start_logits": logits, "end_logits": logits.clone()}


@pytest.mark.parametrize("surer", [0, 1])
def test_tied_votes_for_an_answer_go_to_the_larger_mean(surer):
    mode = mode_of(QuestionAnswering, words_tokenizer(), aggregation="majority_vote")
    example = mode.encode({"question": "w1", "context": "Ana Karel w3 w4"})
    places = [window_place(example, name) for name in ("Ana", "Karel")]
    votes = [(place, 6.0 if number == surer else 3.0) for number, place in enumerate(places)]
    outputs = question(example.windows[0], votes)
    (answer,) = mode.answers(outputs, torch.ones(2, 1), [Options()], [example])
    assert answer.body["prediction"]["answer"] == ("Ana", "Karel")[surer]
    assert answer.body["top_k"][0]["score"] == pytest.approx(0.25)
    (start, _) = mode.targets(outputs, torch.ones(2, 1), Options(), example)
    assert start.row["answer"] == ("Ana", "Karel")[surer]


@pytest.mark.parametrize(("strength", "chosen"), [(3.0, True), (9.0, False)])
def test_an_answer_tied_with_none_goes_by_the_mean_too(strength, chosen):
    mode = mode_of(QuestionAnswering, words_tokenizer(), aggregation="majority_vote")
    example = mode.encode({"question": "w1", "context": "Ana w3 w4"})
    votes = [(0, 6.0), (window_place(example, "Ana"), strength)]
    outputs = question(example.windows[0], votes)
    (answer,) = mode.answers(outputs, torch.ones(2, 1), [Options()], [example])
    assert answer.body["no_answer"] == {"score": pytest.approx(0.25), "chosen": chosen}


@pytest.mark.parametrize("surer", [0, 1])
def test_tied_votes_for_an_answer_in_two_windows_go_to_the_larger_mean(surer):
    mode = mode_of(QuestionAnswering, words_tokenizer(), aggregation="majority_vote", max_length=10, doc_stride=1)
    example = mode.encode({"question": "w1", "context": "Ana w3 w4 w5 w6 w7 w8 Karel"})
    assert len(example.windows) == 2
    logits = torch.zeros(2, 2, max(map(len, example.windows)))
    for row, name in enumerate(("Ana", "Karel")):
        logits[0, row, window_place(example, name, row)] = 6.0 if row == surer else 3.0
        logits[1, row, 0] = 3.0
    outputs = {"start_logits": logits, "end_logits": logits.clone()}
    (answer,) = mode.answers(outputs, torch.tensor([[2.0], [1.0]]), [Options()], [example])
    assert answer.body["prediction"]["answer"] == ("Ana", "Karel")[surer]
    assert [row["score"] for row in answer.body["top_k"][:2]] == pytest.approx([4 / 9, 4 / 9])


def window_place(example, word, row=0):
    start = example.text.pair.index(word)
    window = example.windows[row]
    spans = zip(window.offsets, window.sequence_ids, strict=True)
    return next(i for i, (span, part) in enumerate(spans) if part == 1 and span[0] == start)


@pytest.mark.parametrize("surer", [0, 1])
def test_tied_votes_for_a_token_go_to_the_larger_mean(surer):
    mode = mode_of(TokenClassification, words_tokenizer(), aggregation="majority_vote")
    logits = torch.zeros(2, 1, 3, 3)
    logits[0, 0, 1, 0] = 6.0 if surer == 0 else 3.0
    logits[1, 0, 1, 1] = 6.0 if surer == 1 else 3.0
    (answer,) = mode.answers({"logits": logits}, torch.ones(2, 1), [Options()], [mode.encode("Ana")])
    assert [entity["text"] for entity in answer.body["entities"]] == ([], ["Ana"])[surer]


def one(mode, outputs, item="w1"):
    (answer,) = mode.answers(outputs, torch.ones(2, 1), [Options()], [mode.encode(item)])
    return answer.body


def test_several_labels_abstain_by_the_least_sure():
    logits = torch.tensor([3.0, -3.0, -1.0]).expand(2, 1, 3)
    sure = 1 - torch.tensor(-1.0).sigmoid().item()
    for limit, reasons in ((sure - 0.01, None), (sure + 0.01, [f"probability below {sure + 0.01}"])):
        body = one(mode_of(MultiLabel, words_tokenizer(), abstain_below_probability=limit), {"logits": logits})
        assert (body["abstain"], body.get("abstain_reasons")) == (bool(reasons), reasons)
        check(body, "LabelsAnswer")


def test_entities_abstain_each_and_the_answer_with_them():
    logits = torch.zeros(2, 1, 4, 3)
    logits[:, 0, 1, 1], logits[:, 0, 2, 1] = 6.0, 1.0
    mode = mode_of(TokenClassification, words_tokenizer(), abstain_below_probability=0.9)
    body = one(mode, {"logits": logits}, "Ana Karel")
    assert [entity.get("abstain") for entity in body["entities"]] == [None, True]
    assert (body["abstain"], body["abstain_reasons"]) == (True, ["probability below 0.9"])
    check(body, "EntitiesAnswer")
    body = one(mode, {"logits": logits.roll(-1, -1)}, "Ana Karel")
    assert (body["entities"], body["abstain"]) == ([], False)


def test_disagreeing_entities_abstain():
    logits = torch.zeros(2, 1, 3, 3)
    logits[0, 0, 1, 1], logits[1, 0, 1, 2] = 6.0, 5.0
    mode = mode_of(TokenClassification, words_tokenizer(), abstain_above_mutual_information=0.1)
    assert one(mode, {"logits": logits})["abstain_reasons"] == ["mutual information above 0.1"]


def test_answers_abstain_by_their_score():
    item = {"question": "w1", "context": "Ana w3 w4"}
    for strength, abstains in ((20.0, False), (1.0, True)):
        mode = mode_of(QuestionAnswering, words_tokenizer(), abstain_below_probability=0.9)
        example = mode.encode(item)
        body = one(mode, question(example.windows[0], [(window_place(example, "Ana"), strength)] * 2), item)
        assert body["abstain"] is abstains
        check(body, "QuestionAnswer")


def test_masks_abstain_by_the_least_sure(serve, ask):
    for settings, abstains in ((ABSTAIN, True), ({"abstain_below_probability": 0.0}, False)):
        handler, _, _ = serve("fill_mask", bert.CONFIGS["bert"](), **settings)
        ((_, body),) = ask(handler, [{"body": b"a [MASK] is [MASK]"}])
        assert body["abstain"] is abstains
        check(body, "MasksAnswer")


@pytest.mark.parametrize(
    "block", [{"mode": "embedding"}, {"mode": "sequence_classification", "problem_type": "regression"}]
)
@pytest.mark.parametrize("key", ["abstain_below_probability", "abstain_above_mutual_information"])
def test_abstaining_is_refused_where_there_are_no_probabilities(block, key):
    with pytest.raises(SettingsError, match=f"{key}: .* has no probabilities to abstain by"):
        parse_settings({**block, key: 0.5}, TextSettings, "setup_config.json")


def test_a_regression_by_its_config_refuses_to_abstain(serve):
    with pytest.raises(SettingsError, match="abstain_below_probability: regression has no probabilities"):
        serve("sequence_classification", bert.CONFIGS["bert"](num_labels=1), **ABSTAIN)


def test_other_outputs_than_logits_are_refused_for_texts():
    with pytest.raises(SettingsError, match="output: expected 'auto' or 'logits'"):
        parse_settings({"output": "probabilities"}, TextSettings, "setup_config.json")


def test_torchserves_form_says_that_a_text_was_cut():
    mode = mode_of(SingleLabel, words_tokenizer(), response="torchserve", max_length=4)
    body = one(mode, {"logits": torch.zeros(2, 1, 3)}, "w1 w2 w3")
    assert json.loads(dump_json(body))["truncated"] is True
    check(body, "PlainAnswer")


def test_probabilities_are_the_modes_own(serve):
    """Of classes that sum to 1, of labels each on its own; numbers and tokens have none."""
    kinds = {None: "softmax", "multi_label_classification": "sigmoid", "regression": None}
    for kind, expected in kinds.items():
        handler, _models, _ = serve("sequence_classification", bert.CONFIGS["bert"](num_labels=3, problem_type=kind))
        ensemble = handler.ensemble
        args = ensemble.task.collate(ensemble.task.sample_examples(2))
        if expected is None:
            with pytest.raises(NotOffered, match="has no probabilities"):
                ensemble.probabilities(*args)
            continue
        logits = ensemble.outputs(*args)["logits"]
        own = logits.softmax(-1) if expected == "softmax" else logits.sigmoid()
        torch.testing.assert_close(ensemble.probabilities(*args), own.mean(0), rtol=1e-5, atol=1e-6)
    handler, _, _ = serve("token_classification", bert.CONFIGS["bert"](num_labels=3))
    ensemble = handler.ensemble
    with pytest.raises(NotOffered, match="has no probabilities"):
        ensemble.probabilities(*ensemble.task.collate(ensemble.task.sample_examples(1)))
