"""The agent on one CPU: which one, and when it leaves it."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmagent.onecpu import OneCpu

ALLOWED = sorted(os.sched_getaffinity(0))
pytestmark = pytest.mark.skipif(len(ALLOWED) < 2, reason="one CPU alone leaves nothing to choose")


class Host:
    """A /proc whose CPUs are as busy as a test says, and a clock; ticks are hundredths of a second."""

    def __init__(self, proc: Path) -> None:
        self.proc = proc
        self.now = self.used = 0.0
        self._ticks = {cpu: [0, 0] for cpu in ALLOWED}
        self.work(dict.fromkeys(ALLOWED, 0.5), seconds=100)

    def work(self, busy: dict[int, float], *, seconds: float = 5.0) -> None:
        """Let time pass; a CPU that is not named is idle."""
        self.now += seconds
        lines = ["cpu  0 0 0 0 0 0 0 0 0 0"]
        for cpu, ticks in self._ticks.items():
            ticks[0] += int(100 * seconds * busy.get(cpu, 0.0))
            ticks[1] += int(100 * seconds * (1 - busy.get(cpu, 0.0)))
            lines.append(f"cpu{cpu} {ticks[0]} 0 0 {ticks[1]} 0 0 0 0 {ticks[0]} 0")
        (self.proc / "stat").write_text("\n".join([*lines, "intr 1 2 3", "ctxt 4"]))


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


@pytest.fixture
def one_cpu(host: Host) -> Iterator[OneCpu]:
    one = OneCpu(proc=host.proc, clock=lambda: host.now, used=lambda: host.used)
    yield one
    one.stop()


def affinities() -> set[frozenset[int]]:
    return {frozenset(os.sched_getaffinity(int(thread))) for thread in os.listdir("/proc/self/task")}


def refuse(_thread: int, _cpus: object) -> None:
    raise PermissionError(1, "Operation not permitted")


FIRST, SECOND = ALLOWED[:2]
REST = dict.fromkeys(ALLOWED[2:], 1.0)


def test_all_threads_come_to_the_cpu_that_was_used_least_and_are_free_at_the_end(host: Host, one_cpu: OneCpu) -> None:
    ended = threading.Event()
    thread = threading.Thread(target=ended.wait)
    thread.start()
    host.work({FIRST: 1.0, **REST})
    one_cpu.start()
    assert affinities() == {frozenset({SECOND})}
    one_cpu.stop()
    assert affinities() == {frozenset(ALLOWED)}
    ended.set()
    thread.join()


def test_a_cpu_that_others_crowd_is_left(host: Host, one_cpu: OneCpu) -> None:
    one_cpu.start()
    host.work({FIRST: 0.9, SECOND: 0.1, **REST})
    one_cpu.look()
    assert affinities() == {frozenset({SECOND})}


def test_the_agents_own_work_does_not_drive_it_away(host: Host, one_cpu: OneCpu) -> None:
    one_cpu.start()
    host.used += 4.5
    host.work({FIRST: 1.0, **REST})
    one_cpu.look()
    assert affinities() == {frozenset({FIRST})}


def test_it_stays_where_no_other_cpu_is_much_better(host: Host, one_cpu: OneCpu) -> None:
    one_cpu.start()
    host.work({FIRST: 0.9, SECOND: 0.7, **REST})
    one_cpu.look()
    assert affinities() == {frozenset({FIRST})}


def test_a_short_time_says_nothing(host: Host, one_cpu: OneCpu) -> None:
    one_cpu.start()
    host.work({FIRST: 1.0, **REST}, seconds=1.0)
    one_cpu.look()
    assert affinities() == {frozenset({FIRST})}


def test_what_is_begun_everywhere_may_use_all_cpus(host: Host, one_cpu: OneCpu) -> None:
    one_cpu.start()
    show = [sys.executable, "-c", "import os; print(sorted(os.sched_getaffinity(0)))"]
    with one_cpu.everywhere():
        done = subprocess.run(show, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(ALLOWED)
    assert affinities() == {frozenset({FIRST})}


def test_what_is_begun_where_cpus_were_taken_away_is_begun_all_the_same(
    host: Host, one_cpu: OneCpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_cpu.start()
    with monkeypatch.context() as patch:
        patch.setattr(os, "sched_setaffinity", refuse)
        with one_cpu.everywhere():
            pass
    assert affinities() == {frozenset({FIRST})}


def test_where_the_kernel_says_nothing_all_stays_as_it_was(tmp_path: Path) -> None:
    one = OneCpu(proc=tmp_path)
    one.start()
    one.look()
    assert affinities() == {frozenset(ALLOWED)}


def test_where_it_is_not_allowed_all_stays_as_it_was(
    host: Host, one_cpu: OneCpu, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    one_cpu.start()
    assert "the agent is not kept on one CPU" in caplog.text
    with one_cpu.everywhere():
        pass
    one_cpu.look()
    assert affinities() == {frozenset(ALLOWED)}
