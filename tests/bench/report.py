"""The benchmark's outcome: rows with a target and the ratio to it, as a table for people and as JSON for tools."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import libvirt

Kind = Literal["at most", "at least"]


@dataclass(frozen=True)
class Row:
    """One number. `target` None: it is there to be compared with, and is not promised."""

    section: str
    name: str
    value: float
    unit: str
    target: float | None = None
    kind: Kind = "at most"

    @property
    def ratio(self) -> float | None:
        """The number as a part of its target: for "at most" good below 1, for "at least" above."""
        return None if not self.target else self.value / self.target

    @property
    def is_reached(self) -> bool | None:
        """Whether the target is reached; None where there is none."""
        if self.target is None:
            return None
        return self.value <= self.target if self.kind == "at most" else self.value >= self.target


@dataclass
class Report:
    """Collects rows and profiles, and prints each row as it comes."""

    rows: list[Row] = field(default_factory=list)
    profiles: dict[str, str] = field(default_factory=dict)
    section: str = ""

    def begin(self, section: str) -> None:
        """The rows that follow belong to this section."""
        self.section = section
        print(f"\n== {section} (load {os.getloadavg()[0]:.1f})", flush=True)

    def add(
        self, name: str, value: float, unit: str, *, at_most: float | None = None, at_least: float | None = None
    ) -> None:
        """Add a number, with its target where it has one."""
        target, kind = (at_least, "at least") if at_least is not None else (at_most, "at most")
        self.rows.append(Row(self.section, name, value, unit, target, kind))  # type: ignore[arg-type]
        print(format_row(self.rows[-1]), flush=True)

    def format_targets(self) -> str:
        """The rows that have a target."""
        promised = [row for row in self.rows if row.target is not None]
        missed = [row for row in promised if not row.is_reached]
        lines = [format_row(row) for row in promised]
        return "\n".join([*lines, f"{len(promised) - len(missed)} of {len(promised)} targets reached"])

    def write(self, path: Path) -> None:
        """Write everything as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [asdict(row) | {"ratio": row.ratio, "reached": row.is_reached} for row in self.rows]
        path.write_text(json.dumps({"machine": describe_machine(), "rows": rows, "profiles": self.profiles}, indent=1))


def format_row(row: Row) -> str:
    """One line: name, number, target, ratio, verdict."""
    line = f"{row.name:<66} {row.value:>10.2f} {row.unit:<5}"
    if row.target is None:
        return line
    verdict = "reached" if row.is_reached else "MISSED"
    return f"{line} {row.kind:>8} {row.target:>8.2f}  ratio {row.ratio or 0:>5.2f}  {verdict}"


def describe_machine() -> dict[str, object]:
    """What the numbers depend on."""
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    git = shutil.which("git")
    command = [git, "rev-parse", "HEAD"] if git else ["true"]
    return {
        "commit": subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip(),
        "cpus": os.cpu_count(),
        "cpu": model.partition(":")[2].strip(),
        "load": os.getloadavg(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "libvirt": libvirt.getVersion(),
    }
