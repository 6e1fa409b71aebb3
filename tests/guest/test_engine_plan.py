"""Twelve targets on a real guest: each is planned, then done, and what came of it is what the plan said."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.lab.agent import AgentProcess
from tests.lab.domainxml import GuestSpec
from tests.lab.guest import Guest
from tests.lab.processes import wait_for

pytestmark = pytest.mark.guest

MIB = 1024 * 1024
GIB = 1024 * MIB
# Up and down, exact and rounded, beyond what it was started for and beyond what the host has.
TARGETS: list[tuple[dict[str, Any], str]] = [
    ({"cpuNum": 2}, "live"),
    ({"cpuNum": 3}, "live"),
    ({"cpuNum": 4}, "live"),
    ({"cpuNum": 5}, "live"),
    ({"memorySize": 640 * MIB, "method": "dimm"}, "live"),
    ({"memorySize": 700 * MIB, "method": "dimm"}, "live-rounded"),
    ({"memorySize": 896 * MIB, "method": "dimm"}, "live"),
    ({"memorySize": 1024 * MIB, "method": "dimm"}, "live"),
    ({"memorySize": 896 * MIB}, "live"),
    ({"cpuNum": 3}, "restart"),
    ({"cpuNum": 8}, "restart"),
    ({"memorySize": 512 * 1024 * GIB}, "never"),
]


def test_twelve_targets_are_done_as_they_were_planned(
    boot: Callable[[GuestSpec], Guest], agent: AgentProcess, send: Callable[..., Any]
) -> None:
    spec = GuestSpec(
        name="planned",
        max_vcpus=6,
        memory_mib=512,
        max_memory_mib=4096,
        slots=6,
        kernel_args="memhp_default_state=online_movable",
    )
    guest = boot(spec)

    def plan(target: dict[str, Any]) -> Any:
        question = {"vmUuid": guest.uuid, "targets": [target]}

        def ask() -> Any:
            """A guest on a machine that others load may take longer than the agent waits for a plan."""
            reply = agent.post("/vm/hotplug/plan", question)
            assert reply.status in (200, 503), reply.body
            return reply.status == 200 and reply.body["plans"][0]

        return wait_for(ask, timeout_s=60, what="a plan")

    def do(planned: dict[str, Any]) -> Any:
        fields = {name: value for name, value in planned["request"].items() if name != "vmUuid"}
        return send(planned["path"], guest, **fields)

    table = [("target", "verdict", "will be", "median ms", "worst ms", "is", "ms")]
    known_times = 0
    for target, verdict in TARGETS:
        told = plan(target)
        assert told["verdict"] == verdict, told
        took = told["took"] or {"medianMs": None, "worstMs": None}
        known_times += told["took"] is not None
        if verdict.startswith("live"):
            (command,) = told["commands"]
            reply = do(command)
            assert (reply["success"], reply["outcome"]) == (True, told["outcome"]), (told, reply)
            first = [step["step"] for step in command["steps"]]
            assert [step["step"] for step in reply["steps"]][: len(first)] == first
            now = told["cpuNum"] or reply["cpuNum"], told["memorySize"] or reply["memorySize"]
            assert (reply["cpuNum"], reply["memorySize"]) == now
        else:
            live = guest.live_xml()
            path = "/vm/hotplug/cpu" if target.get("cpuNum", 0) > 5 else "/vm/hotunplug/cpu"
            reply = send("/vm/hotplug/memory" if "memorySize" in target else path, guest, **target)
            assert (reply["outcome"], reply["errorCode"]) == ("refused", told["reasons"][0]["code"]), (told, reply)
            assert guest.live_xml() == live
        spent = sum(step["elapsedMs"] or 0 for step in reply["steps"])
        size = target.get("memorySize", 0) // MIB
        row = (f"{size} MiB" if size else f"{target['cpuNum']} vCPUs", verdict, told["outcome"] or "-")
        times = ["-" if one is None else f"{one:.0f}" for one in (took["medianMs"], took["worstMs"])]
        table.append((*row, *times, reply["errorCode"] or reply["outcome"], f"{spent:.0f}"))
    print("\n" + "\n".join("  ".join(f"{cell:<18}" for cell in row) for row in table))
    assert known_times >= 2, "three like it were done: how long they took is told"

    # What is to be had after a restart is there after it, prepared as the plan says.
    told = plan({"cpuNum": 8})
    (prepare,) = told["prepare"]
    assert do(prepare)["diff"] == prepare["diff"]
    guest.restart()
    then = plan({"cpuNum": 8})
    assert then["verdict"] == "live", then
    for planned, again in zip(told["commands"], then["commands"], strict=True):
        assert planned["request"] == again["request"]
        reply = do(planned)
    assert (reply["outcome"], reply["cpuNum"], guest.cpus_online()) == ("online", 8, "0-7")
