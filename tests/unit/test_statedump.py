"""A dump says why nothing moves, also where nothing can."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kvmagent.settings import CallbackSection, parse_callback_rule
from kvmagent.tasks.callbackclient import CallbackClient
from kvmagent.tasks.delivery import Delivery
from kvmagent.tasks.journal import Journal, Task
from kvmagent.tasks.lanes import Lanes
from kvmagent.tasks.statedump import dump_state
from tests.lab.agent import find_free_port
from tests.lab.processes import wait_for

# The main thread holds the interpreter's lock in a C function for ever: no Python code runs any more.
STUCK = """
import itertools, sys, threading
from pathlib import Path
from kvmagent.cli.daemon import _Process
_Process(Path("none"), [])
threading.Thread(target=threading.Event().wait, name="other", daemon=True).start()
sys.setswitchinterval(3600)
print("stuck", flush=True)
any(itertools.repeat(0))
"""


def test_it_tells_what_runs_since_when_what_waits_and_what_is_owed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    let_go, running = threading.Event(), threading.Event()

    def run(_task: Task) -> None:
        running.set()
        let_go.wait(20)

    lanes = Lanes(run, workers=2, max_queued=9, max_queued_per_lane=9, max_queued_per_client=9, clock=lambda: 7.0)
    journal = Journal(tmp_path / "journal.sqlite", on_accepted=lambda _task: None)
    journal.start()
    delivery = Delivery(
        journal, CallbackClient([parse_callback_rule("caller")], CallbackSection()), timeout_s=1.0, give_up_s=100.0
    )
    dead = f"http://127.0.0.1:{find_free_port()}"
    tasks = [
        Task(task_uuid=f"t{n}", command="HotPlugCpu", lane="vm1", request=b"{}", callback_url=dead, client="127.0.0.1")
        for n in range(3)
    ]
    for task in tasks:
        lanes.put(task)
    journal.accept(tasks[0])
    delivery.put(journal.finish("t0", b"{}", "online"))
    assert running.wait(10)
    wait_for(lambda: any(one.failures for one in delivery.backlog()), timeout_s=10, what="a failed attempt")
    dump_state(lanes, delivery, journal)
    let_go.set()
    delivery.stop(0.1)
    lanes.stop(10)
    journal.stop()
    told = "\n".join(record.getMessage() for record in caplog.records)
    assert "dump totals" in told
    assert "running=1 queued=2 owed=1 journal=well" in told
    assert "dump lane vm=vm1 task=t0 command=HotPlugCpu caller=unknown seconds=0.0 queued=2" in told
    assert f'dump callbacks destination="{dead} of 127.0.0.1" owed=1 oldest_seconds=' in told
    assert "dump thread thread=MainThread" in told


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_the_stacks_come_even_when_no_thread_makes_progress(number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as stuck:
        assert stuck.stdout is not None
        assert stuck.stderr is not None
        assert stuck.stdout.readline() == b"stuck\n"
        os.kill(stuck.pid, number)
        seen = []
        while b"most recent call first" not in (line := stuck.stderr.readline()) or len(seen) < 1:
            assert line or stuck.poll() is None
            seen.append(line)
        assert stuck.poll() is None
        stuck.kill()
