"""Examines this host for what an agent needs; each finding has its remedy.

as the agent's user   configuration, plugins, log, state directory, journal, hooks, certificates, libvirt and guests
as who runs it        KVM, clock, agent with page and metrics, front (where the node has ZStack's own agent too), alerts
"""

import getpass
import importlib.metadata
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kvmagent import __version__
from kvmagent.api.deadline import Asker
from kvmagent.cli.configfile import read_settings
from kvmagent.cli.ctl.agentuser import USER, Identity, find_identity, find_user, look_as
from kvmagent.cli.ctl.client import Agent, Target
from kvmagent.cli.ctl.exits import CtlError
from kvmagent.cli.ctl.findings import Finding
from kvmagent.cli.ctl.front import examine_front
from kvmagent.cli.ctl.hostchecks import examine_clock, examine_kvm
from kvmagent.cli.ctl.local import target_of
from kvmagent.hypervisor.probe import NO_CHANNEL, NOT_CONNECTED, Probe, Version, probe
from kvmagent.model.errors import CODES, AgentError, Code
from kvmagent.model.guestuse import MOST_MOVABLE_RATIO
from kvmagent.model.hostbudget import SLICE_LIMIT
from kvmagent.model.units import format_size
from kvmagent.model.urls import shown_url
from kvmagent.plugins import load_plugins
from kvmagent.settings import Settings

# libvirt may hang, and guests may: the pings of all together take 20 s at most. The whole look takes no longer than the
# second.
_PROBE_S, _LOOK_S = 30.0, 45.0
# The alerts on guests look at what is younger than 15 minutes.
_SAMPLE_S = 600
# The oldest versions that the agent was tried on (Ubuntu 22.04).
_OLDEST_LIBVIRT, _OLDEST_QEMU = (8, 0, 0), (6, 2, 0)
# Observed: QEMU 7.2 cannot detach a virtio-mem device; libvirt counts one against the slots. Source: libvirt's news
# for 9.5; QEMU's commit "virtio-mem: Support device unplug" came in the months after 8.0.
_VIRTIO_MEM_UNPLUG, _VIRTIO_MEM_NO_SLOT = (8, 1, 0), (9, 5, 0)
_MOST_NAMES = 5


def examine(config: Path, given: dict[str, str], *, look_s: float = _LOOK_S) -> list[Finding]:
    """Return all findings; `given` are the options that say which agent to ask, and who asks.

    What the agent's user meets is looked at by a process of that user, which `look_s` ends.
    """
    now = datetime.now(UTC)
    identity = find_identity()
    findings = [_examine_user(identity), *look_as(identity, "host", [str(config)], timeout_s=look_s)]
    try:
        settings = read_settings(config)
    except AgentError:  # told by the look
        settings = Settings()
    state_dir = Path(settings.agent.state_dir)
    target = Target(**target_of(settings) | given)
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "kvm": examine_kvm,
        "clock": lambda: examine_clock(state_dir, now),
        "agent": lambda: _examine_agent(target),
        "front": lambda: examine_front(settings),
        "alerts": lambda: examine_alerts(settings),
    }
    for name, check in checks.items():
        try:
            findings += check()
        except (AgentError, CtlError) as error:
            findings.append(Finding(name, "wrong", error.message, error.remedy))
        except Exception as error:  # one look that fails must not take the others away
            findings.append(Finding(name, "wrong", f"not examined: {type(error).__name__}: {error}"))
    return findings


def _examine_user(identity: Identity | None) -> Finding:
    """Tell as whom was looked: what root may do, the agent may not."""
    own, user = getpass.getuser(), find_user()
    if identity is not None:
        return Finding("user", "good", f"checked as {identity.name}, the agent's user")
    if user is None:
        remedy = "Make it: systemd-sysusers with conf/kvmagent.sysusers, as the package does."
        return Finding("user", "note", f"checked as {own}: there is no user {USER} for the agent", remedy)
    if user.pw_name == own:
        return Finding("user", "good", f"checked as {own}, the agent's user")
    return Finding("user", "warning", f"checked as {own}, the agent runs as {user.pw_name}", "sudo kvmagentctl doctor")


