"""Turns an answer of /explanations/ into a page or a picture: words coloured by what they add.

curl -T data/texts/order.txt http://127.0.0.1:8080/explanations/ens > answer.json
python -m scripts.render_explanation answer.json -o answer.html        one file, no scripts, nothing is fetched
python -m scripts.render_explanation answer.json -o answer.png         needs matplotlib
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

from scripts.explanation_cards import AGAINST, FOR, STRONGEST, Card, RenderError, make_cards, read_answers

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.1rem; margin: 0; overflow-wrap: anywhere; }
section { border: 1px solid #d5d5d5; border-radius: .5rem; padding: 1rem 1.2rem; margin: 1rem 0; }
dl { display: flex; flex-wrap: wrap; gap: 0 1.5rem; margin: .2rem 0 .8rem; color: #555; font-size: .9rem; }
dt, dd { display: inline; margin: 0; } dd { font-variant-numeric: tabular-nums; color: #1a1a1a; }
p { margin: .3rem 0; line-height: 2; white-space: pre-wrap; overflow-wrap: anywhere; }
p b { font-weight: normal; color: #777; font-size: .8rem; margin-right: .6rem; }
span { padding: .15rem .2rem; border-radius: .25rem; }
.legend { display: flex; align-items: center; gap: .6rem; font-size: .85rem; color: #555; }
.bar { width: 14rem; height: .9rem; padding: 0; }
"""


def to_html(answers: Sequence[Sequence[Card]], explains: str) -> str:
    """One self-contained page; everything that came from a request is escaped."""
    sections = [_section(card) for cards in answers for card in cards] or ["<p>Nothing was found to explain.</p>"]
    stops = (_css(AGAINST, STRONGEST), "#fff", _css(FOR, STRONGEST))
    legend = (
        f'<div class="legend">against <span class="bar" style="background:linear-gradient(90deg,{",".join(stops)})">'
        f"</span> for &nbsp; what a word adds to the {escape(explains.replace('_', ' '))}; hover for the number</div>"
    )
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8"><title>Explanation</title>',
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            '<meta name="viewport" content="width=device-width">',
            f"<style>{STYLE}</style></head><body><h1>What the words add</h1>",
            legend,
            *sections,
            "</body></html>\n",
        ]
    )


def _section(card: Card) -> str:
    facts = "".join(f"<div><dt>{escape(name)}</dt> <dd>{escape(value)}</dd></div>" for name, value in card.facts)
    parts: list[str] = []
    several = len({word.of for word in card.words}) > 1
    for word in card.words:
        if word.begins_text:
            parts.append(("</p>" if parts else "") + "<p>" + (f"<b>{escape(word.of)}</b>" if several else ""))
        colour = "#{:02x}{:02x}{:02x}".format(*card.colour(word.importance))
        parts.append(
            f'{" " if word.spaced else ""}<span style="background:{colour}" title="{word.importance:+.4f}">'
            f"{escape(word.text)}</span>"
        )
    text = "".join(parts) + ("</p>" if parts else "")
    return f"<section><h2>{escape(card.title)}</h2><dl>{facts}</dl>{text}</section>"


def _css(colour: tuple[int, int, int], strength: float) -> str:
    return "rgb({} {} {})".format(*(round(255 + strength * (c - 255)) for c in colour))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 done, 1 refused, 2 wrong usage."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="python -m scripts.render_explanation", description=__doc__.splitlines()[0]
    )
    parser.add_argument("answer", type=Path, help="JSON file that /explanations/ answered; - reads standard input")
    parser.add_argument("-o", "--output", type=Path, required=True, help="a .html or .png file")
    options = parser.parse_args(arguments)
    if options.output.suffix not in (".html", ".png"):
        parser.error(f"--output: expected a name ending in .html or .png, got '{options.output.name}'")
    try:
        text = sys.stdin.read() if str(options.answer) == "-" else options.answer.read_text(encoding="utf-8")
        bodies = read_answers(text)
        answers = [make_cards(body) for body in bodies]
        explains = str(bodies[0]["explains"]) if bodies else "answer"
        if options.output.suffix == ".html":
            options.output.write_text(to_html(answers, explains), encoding="utf-8")
        else:
            _write_png(answers, explains, options.output)
    except (OSError, UnicodeDecodeError) as error:
        print(f"render_explanation: {error}", file=sys.stderr)
        return 1
    except RenderError as error:
        print(f"render_explanation: {options.answer.name}: {error}", file=sys.stderr)
        return 1
    return 0


def _write_png(answers: Sequence[Sequence[Card]], explains: str, path: Path) -> None:
    try:
        import matplotlib  # noqa: F401  # here: pages need none
    except ImportError:
        raise RenderError(
            "a .png needs matplotlib: pip install -r requirements-bench.txt, or write a .html"
        ) from None
    from scripts.explanation_picture import write_png

    write_png([card for cards in answers for card in cards], explains, path)


if __name__ == "__main__":
    sys.exit(main())
