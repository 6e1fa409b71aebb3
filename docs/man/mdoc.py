"""Text of the program as mdoc(7) wants it."""

import re
import textwrap

DATE = "November 23, 2026"


def text(words: str) -> str:
    """Return running text: each sentence on lines of its own, nothing that troff takes for its own."""
    sentences = re.split(r"(?<=[.:;])\s+", " ".join(words.split()))
    return "\n".join(_line(line) for sentence in sentences for line in textwrap.wrap(sentence, 78, **_WHOLE_WORDS))


def paragraphs(words: str) -> str:
    """Return text with empty lines in it as paragraphs."""
    return "\n.Pp\n".join(text(one) for one in re.split(r"\n\s*\n", words.strip()))


def word(words: str) -> str:
    """Return an argument of a macro; it is one, whatever is in it."""
    return '"{}"'.format(_escape(words).replace('"', r"\(dq"))


_WHOLE_WORDS = {"break_on_hyphens": False, "break_long_words": False}


def _line(line: str) -> str:
    line = _escape(line)
    return rf"\&{line}" if line[0] in ".'" else line


def _escape(words: str) -> str:
    return words.replace("\\", r"\e").replace("-", r"\-").replace("`", r"\(ga")
