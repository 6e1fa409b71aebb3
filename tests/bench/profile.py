"""Where the agent's time goes, as py-spy sees it: samples of the threads that hold the interpreter."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.bench.report import Report

_RATE = 200
_LINES = 40


@contextlib.contextmanager
def profiled(report: Report, name: str, pid: int) -> Iterator[None]:
    """Sample a process while the block lasts, and put the outcome into the report."""
    program = Path(sys.executable).with_name("py-spy")
    with tempfile.NamedTemporaryFile() as raw:
        command = [str(program), "record", "-p", str(pid), "-r", str(_RATE), "--gil", "-F", "-f", "raw", "-o", raw.name]
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield
        finally:
            child.send_signal(signal.SIGINT)
            child.wait()
        report.profiles[name] = summarize(Path(raw.name).read_text())


def summarize(raw: str) -> str:
    """Return the functions with the most samples in them and below them: all, own, function."""
    below, own, total = Counter[str](), Counter[str](), 0
    for line in raw.splitlines():
        stack, _, count = line.rpartition(" ")
        frames = stack.split(";")
        total += int(count)
        own[frames[-1]] += int(count)
        below.update(dict.fromkeys(frames, int(count)))
    lines = [f"{total} samples at {_RATE} Hz: below, own, function"]
    share = 100 / max(total, 1)
    lines += [
        f"{count * share:5.1f}% {own[frame] * share:5.1f}%  {frame}" for frame, count in below.most_common(_LINES)
    ]
    return "\n".join(lines)
