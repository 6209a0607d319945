"""Turns the cards of explanations into one PNG: words on coloured paper, wrapped at a fixed width."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.text import Text
from matplotlib.transforms import IdentityTransform

from scripts.explanation_cards import Card

WIDTH_PX, MARGIN_PX, LINE_PX, DPI = 1000, 36, 36, 110
INK, GREY, RULE = "#1a1a1a", "#6a6a6a", "#d5d5d5"
TITLE, BODY, SMALL = 14, 12, 9
LEGEND_STEPS, LEGEND_PX = 80, 240


@dataclass(frozen=True)
class Box:
    """A piece of text: its left end and the middle of its line in pixels from the top left, and its paper."""

    text: str
    x: float
    y: float
    width: float
    size: int
    colour: str = INK
    paper: tuple[int, int, int] | None = None


class Page:
    """Text that flows from the top; knows how wide a text is."""

    def __init__(self) -> None:
        self.boxes: list[Box] = []
        self.rules: list[float] = []
        self.x, self.y = float(MARGIN_PX), float(MARGIN_PX)
        self._renderer = RendererAgg(1, 1, DPI)

    def width(self, text: str, size: int) -> float:
        """Pixels of a text in one line."""
        # ismath is off here and below: a $ in somebody's text is a dollar.
        return float(self._renderer.get_text_width_height_descent(text, FontProperties(size=size), ismath=False)[0])

    def put(self, text: str, size: int, colour: str = INK, gap: float = 0, paper: tuple[int, int, int] | None = None):
        """Add a text after the last one, on as many lines as it needs."""
        self.x += gap
        for piece in self._cut(text, size):
            width = self.width(piece, size)
            if self.x + width > WIDTH_PX - MARGIN_PX and self.x > MARGIN_PX:
                self.new_line()
            self.boxes.append(Box(piece, self.x, self.y, width, size, colour, paper))
            self.x += width

    def _cut(self, text: str, size: int) -> Iterator[str]:
        """A text in pieces that fit on a line; only a very long word has several."""
        room = WIDTH_PX - 2 * MARGIN_PX
        while self.width(text, size) > room:
            end = len(text)
            while self.width(text[:end], size) > room:
                end = end * 3 // 4
            yield text[:end]
            text = text[end:]
        yield text

    def new_line(self, height: float = LINE_PX) -> None:
        """Go on at the left."""
        self.x, self.y = float(MARGIN_PX), self.y + height

    def card(self, card: Card) -> None:
        """Title, numbers and words of one explanation."""
        self.put(card.title, TITLE)
        self.new_line(LINE_PX * 0.8)
        for name, value in card.facts:
            self.put(f"{name} ", SMALL, GREY)
            self.put(value, SMALL, gap=4)
            self.x += 24
        self.new_line()
        several = len({word.of for word in card.words}) > 1
        for word in card.words:
            if word.begins_text and several:
                if self.x > MARGIN_PX:
                    self.new_line()
                self.put(word.of, SMALL, GREY)
                self.x += 12
            self.put(word.text, BODY, gap=9 if word.spaced else 2, paper=card.colour(word.importance))
        self.new_line(LINE_PX * 0.8)
        self.rules.append(self.y)
        self.new_line(LINE_PX * 0.8)


def write_png(cards: Sequence[Card], explains: str, path: Path) -> None:
    """Draw cards one below the other.

    Args:
        cards: The explanations.
        explains: What they explain, for the legend.
        path: The file that is written.
    """
    page = Page()
    page.put("What the words add", TITLE)
    page.new_line()
    legend_y = page.y
    page.put("against", SMALL, GREY)
    legend_x = page.x + 10
    page.x = legend_x + LEGEND_PX + 10
    page.put(f"for; what a word adds to the {explains.replace('_', ' ')}", SMALL, GREY)
    page.new_line(LINE_PX * 1.3)
    for card in cards:
        page.card(card)
    if not cards:
        page.put("Nothing was found to explain.", BODY)
        page.new_line()
    figure = Figure(figsize=(WIDTH_PX / DPI, (page.y + MARGIN_PX / 2) / DPI), dpi=DPI)
    for artist in (*_legend(legend_x, legend_y, page.y), *_artists(page)):
        figure.add_artist(artist)
    FigureCanvasAgg(figure).print_png(path)


def _legend(x: float, y: float, bottom: float) -> Iterator[Artist]:
    """A bar from against to for, in the colours of the cards."""
    scale = Card("", (), (), 1.0)
    step = LEGEND_PX / LEGEND_STEPS
    for i in range(LEGEND_STEPS):
        colour = scale.colour(2 * (i + 0.5) / LEGEND_STEPS - 1)
        yield Rectangle((x + i * step, _up(y + 8, bottom)), step + 1, 16, color=_share(colour), lw=0, transform=_PX)


def _artists(page: Page) -> Iterator[Artist]:
    for y in page.rules[:-1]:
        width = WIDTH_PX - 2 * MARGIN_PX
        yield Rectangle((MARGIN_PX, _up(y, page.y)), width, 1, color=RULE, lw=0, transform=_PX)
    for box in page.boxes:
        if box.paper is not None:
            corner = (box.x - 2, _up(box.y + 13, page.y))
            yield FancyBboxPatch(
                corner,
                box.width + 4,
                26,
                boxstyle="round,pad=0,rounding_size=4",
                color=_share(box.paper),
                lw=0,
                transform=_PX,
            )
    for box in page.boxes:
        yield Text(
            box.x,
            _up(box.y, page.y),
            box.text,
            color=box.colour,
            size=box.size,
            va="center_baseline",
            parse_math=False,
            transform=_PX,
        )


_PX = IdentityTransform()


def _up(y: float, bottom: float) -> float:
    """Pixels from the top to matplotlib's from the bottom."""
    return bottom + MARGIN_PX / 2 - y


def _share(colour: tuple[int, int, int]) -> tuple[float, float, float]:
    return colour[0] / 255, colour[1] / 255, colour[2] / 255
