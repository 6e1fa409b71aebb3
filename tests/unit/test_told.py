"""What log, metrics, journal and reply say of an ending: the same, whoever made the error."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvmagent.logs import Event, log_context, struct_fields
from kvmagent.model.steps import AttachMemory, AwaitGuestVcpus, SetVcpus
from kvmagent.recorder import Recorder
from kvmagent.tasks.journal import Journal, StepRecord, Task
from kvmagent.tasks.lanes import Lanes
from kvmagent.tasks.withdrawal import Withdrawal
from kvmagent_plugins.vm.requests import HotPlugMemoryRequest
from tests.fakes.agent import COMMANDS, MIB
from tests.unit.test_recovery import LOST, Agent, Killed


class Counted(Recorder):
    """Keeps what ended."""

    def __init__(self) -> None:
        self.endings: list[tuple[str, str, str | None]] = []
        self.late: list[tuple[str, str | None]] = []

    def ended(self, command: str, outcome: str, error_code: str | None) -> None:
        self.endings.append((command, outcome, error_code))

    def ended_late(self, command: str, error_code: str | None) -> None:
        self.late.append((command, error_code))


class Told:
    """One agent's inside, and all that it says."""

    def __init__(self, directory: Path, caplog: pytest.LogCaptureFixture) -> None:
        self.agent = Agent(directory)
        self.recorder = Counted()
        self.pending: list[str] = []
        self._caplog = caplog
        self.agent.executor = self.executor = self.agent.make_executor(
            on_pending=self.pending.append, recorder=self.recorder
        )

    def run(self, command: str, **fields: Any) -> dict[str, Any]:
        self.executor.run(self.agent.accept(command, vmUuid="vm1", **fields))
        return self.agent.reply()

    def lines(self, name: str) -> list[tuple[str, dict[str, Any]]]:
        return [
            (record.levelname, dict(record.msg.fields))
            for record in self._caplog.records
            if isinstance(record.msg, Event) and record.msg.name == name
        ]


@pytest.fixture
def told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Iterator[Told]:
    caplog.set_level(logging.INFO)
    made = Told(tmp_path, caplog)
    yield made
    made.agent.journal.stop()


