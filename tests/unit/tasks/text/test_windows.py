"""Long texts, cut texts and offsets, on tokenizers made here."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

from vmap_ensemble.errors import ItemError  # noqa: E402
from vmap_ensemble.serving.statuses import status_of  # noqa: E402
from vmap_ensemble.tasks.answers import Options  # noqa: E402
from vmap_ensemble.tasks.text.inputs import read_text  # noqa: E402
from vmap_ensemble.tasks.text.question_answering import QuestionAnswering  # noqa: E402
from vmap_ensemble.tasks.text.sequence_classification import SingleLabel  # noqa: E402
from vmap_ensemble.tasks.text.settings import TextSettings  # noqa: E402
from vmap_ensemble.tasks.text.token_classification import TokenClassification, join_windows  # noqa: E402
from vmap_ensemble.tasks.text.windows import is_punctuation, positions_of, trim, vocabulary_of  # noqa: E402

LABELS = {0: "O", 1: "B-PER", 2: "I-PER"}
NAMES = ["Ana", "Karel", "Eva"]
WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *NAMES, *(f"w{i}" for i in range(200))]


def words_tokenizer(**options):
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return finished(core, **options)


def finished(core, **options):
    vocabulary = core.get_vocab()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")],
    )
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names, **options)


def metaspace_tokenizer(**options):
    pieces = [(p, 0.0) for p in ("[PAD]", "[CLS]", "[SEP]", "[UNK]")]
    pieces += [("▁", -5.0), *((f"▁{w}", -6.0) for w in NAMES), *((c, -9.0) for c in "abcdefgilnorsuvwxyz.")]
    core = Tokenizer(models.Unigram(pieces, unk_id=3))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    return finished(core, **options)


def bytes_tokenizer(**options):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *alphabet, "An", "Ana"])}
    vocabulary["ĠAna"] = len(vocabulary)
    core = Tokenizer(models.BPE(vocabulary, [("A", "n"), ("An", "a"), ("Ġ", "Ana")], unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return finished(core, **options)


def mode_of(kind, tokenizer, **settings):
    names = {"positions": settings.pop("positions", None), "vocabulary": settings.pop("vocabulary", None)}
    modes = {TokenClassification: "token_classification", QuestionAnswering: "question_answering"}
    given = TextSettings(mode=modes.get(kind, "sequence_classification"), **settings)
    return kind(given, tokenizer, LABELS, ["a", "b"], **names)


def tagged(mode, examples, names=NAMES, length=None):
    """Logits (2, R, S, 3) of members that know these names, whatever stands around them."""
    windows = [window for example in examples for window in example.windows]
    logits = torch.zeros(2, len(windows), max(map(len, windows)), 3)
    for row, window in enumerate(windows):
        for i, token in enumerate(window.arrays["input_ids"]):
            label = 1 if mode.tokenizer.convert_ids_to_tokens(token).lstrip("▁Ġ") in names else 0
            logits[:, row, i, label] = 9.0
    return logits


def entities(mode, texts, **options):
    examples = [mode.encode(text) for text in texts]
    answers = mode.answers(
        {"logits": tagged(mode, examples)}, torch.ones(2, len(texts)), [Options(**options)] * len(texts), examples
    )
    return [[(e["text"], e["start"], e["end"]) for e in answer.body["entities"]] for answer in answers]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("stride", [0, 1, 4, 5, 128])
@pytest.mark.parametrize("words", [1, 8, 9, 10, 30, 31, 32, 33, 100])
def test_windows_hold_every_token_once(words, stride, side):
    tokenizer = words_tokenizer(truncation_side=side)
    mode = mode_of(TokenClassification, tokenizer, max_length=10, doc_stride=stride or 1)
    text = " ".join(f"w{i}" for i in range(words))
    example = mode.encode(text)
    found = [example.windows[row].arrays["input_ids"][i] for row, i in join_windows(example)]
    assert found == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert all(len(window) <= 10 for window in example.windows)
    assert example.truncated is False


def test_a_token_is_labelled_where_most_stands_around_it():
    example = mode_of(TokenClassification, words_tokenizer(), max_length=12, doc_stride=4).encode(
        " ".join(f"w{i}" for i in range(22))
    )
    # windows of 10 words from 0, 6 and 12; their overlaps of 4 are halved
    rows = [row for row, _ in join_windows(example)]
    assert rows == [0] * 8 + [1] * 6 + [2] * 8


def test_entities_of_long_texts_are_found_in_batches():
    mode = mode_of(TokenClassification, words_tokenizer(), max_length=12, doc_stride=4)
    long = " ".join("Ana" if i in (0, 9, 30, 59) else "w1" for i in range(60))
    expected = [("Ana", m, m + 3) for m in range(len(long)) if long.startswith("Ana", m)]
    assert len(expected) == 4
    assert entities(mode, ["w1 Ana", long, "Ana"]) == [[("Ana", 3, 6)], expected, [("Ana", 0, 3)]]


def test_an_entity_across_windows_is_one():
    mode = mode_of(TokenClassification, words_tokenizer(), max_length=12, doc_stride=4)
    example = mode.encode(" ".join(f"w{i}" for i in range(22)))
    tokens = join_windows(example)
    labels = [0] * len(tokens)
    labels[6:9] = [1, 2, 2]  # the first two are the first window's, the third the second's
    (span,) = mode.join(example, labels, [1.0] * 22, [0.0] * 22)
    assert example.text.text[span.start : span.end] == "w6 w7 w8"
    logits = torch.zeros(2, 3, 12, 3)
    for number, (row, i) in enumerate(tokens):
        logits[:, row, i, labels[number]] = 9.0
    (target,) = mode.targets({"logits": logits}, torch.ones(2, 1), Options(), example)
    assert (target.window, target.row["text"]) == (0, "w6 w7 w8")
    own = target.score({"logits": logits[:, 0]})
    torch.testing.assert_close(own, logits[:, 0, 7].softmax(-1)[:, 1])


def test_too_many_windows_are_refused():
    mode = mode_of(TokenClassification, words_tokenizer(), max_length=12, doc_stride=4, max_windows=3)
    assert len(mode.parse("w1 " * 22).windows) == 3
    with pytest.raises(ItemError, match="the text has 4 windows of 12 tokens; at most 3") as caught:
        mode.parse("w1 " * 23)
    assert status_of(caught.value) == 413


@pytest.mark.parametrize(("length", "windows"), [(32, 64), (384, 5), (512, 4), (4096, 1)])
def test_by_default_windows_hold_2048_tokens_together(length, windows):
    mode = mode_of(QuestionAnswering, words_tokenizer(), max_length=length)
    assert mode.max_windows == windows


def test_a_long_context_is_refused_at_once():
    mode = mode_of(QuestionAnswering, words_tokenizer(), max_length=384)
    start = time.perf_counter()
    with pytest.raises(ItemError) as caught:
        mode.parse({"question": "w1", "context": "w1 " * 60_000})
    assert status_of(caught.value) == 413
    assert time.perf_counter() - start < 30


@pytest.mark.parametrize("make", [metaspace_tokenizer, bytes_tokenizer])
def test_offsets_begin_with_the_word(make):
    mode = mode_of(TokenClassification, make())
    text = "xyz Ana  Ana. Ana."
    assert entities(mode, [text]) == [[("Ana", 4, 7), ("Ana", 9, 12), ("Ana", 14, 17)]]


def test_answers_begin_with_the_word():
    mode = mode_of(QuestionAnswering, metaspace_tokenizer())
    example = mode.encode({"question": "xyz", "context": "lives Ana in"})
    (window,) = example.windows
    place = window.arrays["input_ids"].index(mode.tokenizer.convert_tokens_to_ids("▁Ana"))
    logits = torch.zeros(2, 1, len(window))
    logits[..., place] = 9.0
    (answer,) = mode.answers(
        {"start_logits": logits, "end_logits": logits}, torch.ones(2, 1), [Options(detail=True)], [example]
    )
    found = answer.body["prediction"]
    assert (found["answer"], found["start"], found["end"]) == ("Ana", 6, 9)
    assert answer.body["members"][0]["answer"] == "Ana"


def test_trim():
    assert trim("a  b ", 1, 5) == (3, 4)
    assert trim("a  b", 1, 3) == (3, 3)
    assert trim("ab", 0, 2) == (0, 2)


def test_a_tokenizer_that_knows_no_words_gives_one_number_to_all():
    pieces = [(p, 0.0) for p in ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "▁", *(f"▁{name}" for name in NAMES))]
    core = Tokenizer(models.Unigram(pieces, unk_id=3))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    mode = mode_of(TokenClassification, finished(core))
    (window,) = mode.encode("Ana Karel").windows
    assert len({word for word in window.word_ids if word is not None}) == 1
    assert entities(mode, ["Ana Karel"]) == [[("Ana", 0, 3), ("Karel", 4, 9)]]


def test_punctuation():
    assert is_punctuation(".,")
    assert not is_punctuation("a.")
    assert not is_punctuation("\u093f")  # a vowel sign of Devanagari


def test_texts_that_are_cut_say_so():
    mode = mode_of(SingleLabel, words_tokenizer(), max_length=8)
    items = [
        "w1 " * 6,
        "w1 " * 7,
        {"text": "w1 " * 3, "text_pair": "w1 w2"},
        {"text": "w1 " * 3, "text_pair": "w1 " * 3},
    ]
    examples = [mode.encode(item) for item in items]
    assert [example.truncated for example in examples] == [False, True, False, True]
    assert [example.tokens for example in examples] == [8, 8, 8, 8]
    answers = mode.answers({"logits": torch.zeros(2, 4, 3)}, torch.ones(2, 4), [Options()] * 4, examples)
    assert [answer.body.get("truncated") for answer in answers] == [None, True, None, True]


@pytest.mark.parametrize("sizes", [(500, 500), (3, 500), (500, 3), (20, 90)])
def test_pairs_are_cut_as_the_tokenizer_cuts_them(sizes):
    mode = mode_of(SingleLabel, words_tokenizer(), max_length=33)
    first, second = (" ".join(f"w{i % 200}" for i in range(size)) for size in sizes)
    example = mode.encode({"text": first, "text_pair": second})
    theirs = mode.tokenizer(first, second, truncation=True, max_length=33)["input_ids"]
    assert example.windows[0].arrays["input_ids"] == theirs
    assert example.truncated


def test_long_pairs_take_no_minutes():
    mode = mode_of(SingleLabel, words_tokenizer(), max_length=16)
    long = "w1 " * 30_000
    start = time.perf_counter()
    assert mode.encode({"text": long, "text_pair": long}).truncated
    assert time.perf_counter() - start < 20


def test_texts_are_cut_at_the_members_positions_and_unknown_tokens_refused():
    mode = mode_of(SingleLabel, words_tokenizer(), positions=16, vocabulary=20)
    assert mode.max_length == 16
    assert len(mode.encode("w1 " * 40).windows[0]) == 16
    with pytest.raises(ItemError, match="a token of the tokenizer that the members lack: they have 20") as caught:
        mode.encode("w1 w199")
    assert status_of(caught.value) == 422


def test_positions_and_vocabulary_of_real_models():
    size = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 8,
        "vocab_size": 30,
    }
    bert = transformers.BertModel(transformers.BertConfig(**size, max_position_embeddings=64))
    roberta = transformers.RobertaModel(transformers.RobertaConfig(**size, max_position_embeddings=66))
    assert (positions_of(bert), vocabulary_of(bert)) == (64, 30)
    assert positions_of(roberta) == 64
    with torch.inference_mode():
        roberta.eval()(torch.full((1, 64), 5))
        with pytest.raises((IndexError, RuntimeError)):
            roberta(torch.full((1, 65), 5))
    assert positions_of(nn.Linear(2, 2)) is None
    assert vocabulary_of(nn.Linear(2, 2)) is None


def test_a_byte_order_mark_is_no_part_of_a_text():
    assert read_text(b"\xef\xbb\xbfthe order", "text", 100) == "the order"
