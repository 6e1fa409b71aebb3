"""VMs are prepared without being asked: once for each definition, none that its owner excludes, and never in a loop."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from lxml import etree

from kvmagent.api.wire import decode_request
from kvmagent.hypervisor.vmevents import VmEvents
from kvmagent.model.command import Command
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.facts import POLICY_NAMESPACE
from kvmagent.model.units import Amount
from kvmagent.tasks.journal import Task
from kvmagent.tasks.ondefine import OWN_ACCESS, Maxima, Preparations
from tests.fakes.agent import COMMANDS, MIB, FakeAgent, make_domain
from tests.fakes.libvirt import FakeDomain, libvirt_error, qemu_error
from tests.fakes.settings import parse_settings
from tests.lab.domainxml import GuestSpec
from tests.unit.test_capacity import any_vms, examples
from tests.unit.test_planners_properties import Vm
from tests.unit.test_rogues import MISDEEDS
from tests.unit.test_told import Counted

GIB = 1024 * MIB
BARE = GuestSpec(name="vm1", vcpus=2, max_vcpus=2, memory_mib=1024, max_memory_mib=None, numa_cells=0)
FOURFOLD = Maxima(Amount(4, is_factor=True), Amount(4, is_factor=True))


class Field:
    """A VM with its agent, and what it is given to do by itself."""

    def __init__(self, directory: Path, domain: FakeDomain, maxima: Maxima = FOURFOLD, **host: Any) -> None:
        self.domain = domain
        self.agent = FakeAgent(directory, domain, **host)
        self.node = self.agent.executor._node
        self.now = 1000.0
        self.handed_in: list[tuple[str, dict[str, Any]]] = []
        self.waiting: list[Task] = []
        self.refuse: AgentError | None = None
        self.stores_and_fails = False
        self.recorder = Counted()
        self.preparations = self.make(maxima)
        assert domain.connection is not None
        events = VmEvents(
            lambda _event: None, on_definition=lambda uuid, *, is_new: self.preparations.note(uuid, is_new=is_new)
        )
        events.register(domain.connection)  # type: ignore[arg-type]

    def make(self, maxima: Maxima = FOURFOLD) -> Preparations:
        return Preparations(
            self.node,  # type: ignore[arg-type]
            COMMANDS["ReadyForHotplug"],
            maxima,
            find_task=self.agent.journal.find,
            hand_in=self.hand_in,
            clock=lambda: self.now,
            recorder=self.recorder,
        )

    def hand_in(self, command: Command, task_uuid: str, body: bytes) -> None:
        if self.refuse is not None and not self.stores_and_fails:
            raise self.refuse
        request = msgspec.json.decode(body)
        self.handed_in.append((task_uuid, request))
        task = Task(
            task_uuid=task_uuid,
            command=command.name,
            lane=request["vmUuid"],
            request=body,
            callback_url="none",
            client="local",
            caller=OWN_ACCESS.caller,
        )
        self.waiting.append(self.agent.journal.accept(task)[0])
        if self.refuse is not None:
            raise self.refuse

    def work(self) -> None:
        """Carry out what was handed in."""
        while self.waiting:
            self.agent.executor.run(self.waiting.pop(0))

    def settle(self, *, looks: int = 20) -> None:
        """Look and work until there is nothing to do, however often."""
        for _ in range(looks):
            self.now += 0.6
            self.preparations.look()
            self.work()

    def define(self, root: Any) -> None:
        """Somebody defines the VM."""
        assert self.domain.connection is not None
        self.domain.connection.defineXMLFlags(etree.tostring(root, encoding="unicode"), 0)

    def config(self) -> Any:
        return copy.deepcopy(self.domain.config)

    @property
    def maximum(self) -> int:
        return int(self.domain.config.findtext("vcpu"))

    def outcomes(self) -> list[str]:
        done = [self.agent.journal.find(task_uuid) for task_uuid, _ in self.handed_in]
        return [str(task and task.outcome) for task in done]


@pytest.fixture
def field(tmp_path: Path) -> Iterator[Field]:
    made = Field(tmp_path, make_domain(BARE, virt_type="kvm"))
    yield made
    made.agent.stop()


def test_what_is_there_at_the_start_is_prepared_once_and_its_own_event_starts_nothing(field: Field) -> None:
    field.preparations.note_all()
    field.settle()
    assert field.outcomes() == ["configured"]
    assert (field.maximum, field.domain.config.find("maxMemory").text) == (8, str(4 * 1024 * 1024))
    assert field.domain.live.findtext("vcpu") == "2"
    field.preparations.note_all()
    field.settle()
    assert len(field.handed_in) == 1


def test_events_of_one_definition_that_come_close_together_start_one_task(field: Field) -> None:
    for _ in range(5):
        field.preparations.note(field.domain.UUIDString(), is_new=True)
    field.preparations.look()
    field.preparations.note(field.domain.UUIDString().replace("-", "").upper(), is_new=False)
    field.preparations.look()
    assert len(field.handed_in) == 1
    field.settle()
    assert field.outcomes() == ["configured"]


def test_the_same_definition_made_anew_is_prepared_anew(field: Field) -> None:
    first = field.config()
    field.preparations.note_all()
    field.settle()
    field.define(first)
    assert field.maximum == 2
    field.settle()
    assert field.outcomes() == ["configured", "configured"]
    assert field.maximum == 8


def test_whoever_defines_it_again_and_again_is_answered_a_few_times_a_minute(
    field: Field, caplog: pytest.LogCaptureFixture
) -> None:
    first = field.config()
    for _ in range(12):
        field.define(first)
        field.settle(looks=3)
    assert len(field.handed_in) == 5
    told = [record for record in caplog.records if "again and again" in record.getMessage()]
    assert len(told) == 1
    field.now += 60
    field.settle()
    assert len(field.handed_in) == 6
    assert field.maximum == 8


@pytest.mark.parametrize("which", ["persistent", "running", "both"])
def test_one_that_its_owner_excludes_is_left_alone_and_told_once(
    field: Field, which: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    roots = {"persistent": [field.domain.config], "running": [field.domain.live]}
    for root in roots.get(which) or [field.domain.config, field.domain.live]:
        etree.SubElement(root, "metadata").append(etree.Element(f"{{{POLICY_NAMESPACE}}}policy", hotplug="off"))
    before = etree.tostring(field.domain.config)
    field.preparations.note_all()
    field.settle()
    field.preparations.note_all()
    field.settle()
    assert etree.tostring(field.domain.config) == before
    assert field.handed_in == []
    lines = [record.getMessage() for record in caplog.records if "VM_OPTED_OUT" in record.getMessage()]
    (audited,) = (line for line in lines if line.startswith("audit"))
    assert "event=refused" in audited
    assert "caller=agent:on_define" in audited
    assert len(lines) == 2
    assert field.recorder.endings == [("ReadyForHotplug", "refused", "VM_OPTED_OUT")]
    # Another definition, without it: now it may.
    for root in (field.domain.config, field.domain.live):
        for metadata in root.findall("metadata"):
            root.remove(metadata)
    field.preparations.note_all()
    field.settle()
    assert field.outcomes() == ["configured"]


def test_the_owners_ceilings_bound_it(field: Field) -> None:
    policy = etree.Element(f"{{{POLICY_NAMESPACE}}}policy", maxCpuNum="3", maxMemorySize=str(2 * GIB))
    etree.SubElement(field.domain.config, "metadata").append(policy)
    field.preparations.note_all()
    field.settle()
    assert (field.maximum, field.domain.config.find("maxMemory").text) == (3, str(2 * 1024 * 1024))


def test_a_definition_that_is_refused_is_not_tried_again_until_it_is_another(field: Field) -> None:
    field.domain.fail_next = {"defineXMLFlags": qemu_error(67, "unsupported configuration: no")}
    field.preparations.note_all()
    field.settle()
    assert field.outcomes() == ["refused"]
    for _ in range(3):
        field.preparations.note_all()
        field.preparations.note(field.domain.UUIDString(), is_new=False)
        field.settle()
    assert field.outcomes() == ["refused"]
    # What was in its way may be nothing that the agent reads.
    field.define(field.config())
    field.settle()
    assert field.outcomes() == ["refused", "configured"]


def test_one_that_fails_on_the_way_does_not_follow_its_own_event(field: Field) -> None:
    assert field.domain.connection is not None
    define = field.domain.connection.defineXMLFlags

    def lose(xml: str, flags: int) -> FakeDomain:
        """A libvirt that says yes, tells of it, and keeps what it had."""
        former = field.config()
        define(xml, flags)
        field.domain.config = former
        return field.domain

    field.domain.connection.defineXMLFlags = lose  # type: ignore[method-assign]
    field.preparations.note_all()
    field.settle()
    assert field.outcomes() == ["refused"]


@pytest.mark.parametrize("misdeed", MISDEEDS)
def test_a_plugin_that_misbehaves_is_told_once_and_leaves_the_others_alone(
    field: Field, misdeed: str, caplog: pytest.LogCaptureFixture
) -> None:
    command = replace(COMMANDS["ReadyForHotplug"], prepares=MISDEEDS[misdeed])
    preparations = Preparations(
        field.node,  # type: ignore[arg-type]
        command,
        FOURFOLD,
        find_task=field.agent.journal.find,
        hand_in=field.hand_in,
        clock=lambda: field.now,
        recorder=field.recorder,
    )
    for _ in range(3):
        preparations.note_all()
        field.now += 0.6
        preparations.look()
    assert field.handed_in == []
    assert len(field.recorder.endings) == 1
    assert sum("audit" in record.getMessage() for record in caplog.records) == 1


def test_a_task_that_failed_for_a_passing_reason_is_followed_by_another(field: Field) -> None:
    field.domain.fail_next = {"defineXMLFlags": libvirt_error(38, 7, "Cannot recv data: Connection reset by peer")}
    field.preparations.note_all()
    field.settle()
    assert field.outcomes()[-1] == "configured"


def test_one_that_is_refused_as_it_is_handed_in_is_told_once_in_the_audit_too(
    field: Field, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    field.refuse = AgentError(Code.UNKNOWN_FIELD, "no")
    for _ in range(3):
        field.preparations.note_all()
        field.settle()
    lines = [record.getMessage() for record in caplog.records if "UNKNOWN_FIELD" in record.getMessage()]
    assert [line.startswith("audit") for line in lines] == [False, True]
    assert field.recorder.endings == [("ReadyForHotplug", "refused", "UNKNOWN_FIELD")]


def test_what_cannot_be_stored_now_is_stored_later_under_the_same_id(field: Field) -> None:
    field.refuse = AgentError(Code.JOURNAL_UNAVAILABLE, "the disk is full")
    field.stores_and_fails = True
    field.preparations.note_all()
    field.preparations.look()
    field.now += 11
    field.preparations.look()
    field.refuse = None
    field.now += 11
    field.preparations.look()
    assert len({task_uuid for task_uuid, _ in field.handed_in}) == 1
    field.waiting = field.waiting[:1]
    field.settle()
    assert field.maximum == 8
    assert len({task_uuid for task_uuid, _ in field.handed_in}) == 1


def test_a_task_that_an_earlier_agent_left_is_not_handed_in_again(field: Field) -> None:
    field.preparations.note_all()
    field.preparations.look()
    left = field.agent.journal.unfinished()
    assert [task.caller for task in left] == ["agent:on_define"]
    field.preparations = field.make()
    field.preparations.recall(left)
    field.preparations.note_all()
    for _ in range(5):
        field.now += 0.6
        field.preparations.look()
    assert len(field.handed_in) == 1
    field.settle()
    assert field.outcomes() == ["configured"]


def test_while_libvirt_is_away_nothing_is_forgotten(field: Field) -> None:
    listed = field.node.list_vms  # type: ignore[attr-defined]
    away = AgentError(Code.LIBVIRT_UNAVAILABLE, "away")

    def fail(*_args: Any) -> Any:
        raise away

    field.node.list_vms = fail  # type: ignore[attr-defined]
    field.preparations.note_all()
    assert field.preparations.look() == 10.0
    field.node.list_vms = listed  # type: ignore[attr-defined]
    field.settle()
    assert field.outcomes() == ["configured"]


def test_absolute_maxima_hold_for_all_and_never_lower(tmp_path: Path) -> None:
    big = GuestSpec(name="vm1", vcpus=6, max_vcpus=7, memory_mib=4096, max_memory_mib=None, numa_cells=0)
    field = Field(tmp_path, make_domain(big, virt_type="kvm"), Maxima(Amount(8), Amount(2 * GIB)))
    try:
        field.preparations.note_all()
        field.settle()
        assert field.maximum == 8
        assert field.handed_in[0][1]["maxMemorySize"] == 4 * GIB
        assert set(field.outcomes()) == {"configured"}
    finally:
        field.agent.stop()


def test_a_factor_goes_no_further_than_a_request_may(tmp_path: Path) -> None:
    """What was beyond the range of a request was refused, and the VM never prepared."""
    most = Maxima(Amount(8000, is_factor=True), Amount(2**30, is_factor=True))
    field = Field(tmp_path, make_domain(BARE, virt_type="kvm"), most)
    try:
        field.preparations.note_all()
        field.settle()
        decode_request(msgspec.json.encode(field.handed_in[0][1]), COMMANDS["ReadyForHotplug"].request)
        assert field.maximum > 2
    finally:
        field.agent.stop()


def test_a_vm_that_has_room_is_not_given_more_by_a_factor(field: Field) -> None:
    field.preparations.note_all()
    field.settle()
    field.domain.config.find("vcpu").set("current", "5")
    field.preparations.note_all()
    field.settle()
    assert field.maximum == 8


def test_a_transient_vm_and_one_that_is_gone_are_nothing_to_do(field: Field) -> None:
    field.preparations.note("99999999-2222-3333-4444-555555555555", is_new=True)
    field.domain.config = None
    field.preparations.note_all()
    field.settle()
    assert field.handed_in == []
    assert field.preparations.look() is None


def test_few_tasks_are_unfinished_at_once(tmp_path: Path) -> None:
    domains = []
    for n in range(9):
        spec = GuestSpec(name=f"vm{n}", vcpus=1, max_vcpus=1, memory_mib=512, max_memory_mib=None, numa_cells=0)
        domain = make_domain(spec, virt_type="kvm")
        domain._uuid = f"{n}1111111-2222-3333-4444-555555555555"
        domains.append(domain)
    agent = FakeAgent(tmp_path, *domains)
    field = Field.__new__(Field)
    field.agent, field.node, field.now, field.domain = agent, agent.executor._node, 0.0, domains[0]
    field.handed_in, field.waiting, field.refuse, field.stores_and_fails = [], [], None, False
    field.recorder = Counted()
    field.preparations = field.make()
    try:
        field.preparations.note_all()
        field.preparations.look()
        assert len(field.waiting) == 4
        field.settle()
        assert field.outcomes() == ["configured"] * 9
    finally:
        agent.stop()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_cpus", "x0"),
        ("max_cpus", "many"),
        ("max_cpus", "8193"),
        ("max_cpus", "x9999"),
        ("max_memory", "64"),
        ("max_memory", "x1.5"),
        ("max_memory", "9000000T"),
    ],
)
def test_maxima_that_are_none_stop_the_start(key: str, value: str) -> None:
    with pytest.raises(AgentError) as refused:
        parse_settings(f"[prepare]\n{key} = {value}\n")
    assert refused.value.code is Code.BAD_CONFIGURATION
    assert f"prepare.{key}" in refused.value.message


@examples
@given(vm=any_vms())
def test_whatever_the_vm_it_comes_to_rest_after_one_task(vm: Vm, tmp_path_factory: pytest.TempPathFactory) -> None:
    field = Field(tmp_path_factory.mktemp("on-define"), vm.domain, **vm.host)
    try:
        live = None if vm.domain.live is None else etree.tostring(vm.domain.live)
        field.preparations.note_all()
        field.settle(looks=6)
        assert len(field.handed_in) <= 1, field.outcomes()
        assert set(field.outcomes()) <= {"configured", "refused"}
        assert live == (None if vm.domain.live is None else etree.tostring(vm.domain.live))
        field.preparations.note_all()
        field.settle(looks=3)
        assert len(field.handed_in) <= 1, field.outcomes()
    finally:
        field.agent.stop()
