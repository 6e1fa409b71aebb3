"""Each remedy that says to send the command again is followed: the cause goes, and the same command succeeds."""

import ast
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import libvirt
import msgspec
import pytest

from kvmagent.model.errors import CODES, AgentError, Code
from kvmagent.tasks.hooks import Hooks
from kvmagent.tasks.journal import Task
from kvmagent.tasks.lanes import Lanes
from kvmagent.tasks.withdrawal import Withdrawal
from tests.fakes.agent import COMMANDS, MIB, FakeAgent, make_domain, make_guest
from tests.fakes.hooks import HookDirectory
from tests.fakes.libvirt import FakeDomain
from tests.lab.domainxml import GuestSpec
from tests.unit.test_recovery import LOST, Agent, Killed

SPEC = GuestSpec(name="vm1")
TESTS = Path(__file__).parents[1]
CPU, MEMORY = ("HotPlugCpu", {"cpuNum": 3}), ("HotPlugMemory", {"memorySize": 512 * MIB})
LESS_CPU = ("HotUnplugCpu", {"cpuNum": 1})
LESS_MEMORY = ("HotUnplugMemory", {"memorySize": 256 * MIB})
Way = Callable[[FakeDomain], Any]


class Row(NamedTuple):
    """What is sent, what is so then, how that goes; `first`: what is sent before."""

    command: tuple[str, dict[str, Any]]
    cause: Way
    gone: Way
    outcome: str = "online"
    first: tuple[str, dict[str, Any]] | None = None
    virt_type: str = "kvm"


def set_job(kind: int) -> Way:
    return lambda domain: domain.job.update(type=kind, operation=libvirt.VIR_DOMAIN_JOB_OPERATION_SAVE)


def set_guest(**values: Any) -> Way:
    def change(domain: FakeDomain) -> None:
        for name, value in values.items():
            setattr(domain.guest, name, value)

    return change


def pause(domain: FakeDomain) -> None:
    domain.paused = True


def resume(domain: FakeDomain) -> None:
    domain.paused = False


def suspend(domain: FakeDomain) -> None:
    domain.state = lambda: (libvirt.VIR_DOMAIN_PMSUSPENDED, 0)  # type: ignore[method-assign]


def wake(domain: FakeDomain) -> None:
    del domain.state


def make_transient(domain: FakeDomain) -> None:
    domain.isPersistent = lambda: False  # type: ignore[method-assign]


def make_persistent(domain: FakeDomain) -> None:
    del domain.isPersistent


def pin(domain: FakeDomain) -> None:
    domain.guest.pinned = frozenset(domain.guest.blocks)


