"""Pages of figures: lengths in proportion, curves from end to end, text that stays text."""

from __future__ import annotations

import re

from vmap_ensemble.offline.page import HEIGHT, MARGIN, WIDTH, bars, lines, page, table


def test_bars_are_as_long_as_their_values() -> None:
    drawn = bars("Sizes", [("a", 4.0), ("<b>", 1.0)], ".1f")
    assert [float(width) for width in re.findall(r'width="([\d.]+)"', drawn)] == [400, 100]
    assert "&lt;b&gt;" in drawn
    assert ">4.0<" in drawn
    assert bars("Nothing", [("a", 0)]).count('width="0.0"') == 1


def test_a_curve_goes_from_the_highest_to_the_lowest() -> None:
    drawn = lines("Loss", {"trained on": [3.0, 2.0, 1.0], "held out": [2.5, 2.5, 2.5]})
    points = [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', drawn)]
    assert points[0] == (MARGIN, 20)
    assert points[2] == (WIDTH - MARGIN, HEIGHT - 20)
    assert points[1] == (WIDTH / 2, HEIGHT / 2)
    assert drawn.count("<line ") == 4
    assert lines("One", {"a": [1.0]}).count("<circle ") == 1


def test_a_page_is_whole_and_escapes_its_texts() -> None:
    text = page("<Title>", table([["a & b", "1"]], ["", "<head>"]))
    assert "<title>&lt;Title&gt;</title>" in text
    assert "<td>a &amp; b<td>1" in text
    assert "<th>&lt;head&gt;" in text
    assert "<script" not in text
