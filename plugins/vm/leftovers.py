"""Earlier requests that a guest has not reached, whoever made them: a balloon target, a virtio-mem size.

The guest may follow it at any later time: when its driver is loaded, when it has memory to give, when it goes on. A
plug takes it back. Where the definition was given the same, it is brought to what the running VM has, too.
"""

import msgspec

from kvmagent.model.command import Affect, Ending
from kvmagent.model.errors import Code
from kvmagent.model.facts import Definition, Facts, MemoryDevice, find_other_half
from kvmagent.model.guestuse import warning
from kvmagent.model.reply import Problem
from kvmagent.model.units import format_size


def find_balloon_leftover(facts: Facts) -> int | None:
    """Return what the balloon was asked to come to and has not; None where there is nothing, or nobody looked."""
    target, actual = facts.domain.balloon_target_bytes, facts.domain.balloon_bytes
    return None if facts.domain.live is None or actual is None or target == actual else target


def cancel_leftovers(facts: Facts, affect: Affect) -> Facts:
    """Return the VM as it would be with each virtio-mem device's request set to what it has."""
    live, config = facts.domain.live, facts.domain.config
    if affect == "config" or live is None or all(device.is_settled for device in live.devices):
        return facts
    domain = msgspec.structs.replace(facts.domain, live=_replace(live, {d: _settled(d) for d in live.virtio_mems}))
    if affect == "both" and config is not None:
        changes = {}
        for device in live.virtio_mems:
            saved = find_other_half(device, config)
            if saved is not None and not device.is_settled and saved.requested_bytes == device.requested_bytes:
                changes[saved] = msgspec.structs.replace(saved, requested_bytes=device.current_bytes)
        domain = msgspec.structs.replace(domain, config=_replace(config, changes))
    return msgspec.structs.replace(facts, domain=domain)


def explain_leftovers(ending: Ending) -> list[Problem]:
    """Say what a plug found, and took back."""
    facts, affect = ending.before, ending.request.affect
    if ending.goal is None or facts is None or facts.domain.live is None or affect == "config":
        return []
    target, actual = find_balloon_leftover(facts), facts.domain.balloon_bytes
    told = []
    if target is not None and actual is not None:
        told.append(f"the balloon's target was {format_size(target)}, but it is at {format_size(actual)}")
    told += [
        f"{device.alias} had been asked for {format_size(device.requested_bytes or 0)} and is at "
        f"{format_size(device.plugged_bytes)}"
        for device in facts.domain.live.virtio_mems
        if not device.is_settled
    ]
    return [warning(Code.LEFTOVER_TAKEN_BACK, "; ".join(told))] if told else []


def _settled(device: MemoryDevice) -> MemoryDevice:
    return device if device.is_settled else msgspec.structs.replace(device, requested_bytes=device.current_bytes)


def _replace(definition: Definition, changes: dict[MemoryDevice, MemoryDevice]) -> Definition:
    devices = tuple(changes.get(device, device) for device in definition.devices)
    return msgspec.structs.replace(definition, devices=devices)
