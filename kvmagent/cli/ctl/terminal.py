"""Where output goes: results to standard output, notices, progress and errors to standard error.

Colour is for terminals alone, and for none where NO_COLOR is set. Source: no-color.org.
"""

import io
import json
import os
import re
import shutil
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TextIO

import click

from kvmagent.cli.ctl.yaml import write_yaml

GOOD, WARN, BAD, DIM, BOLD = "green", "yellow", "red", "dim", "bold"
# A colour of ours, which stays; or any other character.
_COLOUR_OR_CHAR = re.compile(r"\x1b\[[0-9;]*m|.", re.DOTALL)
_NOT_ASCII = re.compile(r"[^\n -~]")


class OutputLost(Exception):
    """Standard output cannot be written; `error` is why."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error)
        self.error = error


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
    line.indent = text_width(head)
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


class Column(NamedTuple):
    """A column: its title, which begins with ">" where it is of numbers, and how soon it gives way.

    Where a terminal is too narrow, columns with the highest `folds` stand below their row, under their `label`. One
    with 0 never does.
    """

    title: str
    folds: int = 0
    label: str = ""


class Row(str):
    """A line of a table in full width; `folded` replaces it on a narrow terminal."""

    __slots__ = ("_n", "_table")
    _table: "_Table"
    _n: int

    def folded(self, columns: int) -> str:
        """Return it in lines of at most that many columns; a single wider word is not cut."""
        return self._table.fold(columns)[self._n]


class _Table:
    """Cells, the titles first."""

    def __init__(self, columns: list[Column], rows: list[list[str]]) -> None:
        self._columns = columns
        self._rows = [[_paint_title(column.title) for column in columns], *rows]
        self._widths = [max(text_width(row[n]) for row in self._rows) for n in range(len(columns))]
        self._folded: tuple[int, list[str]] = (0, [])

    def lines(self) -> list[str]:
        lines: list[str] = []
        for n, row in enumerate(self._rows):
            line = Row(self._join(row, range(len(self._columns))))
            line._table, line._n = self, n
            lines.append(line)
        return lines

    def fold(self, columns: int) -> list[str]:
        if self._folded[0] != columns:
            self._folded = columns, list(self._fold(columns))
        return self._folded[1]

    def _fold(self, columns: int) -> Iterator[str]:
        kept = list(range(len(self._columns)))
        while sum(self._widths[n] + 2 for n in kept) - 2 > columns:
            soonest = max(kept, key=lambda n: (self._columns[n].folds, n))
            if not self._columns[soonest].folds:
                break
            kept.remove(soonest)
        moved = [n for n in range(len(self._columns)) if n not in kept]
        for number, row in enumerate(self._rows):
            line = self._join(row, kept)
            told = [
                f"{self._columns[n].label} {row[n]}".strip() for n in moved if click.unstyle(row[n]) not in ("", "-")
            ]
            if told and number > 0:
                line += "\n" + fold(prose("    ", ", ".join(told)), columns)
            yield line

    def _join(self, row: Sequence[str], kept: Iterable[int]) -> str:
        cells = []
        for n in kept:
            space = " " * (self._widths[n] - text_width(row[n]))
            cells.append(space + row[n] if self._columns[n].title.startswith(">") else row[n] + space)
        return "  ".join(cells).rstrip()


def format_table(headers: Sequence[str | Column], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return aligned lines, the headers first. A header that begins with ">" is of a column of numbers.

    A plain header gives way to the left of it where a terminal is narrow; the first one never.
    """
    columns = [
        header if isinstance(header, Column) else Column(header, n, header.removeprefix(">").lower())
        for n, header in enumerate(headers)
    ]
    return _Table(columns, [list(row) for row in rows]).lines()


def _paint_title(title: str) -> str:
    shown = title.removeprefix(">")
    return paint(shown, BOLD) if shown.strip() else shown


