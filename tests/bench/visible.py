"""How long it takes until the guest itself uses a vCPU, seen from inside the guest: by the agent, by virsh calls."""

from __future__ import annotations

import subprocess
import threading
import time

from kvmagent.model.command import NO_CALLBACK
from tests.lab.agent import AgentProcess
from tests.lab.guest import Guest

#: What a careful operator types: the change, then the guest's part as soon as the guest lists the CPU.
SCRIPT = """
virsh -q -c "$1" setvcpus "$2" "$3" --live --config
until virsh -q -c "$1" setvcpus "$2" "$3" --guest 2>/dev/null; do sleep 0.1; done
"""
#: The observer looks so often; it costs both sides the same.
LOOK = 'until [ "$(cat /sys/devices/system/cpu/online)" = "0-{last}" ]; do usleep 5000; done'
OBSERVER_HEADSTART_S = 0.5


def compare_visible(guest: Guest, uri: str, agent: AgentProcess, by_agent: list[float], by_script: list[float]) -> None:
    """Plug one vCPU after another, by agent, script, script, agent and so on; add the milliseconds of each."""
    for count in range(guest.spec.vcpus + 1, guest.spec.max_vcpus + 1):
        if count % 4 in (0, 1):
            by_script.append(_time_visible(guest, count, lambda n=count: _run_script(uri, guest.name, n)))
        else:
            by_agent.append(_time_visible(guest, count, lambda n=count: _run_agent(agent, guest.name, n)))


def _time_visible(guest: Guest, count: int, begin: object) -> float:
    """Return the milliseconds from the beginning of a change until the guest says that it uses `count` CPUs."""
    seen: list[float] = []

    def observe() -> None:
        guest.run(LOOK.format(last=count - 1), timeout_s=60)
        seen.append(time.perf_counter())

    observer = threading.Thread(target=observe)
    observer.start()
    time.sleep(OBSERVER_HEADSTART_S)
    began = time.perf_counter()
    begin()  # type: ignore[operator]
    observer.join()
    return (seen[0] - began) * 1000


def _run_script(uri: str, name: str, count: int) -> None:
    subprocess.run(["sh", "-c", SCRIPT, "sh", uri, name, str(count)], check=True)


def _run_agent(agent: AgentProcess, name: str, count: int) -> None:
    body = {"vmUuid": name, "cpuNum": count}
    agent.post("/vm/hotplug/cpu", body, task_uuid=f"visible-{count}", callback_url=NO_CALLBACK)
