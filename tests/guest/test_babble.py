"""A guest whose agent answers nonsense, from the start or from the n-th answer on: told, and no other VM's trouble."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.lab.agent import AgentProcess
from tests.lab.domainxml import GuestSpec
from tests.lab.guest import Guest
from tests.lab.processes import wait_for

pytestmark = pytest.mark.guest

MIB = 1024 * 1024
BABBLER = (Path(__file__).parent.parent / "lab/babbler.sh").read_text()
NONSENSE = {
    "empty things": '{"return": [{}]}',
    "half of a block": '{"return": [{"online": true}]}',
    "a block size of 128": '{"return": {"size": 128}}',
    "no JSON": "hello",
    "no UTF-8": '{"return": "\\377\\376"}',
}


def babble(guest: Guest, answer: str, *, left: int = 0) -> None:
    """Put the babbler in the place of the guest's agent, or of another babbler."""
    stop(guest)
    guest.run(f"cat >/run/babbler <<'END'\n{BABBLER}END")
    guest.run(f"setsid sh /run/babbler {left} '{answer}' </dev/null >/run/babbler.log 2>&1 & echo $! >/run/babbler.pid")
    wait_for(guest.is_agent_connected, timeout_s=30, what="the babbler to connect")


def stop(guest: Guest) -> None:
    """Let nothing answer in the guest."""
    guest.run(
        "if [ -e /run/babbler.pid ]; then kill -KILL $(cat /run/babbler.pid); rm /run/babbler.pid; else agent stop; fi"
    )
    wait_for(lambda: not guest.is_agent_connected(), timeout_s=30, what="the agent to disconnect")


@pytest.fixture(scope="module")
def good(boot_module: Callable[[GuestSpec], Guest]) -> Guest:
    """The VM beside it."""
    return boot_module(GuestSpec(name="good"))


@pytest.fixture(scope="module")
def bad(boot_module: Callable[[GuestSpec], Guest]) -> Guest:
    """The VM whose agent babbles."""
    return boot_module(GuestSpec(name="bad", max_vcpus=8))


@pytest.mark.parametrize("answer", NONSENSE.values(), ids=NONSENSE.keys())
def test_a_guest_that_babbles_from_the_start_is_told_and_spoils_nothing(
    answer: str, good: Guest, bad: Guest, agent: AgentProcess, send: Callable[..., Any]
) -> None:
    babble(bad, answer)
    vms = {vm["name"]: vm for vm in agent.get("/vms").body["vms"]}
    assert (vms["good"]["confirmable"], vms["good"]["after"]["guestCpuNum"]) == (True, 1)
    assert (vms["bad"]["success"], vms["bad"]["ready"], vms["bad"]["confirmable"]) == (True, True, False)
    (told,) = [warning for warning in vms["bad"]["warnings"] if warning["code"].startswith("GUEST_AGENT")]
    assert told["code"] in ("GUEST_AGENT_INVALID", "GUEST_AGENT_REFUSED", "GUEST_AGENT_UNRESPONSIVE")
    assert agent.get("/metrics").status == 200

    cpus, memory = vms["bad"]["after"]["cpuNum"], vms["bad"]["after"]["memorySize"]
    reply = send("/vm/hotplug/cpu", bad, cpuNum=cpus + 1, timeoutSec=5)
    assert (reply["success"], reply["outcome"], reply["cpuNum"]) == (True, "plugged", cpus + 1), reply
    reply = send("/vm/hotplug/memory", bad, memorySize=memory + 128 * MIB, method="dimm", timeoutSec=5)
    assert (reply["success"], reply["outcome"], reply["memorySize"]) == (True, "plugged", memory + 128 * MIB), reply
    # libvirt itself gives an agent up that it cannot read, and then says so.
    assert any(warning["code"].startswith("GUEST_AGENT_") for warning in reply["warnings"])


@pytest.mark.parametrize("left", [2, 4, 6])
def test_a_guest_that_babbles_from_the_nth_answer_on_gets_its_task_answered(
    left: int, good: Guest, bad: Guest, agent: AgentProcess, send: Callable[..., Any]
) -> None:
    memory = agent.get("/vms/bad").body["after"]["memorySize"]
    babble(bad, '{"return": [{"online": true}]}', left=left)
    reply = send("/vm/hotplug/memory", bad, memorySize=memory + 128 * MIB, method="dimm", timeoutSec=5)
    assert (reply["success"], reply["outcome"], reply["memorySize"]) == (True, "plugged", memory + 128 * MIB), reply
    assert "GUEST_AGENT_INVALID" in [warning["code"] for warning in reply["warnings"]]
    assert agent.get("/vms/good").body["confirmable"] is True


def test_the_good_vm_is_plugged_as_ever_and_the_bad_one_is_believed_once_it_is_sane(
    good: Guest, bad: Guest, agent: AgentProcess, send: Callable[..., Any]
) -> None:
    babble(bad, '{"return": [{}]}')
    assert send("/vm/hotplug/cpumem", good, cpuNum=2, memorySize=512 * MIB)["outcome"] == "online"
    stop(bad)
    bad.start_agent()
    cpus = agent.get("/vms/bad").body["after"]["cpuNum"]
    bad.run("for c in /sys/devices/system/cpu/cpu*/online; do echo 1 >$c; done")
    assert send("/vm/hotplug/cpu", bad, cpuNum=cpus + 1)["outcome"] == "online"
