"""What an item says: one text, a pair, or a question with its context, and no text that would be dropped."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from tests.unit.tasks.text import test_encoder_task as bert
from vmap_ensemble.errors import ItemError, UnreadableItem
from vmap_ensemble.tasks.text.inputs import TextInput, read_question_item, read_text_item

serve = bert.serve


@pytest.mark.parametrize("key", ["text", "data", "body"])
def test_one_text_or_a_pair(key):
    assert read_text_item({key: "a"}, 9) == TextInput("a")
    assert read_text_item({key: "a", "text_pair": "b"}, 9) == TextInput("a", "b")
    assert read_text_item({key: "a", "text_pair": None}, 9, pairs=False) == TextInput("a")
    assert read_text_item("a", 9, pairs=False) == TextInput("a")


@pytest.mark.parametrize(
    ("item", "pairs", "named"),
    [
        ({"text": "a", "data": "b"}, True, "text, data"),
        ({"data": "a", "body": "b", "text_pair": "c"}, True, "data, body, text_pair"),
        ({"text": "a", "text_pair": "b"}, False, "text, text_pair"),
    ],
)
def test_a_text_too_many_is_refused(item, pairs, named):
    """The first of them was answered, and the others dropped."""
    with pytest.raises(UnreadableItem, match=f"expected one text, got {named}; send one an item"):
        read_text_item(item, 9, pairs)


def test_a_question_has_one_context():
    item = {"question": "a", "context": "b"}
    assert read_question_item(item, 9) == TextInput("a", "b")
    for key in ("text", "data", "text_pair"):
        with pytest.raises(UnreadableItem, match=f"a question and its context, got {key} beside them"):
            read_question_item({**item, key: "c"}, 9)


@pytest.mark.parametrize("item", [{}, {"text_pair": "a"}, {"question": "a"}, None, 3, ["a"]])
def test_what_holds_no_text_is_refused(item):
    for read in (read_text_item, read_question_item):
        with pytest.raises(ItemError):
            read(item, 9)


@pytest.mark.parametrize("mode", ["token_classification", "fill_mask"])
def test_modes_of_one_text_refuse_a_pair(mode, serve, ask):
    handler, _, _ = serve(mode, bert.CONFIGS["bert"]())
    good = {"text": "a [MASK] movie"}
    ((status, _), (refused, answer)) = ask(handler, [{"body": good}, {"body": {**good, "text_pair": "bad"}}])
    assert (status, refused) == (200, 400)
    assert "expected one text, got text, text_pair" in answer["error"]["message"]
