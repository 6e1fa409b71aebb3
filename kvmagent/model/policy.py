"""Compares a request with what the VM's owner allows, for one definition at a time: each has its own policy.

The running VM's policy rules the running VM, the persistent one the next start.
"""

import shlex
from collections.abc import Iterator

import msgspec

from kvmagent.model.errors import CODES, Code
from kvmagent.model.facts import POLICY_NAMESPACE, Definition, Domain, Facts, Policy
from kvmagent.model.reply import Problem
from kvmagent.model.units import format_size


def check_opt_out(domain: Domain, name: str, definition: Definition) -> Iterator[Problem]:
    """The owner must allow hotplug at all."""
    policy = definition.policy
    if not policy.hotplug:
        yield Problem(
            code=Code.VM_OPTED_OUT,
            message=f"the policy of VM {domain.name}'s {name} definition has hotplug off{_told(policy)}",
            remedy=_remedy(domain, name, msgspec.structs.replace(policy, hotplug=True)),
        )


def check_cpu_ceiling(domain: Domain, name: str, definition: Definition, cpu_num: int) -> Iterator[Problem]:
    """More vCPUs must stay within the owner's ceiling; what the VM has already it may keep."""
    policy, ceiling = definition.policy, definition.policy.max_cpu_num
    if ceiling is not None and cpu_num > max(ceiling, definition.vcpu_current):
        yield Problem(
            code=Code.ABOVE_POLICY,
            message=f"{cpu_num} vCPUs requested, the policy of the {name} definition allows at most {ceiling}"
            f"{_told(policy)}",
            remedy=_remedy(domain, name, msgspec.structs.replace(policy, max_cpu_num=cpu_num)),
        )


def check_memory_ceiling(domain: Domain, name: str, definition: Definition, size_bytes: int) -> Iterator[Problem]:
    """What is added, rounded as it will be, must stay within the owner's ceiling."""
    policy, ceiling = definition.policy, definition.policy.max_memory_bytes
    if ceiling is not None and size_bytes > ceiling:
        yield Problem(
            code=Code.ABOVE_POLICY,
            message=f"{format_size(size_bytes)} would be the total, the policy of the {name} definition allows at most "
            f"{format_size(ceiling)}{_told(policy)}",
            remedy=_remedy(domain, name, msgspec.structs.replace(policy, max_memory_bytes=size_bytes)),
        )


def may_online(facts: Facts) -> bool:
    """Whether the owner of the running VM lets anything be brought online in its guest."""
    return facts.domain.live is None or facts.domain.live.policy.guest_online


def explain_not_asked(facts: Facts) -> Problem:
    """Return the warning of what was left offline, and whose will that was."""
    words = '"guestOnline" was false' if may_online(facts) else "guestOnline is off in the VM's policy"
    return Problem(code=Code.GUEST_ONLINE_NOT_ASKED, message=words, remedy=CODES[Code.GUEST_ONLINE_NOT_ASKED].remedy)


def find_mistakes(facts: Facts | None) -> list[Problem]:
    """Return what is unreadable in a VM's policies: a warning whatever the outcome."""
    if facts is None:
        return []
    domain, policies = facts.domain, dict[str, Policy]()
    for name, definition in domain.definitions():
        if definition.policy.mistakes:
            policies[name] = definition.policy
    if not policies:
        return []
    words = "; ".join(f"policy of the {name} definition: {', '.join(one.mistakes)}" for name, one in policies.items())
    return [Problem(code=Code.POLICY_UNREADABLE, message=words, remedy=CODES[Code.POLICY_UNREADABLE].remedy)]


def _told(policy: Policy) -> str:
    return f" ({', '.join(policy.mistakes)})" if policy.mistakes else ""


def _remedy(domain: Domain, name: str, wanted: Policy) -> str:
    """Return the command by which the owner allows it, with what else the policy says kept."""
    switches = {"hotplug": wanted.hotplug, "guestOnline": wanted.guest_online}
    ceilings = {"maxCpuNum": wanted.max_cpu_num, "maxMemorySize": wanted.max_memory_bytes}
    values = [f'{one}="off"' for one, is_on in switches.items() if not is_on]
    values += [f'{one}="{ceiling}"' for one, ceiling in ceilings.items() if ceiling is not None]
    xml = " ".join(["<policy", *values]) + "/>"
    same = domain.live is not None and domain.config is not None and domain.live.policy == domain.config.policy
    where = "--live --config" if same else "--live" if name == "running" else "--config"
    return (
        f"If the VM's owner agrees: virsh metadata {shlex.quote(domain.name)} {POLICY_NAMESPACE} --key kvmagent "
        f"--set '{xml}' {where}"
    )