#: For each code whose remedy says so, in words of its own or of the table.
ROWS: dict[Code, list[Row]] = {
    Code.LIBVIRT_UNAVAILABLE: [
        Row(CPU, lambda d: d.fail_next.update(setVcpusFlags=LOST), lambda d: None, "unchanged"),
        Row(MEMORY, lambda d: d.fail_next.update(attachDeviceFlags=LOST), lambda d: None),
    ],
    Code.LIBVIRT_BUSY: [
        Row(CPU, set_job(libvirt.VIR_DOMAIN_JOB_BOUNDED), set_job(libvirt.VIR_DOMAIN_JOB_NONE)),
        Row(MEMORY, set_job(libvirt.VIR_DOMAIN_JOB_BOUNDED), set_job(libvirt.VIR_DOMAIN_JOB_NONE)),
    ],
    Code.VM_PAUSED: [Row(CPU, pause, resume), Row(MEMORY, pause, resume)],
    Code.VM_SUSPENDED: [Row(CPU, suspend, wake)],
    Code.VM_TRANSIENT: [Row(CPU, make_transient, make_persistent)],
    Code.CPU_REMOVAL_PENDING: [
        Row(LESS_CPU, set_guest(unplugs="does not answer"), set_guest(unplugs="lets go"), first=CPU)
    ],
    Code.CPU_REMOVAL_REFUSED: [Row(LESS_CPU, set_guest(unplugs="refuses"), set_guest(unplugs="lets go"), first=CPU)],
    Code.MEMORY_REMOVAL_REFUSED: [
        Row(LESS_MEMORY, set_guest(unplugs="refuses"), set_guest(unplugs="lets go"), first=MEMORY)
    ],
    Code.GUEST_MEMORY_IN_USE: [Row(LESS_MEMORY, pin, set_guest(pinned=frozenset()), first=MEMORY)],
    Code.VIRTIO_MEM_STALLED: [
        Row(
            ("HotPlugMemory", {"memorySize": 512 * MIB, "method": "virtio-mem", "timeoutSec": 1}),
            set_guest(virtio_mem_limit=0),
            set_guest(virtio_mem_limit=1 << 60),
        )
    ],
    Code.BALLOON_NOT_ANSWERING: [
        Row(
            ("HotUnplugMemory", {"memorySize": 200 * MIB}),
            set_guest(balloon_driver=False),
            lambda d: d.load_balloon_driver(),
        )
    ],
    Code.GUEST_AGENT_FROZEN: [
        Row(CPU, set_guest(frozen=True), set_guest(frozen=False)),
        Row(MEMORY, set_guest(frozen=True), set_guest(frozen=False)),
    ],
    Code.GUEST_AGENT_DISCONNECTED: [
        Row(CPU, set_guest(agent="stopped"), set_guest(agent="running")),
        Row(MEMORY, set_guest(agent="stopped"), set_guest(agent="running")),
        Row(
            ("HotPlugMemory", {"memorySize": 512 * MIB, "method": "virtio-mem"}),
            set_guest(agent="stopped"),
            set_guest(agent="running"),
        ),
    ],
    Code.GUEST_AGENT_UNRESPONSIVE: [
        Row(CPU, set_guest(agent="hung"), set_guest(agent="running")),
        Row(MEMORY, set_guest(agent="hung"), set_guest(agent="running")),
    ],
    Code.GUEST_CPU_OFFLINE: [Row(CPU, set_guest(broken_cpus=True), set_guest(broken_cpus=False))],
    Code.GUEST_AGENT_REFUSED: [
        Row(CPU, set_guest(refuses=frozenset({"guest-set-vcpus"})), set_guest(refuses=frozenset()))
    ],
}


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[[FakeDomain], FakeAgent]]:
    made: list[FakeAgent] = []

    def make_agent(domain: FakeDomain) -> FakeAgent:
        made.append(FakeAgent(tmp_path, domain))
        return made[-1]

    yield make_agent
    for agent in made:
        agent.stop()


def codes(reply: dict[str, Any]) -> set[str]:
    return {reply["errorCode"], *(warning["code"] for warning in reply["warnings"])}


@pytest.mark.parametrize(
    ("code", "row"), [(code, row) for code, rows in ROWS.items() for row in rows], ids=lambda value: str(value)[:60]
)
def test_the_same_again_succeeds_once_the_cause_is_gone(
    code: Code, row: Row, make: Callable[[FakeDomain], FakeAgent]
) -> None:
    domain = make_domain(SPEC, virt_type=row.virt_type)
    agent = make(domain)
    if row.first is not None:
        assert agent.run(row.first[0], "task-0", vmUuid="vm1", **row.first[1]).reply["outcome"] == "online"
    command, fields = row.command
    row.cause(domain)
    before = agent.run(command, "task-1", vmUuid="vm1", **{"timeoutSec": 1} | fields).reply
    assert str(code) in codes(before), before
    row.gone(domain)
    after = agent.run(command, "task-2", vmUuid="vm1", **{"timeoutSec": 1} | fields).reply
    assert after["success"], after
    assert after["outcome"] == row.outcome or row.outcome == "unchanged", after
    again = agent.run(command, "task-3", vmUuid="vm1", **{"timeoutSec": 1} | fields).reply
    assert (again["outcome"], again["steps"]) == ("unchanged", [])


#: How a remedy says it, with the same taskuuid or a new one.
SAYS_AGAIN = re.compile(
    r"\b(send|try) ((the (same )?(command|request)|it|this|that) )?(again|with a new taskuuid)\b", re.I
)

