"""The agent that is measured, as the process that operators run: its memory, its CPU time, how long it takes to start.

Also libvirt's test driver with many domains. Its domains live inside the agent's process: their memory counts there.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from tests.lab.agent import AgentProcess
from tests.lab.domainxml import GuestSpec, format_domain
from tests.lab.image import Image

#: As many as libvirt's test driver gives.
MAX_VCPUS = 32
#: What setup.py installs with the agent, as it is imported.
LIBRARIES = (
    "cherrypy",
    "click",
    "cryptography.x509",
    "libvirt",
    "lxml.etree",
    "msgspec",
    "prometheus_client",
    "simplejson",
    "urllib3",
)
#: Enough for every run; the limits themselves are not what is measured. More is plugged in all than the host has.
SETTINGS = {
    "agent": {"max_queued": "100000", "max_queued_per_client": "100000", "keep_tasks": "20000"},
    "host": {"memory_overcommit": "100"},
}


def start_agent(uri: str) -> AgentProcess:
    """Return an agent that is not started yet: `with start_agent(...) as agent` starts it."""
    return AgentProcess(uri=uri, settings=SETTINGS)


def domain_name(n: int) -> str:
    """The name of a domain of `write_node`."""
    return f"vm-{n}"


def write_node(directory: Path, domains: int) -> str:
    """Write a node of libvirt's test driver with so many running domains; return the URI that opens it.

    Each has one vCPU of MAX_VCPUS. Every open of the URI, in any process, has domains of its own.
    """
    image = Image(kernel=Path("/boot/kernel"), initramfs=Path("/boot/initramfs"), kernel_release="6.1")
    xml = "".join(
        format_domain(
            GuestSpec(name=domain_name(n), max_vcpus=MAX_VCPUS),
            image,
            virt_type="test",
            console_log=Path("/log"),
            harness=Path("/sock"),
        )
        for n in range(domains)
    )
    file = directory / f"node-{domains}.xml"
    file.write_text(f"<node>{xml}</node>")
    return f"test://{file}"


def rss_mib(pid: int) -> float:
    """The resident memory of a process."""
    return _status_mib(pid, "VmRSS")


def anonymous_mib(pid: int) -> float:
    """What of it is the process's own; the rest are pages of files, mostly libraries that libvirtd has as well."""
    return _status_mib(pid, "RssAnon")


def _status_mib(pid: int, name: str) -> float:
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields[name].split()[0]) / 1024


def cpu_s(pid: int) -> float:
    """The CPU time that a process has used, its own and the kernel's for it, ended threads included.

    Source: clock_getcpuclockid(3); Linux include/linux/posix-timers.h for the id of another process's clock.
    """
    return time.clock_gettime((~pid << 3) | 2)


def time_start(agent: AgentProcess) -> float:
    """Start an agent that does not run; return the seconds from the exec to the first /healthz that says ready."""
    began = time.perf_counter()
    agent.start()
    return time.perf_counter() - began


def time_imports() -> float:
    """The seconds that a Python takes that imports the agent's libraries and ends."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {', '.join(LIBRARIES)}"], check=True)
    return time.perf_counter() - began
