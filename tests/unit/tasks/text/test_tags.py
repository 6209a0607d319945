"""Tag schemes, each on the same sentence."""

from __future__ import annotations

import pytest

from vmap_ensemble.tasks.text.tags import SpanJoiner, TagScheme

WORDS = ["Ana", "met", "Bob", "Eva", "Maria", "Lee", "in", "new", "Berlin", "Mitte"]
EXPECTED = [("PER", "Ana"), ("PER", "Bob"), ("PER", "Eva Maria Lee"), ("LOC", "new Berlin Mitte")]
SCHEMES = {
    "BIO": "B-PER O B-PER B-PER I-PER I-PER O B-LOC I-LOC I-LOC",
    "IOB": "I-PER O I-PER B-PER I-PER I-PER O I-LOC I-LOC I-LOC",
    "BILOU": "U-PER O U-PER B-PER I-PER L-PER O B-LOC I-LOC L-LOC",
    "BIOES": "S-PER O S-PER B-PER I-PER E-PER O B-LOC I-LOC E-LOC",
    "BMEWO": "W-PER O W-PER B-PER M-PER E-PER O B-LOC M-LOC E-LOC",
    "suffixed": "PER-B O PER-B PER-B PER-I PER-I O LOC-B LOC-I LOC-I",
    "suffixed BIOES": "PER-S O PER-S PER-B PER-I PER-E O LOC-B LOC-I LOC-E",
    "underscores": "B_PER O B_PER B_PER I_PER I_PER O B_LOC I_LOC I_LOC",
    "colons": "B:PER O B:PER B:PER I:PER I:PER O B:LOC I:LOC I:LOC",
    "dots behind": "PER.B O PER.B PER.B PER.I PER.I O LOC.B LOC.I LOC.I",
    "IOE": "I-PER O E-PER I-PER I-PER E-PER O I-LOC I-LOC E-LOC",
    "lower case": "b-PER o b-PER b-PER i-PER i-PER o b-LOC i-LOC i-LOC",
    "with other labels": "B-PER O B-PER B-PER I-PER I-PER O B-LOC I-LOC I-LOC",
}


def join(tags, words=WORDS, labels=None):
    scheme, joiner = TagScheme(labels or set(tags)), SpanJoiner()
    text, start = " ".join(words), 0
    for word, tag in zip(words, tags, strict=True):
        joiner.word(scheme.read(tag), start, start + len(word))
        start += len(word) + 1
    return [(span.kind, text[span.start : span.end]) for span in joiner.spans]


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_gives_the_same_entities(name):
    tags = SCHEMES[name].split()
    others = {"[CLS]", "X", "PAD"} if name == "with other labels" else set()
    assert join(tags, labels=set(tags) | others) == EXPECTED


@pytest.mark.parametrize(
    "tags", ["I-PER O O I-PER I-PER I-PER O I-LOC I-LOC I-LOC", "PER O O PER PER PER O LOC LOC LOC"]
)
def test_without_beginnings_neighbours_of_one_kind_are_joined(tags):
    assert join(tags.split()) == [("PER", "Ana"), ("PER", "Eva Maria Lee"), ("LOC", "new Berlin Mitte")]


def test_labels_with_single_letters_of_their_own_are_kinds():
    assert join(["U.S", "O", "U.S", "U.S"], ["a", "b", "c", "d"]) == [("U.S", "a"), ("U.S", "c d")]


def test_letters_alone_are_one_kind():
    assert join(["B", "O", "B", "B", "I", "I", "O", "B", "I", "I"]) == [("entity", text) for _, text in EXPECTED]


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("I-LOC L-LOC", [("LOC", "a b")]),  # no beginning
        ("L-LOC L-LOC", [("LOC", "a"), ("LOC", "b")]),
        ("B-LOC L-PER", [("LOC", "a"), ("PER", "b")]),
        ("U-LOC I-LOC", [("LOC", "a"), ("LOC", "b")]),
        ("L-LOC I-LOC", [("LOC", "a"), ("LOC", "b")]),
    ],
)
def test_tags_out_of_order(tags, expected):
    labels = {"B-LOC", "I-LOC", "L-LOC", "U-LOC", "L-PER", "O"}
    assert join(tags.split(), ["a", "b"], labels) == expected


def test_labels_that_only_look_like_tags_are_kinds():
    labels = {"O", "E-MAIL", "PHONE", "S-NUMBER"}
    assert join(["E-MAIL", "PHONE"], ["a", "b"], labels) == [("E-MAIL", "a"), ("PHONE", "b")]
    assert join(["B-Drug-Name", "I-Drug-Name"], ["a", "b"]) == [("Drug-Name", "a b")]


def test_further_tokens_of_a_word_belong_to_it_though_it_ends_its_entity():
    joiner, scheme = SpanJoiner(), TagScheme({"U-PER", "B-PER", "O"})
    joiner.word(scheme.read("U-PER"), 0, 2)
    joiner.go_on(5)
    joiner.word(scheme.read("O"), 6, 8)
    joiner.go_on(9)
    assert [(span.start, span.end) for span in joiner.spans] == [(0, 5)]
