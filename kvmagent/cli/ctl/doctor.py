"""Examines this host: what an agent needs here, and what it would meet; each finding with its remedy."""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec

from kvmagent.cli.ctl.session import Session
from kvmagent.cli.ctl.terminal import BAD, DIM, GOOD, WARN, paint

_COLOURS = {"good": GOOD, "note": DIM, "warning": WARN, "wrong": BAD}


class Finding(msgspec.Struct, frozen=True, rename="camel"):
    """One thing that was looked at. A warning is no failure yet; a note is good to know."""

    check: str
    level: Literal["good", "note", "warning", "wrong"]
    message: str
    remedy: str = ""

    @property
    def is_wrong(self) -> bool:
        """Whether it hinders the agent."""
        return self.level == "wrong"


def examine(config: Path, session: Session) -> list[Finding]:
    """Return all findings."""
    return []


def view_findings(findings: Iterable[Finding]) -> list[str]:
    """Return findings as lines, each remedy below its finding."""
    lines = []
    for found in findings:
        lines.append(f"{paint(f'{found.level:<7}', _COLOURS[found.level])}  {found.check}: {found.message}")
        if found.remedy:
            lines.append(f"         {paint('remedy', DIM)}: {found.remedy}")
    return lines
