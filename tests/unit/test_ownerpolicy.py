"""The VM's owner is asked by the executor, of every command, whatever somebody's plugin forgets or claims."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lxml import etree

from kvmagent.model.command import Command, Goal, Total
from kvmagent.model.facts import POLICY_NAMESPACE
from kvmagent.model.steps import AnyStep, DefineShape, SetBalloon, SetVcpus, Shape
from kvmagent.tasks.executor import Executor
from tests.fakes.agent import COMMANDS, MIB, make_domain
from tests.fakes.libvirt import FakeDomain
from tests.lab.domainxml import GuestSpec
from tests.unit.test_recovery import Agent, definitions_of

OFF, ONE_CPU, LITTLE = {"hotplug": "off"}, {"maxCpuNum": "1"}, {"maxMemorySize": str(128 * MIB)}
MEMORY, CPU = {"memorySize": 512 * MIB}, {"cpuNum": 3}
#: Each command that changes a VM, with what it takes.
CHANGES: dict[str, dict[str, Any]] = {
    "HotPlugCpu": CPU,
    "HotPlugMemory": MEMORY,
    "HotPlugCpuMemory": CPU | MEMORY,
    "HotUnplugCpu": {"cpuNum": 1},
    "HotUnplugMemory": {"memorySize": 200 * MIB},
    "ReadyForHotplug": {"prepare": True, "maxCpuNum": 16, "maxMemorySize": 8192 * MIB},
    "IncreaseCpu": CPU,
    "IncreaseMemory": MEMORY,
    "OnlineChangeCpuMem": CPU | MEMORY,
}
BOTH = ("live", "config")


def set_policy(domain: FakeDomain, policy: dict[str, str], definitions: Iterable[str] = BOTH) -> None:
    for name in definitions:
        metadata = etree.SubElement(getattr(domain, name), "metadata")
        etree.SubElement(metadata, f"{{{POLICY_NAMESPACE}}}policy", **policy)


def run(directory: Path, domain: FakeDomain, command: Command, **fields: Any) -> dict[str, Any]:
    agent = Agent(directory, domain)
    try:
        Executor(
            agent.node,
            agent.journal,
            {command.name: command},
            on_finished=lambda owed: None,
            on_pending=lambda task_uuid: None,
            libvirt_wait_s=5.0,
        ).run(agent.accept(command.name, vmUuid="vm1", **fields))
        return agent.reply()
    finally:
        agent.journal.stop()


def test_each_command_that_changes_a_vm_is_here() -> None:
    assert CHANGES.keys() == COMMANDS.keys()


@pytest.mark.parametrize("name", CHANGES)
def test_no_command_changes_a_vm_whose_owner_wants_no_hotplug(tmp_path: Path, name: str) -> None:
    domain = make_domain(GuestSpec(name="vm1", vcpus=2), virt_type="kvm")
    set_policy(domain, OFF)
    before = definitions_of(domain)
    reply = run(tmp_path, domain, COMMANDS[name], **CHANGES[name])
    assert (reply["outcome"], reply["errorCode"]) == ("refused", "VM_OPTED_OUT")
    assert definitions_of(domain) == before


def a_shape() -> Shape:
    return Shape(vcpu_maximum=16, topology=None, max_memory_bytes=8192 * MIB, slots=16, cells=())


#: What plugins of others may do: what their goal says, what they do, what they are sent, of whose policy it is whose
#: business, and what that says.
ROGUES: dict[str, tuple[tuple[Total, ...], AnyStep, str, str, dict[str, str]]] = {
    "the running VM, though asked for the definition": (
        (Total("cpu", live=3, config=None),),
        SetVcpus(count=3, target="live"),
        *("config", "live", OFF),
    ),
    "the running VM above its ceiling, though asked for the definition": (
        (Total("cpu", live=3, config=None),),
        SetVcpus(count=3, target="live"),
        *("config", "live", ONE_CPU),
    ),
    "the definition, though asked for the running VM": (
        (Total("cpu", live=None, config=3),),
        SetVcpus(count=3, target="config"),
        *("live", "config", ONE_CPU),
    ),
    "a shape, though asked for the running VM": ((), DefineShape(shape=a_shape()), "live", "config", OFF),
    "more vCPUs, which it calls down": (
        (Total("cpu", live=3, config=None, direction="down"),),
        SetVcpus(count=3, target="live"),
        *("live", "live", ONE_CPU),
    ),
    "more memory, which it calls down": (
        (Total("balloon", live=None, config=256 * MIB, direction="down"),),
        SetBalloon(size_bytes=256 * MIB, target="config"),
        *("config", "config", LITTLE),
    ),
    "what it has no total of": ((), SetVcpus(count=3, target="live"), "live", "live", OFF),
}


@pytest.mark.parametrize(("totals", "step", "affect", "whose", "policy"), ROGUES.values(), ids=ROGUES.keys())
def test_a_plugin_changes_nothing_that_the_owner_forbids_whatever_it_claims(
    tmp_path: Path, totals: tuple[Total, ...], step: AnyStep, affect: str, whose: str, policy: dict[str, str]
) -> None:
    domain = make_domain(GuestSpec(name="vm1"), virt_type="kvm")
    domain.config.find("currentMemory").text = str(200 * 1024)
    domain.config.find("currentMemory").set("unit", "KiB")
    set_policy(domain, policy, [whose])
    before = definitions_of(domain)
    command = replace(
        COMMANDS["HotPlugCpu"],
        goal=Goal,
        decide=lambda request, facts, task_uuid: Goal(totals=totals),
        next_steps=lambda goal, facts, failed: (step,),
    )
    reply = run(tmp_path, domain, command, cpuNum=3, affect=affect)
    assert reply["outcome"] == "refused"
    assert reply["errorCode"] == ("VM_OPTED_OUT" if policy is OFF else "ABOVE_POLICY")
    assert definitions_of(domain) == before
