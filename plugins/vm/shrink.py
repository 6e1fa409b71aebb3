"""Shrinks memory to a goal: virtio-mem devices, dimms and the balloon, each with the guest's part first."""

import msgspec

from kvmagent.model.command import Goal
from kvmagent.model.errors import Code
from kvmagent.model.facts import Definition, Facts, MemoryDevice, device_blocks, pick_blocks
from kvmagent.model.steps import (
    AnyStep,
    AwaitBalloon,
    DetachMemory,
    ForgetMemory,
    OfflineGuestMemory,
    OnlineGuestMemory,
    SetBalloon,
    Target,
)

from .guestmemory import online_blocks
from .memorygoal import PlannedResize, resize_steps

USER_ALIAS = "ua-"


class PlannedRemoval(msgspec.Struct, frozen=True, rename="camel"):
    """A dimm that a task removes. `base` distinguishes it from a later one: libvirt gives its own aliases out again.

    `online_blocks` is what the guest used of it before: it is brought back where the guest does not let go.
    """

    alias: str | None
    size_bytes: int
    node: int | None
    slot: int | None
    base: int | None
    live: bool
    config: bool
    online_blocks: tuple[int, ...] = ()

    def find_live(self, definition: Definition, *, same_run: bool) -> MemoryDevice | None:
        """Return the device in the running VM; after another start it may lie elsewhere, and be named otherwise."""
        if not same_run:
            return self.find_config(definition)
        device = definition.find_device(self.alias) if self.alias is not None else None
        return device if device is not None and device.base == self.base else None

    def find_config(self, definition: Definition) -> MemoryDevice | None:
        """Return the device in a definition, whatever run: by user alias, else by slot, node and size."""
        for device in definition.devices:
            named = self.alias is not None and self.alias.startswith(USER_ALIAS) and device.alias == self.alias
            unnamed = not any(
                alias is not None and alias.startswith(USER_ALIAS) for alias in (device.alias, self.alias)
            )
            same = (device.slot, device.node, device.size_bytes) == (self.slot, self.node, self.size_bytes)
            if named or (unnamed and same):
                return device
        return None


class ShrinkGoal(Goal, frozen=True, rename="camel"):
    """Dimms to remove, virtio-mem sizes and a balloon target: absolute."""

    removals: tuple[PlannedRemoval, ...]
    resizes: tuple[PlannedResize, ...]
    balloon_bytes: int | None
    balloon_live: bool
    balloon_config: bool
    total_bytes: int
    guest_online: bool
    timeout_sec: float

    @property
    def changes_live(self) -> bool:
        """Whether the running VM is to change."""
        resizes = any(resize.target == "live" for resize in self.resizes)
        return self.balloon_live or resizes or any(removal.live for removal in self.removals)


def plan_removal(device: MemoryDevice, facts: Facts, *, live: bool, config: bool) -> PlannedRemoval:
    """Return the removal of a device, with what the guest uses of it."""
    quantum = facts.guest.block_bytes
    blocks = (device_blocks(device, quantum),) if live and quantum is not None else ()
    return PlannedRemoval(
        alias=device.alias,
        size_bytes=device.size_bytes,
        node=device.node,
        slot=device.slot,
        base=device.base,
        live=live,
        config=config,
        online_blocks=tuple(sorted(pick_blocks(online_blocks(facts.guest), blocks))),
    )


def next_steps(goal: ShrinkGoal, facts: Facts, failed: frozenset[str]) -> tuple[AnyStep, ...]:
    """Return what is left to do: virtio-mem, then each dimm, then the balloon, which takes what is online."""
    surplus = _find_surplus(goal, facts)
    resizes = tuple(resize for resize in goal.resizes if _may_shrink(resize, facts, surplus))
    if steps := resize_steps(resizes, facts, failed, goal.timeout_sec):
        return steps
    removals, surplus = list[AnyStep](), _find_surplus(goal, facts)
    for removal in goal.removals:
        removals += _removal_steps(removal, goal, facts, failed, surplus)
    return tuple(removals) or _balloon_steps(goal, facts, failed)


def _may_shrink(resize: PlannedResize, facts: Facts, surplus: dict[Target, int | None]) -> bool:
    """Return whether a device has more than it is to come to, or may get it, and the VM keeps its total without.

    Somebody may have taken more meanwhile, from this device or from another.
    """
    device = resize.find(facts.get_live() if resize.target == "live" else facts.get_config())
    if device is None or device.promised_bytes <= resize.requested_bytes or resize.is_somebody_s(device):
        return False
    return _take(surplus, resize.target, max(0, device.plugged_bytes - resize.requested_bytes))


