"""Answers of /explanations/ become a page without live markup, or a picture; other input is refused."""

from __future__ import annotations

import json
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from scripts import render_explanation
from scripts.explanation_cards import AGAINST, FOR, Card, make_cards, read_answers
from scripts.render_explanation import main

EVIL = "<script>alert(1)</script>"


def word(text, start, of="text"):
    return {"word": text, "start": start, "end": start + len(text), "of": of}


def answer(words, importances, **about):
    row = {**(about or {"label": "bad", "index": 0}), "value": 0.9, "baseline": 0.25, "delta": -3e-4}
    return {
        "explains": "probability",
        "explanations": [{**row, "words": words, "importances": importances}],
        "ensemble": {"size": 2, "used": 2},
    }


PLAIN = answer([word("never", 0), word("again", 6), word("!", 11)], [0.4, -0.2, 0.0])


class Page(HTMLParser):
    """The tags of a page, its text, and the colours and titles of its words."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.words = [], "", []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        found = dict(attributes)
        if tag == "span" and "title" in found:
            self.words.append((found["style"], found["title"]))

    def handle_data(self, data):
        self.text += data


def render(folder, body, name="answer.html"):
    (folder / "answer.json").write_text(json.dumps(body))
    assert main([str(folder / "answer.json"), "-o", str(folder / name)]) == 0
    return folder / name


def test_words_have_the_colour_and_number_of_their_importance(tmp_path):
    page = Page(render(tmp_path, PLAIN).read_text())
    assert "never again!" in page.text
    assert [title for _, title in page.words] == ["+0.4000", "-0.2000", "+0.0000"]
    card = make_cards(PLAIN)[0]
    assert page.words[0][0] == "background:#{:02x}{:02x}{:02x}".format(*card.colour(0.4))
    assert page.words[2][0] == "background:#ffffff"
    for shown in ("bad", "probability", "0.9000", "0.2500", "-3.0e-04", "±0.4000", "against", "for"):
        assert shown in page.text


def test_colours_grow_with_importance_and_tell_the_sign():
    card = Card("", (), (), 1.0)
    weak, strong, beyond = (np.array(card.colour(value)) for value in (0.2, 1.0, 9.0))
    assert (weak > strong).all()
    assert (strong == beyond).all()
    for importance, pure in ((1.0, FOR), (-1.0, AGAINST)):
        assert np.argmin(card.colour(importance)) == np.argmin(pure)


def test_untrusted_text_stays_text(tmp_path):
    body = answer(
        [word(EVIL, 0), word('" onmouseover="x', 30), word("</style>", 60, EVIL), word("&lt;", 70, "b")],
        [0.1, 0.2, 0.3, 0.4],
        label=EVIL,
    )
    body["explains"] = EVIL
    html = render(tmp_path, body).read_text()
    page = Page(html)
    assert "script" not in page.tags
    assert page.tags.count("style") == 1
    assert html.count("</style>") == 1
    assert page.text.count(EVIL) == 5  # label, text, name of the text, twice what is explained
    assert '" onmouseover="x' in page.text
    assert "&lt;" in page.text
    assert "http" not in html.replace("http-equiv", "")  # nothing is fetched


def test_lists_and_kserve_bodies_are_read():
    v2 = {"model_name": "ens", "outputs": [{"data": [json.dumps(PLAIN)]}]}
    for body, count in ((PLAIN, 1), ([PLAIN, PLAIN], 2), ({"predictions": [PLAIN]}, 1), (v2, 1)):
        assert read_answers(json.dumps(body)) == [PLAIN] * count


def test_titles_say_what_is_explained(tmp_path):
    rows = [
        ({"entity": "PER", "text": "sarah"}, "PER 'sarah'"),
        ({"position": "start", "answer": "london"}, "london (start)"),
        ({"position": "end", "answer": ""}, "no answer (end)"),
        ({"mask": 1, "token": "love"}, "love for mask 2"),
    ]
    for about, title in rows:
        body = answer([word("a", 0, "question"), word("b", 0, "context")], [0.1, 0.2], **about)
        assert make_cards(body)[0].title == title
        page = Page(render(tmp_path, body).read_text())
        assert title in page.text
        assert page.tags.count("p") == 2
    nothing = {**PLAIN, "explanations": []}
    assert "Nothing was found" in render(tmp_path, nothing).read_text()


def test_a_picture_shows_both_colours(tmp_path):
    pytest.importorskip("matplotlib")
    long = answer(
        [word("$x_{$", 0), word("w" * 500, 6), *(word("again", 510 + 6 * i) for i in range(60))],
        [0.4, -0.4, *[0.01] * 60],
    )
    small, tall = (
        np.asarray(Image.open(render(tmp_path, body, "answer.png")).convert("RGB")) for body in (PLAIN, long)
    )
    assert small.shape[1] == tall.shape[1]
    assert tall.shape[0] > small.shape[0] + 100  # long texts are wrapped
    for importance in (0.4, -0.4):
        colour = np.array(make_cards(long)[0].colour(importance))
        assert (np.abs(tall.astype(int) - colour).max(-1) <= 1).sum() > 500


def test_a_picture_without_matplotlib_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "answer.json").write_text(json.dumps(PLAIN))
    assert main([str(tmp_path / "answer.json"), "-o", str(tmp_path / "answer.png")]) == 1
    assert "requirements-bench.txt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected JSON"),
        ('{"error": {"code": 501, "message": "switched off"}}', "the answer is an error: switched off"),
        ('{"prediction": {}}', "expected the answer of /explanations/, got another JSON"),
        (json.dumps({"explains": "value", "explanations": [{}]}), "KeyError: 'importances'"),
        (json.dumps(answer([word("a", 0)], [0.1, 0.2])), "ValueError"),
        (json.dumps(answer([word("a", 0)], [float("nan")])), "ValueError"),
    ],
)
def test_what_is_no_explanation_is_refused_in_one_line(text, message, tmp_path, capsys):
    path = tmp_path / "answer.json"
    path.write_text(text)
    assert main([str(path), "-o", str(tmp_path / "out.html")]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out.html").exists()
    assert main([str(tmp_path / "gone.json"), "-o", str(tmp_path / "out.html")]) == 1


def test_other_suffixes_are_wrong_usage(tmp_path):
    with pytest.raises(SystemExit) as stopped:
        render_explanation.main(["x.json", "-o", "x.pdf"])
    assert stopped.value.code == 2