#: Those whose cause is no state of the guest or of libvirt: a test of their own sends again.
APART: dict[Code, str] = {
    Code.JOURNAL_UNAVAILABLE: "test_a_task_whose_commit_failed_is_refused_and_done_once_when_it_is_sent_again",
    Code.QUEUE_FULL: "test_limits_hold_for_each_vm_and_in_all",
    Code.STOPPING: "test_what_a_stopping_agent_refused_its_successor_takes",
    Code.TASK_UNREADABLE: "test_a_task_that_no_plugin_could_read_is_done_when_there_is_one_again",
    Code.REFUSED_BY_HOOK: "test_a_hook_that_says_yes_the_next_time_lets_the_same_through",
    Code.VM_REPLACED: "test_a_task_of_a_vm_that_was_replaced_is_for_the_other_one_when_it_is_sent_again",
    Code.VM_RESTARTED: "test_a_task_over_a_power_cycle_is_whole_when_it_is_sent_again",
    Code.REMOVAL_LOST: "test_a_removal_that_a_power_off_ended_is_done_by_the_same_again",
    Code.NOT_VERIFIED: "test_a_change_that_libvirt_confirmed_and_did_not_make_is_made_by_the_same_again",
    Code.NOT_AS_EXPECTED: "test_after_another_look_at_the_vm_the_new_target_is_reached",
    Code.DRIFT: "test_after_drift_the_command_with_both_brings_the_definition_along",
    Code.CPU_REMOVAL_UNFINISHED: "test_a_removal_that_had_no_time_left_goes_on_when_it_is_sent_again",
    Code.CANCELLED: "test_a_task_that_was_cancelled_is_done_under_a_new_taskuuid",
}


def test_each_remedy_that_says_so_is_followed_by_a_test() -> None:
    said = {code for code in Code if SAYS_AGAIN.search(CODES[code].remedy)}
    assert said <= ROWS.keys() | APART.keys(), said - ROWS.keys() - APART.keys()
    assert set(APART.values()) <= find_tests()


def find_tests() -> set[str]:
    return {
        test for file in TESTS.rglob("test_*.py") for test in re.findall(r"^ *def (test_\w+)", file.read_text(), re.M)
    }


@pytest.mark.parametrize(
    "words",
    [
        "Wait, then send the command again.",
        "Send the command again once the VM runs.",
        "Correct the rule and send it again.",
        "Send the request again in a few seconds.",
        "If it is meant so, send it with a new taskuuid.",
        "Send the command with a new taskuuid.",
        "Wake the guest, then try again.",
    ],
)
def test_all_ways_to_say_so_are_found(words: str) -> None:
    assert SAYS_AGAIN.search(words)


def find_own_remedies() -> Iterator[str]:
    """What sources say of sending again, beside the table and the words for ZStack's console, which are by code."""
    for file in sorted([*(TESTS.parent / "kvmagent").rglob("*.py"), *(TESTS.parent / "plugins").rglob("*.py")]):
        if file.name in ("errors.py", "zstack.py"):
            continue
        tree = ast.parse(file.read_text())
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if (
                id(node) not in docs
                and isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and SAYS_AGAIN.search(node.value)
            ):
                yield file.name


#: A remedy that is no code's: which file says it, and the test that follows it.
OWN = {"journalfile.py": "test_nothing_is_accepted_onto_one_that_was_truncated"}


def test_a_source_that_says_so_in_words_of_its_own_is_followed_by_a_test() -> None:
    assert list(find_own_remedies()) == list(OWN)
    assert set(OWN.values()) <= find_tests()


def test_zstack_s_words_say_so_of_codes_that_are_followed() -> None:
    told = {
        code
        for command in COMMANDS.values()
        for code, words in (command.remedies_in_error or {}).items()
        if SAYS_AGAIN.search(words)
    }
    assert told <= ROWS.keys() | APART.keys(), told - ROWS.keys() - APART.keys()


def test_after_another_look_at_the_vm_the_new_target_is_reached(make: Callable[[FakeDomain], FakeAgent]) -> None:
    agent = make(make_domain(SPEC))
    assert agent.run("HotPlugCpu", "t1", vmUuid="vm1", cpuNum=2).reply["success"]
    stale = agent.run("HotPlugCpu", "t2", vmUuid="vm1", cpuNum=3, expectedCpuNum=1).reply
    assert stale["errorCode"] == "NOT_AS_EXPECTED"
    expected = stale["before"]["cpuNum"]
    assert agent.run("HotPlugCpu", "t3", vmUuid="vm1", cpuNum=3, expectedCpuNum=expected).reply["outcome"] == "online"


