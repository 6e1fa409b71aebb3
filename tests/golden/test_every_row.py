"""What is declared is exercised: no refusal, step type or request field without a golden plan that shows it."""

import json
from typing import Any

import msgspec
import pytest

from kvmagent.hypervisor.performers import PERFORMERS
from kvmagent.model.command import Command
from kvmagent.model.steps import AnyStep
from tests.fakes.agent import COMMANDS
from tests.golden.test_plans import CASES, PLANS

# VM_NOT_FOUND, LIBVIRT_BUSY: told before a plan is made; tests/http and tests/unit/test_executor.py show them.
BEFORE_PLANNING = {"VM_NOT_FOUND", "LIBVIRT_BUSY"}
# libvirt refuses to define such a domain; tests/unit/test_checks.py shows them.
NOT_DEFINABLE = {"CPU_TOPOLOGY_MISMATCH", "NUMA_CELLS_INCOMPLETE"}
# A command that is made of others refuses what they refuse.
PARTS = {"HotPlugCpuMemory": ("HotPlugCpu", "HotPlugMemory"), "OnlineChangeCpuMem": ("HotPlugCpuMemory",)}
# Ended in after the first step: what a libvirt call or the guest said no to.
ON_THE_WAY = {
    "LIBVIRT_REFUSED",
    "DEFINITION_REFUSED",
    "BALLOON_NOT_ANSWERING",
    "VIRTIO_MEM_STALLED",
    "CPU_REMOVAL_PENDING",
    "MEMORY_REMOVAL_PENDING",
    "MEMORY_REMOVAL_REFUSED",
}


# A command under another path is planned as the first is: its plans are the first one's.
PLANNED = list({command.decide: command for command in reversed(COMMANDS.values())}.values())


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    """The golden plans, by case."""
    return {name: json.loads((PLANS / f"{name}.json").read_text()) for name in CASES}


def codes(golden: dict[str, Any], command: Command) -> set[str | None]:
    return {golden[name]["reply"]["errorCode"] for name, case in CASES.items() if case.command == command.name}


@pytest.mark.parametrize("command", PLANNED, ids=lambda command: command.name)
def test_every_refusal_has_a_golden_plan(golden: dict[str, Any], command: Command) -> None:
    parts = {code for part in PARTS.get(command.name, ()) for code in COMMANDS[part].refusals}
    assert set(command.refusals) - parts - BEFORE_PLANNING - NOT_DEFINABLE <= codes(golden, command)


@pytest.mark.parametrize("command", PLANNED, ids=lambda command: command.name)
def test_every_refusal_shown_is_declared(golden: dict[str, Any], command: Command) -> None:
    assert codes(golden, command) - {None} - ON_THE_WAY <= set(command.refusals)


@pytest.mark.parametrize("command", PLANNED, ids=lambda command: command.name)
def test_every_request_field_has_a_golden_plan(command: Command) -> None:
    used = {field for case in CASES.values() if case.command == command.name for field in case.request}
    shared = {field for case in CASES.values() for field in case.request}
    for field in msgspec.structs.fields(command.request):
        own = field.name not in {base.name for base in msgspec.structs.fields(command.request.__base__)}
        assert field.encode_name in (used if own else shared | {"vmUuid"}), field.encode_name


def test_every_step_type_has_a_golden_plan_and_one_performer(golden: dict[str, Any]) -> None:
    types = {step.__name__ for step in AnyStep.__args__}
    assert types == {step["step"] for plan in golden.values() for step in plan["reply"]["steps"]}
    assert types == {step.__name__ for step in PERFORMERS}