def text_width(text: str) -> int:
    """Return how many columns a terminal gives to text: two to a character of East Asia or an emoji, none to marks.

    Source: Unicode Standard Annex 11; wcwidth(3). What a ZERO WIDTH JOINER joins is drawn as one.
    """
    width, last, joined = 0, 0, False
    for char in click.unstyle(text):
        if " " <= char <= "~":
            width, last, joined = width + 1, 1, False
        elif char == "\N{ZERO WIDTH JOINER}":
            joined = True
        elif char == "\N{VARIATION SELECTOR-16}":  # what precedes is drawn as an emoji
            width, last = width + (last == 1), 2
        elif unicodedata.category(char) in _NO_WIDTH or "\u1160" <= char <= "\u11ff":
            continue
        elif joined or (last == 2 and "\U0001f3fb" <= char <= "\U0001f3ff"):
            joined = False
        else:
            last = 2 if unicodedata.east_asian_width(char) in ("W", "F") else 1
            width += last
    return width


_NO_WIDTH = ("Mn", "Me", "Cf")


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
        #: Whether `print_json` prints YAML in its place.
        self.as_yaml = False
        self._documents = 0

    @property
    def shows_progress(self) -> bool:
        """Whether somebody looks at standard error."""
        return self._err.isatty()

    @property
    def is_watched(self) -> bool:
        """Whether somebody looks at standard output."""
        return self._out.isatty()

    def print(self, *lines: str) -> None:
        """Print lines of a result.

        Raises:
            OutputLost: they cannot be written; as with `print_json` and `redraw`.
        """
        for line in lines:
            if self._out.isatty():
                columns = shutil.get_terminal_size().columns
                line = fold(line, columns) if isinstance(line, Prose) else line
                line = line.folded(columns) if isinstance(line, Row) else line
            self._write(shown(line), color=_has_colour(self._out))

    def print_json(self, value: Any, *, indent: int | None = 2) -> None:
        """Print a result as JSON, or as YAML if requested; several results are documents of one stream."""
        if self.as_yaml:
            self._documents += 1
            self._write(("---\n" if self._documents > 1 or indent is None else "") + write_yaml(value))
            return
        self._write(quoted_json(value, indent=indent))

    def redraw(self, *lines: str) -> None:
        """Print lines in place of what stands there; where nobody looks they follow it."""
        if self._out.isatty():
            self._out.write("\033[H\033[J")
        self.print(*lines)

    def tell(self, line: str) -> None:
        """Tell something beside the result. Where that cannot be written the result still can."""
        self.clear()
        with suppress(OSError):
            click.echo(shown(line), self._err, color=_has_colour(self._err))

    def show(self, line: str) -> None:
        """Show a line that the next one takes the place of; on a terminal only."""
        if self.shows_progress:
            self.clear()
            width = shutil.get_terminal_size().columns - 1
            line = shown(line)
            while text_width(line) > width:
                line = line[:-1]
            with suppress(OSError):
                self._err.write(line)
                self._err.flush()
            self._transient = True

    def clear(self) -> None:
        """Take back what `show` has shown."""
        if self._transient:
            with suppress(OSError):
                self._err.write("\r\033[K")
                self._err.flush()
            self._transient = False

    def _write(self, text: str, *, color: bool | None = None) -> None:
        try:
            click.echo(text, self._out, color=color)  # which flushes
        except OSError as error:
            raise OutputLost(error) from error


def fold(line: Prose, columns: int) -> str:
    """Return a line as several, each no wider than `columns` unless one word is; no word is broken."""
    lines = [""]
    start = len(line) - len(line.lstrip(" "))
    for word in line[start:].split(" "):
        head = " " * (start if len(lines) == 1 else line.indent)
        wider = f"{lines[-1]} {word}" if lines[-1] else head + word
        if lines[-1].strip() and text_width(wider) > columns:
            lines[-1] = lines[-1].rstrip()
            lines.append(" " * line.indent + word)
        else:
            lines[-1] = wider
    return "\n".join(lines)


def _tolerant(stream: TextIO) -> TextIO:
    """Return a stream that writes a question mark for what its encoding lacks."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")
    return stream


def _has_colour(stream: TextIO) -> bool:
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
