"""What the doctor found, and how it is printed."""

from collections.abc import Iterable
from typing import Literal

import msgspec

from kvmagent.cli.ctl.terminal import BAD, DIM, GOOD, WARN, paint, prose

Level = Literal["good", "note", "warning", "wrong"]

_COLOURS: dict[Level, str] = {"good": GOOD, "note": DIM, "warning": WARN, "wrong": BAD}


class Finding(msgspec.Struct, frozen=True, rename="camel"):
    """One thing that was looked at.

    wrong: it hinders the agent. warning: it will, or it hinders some VMs. note: good to know.
    """

    check: str
    level: Level
    message: str
    remedy: str = ""


def is_healthy(findings: Iterable[Finding]) -> bool:
    """Return whether nothing is wrong."""
    return all(found.level != "wrong" for found in findings)


def render_findings(findings: Iterable[Finding]) -> list[str]:
    """Return findings as lines, each remedy below its finding, and the sum of them."""
    lines: list[str] = []
    counts = dict.fromkeys(_COLOURS, 0)
    for found in findings:
        counts[found.level] += 1
        head = f"{paint(f'{found.level:<7}', _COLOURS[found.level])}  {found.check}: "
        lines.append(prose(head, found.message))
        if found.remedy:
            lines.append(prose(f"         {paint('remedy', DIM)}: ", found.remedy))
    return [*lines, "", ", ".join(f"{number} {level}" for level, number in counts.items() if number)]
