"""What the executor does when things go wrong on the way."""

import json
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvmagent.tasks.hooks import Hooks
from tests.fakes.agent import MIB, FakeAgent, make_domain
from tests.fakes.hooks import KEEP, HookDirectory
from tests.fakes.libvirt import FakeDomain, libvirt_error, qemu_error
from tests.lab.domainxml import GuestSpec


@pytest.fixture
def domain() -> FakeDomain:
    return make_domain(GuestSpec(name="vm1"))


@pytest.fixture
def agent(tmp_path: Path, domain: FakeDomain) -> Iterator[FakeAgent]:
    running = FakeAgent(tmp_path, domain)
    yield running
    running.stop()


def test_a_refusal_of_the_hypervisor_is_told_with_its_code_and_words(agent: FakeAgent, domain: FakeDomain) -> None:
    words = "internal error: unable to execute QEMU command 'object-add': cannot allocate"
    domain.fail_next["attachDeviceFlags"] = qemu_error(1, words)
    reply = agent.run("HotPlugMemory", vmUuid="vm1", memorySize=384 * MIB).reply
    assert (reply["success"], reply["outcome"], reply["errorCode"]) == (False, "refused", "LIBVIRT_REFUSED")
    assert words in reply["error"]
    assert reply["details"] == {"libvirtCode": 1, "libvirtDomain": 10}
    assert reply["steps"][0]["step"] == "AttachMemory"
    assert reply["before"] == reply["after"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (qemu_error(68, "Timed out: cannot acquire state change lock (held by x)"), "LIBVIRT_BUSY"),
        (libvirt_error(38, 7, "Failed to connect socket"), "LIBVIRT_UNAVAILABLE"),
        (libvirt_error(1, 7, "internal error: client socket is closed"), "LIBVIRT_UNAVAILABLE"),
        (qemu_error(38, "End of file while reading data"), "VM_CRASHED"),
        (qemu_error(42, "Domain not found"), "VM_NOT_FOUND"),
        (qemu_error(3, "this function is not supported"), "NOT_SUPPORTED"),
    ],
)
def test_libvirt_s_errors_are_told_apart_by_origin_and_code(
    agent: FakeAgent, domain: FakeDomain, error: Exception, code: str
) -> None:
    domain.fail_next["setVcpusFlags"] = error
    assert agent.run("HotPlugCpu", vmUuid="vm1", cpuNum=2).reply["errorCode"] == code


def test_half_of_a_change_is_partial_and_the_numbers_say_how_far(agent: FakeAgent, domain: FakeDomain) -> None:
    domain.fail_next["save"] = qemu_error(38, "Failed to create file '/x/vm1.xml.new': No space left on device")
    reply = agent.run("HotPlugCpu", vmUuid="vm1", cpuNum=3).reply
    assert (reply["success"], reply["outcome"]) == (False, "partial")
    assert (reply["after"]["cpuNum"], reply["after"]["configCpuNum"]) == (3, 1)
    assert reply["drift"] == [{"field": "cpuNum", "live": 3, "config": 1}]


def test_a_hypervisor_that_says_yes_and_does_nothing_is_found_out(agent: FakeAgent, domain: FakeDomain) -> None:
    attached = []
    domain.attachDeviceFlags = lambda xml, flags: attached.append(xml)  # type: ignore[method-assign]
    reply = agent.run("HotPlugMemory", vmUuid="vm1", memorySize=384 * MIB).reply
    assert (reply["success"], reply["outcome"], reply["errorCode"]) == (False, "refused", "NOT_VERIFIED")
    assert len(attached) == 1


def test_a_fault_of_our_own_is_told_and_logged_once_with_a_traceback(
    agent: FakeAgent, domain: FakeDomain, caplog: pytest.LogCaptureFixture
) -> None:
    domain.fail_next["setVcpusFlags"] = RuntimeError("a bug")
    with caplog.at_level(logging.INFO):
        reply = agent.run("HotPlugCpu", vmUuid="vm1", cpuNum=2).reply
    assert (reply["success"], reply["errorCode"]) == (False, "INTERNAL_ERROR")
    assert "a bug" in reply["error"]
    assert len([record for record in caplog.records if record.exc_info]) == 1