def check_same(told: Told, reply: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The error of the reply is on the line and in the count; return the line."""
    ((level, line),) = told.lines("task finished")
    ((_, outcome, code),) = told.recorder.endings
    assert (line["outcome"], line.get("error_code")) == (reply["outcome"], reply["errorCode"]) == (outcome, code)
    assert (line.get("error"), line.get("remedy")) == (reply["error"] or None, reply["remedy"])
    return level, line


def test_a_step_has_its_own_fields_and_the_end_the_totals_before_and_after(told: Told) -> None:
    level, line = check_same(told, told.run("HotPlugCpu", cpuNum=3))
    assert level == "INFO"
    totals = {"cpuNumBefore": 1, "cpuNumAfter": 3, "configCpuNumBefore": 1, "configCpuNumAfter": 3}
    totals |= {"memorySizeBefore": 256 * MIB, "memorySizeAfter": 256 * MIB}
    assert totals.items() <= line.items()
    ((_, audited),) = told.lines("audit")
    assert totals.items() <= audited.items()
    steps = told.lines("step")
    assert (steps[0][0], steps[0][1]["step"]) == ("INFO", "SetVcpus")
    assert (steps[0][1]["count"], steps[0][1]["target"]) == (3, "both")


def test_an_error_that_the_judge_made_is_told_like_any_other_and_partial_is_a_warning(told: Told) -> None:
    told.agent.domain.guest.virtio_mem_limit = 64 * MIB
    reply = told.run("HotPlugMemory", memorySize=512 * MIB, method="virtio-mem", timeoutSec=1)
    assert (reply["outcome"], reply["errorCode"]) == ("partial", "VIRTIO_MEM_STALLED")
    level, line = check_same(told, reply)
    assert level == "WARNING"
    assert line["memorySizeAfter"] == 320 * MIB
    failed = [step for step in told.lines("step") if "problem" in step[1] and step[1]["problem"]]
    assert [(level, step["step"], step["problem"]) for level, step in failed] == [
        ("WARNING", "AwaitVirtioMem", "VIRTIO_MEM_STALLED")
    ]


def test_a_refusal_is_told_as_it_is_answered(told: Told) -> None:
    level, line = check_same(told, told.run("HotPlugCpu", cpuNum=99))
    assert (level, line["error_code"], line["cpuNumBefore"]) == ("INFO", "CPU_ABOVE_MAXIMUM", 1)


def test_what_ends_late_is_counted_and_told_with_its_error(told: Told) -> None:
    domain = told.agent.domain
    assert told.run("HotPlugMemory", memorySize=384 * MIB)["outcome"] == "online"
    domain.guest.unplugs = "does not answer"
    request = msgspec.json.encode({"vmUuid": "vm1", "memorySize": 256 * MIB, "timeoutSec": 1, "guestOnline": False})
    task = Task(
        task_uuid="t2",
        command="HotUnplugMemory",
        lane="vm1",
        request=request,
        callback_url="http://127.0.0.1:9/",
        client="127.0.0.1",
    )
    told.executor.run(told.agent.journal.accept(task)[0])
    assert told.pending == ["t2"]
    told.agent.journal.record_delivery("t2", "delivered", None)
    domain.power_cycle()
    pending = told.agent.journal.find("t2")
    assert pending is not None
    told.executor.run(pending)
    _, line = told.lines("task finished")[-1]
    assert (line["late"], line["error_code"]) == (True, "REMOVAL_LOST")
    assert told.recorder.late == [("HotUnplugMemory", "REMOVAL_LOST")]


def test_a_task_that_was_taken_back_has_its_last_line_as_well(told: Told) -> None:
    lanes = Lanes(lambda task: None, workers=1, max_queued=9, max_queued_per_lane=9, max_queued_per_client=9)
    taken = Withdrawal(told.agent.journal, lanes, COMMANDS, on_finished=lambda owed: None, recorder=told.recorder)
    told.agent.accept("HotPlugCpu", vmUuid="vm1", cpuNum=2)
    taken.withdraw("t1")
    assert check_same(told, told.agent.reply())[1]["error_code"] == "CANCELLED"


def steps(journal: Journal) -> list[StepRecord]:
    return journal.steps("t1")


def test_a_step_that_libvirt_s_loss_cut_off_is_journaled_and_shown_as_cut_off(told: Told) -> None:
    told.agent.domain.fail_next["setVcpusFlags"] = LOST
    reply = told.run("HotPlugCpu", cpuNum=2)
    assert reply["outcome"] == "online"
    first, second = reply["steps"][:2]
    assert (first["step"], first["elapsedMs"], first["cutOff"], "problem" in first) == ("SetVcpus", None, True, False)
    assert second["elapsedMs"] is not None
    assert "cutOff" not in second
    assert [(step.cut_off, step.elapsed_ms is None) for step in steps(told.agent.journal)][:2] == [
        (True, True),
        (False, False),
    ]
    level, line = told.lines("step")[0]
    assert (level, line["cut_off"], line["ms"]) == ("WARNING", True, None)


def test_a_step_that_the_agent_s_end_cut_off_is_so_from_the_next_start_on(told: Told, tmp_path: Path) -> None:
    task = told.agent.accept("HotPlugCpu", vmUuid="vm1", cpuNum=2)
    told.agent.point = "step:begun"
    with pytest.raises(Killed):
        told.executor.run(task)
    (running,) = steps(told.agent.journal)
    assert (running.elapsed_ms, running.cut_off) == (None, False)
    told.agent.journal.stop()
    told.agent.journal = Journal(tmp_path / "journal.sqlite", on_accepted=lambda task: None)
    told.agent.journal.start()
    told.agent.journal.start_task("t1")
    told.agent.journal.stop()
    told.agent.journal = Journal(tmp_path / "journal.sqlite", on_accepted=lambda task: None)
    told.agent.journal.start()
    (cut,) = steps(told.agent.journal)
    assert (cut.elapsed_ms, cut.cut_off) == (None, True)


def test_fields_are_told_by_their_names_on_the_wire_but_for_defaults() -> None:
    request = HotPlugMemoryRequest(vm_uuid="vm1", memory_size=5, method="dimm")
    assert struct_fields(request, omit=frozenset({"vm_uuid"})) == {"memorySize": 5, "method": "dimm"}
    step = AwaitGuestVcpus(known=(0, 1, 2, 5), added=2, timeout_sec=60)
    assert struct_fields(step) == {"known": "0-2,5", "added": 2, "timeoutSec": 60}
    assert struct_fields(SetVcpus(count=2, target="live")) == {"count": 2, "target": "live"}
    attach = AttachMemory(alias="ua-1", size_bytes=1, node=0, live=True, config=False)
    assert struct_fields(attach)["live"] is True


def test_a_field_cannot_pass_for_one_of_the_line_s_own() -> None:
    class Odd(msgspec.Struct, rename="camel"):
        task: str
        error: str
        several: tuple[str, ...] = ()

    with log_context(task="t1"):
        assert struct_fields(Odd("x", "y", ("a",))) == {"own_task": "x", "own_error": "y", "several": '["a"]'}
