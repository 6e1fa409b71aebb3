"""Where output goes: results to standard output, notices, progress and errors to standard error.

Colour is for terminals alone, and for none where NO_COLOR is set. Source: no-color.org.
"""

import io
import json
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

import click

GOOD, WARN, BAD, DIM, BOLD = "green", "yellow", "red", "dim", "bold"
# A colour of ours, which stays; or any other character.
_COLOUR_OR_CHAR = re.compile(r"\x1b\[[0-9;]*m|.", re.DOTALL)
_NOT_ASCII = re.compile(r"[^\n -~]")


def paint(text: str, colour: str) -> str:
    """Return text in a colour; what is written where there is none loses it again."""
    if colour in (DIM, BOLD):
        return click.style(text, **{colour: True})
    return click.style(text, fg=colour)


class Prose(str):
    """A line of a result that a terminal folds at its width; what follows the first line is indented by `indent`."""

    __slots__ = ("indent",)
    indent: int


def prose(head: str, text: str) -> Prose:
    """Return a line that begins with `head`; where it is folded, the rest stands below `text`."""
    line = Prose(head + text)
    line.indent = _width(head)
    return line


def printable(value: Any) -> Any:
    """Return JSON with its strings fit for a terminal: what others wrote must not move its cursor.

    Line ends and tabs stay.
    """
    if isinstance(value, str):
        return "".join(char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in value)
    if isinstance(value, list):
        return [printable(one) for one in value]
    if isinstance(value, dict):
        return {printable(name): printable(one) for name, one in value.items()}
    return value


def format_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return aligned lines, the headers first. A header that begins with ">" is of a column of numbers."""
    titles = [header.removeprefix(">") for header in headers]
    table = [[paint(title, BOLD) if title.strip() else title for title in titles], *rows]
    widths = [max(_width(row[n]) for row in table) for n in range(len(titles))]
    lines = []
    for row in table:
        cells = []
        for header, cell, width in zip(headers, row, widths, strict=True):
            space = " " * (width - _width(cell))
            cells.append(space + cell if header.startswith(">") else cell + space)
        lines.append("  ".join(cells).rstrip())
    return lines


def shown(line: str) -> str:
    """Return a line as it may reach a terminal: in colour, and with nothing else in it that is no text."""
    if line.isprintable():
        return line
    return _COLOUR_OR_CHAR.sub(lambda found: found[0] if len(found[0]) > 1 else printable(found[0]), line)


def quoted_json(value: Any, *, indent: int | None = 2) -> str:
    r"""Return JSON whose strings have \u in place of what moves a cursor or turns text around."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return _NOT_ASCII.sub(lambda found: found[0] if found[0].isprintable() else json.dumps(found[0])[1:-1], text)


class Terminal:
    """Standard output and standard error. Whoever wrote it, nothing but text and our colours reaches them."""

    def __init__(self) -> None:
        self._out, self._err = _tolerant(sys.stdout), _tolerant(sys.stderr)
        self._transient = False

    @property
    def shows_progress(self) -> bool:
        """Whether somebody looks at standard error."""
        return self._err.isatty()

    def print(self, *lines: str) -> None:
        """Print lines of a result."""
        for line in lines:
            if isinstance(line, Prose) and self._out.isatty():
                line = _fold(line, shutil.get_terminal_size().columns)
            click.echo(shown(line), self._out, color=_has_colour(self._out))

    def print_json(self, value: Any, *, indent: int | None = 2) -> None:
        """Print a result as JSON."""
        click.echo(quoted_json(value, indent=indent), self._out)

    def tell(self, line: str) -> None:
        """Tell something beside the result."""
        self.clear()
        click.echo(shown(line), self._err, color=_has_colour(self._err))

    def show(self, line: str) -> None:
        """Show a line that the next one takes the place of; on a terminal only."""
        if self.shows_progress:
            self.clear()
            width = shutil.get_terminal_size().columns - 1
            self._err.write(shown(line)[:width])
            self._err.flush()
            self._transient = True

    def clear(self) -> None:
        """Take back what `show` has shown."""
        if self._transient:
            self._err.write("\r\033[K")
            self._err.flush()
            self._transient = False


def _fold(line: Prose, columns: int) -> str:
    return textwrap.fill(
        line, columns, subsequent_indent=" " * line.indent, break_long_words=False, break_on_hyphens=False
    )


def _tolerant(stream: TextIO) -> TextIO:
    """Return a stream that writes a question mark for what its encoding lacks."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")
    return stream


def _has_colour(stream: TextIO) -> bool:
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _width(text: str) -> int:
    return len(click.unstyle(text))