def test_an_expected_refusal_logs_no_traceback(agent: FakeAgent, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        agent.run("HotPlugCpu", vmUuid="vm1", cpuNum=9)
    assert not [record for record in caplog.records if record.exc_info]


def test_two_names_of_one_vm_are_one_vm(agent: FakeAgent, domain: FakeDomain) -> None:
    by_name: Any = agent.run("HotPlugCpu", "t1", vmUuid="vm1", cpuNum=2).reply
    by_uuid: Any = agent.run("HotPlugCpu", "t2", vmUuid=domain.UUIDString(), cpuNum=3).reply
    assert (by_name["cpuNum"], by_uuid["before"]["cpuNum"], by_uuid["cpuNum"]) == (2, 2, 3)


@pytest.fixture
def hooks(tmp_path: Path) -> HookDirectory:
    return HookDirectory(tmp_path)


@pytest.fixture
def hooked(tmp_path: Path, domain: FakeDomain, hooks: HookDirectory) -> Iterator[FakeAgent]:
    running = FakeAgent(tmp_path, domain, hooks=Hooks(str(hooks.path)))
    yield running
    running.stop()


@pytest.mark.parametrize("command", ["HotPlugCpu", "HotPlugMemory", "HotPlugCpuMemory"])
def test_a_hook_that_refuses_leaves_the_vm_and_the_journal_as_they_were(
    hooked: FakeAgent, hooks: HookDirectory, domain: FakeDomain, command: str
) -> None:
    hooks.write("before.d/10-no", "echo not tonight; exit 1")
    hooks.write("after.d/10-tell", KEEP)
    fields = {"HotPlugCpu": {"cpuNum": 2}, "HotPlugMemory": {"memorySize": 384 * MIB}}
    wanted: Any = fields.get(command) or {**fields["HotPlugCpu"], **fields["HotPlugMemory"]}
    live, persistent = domain.XMLDesc(0), domain.XMLDesc(2)
    done = hooked.run(command, vmUuid="vm1", **wanted)
    assert done.goal is None
    assert (done.reply["success"], done.reply["outcome"]) == (False, "refused")
    assert (done.reply["errorCode"], done.reply["error"]) == ("REFUSED_BY_HOOK", "before.d/10-no: not tonight")
    assert done.reply["steps"] == []
    assert (domain.XMLDesc(0), domain.XMLDesc(2)) == (live, persistent)
    (told,) = map(json.loads, hooks.lines())
    assert told["reply"]["errorCode"] == "REFUSED_BY_HOOK"


@pytest.mark.parametrize(
    "request_", [{"cpuNum": 1}, {"cpuNum": 2, "dryRun": True}, {"cpuNum": 99}], ids=["unchanged", "dryRun", "refused"]
)
def test_hooks_are_not_asked_where_nothing_would_be_changed(
    hooked: FakeAgent, hooks: HookDirectory, request_: dict[str, Any]
) -> None:
    hooks.write("before.d/10-no", KEEP, "exit 1")
    hooks.write("after.d/10-tell", KEEP)
    hooked.run("HotPlugCpu", vmUuid="vm1", **request_)
    assert hooks.lines() == []


def test_after_its_hooks_a_task_is_decided_anew(hooked: FakeAgent, hooks: HookDirectory, domain: FakeDomain) -> None:
    """What a hook, or the time that it took, has changed is seen: here another has given the VM its vCPU meanwhile."""
    hooks.write("before.d/10-wait", "echo > {told}.asked; read go < {told}.go")
    asked, go = hooks.told.with_name("told.asked"), hooks.told.with_name("told.go")
    os.mkfifo(asked)
    os.mkfifo(go)

    def change() -> None:
        asked.read_text()
        domain.setVcpusFlags(2, 1)
        go.write_text("go\n")

    other = threading.Thread(target=change)
    other.start()
    reply = hooked.run("HotPlugCpu", vmUuid="vm1", cpuNum=3, expectedCpuNum=1).reply
    other.join()
    assert (reply["outcome"], reply["errorCode"]) == ("refused", "NOT_AS_EXPECTED")
    assert reply["before"]["cpuNum"] == 2