def test_a_task_that_was_cancelled_is_done_under_a_new_taskuuid(tmp_path: Path) -> None:
    agent = Agent(tmp_path)
    task = agent.accept("HotPlugCpu", vmUuid="vm1", cpuNum=3)
    lanes = Lanes(lambda task: None, workers=1, max_queued=9, max_queued_per_lane=9, max_queued_per_client=9)
    Withdrawal(agent.journal, lanes, COMMANDS, on_finished=lambda owed: None).withdraw("t1")
    assert agent.reply()["errorCode"] == "CANCELLED"
    assert send_again(agent, task)["outcome"] == "online"


def test_a_removal_that_had_no_time_left_goes_on_when_it_is_sent_again(
    make: Callable[[FakeDomain], FakeAgent],
) -> None:
    """The first vCPU leaves while libvirt waits for it, and by then the time of the task is over."""
    domain = make_domain(SPEC, virt_type="kvm")
    agent, ask = make(domain), domain.setVcpusFlags
    assert agent.run("HotPlugCpu", "t1", vmUuid="vm1", cpuNum=4).reply["success"]

    def take_long(count: int, flags: int) -> None:
        time.sleep(1)
        ask(count, flags)

    domain.setVcpusFlags = take_long  # type: ignore[method-assign]
    reply = agent.run("HotUnplugCpu", "t2", vmUuid="vm1", cpuNum=1, timeoutSec=1).reply
    assert reply["errorCode"] == "CPU_REMOVAL_UNFINISHED", reply
    domain.setVcpusFlags = ask  # type: ignore[method-assign]
    reply = agent.run("HotUnplugCpu", "t3", vmUuid="vm1", cpuNum=1, timeoutSec=60).reply
    assert (reply["outcome"], reply["cpuNum"]) == ("online", 1), reply


def test_what_a_stopping_agent_refused_its_successor_takes() -> None:
    def make_lanes() -> Lanes:
        return Lanes(lambda task: None, workers=1, max_queued=9, max_queued_per_lane=9, max_queued_per_client=9)

    stopping, successor = make_lanes(), make_lanes()
    assert stopping.stop(5)
    with pytest.raises(AgentError) as refused:
        stopping.check_room()
    assert refused.value.code is Code.STOPPING
    successor.check_room()
    assert successor.stop(5)


def test_a_change_that_libvirt_confirmed_and_did_not_make_is_made_by_the_same_again(
    make: Callable[[FakeDomain], FakeAgent],
) -> None:
    domain = make_domain(SPEC)
    agent, change = make(domain), domain.setVcpusFlags
    domain.setVcpusFlags = lambda count, flags: None  # type: ignore[method-assign]
    reply = agent.run("HotPlugCpu", "t1", vmUuid="vm1", cpuNum=3, timeoutSec=1).reply
    assert reply["errorCode"] == "NOT_VERIFIED"
    domain.setVcpusFlags = change  # type: ignore[method-assign]
    assert agent.run("HotPlugCpu", "t2", vmUuid="vm1", cpuNum=3).reply["outcome"] == "online"


def test_a_hook_that_says_yes_the_next_time_lets_the_same_through(tmp_path: Path) -> None:
    hooks = HookDirectory(tmp_path)
    hooks.write("before.d/10-ask", f"test -e {tmp_path}/yes")
    agent = FakeAgent(tmp_path, make_domain(SPEC), hooks=Hooks(str(hooks.path), timeout_s=30.0))
    try:
        assert agent.run("HotPlugCpu", "t1", vmUuid="vm1", cpuNum=3).reply["errorCode"] == "REFUSED_BY_HOOK"
        (tmp_path / "yes").touch()
        assert agent.run("HotPlugCpu", "t2", vmUuid="vm1", cpuNum=3).reply["outcome"] == "online"
    finally:
        agent.stop()