def examine_alerts(settings: Settings) -> Iterator[Finding]:
    """Look whether what alerts and the dashboard need is on."""
    if settings.metrics.sample_sec == 0:
        message = (
            "metrics.sample_sec is 0: the agent learns what guests use only after commands; KvmagentVmUnreadable fires"
        )
        yield Finding("alerts", "warning", message, "Set metrics.sample_sec = 300, then: systemctl restart kvmagent.")
    elif settings.metrics.sample_sec > _SAMPLE_S:
        message = f"metrics.sample_sec is {settings.metrics.sample_sec}: alerts on guests look at the last 15 minutes"
        yield Finding("alerts", "warning", message, "Set metrics.sample_sec = 300, then: systemctl restart kvmagent.")


def examine_plugins(settings: Settings) -> Iterator[Finding]:
    """Look which plugins there are."""
    plugins = load_plugins(settings.agent.plugins)
    commands = sum(len(plugin.commands) for plugin in plugins)
    found = ", ".join(f"{plugin.name} ({_version_of(plugin.name)})" for plugin in plugins)
    yield Finding("plugins", "good", f"{found}: {commands} commands")


def _version_of(plugin: str) -> str:
    point = next(iter(importlib.metadata.entry_points(group="kvmagent.plugins", name=plugin)))
    return f"{point.dist.name} {point.dist.version}" if point.dist else "unknown"


def examine_libvirt(uri: str) -> Iterator[Finding]:
    """Look whether libvirt lets this user in, and what is there."""
    try:
        found = Asker(at_once=1).ask(
            lambda: probe(uri), timeout_s=_PROBE_S, about=f"asking libvirt at {shown_url(uri)}"
        )
    except AgentError as error:
        yield Finding("libvirt", "wrong", error.message, error.remedy)
        return
    running = f"{len(found.running)} of {found.vms} VMs run"
    user = getpass.getuser()
    yield Finding("libvirt", "good", f"{shown_url(uri)} lets {user} in: libvirt {_dotted(found.libvirt)}, {running}")
    yield from examine_versions(found)
    yield from examine_guests(found)
    yield from examine_memory_balance(found)


def examine_versions(found: Probe) -> Iterator[Finding]:
    """Look for what is known of the versions of libvirt and QEMU."""
    if found.driver != "QEMU":
        remedy = "Set libvirt.uri to qemu:///system."
        yield Finding("qemu", "warning", f"libvirt.uri connects to the {found.driver} driver, not to QEMU", remedy)
        return
    libvirt, qemu = _dotted(found.libvirt), _dotted(found.hypervisor)
    if found.libvirt < _OLDEST_LIBVIRT or found.hypervisor < _OLDEST_QEMU:
        oldest = f"libvirt {_dotted(_OLDEST_LIBVIRT)} and QEMU {_dotted(_OLDEST_QEMU)}"
        remedy = "Update them: hotplug was never tested on older versions."
        yield Finding("qemu", "warning", f"libvirt {libvirt} and QEMU {qemu} are older than {oldest}", remedy)
    else:
        yield Finding("qemu", "good", f"QEMU {qemu}")
    if found.hypervisor < _VIRTIO_MEM_UNPLUG:
        message = (
            f"QEMU {qemu} cannot detach a virtio-mem device: it can be shrunk to nothing, but its slot stays in use"
        )
        yield Finding("qemu", "note", message, "Update to QEMU 8.2 if VMs run out of slots.")
    if found.libvirt < _VIRTIO_MEM_NO_SLOT:
        message = f"libvirt {libvirt} counts a virtio-mem device against the memory slots"
        yield Finding("qemu", "note", message, "Prepare VMs with one slot more than they need for dimms.")
    if not found.offers_kvm:
        remedy = (
            "See the finding on kvm, let QEMU's user open /dev/kvm, then: systemctl restart libvirtd (or virtqemud)."
        )
        yield Finding("qemu", "warning", "libvirt offers no KVM: VMs are emulated", remedy)
    emulated = [vm.name for vm in found.running if vm.hypervisor == "qemu"]
    if emulated:
        message = f"{_names(emulated)}: emulated, without KVM; vCPUs can be added but not removed while they run"
        yield Finding("qemu", "note", message, "If this host supports KVM, define VMs with <domain type='kvm'>.")