def _is_left(removal: PlannedRemoval, goal: ShrinkGoal, facts: Facts) -> bool:
    live, config = facts.domain.live, facts.domain.config
    in_live = removal.live and live is not None and _find_live(removal, goal, facts) is not None
    return in_live or (removal.config and config is not None and removal.find_config(config) is not None)


def _find_live(removal: PlannedRemoval, goal: ShrinkGoal, facts: Facts) -> MemoryDevice | None:
    return removal.find_live(facts.get_live(), same_run=goal.run is None or goal.run == facts.run)


def _find_surplus(goal: ShrinkGoal, facts: Facts) -> dict[Target, int | None]:
    """Return what each definition has above its total, None where it has none: others may have taken more meanwhile."""
    total = goal.find_total("memory")

    def exceed(target: Target) -> int | None:
        wanted: int | None = None if total is None else getattr(total, target)
        definition = facts.find_definition(target)
        return None if wanted is None or definition is None else definition.memory_bytes - wanted

    return {"live": exceed("live"), "config": exceed("config")}


def _take(surplus: dict[Target, int | None], target: Target, size_bytes: int) -> bool:
    """Return whether so much may leave, and take it from the surplus."""
    left = surplus[target]
    if left is not None and size_bytes > max(0, left):
        return False
    surplus[target] = None if left is None else left - size_bytes
    return True


def _removal_steps(
    removal: PlannedRemoval, goal: ShrinkGoal, facts: Facts, failed: frozenset[str], surplus: dict[Target, int | None]
) -> tuple[AnyStep, ...]:
    """Out of use in the guest, out of the VM, out of its definition: each only after the one before.

    What the guest refuses to give up goes back into use; what it has not answered for may still leave. What would bring
    the VM below its total by now stays; but what has left the VM leaves its definition.
    """
    steps: list[AnyStep] = []
    device = _find_live(removal, goal, facts) if removal.live else None
    stays = device is not None and not _take(surplus, "live", device.plugged_bytes)
    if device is not None and device.alias is not None:
        detach = DetachMemory(alias=device.alias, timeout_sec=goal.timeout_sec)
        used = tuple(sorted(online_blocks(facts.guest) & frozenset(removal.online_blocks)))
        offline = OfflineGuestMemory(alias=device.alias, blocks=used)
        refused = detach.key in failed and f"{detach.key} {Code.MEMORY_REMOVAL_PENDING}" not in failed
        if offline.key in failed or refused or stays:
            back = tuple(sorted(frozenset(removal.online_blocks) - frozenset(used)))
            return (OnlineGuestMemory(blocks=back),) if back and OnlineGuestMemory.__name__ not in failed else ()
        if detach.key in failed:
            return ()
        steps += [offline, detach] if used and goal.guest_online else [detach]
    if removal.config and removal.find_config(facts.get_config()) is not None:
        has_left = removal.live and device is None
        if not has_left and not _take(surplus, "config", removal.size_bytes):
            return tuple(steps)
        steps.append(
            ForgetMemory(alias=removal.alias, slot=removal.slot, node=removal.node, size_bytes=removal.size_bytes)
        )
    return tuple(steps)


def _balloon_steps(goal: ShrinkGoal, facts: Facts, failed: frozenset[str]) -> tuple[AnyStep, ...]:
    """Only once every dimm is removed: the balloon counts them, and would take their size out of what is online."""
    if goal.balloon_bytes is None or any(_is_left(removal, goal, facts) for removal in goal.removals):
        return ()
    actual = facts.domain.balloon_bytes
    if goal.balloon_live and actual is not None and actual > goal.balloon_bytes:
        if AwaitBalloon.__name__ in failed:
            return ()
        return (
            SetBalloon(size_bytes=goal.balloon_bytes, target="live"),
            AwaitBalloon(size_bytes=goal.balloon_bytes, timeout_sec=goal.timeout_sec),
        )
    if goal.balloon_config and facts.get_config().current_bytes > goal.balloon_bytes:
        return (SetBalloon(size_bytes=goal.balloon_bytes, target="config"),)
    return ()
