"""Turns figures into one page of HTML that needs nothing else: tables, and plots as SVG, in light and dark."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from itertools import pairwise

WIDTH, HEIGHT, MARGIN = 680, 220, 60
COLOURS = ("#4477aa", "#cc6677", "#228833", "#aa7733")


def page(title: str, *parts: str) -> str:
    """A whole page.

    Args:
        title: Of the page, as text.
        parts: What stands below it, as HTML.
    """
    return PAGE.format(title=html.escape(title), body="".join(parts))


def table(rows: Sequence[Sequence[str]], head: Sequence[str] = ()) -> str:
    """A table of texts."""

    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}" for cell in cells)

    top = row(head, "th") if head else ""
    return f"<table>{top}{''.join(row(cells, 'td') for cells in rows)}</table>"


def bars(title: str, values: Sequence[tuple[str, float]], form: str = ",") -> str:
    """Bars with their numbers.

    Args:
        title: What is counted or measured.
        values: Name and length of each bar, 0 or more.
        form: How numbers are written, as `format` takes it.
    """
    most = max((value for _, value in values), default=0) or 1
    drawn = "".join(
        f'<text x="190" y="{y + 14}" text-anchor="end">{html.escape(name[:28])}</text>'
        f'<rect x="200" y="{y + 2}" width="{400 * value / most:.1f}" height="16" />'
        f'<text x="{206 + 400 * value / most:.1f}" y="{y + 14}">{value:{form}}</text>'
        for y, (name, value) in zip(range(0, 22 * len(values), 22), values, strict=True)
    )
    return _figure(title, drawn, 22 * len(values))


def lines(title: str, curves: Mapping[str, Sequence[float]]) -> str:
    """Curves over 1, 2, 3, ..., each in a colour of its own, with the least and the largest value at the side.

    Args:
        title: What is shown.
        curves: Name -> values, all finite.
    """
    values = [value for curve in curves.values() for value in curve]
    low, high = min(values), max(values)
    count = max(map(len, curves.values()))

    def place(number: int, value: float) -> tuple[float, float]:
        across = MARGIN + (WIDTH - 2 * MARGIN) * number / max(1, count - 1)
        return across, 20 + (HEIGHT - 40) * (high - value) / ((high - low) or 1)

    drawn = f'<text x="0" y="24">{high:.4g}</text><text x="0" y="{HEIGHT - 16}">{low:.4g}</text>'
    for number, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        points = [place(index, value) for index, value in enumerate(curve)]
        drawn += "".join(
            f'<line x1="{a:.1f}" y1="{b:.1f}" x2="{c:.1f}" y2="{d:.1f}" stroke="{colour}" stroke-width="2" />'
            for (a, b), (c, d) in pairwise(points)
        )
        drawn += "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" style="fill:{colour}" />' for x, y in points)
        x = MARGIN + 160 * number
        drawn += f'<text x="{x}" y="12" style="fill:{colour}">{html.escape(name[:24])}</text>'
    return _figure(title, drawn, HEIGHT)


def _figure(title: str, drawn: str, height: int) -> str:
    head = f'<svg role="img" aria-label="{html.escape(title)}" viewBox="0 0 {WIDTH} {height}">'
    return f"<h2>{html.escape(title)}</h2>{head}{drawn}</svg>"


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width"><style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui; max-width: 45rem; margin: 2rem auto; padding: 0 1rem }}
td, th {{ padding-right: 2rem; text-align: left }} svg {{ width: 100%; font-size: 13px; fill: currentColor }}
rect {{ fill: #4477aa }}
</style><h1>{title}</h1>{body}</html>
"""