def cut_off(directory: Path) -> tuple[Agent, Task]:
    """A task that its agent left after its first step."""
    agent = Agent(directory)
    task = agent.accept("HotPlugCpu", vmUuid="vm1", cpuNum=3)
    agent.point = "step:done"
    with pytest.raises(Killed):
        agent.executor.run(task)
    (left,) = agent.journal.unfinished()
    return agent, left


def send_again(agent: Agent, task: Task) -> Any:
    fresh = {"task_uuid": "t2", "goal": None, "before": None, "recovered": False}
    again, _ = agent.journal.accept(msgspec.structs.replace(task, **fresh))
    agent.executor.run(again)
    found = agent.journal.find("t2")
    assert found is not None
    assert found.reply is not None
    agent.journal.stop()
    return msgspec.json.decode(found.reply)


def test_a_task_of_a_vm_that_was_replaced_is_for_the_other_one_when_it_is_sent_again(tmp_path: Path) -> None:
    agent, task = cut_off(tmp_path)
    agent.domain._uuid = "99999999-2222-3333-4444-555555555555"
    agent.domain.setVcpusFlags(1, libvirt.VIR_DOMAIN_AFFECT_LIVE | libvirt.VIR_DOMAIN_AFFECT_CONFIG)
    agent.executor.run(task)
    assert agent.reply()["errorCode"] == "VM_REPLACED"
    assert send_again(agent, task)["outcome"] == "online"


def test_a_task_over_a_power_cycle_is_whole_when_it_is_sent_again(tmp_path: Path) -> None:
    agent, task = cut_off(tmp_path)
    agent.domain.power_cycle()
    agent.domain.guest.online_cpus = dict.fromkeys(range(3), True)
    agent.executor.run(task)
    assert "VM_RESTARTED" in codes(agent.reply())
    assert send_again(agent, task)["success"]


def test_a_task_that_no_plugin_could_read_is_done_when_there_is_one_again(tmp_path: Path) -> None:
    agent, task = cut_off(tmp_path)
    agent.executor.run(msgspec.structs.replace(task, command="GoneWithItsPlugin"))
    assert agent.reply()["errorCode"] == "TASK_UNREADABLE"
    assert send_again(agent, task)["success"]


def test_after_drift_the_command_with_both_brings_the_definition_along(make: Callable[[FakeDomain], FakeAgent]) -> None:
    agent = make(make_domain(SPEC))
    assert agent.run("HotPlugCpu", "t1", vmUuid="vm1", cpuNum=3, affect="live").reply["drift"]
    reply = agent.run("HotPlugCpu", "t2", vmUuid="vm1", cpuNum=3, affect="both").reply
    assert (reply["success"], reply["drift"]) == (True, [])


def test_a_removal_that_a_power_off_ended_is_done_by_the_same_again(make: Callable[[FakeDomain], FakeAgent]) -> None:
    domain = make_domain(SPEC)
    agent = make(domain)
    assert agent.run("HotPlugMemory", "t1", vmUuid="vm1", memorySize=512 * MIB).reply["success"]
    domain.guest.unplugs = "does not answer"
    assert agent.run("HotUnplugMemory", "t2", vmUuid="vm1", memorySize=256 * MIB, timeoutSec=1).reply["outcome"] == (
        "pending"
    )
    domain.power_cycle()
    domain.guest.unplugs, domain.guest.blocks = "lets go", {0: True, 1: True}
    for device in domain.live.iterfind("./devices/memory"):
        first = int(device.find("address").get("base"), 16) // domain.guest.block_bytes
        domain.guest.blocks |= {first: True, first + 1: True}
    reply = agent.run("HotUnplugMemory", "t3", vmUuid="vm1", memorySize=256 * MIB).reply
    assert (reply["outcome"], reply["memorySize"]) == ("online", 256 * MIB), reply


def paused_plug(make: Callable[[FakeDomain], FakeAgent]) -> tuple[FakeAgent, FakeDomain]:
    domain = make_domain(SPEC)
    agent = make(domain)
    domain.paused = True
    assert agent.run("HotPlugCpu", "t1", vmUuid="vm1", cpuNum=3).reply["outcome"] == "plugged"
    domain.paused = False
    return agent, domain