def examine_guests(found: Probe) -> Iterator[Finding]:
    """Look whose agents hang, and how many guests have none: nothing is wrong with those, plugs stay `plugged`."""
    names_by_silence: dict[str, list[str]] = {}
    for vm in found.running:
        names_by_silence.setdefault(vm.silence, []).append(vm.name)
    answering = names_by_silence.pop("", [])
    without = sum(len(names_by_silence.pop(silence, [])) for silence in (NO_CHANNEL, NOT_CONNECTED))
    if answering:
        yield Finding("guest agents", "good", f"{len(answering)} of {len(found.running)} answer")
    if without:
        message = (
            f"{without} of {len(found.running)} running VMs have no guest agent, so no plug into them can be confirmed"
        )
        remedy = "kvmagentctl ready VM says what one lacks: the channel, or qemu-guest-agent in the guest."
        yield Finding("guest agents", "note", message, remedy)
    for silence, names in names_by_silence.items():
        remedy = "In the guest: systemctl restart qemu-guest-agent."
        yield Finding("guest agents", "warning", f"{silence}: {_names(names)}", remedy)


def examine_memory_balance(found: Probe) -> Iterator[Finding]:
    """Look whose guests have so much plugged memory that their kernels may lack some for themselves."""
    names = [vm.name for vm in found.running if vm.plugged_bytes > MOST_MOVABLE_RATIO * vm.boot_bytes]
    if names:
        message = f"{_names(names)}: more than {MOST_MOVABLE_RATIO} times the boot memory is plugged"
        yield Finding("guest memory", "note", message, CODES[Code.GUEST_MEMORY_IMBALANCED].remedy)


def _examine_agent(target: Target) -> Iterator[Finding]:
    agent = Agent(target)
    if agent.warning:
        yield Finding("agent", "warning", agent.warning, "Use https:// in its URL, or run doctor on its host.")
    try:
        health = agent.get("healthz")
    except CtlError as error:
        if error.code in ("TLS_REFUSED", "AGENT_NOT_TRUSTED", "CREDENTIALS_MISSING"):
            remedy = "Give doctor --ca, --cert and --key, or --token-file."
            yield Finding("agent", "note", f"it is running but rejected our credentials: {error.message}", remedy)
        elif error.code == "AGENT_UNREACHABLE":
            remedy = "Start it: systemctl start kvmagent. If it stops at once, journalctl -u kvmagent says why."
            yield Finding("agent", "wrong", error.message, remedy)
        else:
            yield Finding("agent", "wrong", error.message, error.remedy)
        return
    for part, why in health["down"].items():
        yield Finding("agent", "wrong", f"{agent.url}: {part} is down: {why}", "See the log: journalctl -u kvmagent.")
    if health["ready"]:
        yield Finding("agent", "good", f"{agent.url} is ready, version {health['version']}")
    if health["version"] != __version__:
        message = f"the running agent is {health['version']}, the installed one {__version__}"
        yield Finding("agent", "warning", message, "systemctl restart kvmagent: running tasks are finished first.")
    yield from _examine_page(agent)
    yield from examine_memory(health.get("memory"))
    if owed := health["owedCallbacks"]:
        remedy = "kvmagentctl tasks --state finished lists them; make sure that this host can reach their servers."
        yield Finding("agent", "note", f"{owed} callbacks are undelivered", remedy)


def _examine_page(agent: Agent) -> Iterator[Finding]:
    """Look whether the page and a scraper get what they ask for."""
    for path, check in (("", "page"), ("metrics", "alerts")):
        status, kind = agent.probe(path)
        expected = "text/html" if check == "page" else "text/plain"
        if status == 200 and kind.startswith(expected):
            yield Finding(check, "good", f"{agent.url}/{path} answers")
        else:
            remedy = "Make sure that no proxy or other program answers on this port."
            yield Finding(
                check, "warning", f"{agent.url}/{path} answers HTTP {status} with {kind or 'nothing'}", remedy
            )


def examine_memory(memory: dict[str, Any] | None) -> Iterator[Finding]:
    """Look whether the host has more memory promised to VMs than it has."""
    if memory is None:
        return
    promised, budget = format_size(memory["promised"]), format_size(memory["budget"])
    if memory["overSince"] is not None:
        other = "host.memory_overcommit"
        # An older agent does not tell. host.memory_overcommit does not raise machine.slice's limit.
        if memory.get("budgetFrom") == SLICE_LIMIT:
            other = "the limit of machine.slice (systemctl set-property machine.slice MemoryMax=SIZE)"
        remedy = f"kvmagentctl reclaim --dry-run shows what VMs could give back; or raise {other}."
        yield Finding("memory", "warning", f"{promised} are promised to VMs, the budget is {budget}", remedy)
    else:
        yield Finding("memory", "good", f"{promised} of {budget} are promised to VMs")


def _dotted(version: Version) -> str:
    return ".".join(map(str, version))


def _names(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more
