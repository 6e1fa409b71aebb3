"""`make bench`: every measurement in turn, the table of targets, a JSON file. Ten minutes on a machine of its own.

(a) POST to callback: real plugs on running QEMUs, then a real guest, each beside the bare calls of the same run
(b) many domains    (c) memory, idleness, start    (d) owed callbacks    (e) until the guest itself has it
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from tests.bench import sections
from tests.bench.report import Report

DEFAULT_OUT = Path("build/bench.json")


def main() -> int:
    """Run the sections that were asked for; the exit status is 0 also where a target is missed."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="the JSON file (default: %(default)s)")
    parser.add_argument(
        "--only", default=",".join(sections.ALL), help="sections to run, by name (default: %(default)s)"
    )
    options = parser.parse_args()
    # As installed: an agent that compiles itself at each start starts later, and keeps the memory that took.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    report = Report()
    for name in options.only.split(","):
        sections.ALL[name](report)
    print(f"\n== targets\n{report.format_targets()}")
    report.write(options.out)
    print(f"all numbers and the profiles: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
