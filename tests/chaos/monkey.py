"""What is done to the agent: one thing after the other, each chosen by chance, and undone before the next.

The library between the agent and its kernel kills it at a counted call, lets the disk fail and steps its clock; its
state is on a small file system of its own that is filled, turned read-only, and robbed of the journal's log.
"""

import contextlib
import errno
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.chaos.clients import Results
from tests.chaos.count import Count
from tests.chaos.shim import Kind, Shim
from tests.lab.agent import AgentProcess
from tests.lab.libvirtd import PrivateLibvirtd
from tests.lab.processes import wait_for
from tests.lab.server import Answer

# What the unit gives it: before that it ends by itself, and says where every thread is.
STOP_S = 150.0
# More than what the journal keeps, with its log.
DISK_BYTES = 64 * 2**20


class Disk:
    """A file system of its own at a directory, for whoever may mount one."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._mount("-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=0700", "none")

    def fill(self) -> None:
        """Leave no space."""
        with (self._directory / "ballast").open("wb", buffering=0) as ballast, contextlib.suppress(OSError):
            while ballast.write(b"\0" * 4096):
                pass

    def empty(self) -> None:
        """Give it back."""
        (self._directory / "ballast").unlink(missing_ok=True)

    def set_read_only(self, *, read_only: bool) -> None:
        """Nobody may have a file of it open for writing."""
        self._mount("-o", f"remount,{'ro' if read_only else 'rw'},size={DISK_BYTES},mode=0700")

    def remove_log(self) -> None:
        """Take the journal's log away."""
        (self._directory / "journal.sqlite-wal").unlink(missing_ok=True)

    def close(self) -> None:
        """Unmount it."""
        subprocess.run(["umount", "--lazy", str(self._directory)], check=True)

    def _mount(self, *options: str) -> None:
        subprocess.run(["mount", *options, str(self._directory)], check=True)


class Monkey:
    """Used by one thread. `agent` runs, or is started again, after each call of `act`."""

    def __init__(
        self,
        chance: random.Random,
        agent: AgentProcess,
        lab: PrivateLibvirtd,
        shim: Shim,
        disk: Disk,
        results: Results,
        count: Count,
    ) -> None:
        self._chance = chance
        self._agent, self._lab, self._shim, self._disk = agent, lab, shim, disk
        self._results, self._count = results, count
        self._acts: list[tuple[int, Callable[[], str]]] = [
            (6, self._kill_at_a_call),
            (2, self._kill_while_it_starts),
            (2, self._stop),
            (4, self._fail_calls),
            (2, self._fill_disk),
            (1, self._turn_read_only),
            (2, self._step_clock),
            (2, self._take_log_away),
            (2, self._kill_libvirtd),
            (2, self._pause_libvirtd),
            (3, self._spoil_receiver),
        ]

    def act(self) -> None:
        """Do one thing, and undo it."""
        with contextlib.suppress(OSError, ValueError):  # it has just ended
            status = Path(f"/proc/{self._agent.pid}/status").read_text()
            most_kib = int(status.partition("VmHWM:")[2].split()[0])
            self._count.most_resident_kib = max(self._count.most_resident_kib, most_kib)
        weights, acts = zip(*self._acts, strict=True)
        (act,) = self._chance.choices(acts, weights)
        self._count.done_to[act()] += 1

    def heal(self) -> None:
        """Leave everything well."""
        self._shim.fail()
        self._shim.kill_after(0)
        self._disk.empty()
        self._shim.step_clock(0)
        self._results.answer = lambda _task, _attempt: Answer()
        self._start()

    def _wait(self, least_s: float, most_s: float) -> None:
        time.sleep(self._chance.uniform(least_s, most_s))

    def _start(self) -> None:
        if not self._agent.is_running():
            self._agent.start()

    def _kill_at_a_call(self) -> str:
        self._shim.kill_after(self._chance.randint(1, 300))
        with contextlib.suppress(TimeoutError):
            wait_for(lambda: not self._agent.is_running(), timeout_s=2, what="its end")
        self._shim.kill_after(0)
        self._agent.kill()
        self._start()
        return "killed at a counted call"

    def _kill_while_it_starts(self) -> str:
        self._agent.kill()
        self._shim.kill_after(self._chance.randint(1, 60))
        # It is killed, or comes up before it has made so many calls.
        with contextlib.suppress(RuntimeError):
            self._agent.start()
        self._shim.kill_after(0)
        self._start()
        return "killed while it starts"

    def _stop(self) -> str:
        if status := self._agent.stop(timeout_s=STOP_S):
            self._count.fault(f"the agent did not end in good order, but with {status}: {self._agent.log()[-6000:]}")
        self._start()
        return "stopped"

    def _fail_calls(self) -> str:
        kinds: list[Kind] = self._chance.choice(
            [["syncs"], ["writes"], ["reads"], ["syncs", "reads"], ["writes", "syncs"], ["reads", "writes", "syncs"]]
        )
        before = self._shim.failed
        self._shim.fail(*kinds, error=errno.EIO, every=self._chance.choice([1, 1, 2, 7]))
        self._wait(0.1, 1.5)
        self._shim.fail()
        self._count.done_to["calls that failed (EIO)"] += self._shim.failed - before
        return f"disk: {' and '.join(kinds)} fail for a while"

    def _fill_disk(self) -> str:
        self._disk.fill()
        self._wait(0.5, 2)
        self._disk.empty()
        return "disk: full for a while"

    def _turn_read_only(self) -> str:
        self._agent.kill()
        self._disk.set_read_only(read_only=True)
        try:
            self._agent.start()
        except RuntimeError:
            pass  # without a journal it does not start
        else:
            self._count.fault("the agent started on a disk that cannot be written")
        self._disk.set_read_only(read_only=False)
        self._start()
        return "disk: read-only at a start"

    def _step_clock(self) -> str:
        self._shim.step_clock(self._chance.choice([-86400, 0, 3600, 172800, 30 * 86400]))
        return "clock: stepped"

    def _take_log_away(self) -> str:
        # While somebody has it: after an error of the disk, or a kill in the same second, nobody would.
        wait_for(self._is_journal_well, timeout_s=30, what="the journal to be open")
        self._disk.remove_log()
        self._wait(1.5, 2)
        return "journal's log removed"

    def _is_journal_well(self) -> bool:
        return "journal" not in self._agent.get("/healthz").body["down"]

    def _kill_libvirtd(self) -> str:
        self._lab.kill()
        self._wait(0, 1)
        self._lab.start()
        return "libvirtd killed"

    def _pause_libvirtd(self) -> str:
        self._lab.pause()
        self._wait(0.5, 2)
        self._lab.resume()
        return "libvirtd paused"

    def _spoil_receiver(self) -> str:
        kind = self._chance.choice(["away", "500", "404", "slow", "reset", "half"])
        if kind == "away":
            self._results.stop()
            self._wait(0.5, 2)
            self._results.start()
        else:
            bad = {
                "500": Answer(status=500),
                "404": Answer(status=404),
                "slow": Answer(hang_s=3.0),
                "reset": Answer(fault="reset"),
                "half": Answer(fault="half"),
            }[kind]
            self._results.answer = lambda _task, _attempt: bad
            self._wait(0.5, 2)
            self._results.answer = lambda _task, _attempt: Answer()
        return f"receiver: {kind}"
