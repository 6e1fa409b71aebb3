"""Writes JSON values as YAML, for `-o yaml`: in blocks, quoting whatever YAML could read as another type."""

import json
import re
from collections.abc import Iterator
from typing import Any

# Text that no reader of YAML, old or new, takes for anything else.
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_./-]*")
_LONGEST_KEY = 1000
_WORDS = frozenset({"true", "false", "yes", "no", "on", "off", "null", "y", "n"})


def write_yaml(value: Any) -> str:
    """Return a document without its last line end."""
    return "\n".join(_lines(value))


def _lines(value: Any) -> Iterator[str]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            key = _scalar(name)
            # Source: YAML 1.2.2, 7.4.2: a key beside its value has at most 1024 characters.
            if len(key) > _LONGEST_KEY:
                yield f"? {key}"
                key = ""
            yield from _entry(f"{key}:", inner)
    elif isinstance(value, list) and value:
        for inner in value:
            first, *others = _lines(inner)
            yield f"- {first}"
            yield from (f"  {line}" for line in others)
    else:
        yield _scalar(value)


def _entry(head: str, value: Any) -> Iterator[str]:
    if isinstance(value, dict | list) and value:
        yield head
        yield from (f"  {line}" for line in _lines(value))
    else:
        yield f"{head} {_scalar(value)}"


def _quote(text: str) -> str:
    """Return text as JSON has it, but characters above U+FFFF as one: YAML knows no halves of them, as JSON does."""
    parts = (f"\\U{ord(one):08X}" if ord(one) > 0xFFFF else json.dumps(one)[1:-1] for one in text)
    return f'"{"".join(parts)}"'.replace("\x7f", "\\u007f")


def _scalar(value: Any) -> str:
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _WORDS:
        return value
    # What JSON writes is YAML too. ASCII alone: YAML allows fewer characters as they are than JSON does.
    text = _quote(value) if isinstance(value, str) else json.dumps(value)
    if isinstance(value, float) and "." not in text:  # YAML 1.1 takes 1e-9 for text
        text = text.replace("e", ".0e")
    return text