def forget_tasks(directory: Path) -> None:
    with sqlite3.connect(directory / "journal.sqlite") as db:
        db.execute("DELETE FROM tasks")
        db.execute("DELETE FROM steps")


def test_what_the_agent_left_offline_is_known_after_a_restart_and_without_its_tasks(
    make: Callable[[FakeDomain], FakeAgent], tmp_path: Path
) -> None:
    agent, domain = paused_plug(make)
    agent.stop()
    forget_tasks(tmp_path)
    agent = make(domain)
    reply = agent.run("HotPlugCpu", "t2", vmUuid="vm1", cpuNum=3).reply
    assert (reply["outcome"], reply["after"]["guestCpuNum"]) == ("online", 3)
    # From now on they are their owner's.
    domain.guest.online_cpus[1] = False
    reply = agent.run("HotPlugCpu", "t3", vmUuid="vm1", cpuNum=3).reply
    assert (reply["outcome"], domain.guest.online_cpus) == ("unchanged", {0: True, 1: False, 2: True})
    assert "1 were offline before" in reply["warnings"][0]["message"]
    agent.stop()
    agent = make(domain)
    assert agent.run("HotPlugCpu", "t4", vmUuid="vm1", cpuNum=3).reply["outcome"] == "unchanged"


def test_one_that_the_owner_took_offline_stays_so_beside_those_that_the_agent_left(
    make: Callable[[FakeDomain], FakeAgent],
) -> None:
    domain = make_domain(SPEC)
    agent = make(domain)
    assert agent.run("HotPlugCpu", "t1", vmUuid="vm1", cpuNum=2).reply["outcome"] == "online"
    domain.guest.online_cpus[1] = False
    reply = agent.run("HotPlugCpu", "t2", vmUuid="vm1", cpuNum=4, guestOnline=False).reply
    assert (reply["outcome"], domain.guest.online_cpus) == ("plugged", {0: True, 1: False, 2: False, 3: False})
    reply = agent.run("HotPlugCpu", "t3", vmUuid="vm1", cpuNum=4).reply
    assert (reply["outcome"], domain.guest.online_cpus) == ("plugged", {0: True, 1: False, 2: True, 3: True})


def test_it_ends_with_the_run_of_the_vm(make: Callable[[FakeDomain], FakeAgent]) -> None:
    agent, domain = paused_plug(make)
    assert agent.journal.find_left(domain.UUIDString()) == ("1@boot-1", frozenset({1, 2}))
    domain.power_cycle()
    domain.guest.online_cpus = {0: True, 1: False, 2: False}
    assert agent.run("HotPlugCpu", "t2", vmUuid="vm1", cpuNum=3).reply["outcome"] == "unchanged"
    assert not any(domain.guest.online_cpus[n] for n in (1, 2))
    assert agent.journal.find_left(domain.UUIDString()) == (None, frozenset())


def test_it_ends_with_the_boot_of_the_host(make: Callable[[FakeDomain], FakeAgent]) -> None:
    agent, domain = paused_plug(make)
    agent.journal.forget_runs("boot-1")
    agent.journal.start_step("none", 0, b"", wait=True)
    assert agent.journal.find_left(domain.UUIDString())[1]
    agent.journal.forget_runs("boot-2")
    agent.journal.start_step("none", 0, b"", wait=True)
    assert agent.journal.find_left(domain.UUIDString()) == (None, frozenset())


def test_a_guest_that_lists_them_late_is_waited_for(make: Callable[[FakeDomain], FakeAgent]) -> None:
    domain = make_domain(SPEC, make_guest(SPEC, late_cpus=3))
    agent = make(domain)
    domain.paused = True
    assert agent.run("HotPlugCpu", "t1", vmUuid="vm1", cpuNum=3).reply["outcome"] == "plugged"
    domain.paused = False
    reply = agent.run("HotPlugCpu", "t2", vmUuid="vm1", cpuNum=3).reply
    assert reply["outcome"] == "online"
    assert [step["step"] for step in reply["steps"]] == ["AwaitGuestVcpus", "OnlineGuestVcpus"]
