"""Text modes on tiny random encoders of every supported kind, against transformers' own loop."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors  # noqa: E402
from transformers import (  # noqa: E402
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    MPNetConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    XLMRobertaConfig,
)

from bert_handler import BertEnsembleHandler  # noqa: E402
from vmap_ensemble.errors import SettingsError  # noqa: E402
from vmap_ensemble.tasks.text.encoder_task import EncoderTask  # noqa: E402
from vmap_ensemble.tasks.text.windows import Window  # noqa: E402

TEXT = "a sample text what is it ? the goal of life to be sarah lives in new york . great bad movie lon"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "##s", "##don"]
VOCABULARY = {word: i for i, word in enumerate([*SPECIAL, *TEXT.split()])}
SIZE = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 80,
    "pad_token_id": 0,
}
DISTIL = {"vocab_size": len(VOCABULARY), "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}
CONFIGS: dict[str, Any] = {
    "bert": lambda **k: BertConfig(**SIZE, **k),
    "roberta": lambda **k: RobertaConfig(**SIZE, **k),
    "distilbert": lambda **k: DistilBertConfig(**DISTIL, max_position_embeddings=80, **k),
    "electra": lambda **k: ElectraConfig(**SIZE, embedding_size=16, **k),
    "mpnet": lambda **k: MPNetConfig(**SIZE, **k),
    "xlm_roberta": lambda **k: XLMRobertaConfig(**SIZE, **k),
}
AUTO = {
    "sequence_classification": AutoModelForSequenceClassification,
    "token_classification": AutoModelForTokenClassification,
    "question_answering": AutoModelForQuestionAnswering,
    "fill_mask": AutoModelForMaskedLM,
    "embedding": AutoModel,
}
BIO = {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC", 4: "I-LOC"}


def save_tokenizer(folder: Path, token_types: bool) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(VOCABULARY, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"unk": "[UNK]", "pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    tokens = {f"{name}_token": token for name, token in names.items()}
    inputs = ["input_ids", "attention_mask", "token_type_ids"][: 3 if token_types else 2]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=64, model_input_names=inputs, **tokens
    )
    fast.save_pretrained(folder)
    return fast


def random_members(mode: str, config: Any, count: int) -> dict[str, Any]:
    """Members whose outputs differ enough to tell them apart."""
    members = {}
    for index in range(count):
        torch.manual_seed(index)
        member = AUTO[mode].from_config(config).eval()
        with torch.no_grad():
            for parameter in member.parameters():
                parameter.normal_(0, 0.3)
        members[f"m{index}"] = member
    return members


@pytest.fixture
def serve(make_archive, make_context):
    """An initialised handler of tiny members, the members, and the tokenizer."""

    def make(mode: str, config: Any, count: int = 2, change: Any = None, **settings: Any):
        members = random_members(mode, config, count)
        if change:
            change(members)
        # An embedding needs no pooler; the archiver leaves it out.
        states = {
            name: {key: tensor for key, tensor in member.state_dict().items() if not key.startswith("pooler.")}
            for name, member in members.items()
        }
        folder = make_archive(states, {"mode": mode, **settings})
        config.save_pretrained(folder / "pretrained")
        tokenizer = save_tokenizer(folder / "pretrained", config.model_type in ("bert", "electra"))
        handler = BertEnsembleHandler()
        handler.initialize(make_context(folder))
        return handler, members, tokenizer

    return make


def loop(members: dict[str, Any], encoded: Any) -> list[Any]:
    with torch.inference_mode():
        inputs = {k: v for k, v in encoded.items() if k in ("input_ids", "attention_mask", "token_type_ids")}
        return [member(**inputs) for member in members.values()]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("mode", AUTO)
def test_outputs_equal_the_loop_for_any_lengths(kind, mode, serve):
    handler, members, _ = serve(mode, CONFIGS[kind](), count=3)
    mask = " [MASK]" if mode == "fill_mask" else ""
    texts = [" ".join(["sample text"] * n) + mask for n in (1, 9, 26, 3)]
    items = [{"question": "what", "context": t} for t in texts] if mode == "question_answering" else texts
    examples = [handler.parse(item) for item in items]
    args = handler.collate(examples)
    with torch.inference_mode():
        ours = handler.ensemble.forward.comparable(handler.ensemble.run(*args), args, 1)
    reference = [
        handler.ensemble.forward.comparable(output, args, 0)
        for output in loop(members, dict(zip(handler.argument_names, args, strict=True)))
    ]
    for key in ours:
        if isinstance(ours[key], torch.Tensor):
            expected = torch.stack([output[key] for output in reference])
            torch.testing.assert_close(ours[key], expected, rtol=1e-5, atol=1e-5)


def test_one_label_equals_the_loop(serve, ask):
    handler, members, tokenizer = serve("sequence_classification", CONFIGS["bert"](num_labels=3))
    texts = ["a great movie", "bad", "sarah lives in london and it is great"]
    replies = ask(handler, [{"body": text.encode()} for text in texts])
    for text, (status, answer) in zip(texts, replies, strict=True):
        outputs = loop(members, tokenizer(text, return_tensors="pt"))
        expected = torch.stack([output.logits.softmax(-1) for output in outputs]).mean(0)[0]
        assert status == 200
        assert answer["prediction"]["label"] == f"LABEL_{int(expected.argmax())}"
        assert answer["prediction"]["probability"] == pytest.approx(expected.max().item(), rel=1e-4)


def test_several_labels_and_numbers_equal_the_loop(serve, ask):
    config = CONFIGS["bert"](num_labels=3, problem_type="multi_label_classification")
    handler, members, tokenizer = serve("sequence_classification", config)
    ((_, answer),) = ask(handler, [{"body": {"text": "a great movie", "detail": "members", "top_k": 3}}])
    outputs = loop(members, tokenizer("a great movie", return_tensors="pt"))
    expected = torch.stack([output.logits.sigmoid() for output in outputs]).mean(0)[0]
    for row in answer["top_k"]:
        assert row["probability"] == pytest.approx(expected[row["index"]].item(), rel=1e-4)
    assert {row["index"] for row in answer["labels"]} == set((expected >= 0.5).nonzero().flatten().tolist())
    assert len(answer["members"]) == 2


def test_regression_gives_mean_and_deviation(serve, ask):
    handler, members, tokenizer = serve("sequence_classification", CONFIGS["bert"](num_labels=1))
    ((_, answer),) = ask(handler, [{"body": b"a great movie"}])
    values = torch.stack([o.logits[0] for o in loop(members, tokenizer("a great movie", return_tensors="pt"))])
    assert answer["prediction"]["values"] == pytest.approx(values.mean(0).tolist(), rel=1e-4)
    deviation = values.std(0, correction=0).tolist()
    assert answer["uncertainty"]["standard_deviation"] == pytest.approx(deviation, rel=1e-3)


def test_a_single_label_of_one_logit_is_refused(serve):
    """A softmax of one number is 1, whatever the text."""
    with pytest.raises(SettingsError, match=r"problem_type: the members have one label.*'multi_label'"):
        serve("sequence_classification", CONFIGS["bert"](num_labels=1), problem_type="single_label")


def test_several_labels_of_one_logit_are_its_sigmoid(serve, ask):
    config = CONFIGS["bert"](num_labels=1)
    handler, members, tokenizer = serve("sequence_classification", config, problem_type="multi_label")
    ((status, answer),) = ask(handler, [{"body": b"a great movie"}])
    inputs = tokenizer("a great movie", return_tensors="pt")
    expected = torch.stack([member(**inputs).logits[0, 0].sigmoid() for member in members.values()]).mean()
    assert status == 200
    assert answer["top_k"][0]["probability"] == pytest.approx(expected.item(), abs=1e-6)


def test_pairs_reach_the_model_as_pairs(serve, ask):
    handler, members, tokenizer = serve("sequence_classification", CONFIGS["bert"](num_labels=3))
    ((_, answer),) = ask(handler, [{"body": {"text": "what is it", "text_pair": "a movie"}}])
    outputs = loop(members, tokenizer("what is it", "a movie", return_tensors="pt"))
    expected = torch.stack([output.logits.softmax(-1) for output in outputs]).mean(0)[0]
    assert answer["prediction"]["probability"] == pytest.approx(expected.max().item(), rel=1e-4)


def test_entities_have_the_characters_of_their_words(serve, ask):
    handler, _, _ = serve("token_classification", CONFIGS["bert"](num_labels=5, id2label=BIO))
    text = "sarah lives in london . new york"
    wanted = {"sarah": 1, "lon": 3, "new": 3, "york": 4}
    table = torch.zeros(len(VOCABULARY), 5)
    table[:, 0] = 5.0
    for word, label in wanted.items():
        table[VOCABULARY[word], label] = 9.0
    # what the members answer is replaced, so that the expected entities are known
    handler.ensemble.run = lambda ids, *_: {"logits": table[ids].expand(2, -1, -1, -1)}
    ((status, answer),) = ask(handler, [{"body": text.encode()}])
    assert status == 200
    found = [(e["entity"], e["text"], e["start"], e["end"]) for e in answer["entities"]]
    assert found == [("PER", "sarah", 0, 5), ("LOC", "london", 15, 21), ("LOC", "new york", 24, 32)]


def test_the_best_span_equals_a_search_over_all(serve, ask):
    handler, members, tokenizer = serve("question_answering", CONFIGS["bert"](), max_answer_tokens=4)
    question, context = "what is it ?", "sarah lives in london . it is great"
    ((status, answer),) = ask(handler, [{"body": {"question": question, "context": context}}])
    encoded = tokenizer(question, context, return_tensors="pt", return_offsets_mapping=True)
    offsets, sides = encoded.pop("offset_mapping")[0].tolist(), encoded.sequence_ids(0)
    allowed = torch.tensor([i == 0 or s == 1 for i, s in enumerate(sides)])
    outputs = loop(members, encoded)
    start, end = (
        torch.stack([o[k][0].masked_fill(~allowed, -torch.inf).softmax(-1) for o in outputs]).mean(0)
        for k in ("start_logits", "end_logits")
    )
    inside = [i for i, s in enumerate(sides) if s == 1]
    best = max((float(start[i] * end[j]), i, j) for i in inside for j in inside if i <= j < i + 4)
    first = answer["top_k"][0]
    assert status == 200
    assert first["score"] == pytest.approx(best[0], rel=1e-4)
    assert (first["start"], first["end"]) == (offsets[best[1]][0], offsets[best[2]][1])
    assert first["answer"] == context[first["start"] : first["end"]]
    assert answer["no_answer"]["score"] == pytest.approx(float(start[0] * end[0]), rel=1e-4)


def test_a_long_context_is_read_in_windows(serve, ask):
    handler, _, _ = serve("question_answering", CONFIGS["bert"](), max_length=24, doc_stride=6)
    context = "sarah lives in london . " * 12 + "new york is great"
    example = handler.parse({"question": "what is it ?", "context": context})
    assert len(example.windows) > 3
    covered = {o for w in example.windows for o, s in zip(w.offsets, w.sequence_ids, strict=True) if s == 1}
    assert max(end for _, end in covered) == len(context)
    long, short = ({"body": {"question": "what", "context": c}} for c in (context, "sarah"))
    together = ask(handler, [long, short, long])
    alone = [ask(handler, [row])[0] for row in (long, short, long)]
    for (status, answer), (_, single) in zip(together, alone, strict=True):
        assert status == 200
        assert answer["top_k"][0]["score"] == pytest.approx(single["top_k"][0]["score"], rel=1e-4)
        assert answer["top_k"][0]["answer"] == single["top_k"][0]["answer"]


def test_masks_are_filled_as_the_loop_would(serve, ask):
    handler, members, tokenizer = serve("fill_mask", CONFIGS["bert"]())
    text = "the goal of life is [MASK] ."
    ((status, answer),) = ask(handler, [{"body": text.encode()}])
    encoded = tokenizer(text, return_tensors="pt")
    place = int((encoded["input_ids"][0] == tokenizer.mask_token_id).nonzero())
    outputs = loop(members, encoded)
    expected = torch.stack([output.logits[0, place].softmax(-1) for output in outputs]).mean(0)
    assert status == 200
    for row in answer["masks"][0]:
        assert row["probability"] == pytest.approx(expected[row["index"]].item(), rel=1e-4)
    assert answer["masks"][0][0]["index"] == int(expected.argmax())


@pytest.mark.parametrize("mode", AUTO)
def test_the_sample_request_is_answered(mode, serve, ask):
    handler, _, _ = serve(mode, CONFIGS["bert"]())
    ((status, _),) = ask(handler, [{"body": handler.sample_request()}])
    assert status == 200


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_embeddings_are_normalised_means(pooling, serve, ask):
    handler, members, tokenizer = serve("embedding", CONFIGS["bert"](), pooling=pooling)
    texts = ["the goal of life", "a"]
    replies = ask(handler, [{"body": text.encode()} for text in texts])
    for text, (_, answer) in zip(texts, replies, strict=True):
        hidden = [o.last_hidden_state[0] for o in loop(members, tokenizer(text, return_tensors="pt"))]
        pooled = torch.stack([h.mean(0) if pooling == "mean" else h[0] for h in hidden])
        own = torch.nn.functional.normalize(pooled, dim=-1)
        expected = torch.nn.functional.normalize(own.mean(0), dim=-1)
        assert answer["embedding"] == pytest.approx(expected.tolist(), abs=1e-5)
        assert answer["uncertainty"]["spread"] == pytest.approx(1 - float((own @ expected).mean()), abs=1e-5)


BAD = [
    ({"body": b"\xff\xfe"}, 400, "UTF-8"),
    ({"body": b""}, 400, "empty"),
    ({"body": b"   "}, 400, "empty"),
    ({"body": {"text": "a\ud800b"}}, 400, "surrogates"),
    ({"body": b"x" * 1_000_000}, 413, "characters"),
    ({"body": b"a\0b"}, 400, "NUL"),
    ({"body": b'{"text": '}, 400, "JSON"),
    ({"body": {"foo": 1}}, 400, "text"),
    ({"body": {"text": 3}}, 400, "expected text, got int"),
]


def test_bad_texts_get_their_own_answer_and_hurt_no_neighbour(serve, ask):
    handler, _, _ = serve("sequence_classification", CONFIGS["bert"](num_labels=3))
    good = {"body": b"a great movie"}
    rows = [row for bad, _, _ in BAD for row in (bad, good)]
    replies = ask(handler, rows)
    (alone,) = ask(handler, [good])
    for index, (_, status, words) in enumerate(BAD):
        assert replies[2 * index][0] == status
        assert words in replies[2 * index][1]["error"]["message"]
        assert replies[2 * index + 1][0] == 200
        got = replies[2 * index + 1][1]["prediction"]
        assert got["probability"] == pytest.approx(alone[1]["prediction"]["probability"], rel=1e-5)


def test_modes_refuse_what_they_cant_read(serve, ask):
    handler, _, _ = serve("question_answering", CONFIGS["bert"]())
    ((status, answer),) = ask(handler, [{"body": b"hello"}])
    assert (status, "question" in answer["error"]["message"]) == (400, True)
    handler, _, _ = serve("fill_mask", CONFIGS["bert"]())
    ((status, answer),) = ask(handler, [{"body": b"no mask"}])
    assert (status, "[MASK]" in answer["error"]["message"]) == (422, True)


def test_lists_and_kserve_bodies_are_batches(serve, ask):
    handler, _, _ = serve("sequence_classification", CONFIGS["bert"](num_labels=3))
    v2 = {"inputs": [{"name": "text", "shape": [2], "datatype": "BYTES", "data": ["a movie", "bad"]}]}
    bodies = [["a movie", "bad"], {"instances": ["a movie", {"text": "bad"}]}, v2]
    listed, v1, v2_reply = (reply for _, reply in ask(handler, [{"body": body} for body in bodies]))
    assert len(listed) == 2
    for other in (v1["predictions"], [json.loads(text) for text in v2_reply["outputs"][0]["data"]]):
        for ours, theirs in zip(listed, other, strict=True):
            assert ours["prediction"]["probability"] == pytest.approx(theirs["prediction"]["probability"], rel=1e-5)


def test_a_batch_mixes_subsets(serve, ask):
    handler, _, _ = serve("sequence_classification", CONFIGS["bert"](num_labels=3), count=3)
    headers = [{"X-Ensemble-Subset": "m0"}, {}, {"X-Ensemble-Subset": "m1,m2"}]
    rows = [{"body": b"a great movie"}] * 3
    together = ask(handler, rows, headers)
    for row, header, (_, answer) in zip(rows, headers, together, strict=True):
        ((_, alone),) = ask(handler, [row], [header])
        assert answer["prediction"]["probability"] == pytest.approx(alone["prediction"]["probability"], rel=1e-5)


def test_keys_of_torchserves_example_alone_are_enough(serve, ask):
    settings = {
        "model_name": "bert-base-uncased",
        "do_lower_case": "True",
        "num_labels": "2",
        "save_mode": "pretrained",
        "max_length": "50",
        "captum_explanation": "True",
        "embedding_name": "bert",
        "FasterTransformer": "False",
    }
    handler, _, _ = serve("sequence_classification", CONFIGS["bert"](num_labels=2), **settings)
    ((status, _),) = ask(handler, [{"body": b"A Great Movie"}])
    assert (status, handler.mode.max_length) == (200, 50)


def test_a_wrong_number_of_labels_is_refused(serve):
    with pytest.raises(SettingsError, match=r"num_labels: 4, but the members have 2"):
        serve("sequence_classification", CONFIGS["bert"](num_labels=2), num_labels=4)


def test_a_number_of_labels_says_nothing_of_other_modes(serve, ask):
    handler, _, _ = serve("fill_mask", CONFIGS["bert"](num_labels=2), num_labels="4")
    assert ask(handler, [{"body": b"a [MASK]"}])[0][0] == 200
    handler, _, _ = serve("sequence_classification", CONFIGS["bert"](num_labels=2), num_labels="0")
    assert ask(handler, [{"body": b"a movie"}])[0][0] == 200


def test_texts_stay_on_the_host_until_a_forward_has_seen_their_lengths():
    windows = [
        Window({"input_ids": ids, "attention_mask": [1] * len(ids)}, [(0, 1)] * len(ids), [], [])
        for ids in ([5, 6], [7])
    ]
    names, pads = ["input_ids", "attention_mask"], {"input_ids": 1}
    task = SimpleNamespace(argument_names=names, pads=pads, place=SimpleNamespace(device=torch.device("cuda")))
    ids, mask = EncoderTask.collate(task, [SimpleNamespace(windows=windows)])
    assert (ids.device.type, ids.tolist()) == ("cpu", [[5, 6], [7, 1]])
    assert mask.tolist() == [[1, 1], [1, 0]]
