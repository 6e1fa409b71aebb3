"""Draws what a terminal shows as an SVG: lines with ANSI colours to text, in the reader's own fixed-width font."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from xml.sax.saxutils import escape

_PART = re.compile(r"\033\[(?P<codes>[0-9;]*)m|(?P<text>[^\033]+)")
_COLOURS = {"31": "#ff7b72", "32": "#7ee787", "34": "#79c0ff"}
_CELL, _LINE, _MARGIN = 8.4, 19, 16


def draw_terminal(lines: Sequence[str], *, columns: int) -> str:
    """The picture of a terminal that has shown these lines."""
    width, height = round(columns * _CELL) + 2 * _MARGIN, len(lines) * _LINE + 2 * _MARGIN
    rows = [
        f'<text x="{_MARGIN}" y="{_MARGIN + (n + 1) * _LINE - 5}" xml:space="preserve">{"".join(_spans(line))}</text>'
        for n, line in enumerate(lines)
        if line
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
            ' font-family="ui-monospace, Menlo, Consolas, DejaVu Sans Mono, monospace" font-size="14" fill="#e6edf3">',
            '<rect width="100%" height="100%" rx="8" fill="#0d1117"/>',
            *rows,
            "</svg>\n",
        ]
    )


def _spans(line: str) -> Iterator[str]:
    """The parts of a line. Each has its width, so that columns stand in line in whichever font is there."""
    codes, column = set[str](), 0
    for part in _PART.finditer(line):
        if part["text"] is None:
            codes = set(part["codes"].split(";")) - {"", "0"}
            continue
        text = part["text"]
        fill = next((f' fill="{_COLOURS[code]}"' for code in sorted(codes) if code in _COLOURS), "")
        weight = ' font-weight="bold"' if "1" in codes else ""
        place = f'x="{_MARGIN + column * _CELL:g}" textLength="{len(text) * _CELL:g}"'
        yield f"<tspan {place}{fill}{weight}>{escape(text)}</tspan>"
        column += len(text)
