"""Runs kvmagentctl as a process, in pipes or on a terminal of its own."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tests.lab.agent import AgentProcess
from tests.lab.processes import wait_for

TIMEOUT_S = 60.0


class Done(NamedTuple):
    """How a call ended, and what it printed."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, which is JSON and nothing else."""
        return json.loads(self.out)


class Ctl:
    """kvmagentctl with an environment."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("KVMAGENT", "NO_COLOR"))}
        self.environment = {**kept, "TERM": "xterm", **environment}
        self.script = Path(sys.executable).with_name("kvmagentctl")

    def __call__(self, *arguments: str, environment: Mapping[str, str] | None = None) -> Done:
        """Run it with its output in pipes."""
        done = subprocess.run(
            [self.script, *arguments],
            env={**self.environment, **(environment or {})},
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return Done(done.returncode, done.stdout, done.stderr)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start it in the background, its output in pipes."""
        return subprocess.Popen(
            [self.script, *arguments],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
        )

    def on_terminal(self, *arguments: str, environment: Mapping[str, str] | None = None) -> Done:
        """Run it on a terminal, which shows standard output and error together."""
        ours, theirs = pty.openpty()
        child = subprocess.Popen(
            [self.script, *arguments],
            env={**self.environment, **(environment or {})},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        shown = b""
        with open(ours, "rb", buffering=0) as terminal:
            try:
                while part := terminal.read(65536):
                    shown += part
            except OSError:  # the last process has closed the terminal: EIO
                pass
        return Done(child.wait(TIMEOUT_S), shown.decode().replace("\r\n", "\n"), "")


def settled(agent: AgentProcess, task_uuid: str) -> Any:
    """A task as the agent tells it, once its callback is no longer owed: that is noted after the callback was taken."""
    path = f"/tasks/{task_uuid}"
    return wait_for(lambda: (task := agent.get(path).body)["state"] == "delivered" and task, timeout_s=20, what=path)


def interrupt(child: subprocess.Popen[str]) -> Done:
    """Press Ctrl-C, and wait for the end."""
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=TIMEOUT_S)
    return Done(child.returncode, out, err)
