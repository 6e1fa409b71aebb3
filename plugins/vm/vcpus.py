"""A VM's vCPUs by id: which ones libvirt takes for a number, and the way back from a failed plug.

    the running VM, where vCPUs can be removed from it: those that were added, and no other
      AwaitGuestVcpus       until the guest lists them; one that it does not list may leave at any later time: it stays
      OfflineGuestVcpus     those of them that the guest uses; then a fresh look
      UnplugVcpus           only where libvirt would take these very vCPUs
    the persistent definition, whatever became of the running VM
      SetVcpus              the former number: only where that makes it the former vCPUs

What is not certain is left as it is: a vCPU too many is told of, one too few is an outage.
"""

from collections.abc import Iterable

import msgspec

from kvmagent.model.checks import check_cpu_removal
from kvmagent.model.facts import Definition, Facts
from kvmagent.model.steps import AnyStep, AwaitGuestVcpus, OfflineGuestVcpus, SetVcpus, UnplugVcpus


class FormerVcpus(msgspec.Struct, frozen=True, rename="camel"):
    """A VM's vCPUs before a task, by id; None for a definition that the task does not change.

    `run` is the run of the VM that the live ones are of.
    """

    live: tuple[int, ...] | None
    config: tuple[int, ...] | None
    run: str | None


def find_former(facts: Facts, *, live: bool, config: bool) -> FormerVcpus:
    """Return the vCPUs of the definitions that a task is to change.

    Raises:
        AgentError: VM_NOT_RUNNING, VM_TRANSIENT.
    """
    return FormerVcpus(
        live=enabled_ids(facts.get_live()) if live else None,
        config=enabled_ids(facts.get_config()) if config else None,
        run=facts.run,
    )


def is_back(former: FormerVcpus, facts: Facts) -> bool:
    """Return whether the VM has its former vCPUs, no more and no others."""
    return all(
        ids is None or (definition is not None and enabled_ids(definition) == ids)
        for ids, definition in ((former.live, facts.domain.live), (former.config, facts.domain.config))
    )


def undo_steps(
    former: FormerVcpus,
    facts: Facts,
    failed: frozenset[str],
    *,
    cpu_num: int,
    known: tuple[int, ...] | None,
    may_offline: bool,
    timeout_sec: float,
) -> tuple[AnyStep, ...]:
    """Return what is left to do on the way back from `cpu_num` vCPUs; `known` is what the guest listed before.

    Without `may_offline` only vCPUs that the guest does not use leave.
    """
    added = _find_added(former, facts, cpu_num)
    live: tuple[AnyStep, ...] = ()
    if added and known is not None:
        live = tuple(
            step
            for step in _undo_live(len(added), known, facts, timeout_sec)
            if step.key not in failed and (may_offline or not isinstance(step, OfflineGuestVcpus))
        )
    return live or _undo_config(former, facts, cpu_num)


def enabled_ids(definition: Definition) -> tuple[int, ...]:
    """Return the vCPUs that a definition has, in order."""
    return tuple(sorted(vcpu.id for vcpu in definition.vcpus if vcpu.enabled))


def can_remove_vcpus(facts: Facts) -> bool:
    """Return whether vCPUs can be removed from the running VM without harm to it: emulated ones crash later."""
    live = facts.domain.live
    if live is None or any(check_cpu_removal(live)):
        return False
    return live.hypervisor == "kvm" or facts.host.removes_emulated


def leaving_ids(live: Definition, cpu_num: int) -> frozenset[int]:
    """Return the vCPUs that leave, as libvirt chooses them: those of the highest ids that can be removed.

    Source: libvirt 9.0, qemuDomainSelectHotplugVcpuEntities. The guest numbers them alike as long as none is missing.
    """
    removable = [vcpu.id for vcpu in live.vcpus if vcpu.enabled and vcpu.hotpluggable]
    count = max(0, live.vcpu_current - cpu_num)
    return frozenset(sorted(removable)[len(removable) - count :] if count else ())


def resized_ids(ids: Iterable[int], count: int) -> tuple[int, ...]:
    """Return the vCPUs of a persistent definition, or of a running VM that grows, once libvirt has given it a number.

    It adds the lowest ids that are free and takes away the highest, removable or not.
    Source: libvirt 9.0, qemuDomainSetVcpusConfig and qemuDomainSelectHotplugVcpuEntities.
    """
    have = sorted(ids)
    free = (n for n in range(len(have) + count) if n not in have)
    while len(have) < count:
        have.append(next(free))
    return tuple(sorted(have[:count]))


def _undo_live(added: int, known: tuple[int, ...], facts: Facts, timeout_sec: float) -> tuple[AnyStep, ...]:
    """Return the next step by which the guest gives up so many new CPUs; none where it is not certain which they are.

    They are told by what it listed before, which must have been all that there were: its numbers are its own.
    """
    count, listed = facts.get_live().vcpu_current - added, facts.guest.vcpus
    if listed is None or len(known) != count:
        return ()
    if len(listed) < count + added:
        return (AwaitGuestVcpus(known=known, added=added, timeout_sec=timeout_sec),)
    new = [cpu for cpu in listed if cpu.id not in known]
    online = [cpu for cpu in new if cpu.online]
    if len(new) != added or not all(cpu.can_offline for cpu in online):
        return ()
    if online:
        return (OfflineGuestVcpus(ids=tuple(cpu.id for cpu in online)),)
    return (UnplugVcpus(count=count, timeout_sec=timeout_sec),)


def _find_added(former: FormerVcpus, facts: Facts, cpu_num: int) -> frozenset[int]:
    """Return the vCPUs that the task has added to the running VM; none where that, or their removal, is not certain."""
    live = facts.domain.live
    same_run = former.run is not None and former.run == facts.run
    if former.live is None or live is None or not can_remove_vcpus(facts) or not same_run:
        return frozenset()
    have, count = enabled_ids(live), len(former.live)
    added = frozenset(have) - frozenset(former.live)
    ours = count < len(have) == live.vcpu_current <= cpu_num and have == resized_ids(former.live, len(have))
    return added if ours and leaving_ids(live, count) == added else frozenset()


def _undo_config(former: FormerVcpus, facts: Facts, cpu_num: int) -> tuple[AnyStep, ...]:
    config = facts.domain.config
    if former.config is None or config is None or (have := enabled_ids(config)) == former.config:
        return ()
    ours = have == resized_ids(former.config, cpu_num)
    exact = resized_ids(have, len(former.config)) == former.config
    return (SetVcpus(count=len(former.config), target="config"),) if ours and exact else ()
