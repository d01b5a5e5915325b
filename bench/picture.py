"""Horizontal bars as SVG text, for the README.

Strategy: one panel per quantity, each on a linear scale of its own from zero to the longest bar within a few times ours; one that
is far longer reaches beyond the scale, with a gap to show it. Every bar has its figure beside it.
The one rule: lengths are to scale up to the cut, and nothing is logarithmic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, LABEL, BAR, BEYOND = 760, 180, 400, 60
ROW, HEAD, MARGIN = 24, 44, 16
CUT = 4.0  # times our own figure
OURS, OTHERS, PAPER, INK, FAINT = "#d9480f", "#9aa5b1", "#ffffff", "#1f2933", "#616e7c"
FONT = "font-family='system-ui, sans-serif' font-size='13'"
Bar = tuple[str, float, bool]


@dataclass(frozen=True)
class Panel:
    """bars: name, figure, whether it is ours; drawn in this order."""

    title: str
    unit: str
    bars: Sequence[Bar]

    @property
    def end(self) -> float:
        """The figure at which bars are cut: that of the longest one within CUT times ours."""
        figures = [figure for _, figure, _ in self.bars]
        own = next((figure for _, figure, ours in self.bars if ours), max(figures))
        return max(figure for figure in figures if figure <= CUT * own)

    @property
    def height(self) -> int:
        return HEAD + ROW * len(self.bars) + MARGIN


def svg(panels: Sequence[Panel], caption: str) -> str:
    """The picture. caption: one line at its foot."""
    height = MARGIN + sum(panel.height for panel in panels) + ROW
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {height}' width='{WIDTH}' height='{height}' role='img'>",
        f"<title>{escape('; '.join(panel.title for panel in panels))}: CPU time, shorter is better</title>",
        f"<rect width='{WIDTH}' height='{height}' rx='8' fill='{PAPER}'/>",
    ]
    top = MARGIN
    for panel in panels:
        parts += _panel(panel, top)
        top += panel.height
    parts.append(f"<text x='{MARGIN}' y='{top + 8}' {FONT} fill='{FAINT}'>{escape(caption)}</text>")
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel, top: int) -> list[str]:
    parts = [
        f"<text x='{MARGIN}' y='{top + 18}' {FONT} font-weight='600' fill='{INK}'>{escape(panel.title)}"
        f"<tspan dx='10' font-weight='400' fill='{FAINT}'>{escape(panel.unit)}, shorter is better</tspan></text>"
    ]
    for number, bar in enumerate(panel.bars):
        parts += _bar(bar, panel.end, top + HEAD - 14 + ROW * number)
    return parts


def _bar(bar: Bar, end: float, top: int) -> list[str]:
    name, figure, ours = bar
    cut = figure > end
    length = float(BAR + BEYOND) if cut else max(1.0, BAR * figure / end)
    colour, weight = (OURS, "600") if ours else (OTHERS, "400")
    written = f"{figure:,.0f}" if figure >= 100 else f"{figure:.1f}"
    parts = [
        f"<text x='{LABEL - 8}' y='{top + 13}' {FONT} font-weight='{weight}' fill='{INK}' "
        f"text-anchor='end'>{escape(name)}</text>",
        f"<rect x='{LABEL}' y='{top}' width='{length:.1f}' height='{ROW - 7}' rx='2' fill='{colour}'/>",
        f"<text x='{LABEL + length + 6:.1f}' y='{top + 13}' {FONT} font-weight='{weight}' fill='{INK}'>{written}</text>",
    ]
    if cut:
        at = LABEL + BAR + BEYOND // 2
        parts.insert(2, f"<path d='M{at} {top + ROW - 5} l8 -21 h6 l-8 21 z' fill='{PAPER}'/>")
    return parts
