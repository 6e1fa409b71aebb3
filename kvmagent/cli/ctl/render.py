"""Turns the agent's JSON into lines for people. Pure: no clock and no terminal; times are arguments.

JSON comes in as the agent wrote it but for `printable`. A field that an older agent does not have is a dash.
"""

import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from kvmagent.cli.ctl.inoptions import in_options
from kvmagent.cli.ctl.terminal import BAD, BOLD, DIM, GOOD, WARN, Column, format_table, paint, prose
from kvmagent.model.units import GIB, MIB, format_ids, format_size

Json = Mapping[str, Any]

_OUTCOME_COLOURS = {
    "online": GOOD,
    "configured": GOOD,
    "unchanged": GOOD,
    "planned": GOOD,
    "plugged": WARN,
    "pending": WARN,
    "partial": BAD,
    "refused": BAD,
}
_CAPITAL = re.compile("[A-Z]")
_LABELS = {"cpu num": "vCPUs", "memory size": "memory", "numa": "NUMA", "acpi": "ACPI"}
_STATE_COLOURS = {"accepted": DIM, "running": WARN, "gone": WARN, "given_up": BAD}


def render_status(url: str, health: Json) -> list[str]:
    """Return what /healthz says."""
    ready = paint("ready", GOOD) if health["ready"] else paint("not ready", BAD)
    lines = [f"{url}: {ready}, version {health['version']}"]
    lines += [prose(f"  {paint('down', BAD)}  ", f"{name}: {why}") for name, why in health["down"].items()]
    lines.append(
        f"  {_count(health['queued'], 'task')} queued, {_count(health['owedCallbacks'], 'callback')} undelivered"
    )
    lines += _memory_lines(health.get("memory"))
    running = [
        [task["vm"], task["command"], f"{task['seconds']:.1f} s", task["taskUuid"]] for task in health["running"]
    ]
    return lines + (["", *format_table(("RUNNING ON", "COMMAND", ">FOR", "TASK"), running)] if running else [])


def _memory_lines(memory: Json | None) -> list[str]:
    """Return how the host's memory is promised."""
    if memory is None:
        return []
    words = f"{format_size(memory['promised'])} of {format_size(memory['budget'])} promised to VMs"
    words += f", {format_size(memory['resident'])} in use by them; {format_size(memory['reserve'])} kept for the host"
    told = prose("  memory: ", words)
    if memory["overSince"] is None:
        return [told]
    since = datetime.fromtimestamp(memory["overSince"], UTC)
    over = paint("over the budget", BAD)
    return [told, f"  {over} since {since:%Y-%m-%d %H:%M} UTC: no VM gets more memory until some is freed"]


def render_reclaimable(answer: Json) -> list[str]:
    """Return what could come back of each running VM, the most first."""
    rows = [
        [
            vm["name"],
            _size(vm["promised"]),
            _size(vm["resident"]),
            _size(vm["unused"]),
            ", ".join(f"{way['means']} {_size(way['size'])}" for way in vm["ways"]) or "-",
        ]
        for vm in answer["vms"]
    ]
    if not rows:
        return ["no VM is running"]
    return format_table(("VM", ">PROMISED", ">RESIDENT", ">UNUSED", "REMOVABLE BY"), rows)


def render_vms(vms: Iterable[Json], *, wide: bool = False) -> list[str]:
    """Return a table of VMs, by name: what each has, may have, and what its guest uses of it; `wide`: their UUIDs."""
    if not wide:
        return _vm_table(_VM_COLUMNS, vms, _vm_row)
    columns = (*_VM_COLUMNS, Column("UUID", 9, "UUID"))
    return _vm_table(columns, vms, lambda vm: [*_vm_row(vm), str(vm.get("uuid") or vm["vmUuid"])])


_VM_COLUMNS: tuple[str | Column, ...] = (
    Column("VM"),
    Column("STATE", 1),
    Column(">VCPUS"),
    Column(">MAX", 5, "max vCPUs"),
    Column(">GUEST", 4, "vCPUs in the guest"),
    Column(">MEMORY"),
    Column(">MAX", 6, "max memory"),
    Column(">GUEST", 3, "memory in the guest"),
    Column(">SLOTS", 8, "free slots"),
    Column("HOTPLUG", 2),
)


def _vm_table(
    headers: tuple[str | Column, ...], vms: Iterable[Json], make_row: Callable[[Json], list[str]]
) -> list[str]:
    """Return a table of VMs by name, with a column for their host where there are several."""
    vms = sorted(vms, key=lambda vm: (str(vm.get("host") or ""), str(vm.get("name") or vm["vmUuid"])))
    if not any("host" in vm for vm in vms):
        return format_table(headers, map(make_row, vms))
    return format_table((Column("HOST"), *headers), [[str(vm.get("host", "")), *make_row(vm)] for vm in vms])


_VERDICT_COLOURS = {
    "live": GOOD,
    "live-unconfirmed": WARN,
    "live-rounded": GOOD,
    "live-partial": WARN,
    "restart": WARN,
    "never": BAD,
}


def render_plan(reply: Json) -> list[str]:
    """Return the plans of one VM: a grid for targets of both vCPUs and memory, else a line each; then reasons."""
    plans = reply["plans"]
    cpus = list(dict.fromkeys(plan["target"].get("cpuNum") for plan in plans))
    sizes = list(dict.fromkeys(plan["target"].get("memorySize") for plan in plans))
    lines = [f"{reply['name']}: {reply['state']}"]
    if None not in cpus and None not in sizes and len(plans) > 1:
        by_target = {(plan["target"]["cpuNum"], plan["target"]["memorySize"]): plan for plan in plans}
        rows = [[format_size(size), *(_verdict(by_target[number, size]) for number in cpus)] for size in sizes]
        lines += format_table(("MEMORY", *(_count(number, "vCPU") for number in cpus)), rows)
    else:
        lines += format_table(
            ("TARGET", "VERDICT", ">TOOK LATELY"),
            [[_target(plan), _verdict(plan), _took_lately(plan)] for plan in plans],
        )
    lines += _explain_codes(WARN, [reason for plan in plans for reason in plan["reasons"]])
    return lines + _prepare_hints(shlex.quote(reply["name"]), [one for plan in plans for one in plan["prepare"]])


def _prepare_hints(vm: str, prepares: list[Json]) -> list[str]:
    """Return the command to run before the restart, for all targets at once."""
    hints = list[str]()
    requests = [one["request"] for one in prepares if one["request"].get("prepare")]
    if requests:
        most_cpus = max((one.get("cpuNum") or 0 for one in requests), default=0)
        most_memory = max((one.get("memorySize") or 0 for one in requests), default=0)
        cpus = f" --max-cpus {most_cpus}" if most_cpus else ""
        memory = f" --max-memory {_size_option(most_memory)}" if most_memory else ""
        hints.append("  before the restart, with --diff to see the change and with --apply to make it:")
        # On a line of its own, to be copied.
        hints.append(f"    kvmagentctl ready {vm} --prepare{cpus}{memory} --diff")
    if len(requests) < len(prepares):
        hints.append('  before a restart that removes something: the request under "prepare" in the plan\'s --json')
    return hints


def _size_option(size_bytes: int) -> str:
    """Return a size as an option takes it, no less than it is."""
    return f"{size_bytes // GIB}G" if size_bytes % GIB == 0 else f"{-(-size_bytes // MIB)}M"


def render_plans(vms: Iterable[Json]) -> list[str]:
    """Return the plans of many VMs: a row for each target of each."""

    def rows(vm: Json) -> list[list[str]]:
        if "plans" not in vm:
            return [["-", paint(str(vm.get("errorCode")), BAD), "-", "-"]]
        return [
            [
                _target(plan),
                _verdict(plan),
                _took_lately(plan),
                ", ".join(one["code"] for one in plan["reasons"]) or "-",
            ]
            for plan in vm["plans"]
        ]

    vms = list(vms)
    flat = [{**vm, "row": row} for vm in vms for row in rows(vm)]
    reasons = [reason for vm in vms for plan in vm.get("plans", ()) for reason in plan["reasons"]]
    return [
        *_vm_table(
            ("VM", "TARGET", "VERDICT", ">TOOK LATELY", "WHY"),
            flat,
            lambda vm: [str(vm.get("name") or vm["vmUuid"]), *vm["row"]],
        ),
        *_explain_codes(WARN, reasons),
        *_explain_failures(vms),
    ]


def _explain_failures(vms: Iterable[Json]) -> list[str]:
    """Return what went wrong with VMs, of each code the first."""
    failures = ({"message": vm.get("error"), **vm, "code": vm["errorCode"]} for vm in vms if vm.get("errorCode"))
    return _explain_codes(BAD, failures)


def _explain_codes(colour: str, problems: Iterable[Json]) -> list[str]:
    """Return each code once, in words: of many VMs those of the first."""
    first: dict[str, Json] = {}
    for problem in problems:
        first.setdefault(problem["code"], problem)
    return [line for problem in first.values() for line in _problem("reason", colour, problem)]


def _target(plan: Json) -> str:
    target = plan["target"]
    cpus = None if target.get("cpuNum") is None else _count(target["cpuNum"], "vCPU")
    size = None if target.get("memorySize") is None else format_size(target["memorySize"])
    return ", ".join(filter(None, (cpus, size)))


def _verdict(plan: Json) -> str:
    verdict = str(plan["verdict"])
    told = f" {format_size(plan['memorySize'])}" if verdict in ("live-rounded", "live-partial") else ""
    return paint(verdict, _VERDICT_COLOURS.get(verdict, BOLD)) + told


def _took_lately(plan: Json) -> str:
    took = plan["took"]
    return (
        "-" if took is None else f"{_duration(took['medianMs'] / 1000)}, at worst {_duration(took['worstMs'] / 1000)}"
    )


def render_preparations(vms: Iterable[Json], *, with_diff: bool) -> list[str]:
    """Return what was, or would be, prepared for many VMs; with the XML if requested."""
    vms = list(vms)

    def row(vm: Json) -> list[str]:
        outcome = str(vm.get("outcome") or vm.get("errorCode") or "failed")
        code = f" {vm['errorCode']}" if vm.get("errorCode") and vm.get("outcome") else ""
        changes = ", ".join(
            f"{one['field']} {_value(one['field'], one['former'])} to {_value(one['field'], one['prepared'])}"
            for one in vm.get("changes") or []
            if one["field"] != "numaCells"
        )
        return [
            str(vm.get("name") or vm["vmUuid"]),
            paint(outcome, _OUTCOME_COLOURS.get(outcome, BAD)) + code,
            changes or "-",
            "yes" if vm.get("restartRequired") else "-",
        ]

    lines = [*_vm_table(("VM", "OUTCOME", "CHANGES", "RESTART"), vms, row), *_explain_failures(vms)]
    for vm in vms if with_diff else ():
        if vm.get("diff"):
            lines += ["", str(vm.get("name") or vm["vmUuid"]), *render_diff(vm["diff"])]
    return lines


def _vm_row(vm: Json) -> list[str]:
    now = vm.get("after") or {}
    is_on = now.get("cpuNum") is not None
    cpus, memory = ("cpuNum", "memorySize") if is_on else ("configCpuNum", "configMemorySize")
    offline = vm.get("pluggedOffline") or {}
    guest_cpus, guest_memory = _number(now.get("guestCpuNum")), _size(now.get("guestMemorySize"))
    return [
        str(vm.get("name") or vm["vmUuid"]),
        str(vm.get("state") or "-"),
        _number(now.get(cpus)),
        _number(now.get("maxCpuNum")),
        paint(guest_cpus, WARN) if offline.get("cpuNum") else guest_cpus,
        _size(now.get(memory)),
        _size(now.get("maxMemorySize")),
        paint(guest_memory, WARN) if offline.get("memorySize") else guest_memory,
        _number(now.get("freeSlots")),
        _readiness(vm),
    ]


def _readiness(vm: Json) -> str:
    pending = paint(f", restart pending{_since(vm)}", WARN) if vm.get("restartRequired") else ""
    if vm.get("ready"):
        return paint("ready", GOOD) + pending
    if vm.get("atMaximum"):
        return paint("at its maximum", GOOD) + pending
    blockers = vm.get("blockers") or []
    if not blockers:
        return paint(str(vm.get("errorCode") or "not ready"), BAD)
    more = f" (+{len(blockers) - 1})" if len(blockers) > 1 else ""
    return paint(str(blockers[0]["code"]), WARN) + more + pending


def _since(vm: Json) -> str:
    since = vm.get("restartRequiredSince")
    return "" if since is None else f" since {datetime.fromtimestamp(since, UTC):%Y-%m-%d %H:%M} UTC"


def render_reply(reply: Json, *, removes: bool = False, asked: Iterable[str] = ()) -> list[str]:
    """Return a reply of any command: what became of it, and the numbers before and after.

    `removes`: it was to take something away. `asked` are the numbers that it was about, whose totals are told first.
    """
    outcome = str(reply.get("outcome") or ("done" if reply.get("success") else "failed"))
    name = reply.get("name") or reply.get("vmUuid") or "task"
    totals = _totals(reply, asked) if outcome not in ("refused", "planned") else ""
    lines = [f"{name}: {_outcome_words(outcome, removes=removes)}{totals}"]
    if outcome == "planned":
        steps = reply.get("steps") or []
        lines += [f"  {n}. {format_step(step)}" for n, step in enumerate(steps, 1)] or ["  nothing to do"]
    if outcome not in ("refused", "planned"):
        lines += _numbers(reply.get("before") or {}, reply.get("after") or {})
    lines += _rounding(reply)
    lines += _warnings(reply)
    lines += [
        f"  {paint('drift', WARN)}  {_label(one['field'])}: {_value(one['field'], one['live'])} running, "
        f"{_value(one['field'], one['config'])} in the definition"
        for one in reply.get("drift") or []
    ]
    return lines


def _totals(reply: Json, asked: Iterable[str]) -> str:
    """Return the totals of what was asked about, so that nobody takes a total for what was added."""
    now = reply.get("after") or {}
    told = []
    for name, config in (("cpuNum", "configCpuNum"), ("memorySize", "configMemorySize")):
        total = now.get(name) if now.get(name) is not None else now.get(config)
        if name in asked and total is not None:
            told.append(_count(total, "vCPU") if name == "cpuNum" else f"{format_size(total)} of memory")
    return f", {' and '.join(told)} in all" if told else ""


_REMOVED = {"online": "removed", "plugged": "removed, not confirmed by the guest", "pending": "removal pending"}


def _outcome_words(outcome: str, *, removes: bool) -> str:
    """Return an outcome as an operator says it: what was to leave is removed, not online."""
    colour = _OUTCOME_COLOURS.get(outcome, BOLD)
    return paint(_REMOVED.get(outcome, outcome) if removes else outcome, colour)


def _removes(command: str) -> bool:
    return command.startswith("HotUnplug")


def _numbers(before: Json, after: Json) -> list[str]:
    """Return a table of what was and is, as far as anything is known."""
    rows = []
    for title, live, config, guest, maximum, show in (
        ("vCPUs", "cpuNum", "configCpuNum", "guestCpuNum", "maxCpuNum", _number),
        ("memory", "memorySize", "configMemorySize", "guestMemorySize", "maxMemorySize", _size),
    ):
        cells = [show(before.get(live)), *(show(after.get(name)) for name in (live, guest, config, maximum))]
        if set(cells) != {"-"}:
            rows.append([f"  {title}", *cells])
    if _moved_balloon(before, after):
        rows.append(["  balloon leaves", *(_size(numbers["balloonSize"]) for numbers in (before, after)), "", "", ""])
    slots = [_number(numbers.get("freeSlots")) for numbers in (before, after)]
    if slots != ["-", "-"]:
        rows.append(["  free slots", *slots, "", "", ""])
    return format_table(("", ">WAS", ">NOW", ">IN THE GUEST", ">AT NEXT START", ">AT MOST"), rows) if rows else []


def _moved_balloon(before: Json, after: Json) -> bool:
    """Whether the balloon took or gave memory: it counts dimms as soon as they are attached, and moves without them."""
    was, now = before.get("balloonSize"), after.get("balloonSize")
    if was is None or now is None:
        return False
    return bool(now - was not in (0, (after.get("memorySize") or 0) - (before.get("memorySize") or 0)))


def _rounding(reply: Json) -> list[str]:
    requested, aligned = reply.get("requested"), reply.get("aligned")
    if requested is None or aligned is None or requested == aligned:
        return []
    return [f"  {paint('rounded', WARN)}  from {_exactly(requested)} to {_exactly(aligned)}"]


def render_readiness(reply: Json, *, with_diff: bool) -> list[str]:
    """Return what ReadyForHotplug says: room, everything in the way, and what prepare changes."""
    name = reply.get("name") or reply["vmUuid"]
    if reply["ready"]:
        lines = [f"{name}: {paint('ready', GOOD)}"]
    elif reply.get("atMaximum"):
        lines = [
            f"{name}: {paint('at its maximum', GOOD)}; more needs --prepare --apply, and the VM powered off and on"
        ]
    else:
        after = "ready after a restart" if reply["readyAfterRestart"] else "nor after a restart"
        lines = [f"{name}: {paint('not ready', BAD)}, {after}"]
    if room := reply.get("headroom"):
        methods = ", ".join(room["memoryMethods"]) or "no way to add any"
        lines += [
            prose(
                "  room for  ",
                f"{_count(room['cpuNum'], 'vCPU')}; {format_size(room['memorySize'])} in "
                f"{_count(room['slots'], 'slot')}, multiples of {format_size(room['memoryGranularity'])} ({methods})",
            ),
            f"  can free  {_count(room['removableCpuNum'], 'vCPU')}; {format_size(room['removableMemorySize'])}",
        ]
    lines += [line for blocker in reply.get("blockers") or [] for line in _problem("blocker", BAD, blocker)]
    lines += _warnings(reply)
    return lines + _preparation(reply, with_diff=with_diff)


def _preparation(reply: Json, *, with_diff: bool) -> list[str]:
    lines: list[str] = []
    if changes := reply.get("changes"):
        verb = "would change" if reply["outcome"] == "planned" else "changed"
        rows = [
            [f"  {_label(one['field'])}", _value(one["field"], one["former"]), _value(one["field"], one["prepared"])]
            for one in changes
        ]
        lines += ["", f"prepare {verb}, for the next start:", *format_table(("  WHAT", "WAS", "IS"), rows)]
    elif reply.get("diff") is not None:
        lines += ["", "the persistent definition is prepared: nothing to change"]
    for one in reply.get("clamped") or []:
        asked, prepared = (_value(one["field"], one[key]) for key in ("asked", "prepared"))
        why = f"{_label(one['field'])}: {prepared} instead of {asked}: {one['why']}"
        lines.append(prose(f"  {paint('limited', WARN)}  ", why))
    if with_diff and reply.get("diff"):
        lines += ["", *render_diff(reply["diff"])]
    if reply.get("outcome") == "configured" and reply.get("restartRequired"):
        lines += ["", "Power the VM off and start it again: a reboot inside the guest does not do it."]
    elif reply.get("outcome") == "planned" and changes:
        lines += [
            "",
            f"Nothing was changed. Add --apply to change it{'' if with_diff else ', or --diff to see the XML'}.",
        ]
    return lines


def render_diff(diff: str) -> list[str]:
    """Return a unified diff in its colours."""
    colours = {"+": GOOD, "-": BAD, "@": DIM}
    return [paint(line, colours[line[0]]) if line[:1] in colours else line for line in diff.splitlines()]


def render_tasks(tasks: Iterable[Json], now: float, *, wide: bool = False, chosen: bool = False) -> list[str]:
    """Return a table of tasks; `now` is seconds since the epoch. `wide`: ids whole, not as far as they differ.

    `chosen`: they were filtered, so that where there are none there may be others.
    """
    tasks = list(tasks)
    ids = [task["taskUuid"] for task in tasks]
    shown = ids if wide else _shorten(ids)
    rows = [
        [
            short,
            task["command"],
            task["vm"],
            paint(task["state"], _STATE_COLOURS[task["state"]]) if task["state"] in _STATE_COLOURS else task["state"],
            _outcome(task),
            _when(task["acceptedAt"]),
            f"{_duration(now - task['acceptedAt'])} ago" if task["acceptedAt"] else "-",
            _took(task),
            task.get("caller") or "-",
            *([task.get("client") or "-", task.get("vmUuid") or "-"] if wide else []),
        ]
        for short, task in zip(shown, tasks, strict=True)
    ]
    headers = (*_TASK_COLUMNS, *((Column("CLIENT", 9, "from"), Column("UUID", 9, "UUID")) if wide else ()))
    return format_table(headers, rows) if rows else ["no task matches these options" if chosen else "no tasks"]


_TASK_COLUMNS: tuple[str | Column, ...] = (
    Column("TASK"),
    Column("COMMAND", 1),
    Column("VM"),
    Column("STATE", 6),
    Column("OUTCOME", 2),
    Column("ACCEPTED (UTC)", 3, "accepted"),
    Column(">AGE", 5),
    Column(">TOOK", 7, "took"),
    Column("CALLER", 4, "by"),
)
# So much of an id is always told.
_SHORT_ID = 8


def _shorten(ids: list[str]) -> list[str]:
    """Return ids as far as they differ from each other."""
    length = _SHORT_ID
    while len({one[:length] for one in ids}) < len(set(ids)):
        length += 1
    return [one[:length] for one in ids]


def render_history(changes: Iterable[Json], now: float, *, wide: bool = False) -> list[str]:
    """Return what changed a VM, newest first."""
    changes = list(changes)
    ids = [change["taskUuid"] for change in changes]
    rows = [
        [
            _when(change["finishedAt"]),
            f"{_duration(now - change['finishedAt'])} ago",
            _changed(change),
            _outcome(change),
            change["caller"] or "-",
            short,
            *([change["command"], change["client"], change["vm"]] if wide else []),
        ]
        for short, change in zip(ids if wide else _shorten(ids), changes, strict=True)
    ]
    headers = (
        *_HISTORY_COLUMNS,
        *((Column("COMMAND", 7), Column("CLIENT", 8, "from"), Column("VM", 9)) if wide else ()),
    )
    return format_table(headers, rows) if rows else ["no changes to this VM"]


_HISTORY_COLUMNS: tuple[str | Column, ...] = (
    Column("WHEN (UTC)"),
    Column(">AGE", 3),
    Column("CHANGE"),
    Column("OUTCOME", 1),
    Column("BY", 2, "by"),
    Column("TASK", 4, "task"),
)


def _changed(change: Json) -> str:
    """Return "vCPUs 2 to 4", or what was requested if nothing has changed."""
    before, after = change["before"], change["after"]
    moved = [
        f"{_label(name)} {_value(name, before.get(name))} to {_value(name, after.get(name))}"
        for name in dict.fromkeys([*before, *after])
        if before.get(name) != after.get(name) and not _follows(name, before, after)
    ]
    if moved:
        return ", ".join(moved)
    asked = [f"{_label(name)} {_value(name, value)}" for name, value in change["asked"].items()]
    return f"none; requested: {', '.join(asked)}" if asked else "none"


def _follows(name: str, before: Json, after: Json) -> bool:
    """Return whether a number of the next start only became what the running VM's became."""
    live = name.removeprefix("config")
    live = live[0].lower() + live[1:]
    return live != name and after.get(name) == after.get(live) and before.get(live) != after.get(live)


def view_cancelled(answer: Json) -> list[str]:
    """Return what became of a task that was to be cancelled."""
    return [f"{answer['taskUuid']}: {paint('cancelled', GOOD)}, its VM was not touched"]


def _when(at: float | None) -> str:
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S}" if at else "-"


def render_change(task: Json, at: str) -> str:
    """Return one line of `tasks --follow`: a task in its new state, and when that was seen."""
    outcome = f" {_outcome(task)}" if task["outcome"] else ""
    took = f" in {_took(task)}" if task["finishedAt"] else ""
    trouble = f", callback: {task['delivery']['error']}" if task["delivery"]["error"] else ""
    state = paint(task["state"], _STATE_COLOURS.get(task["state"], BOLD))
    return f"{at}  {task['taskUuid']}  {task['command']} {task['vm']}  {state}{outcome}{took}{trouble}"


def render_task(task: Json, now: float) -> list[str]:
    """Return one task, whole."""
    request = " ".join(f"{name}={_value(name, value)}" for name, value in task["request"].items())
    by = f"by {task['caller']} " if task.get("caller") else ""
    accepted = (
        f"{_when(task['acceptedAt'])} UTC, {_duration(now - task['acceptedAt'])} ago, {by}from {task['client']}"
        if task["acceptedAt"]
        else "-"
    )
    delivery = task["delivery"]
    callback = f"{delivery['url']}  attempts={delivery['attempts']}"
    rows = [
        ["task", task["taskUuid"]],
        ["command", f"{task['command']}  {request}"],
        ["state", task["state"]],
        ["accepted", accepted],
        ["took", _took(task)],
        ["callback", callback + (f"  {paint(delivery['error'], WARN)}" if delivery["error"] else "")],
    ]
    lines = format_table(("", ""), rows)[1:]
    if task["steps"]:
        lines += ["", *(f"  {n}. {format_step(step)}" for n, step in enumerate(task["steps"], 1))]
    if reply := task["reply"]:
        is_readiness = "ready" in reply and not reply.get("error")
        lines += ["", *_view_task_reply(task, reply, is_readiness=is_readiness)]
        if reply.get("error"):
            lines += _problem(
                "error", BAD, {"code": reply["errorCode"], "message": reply["error"], "remedy": reply["remedy"]}
            )
    return lines


def _view_task_reply(task: Json, reply: Json, *, is_readiness: bool) -> list[str]:
    if is_readiness:
        return render_readiness(reply, with_diff=True)
    return render_reply(reply, removes=_removes(task["command"]), asked=task["request"])


def format_step(step: Json) -> str:
    """Return one step on a line: its name, what it is about, how long it took."""
    apart = ("step", "elapsedMs", "cutOff", "problem", "shape")
    shown = {name: value for name, value in step.items() if name not in apart}
    words = [str(step["step"]), *(f"{name}={_value(name, value)}" for name, value in shown.items())]
    if step.get("elapsedMs") is not None:
        words.append(paint(f"{_duration(step['elapsedMs'] / 1000)}", DIM))
    elif step.get("cutOff"):
        words.append(paint("interrupted", WARN))
    problem = step.get("problem")
    if problem:
        words.append(paint(problem if isinstance(problem, str) else problem["code"], WARN))
    return " ".join(words)


def _warnings(reply: Json) -> list[str]:
    return [line for warning in reply.get("warnings") or [] for line in _problem("warning", WARN, warning)]


def _problem(kind: str, colour: str, problem: Json) -> list[str]:
    restart = " (needs a restart)" if problem.get("needsRestart") else ""
    message = in_options(problem["message"])
    lines: list[str] = [prose(f"  {paint(kind, colour)}  ", f"{problem['code']}: {message}{restart}")]
    if problem["remedy"]:
        lines.append(prose(f"  {' ' * len(kind)}  {paint('remedy', DIM)}: ", in_options(problem["remedy"])))
    return lines


def _outcome(task: Json) -> str:
    outcome = task["outcome"]
    if not outcome:
        return "-"
    code = f" {task['errorCode']}" if task.get("errorCode") else ""
    return _outcome_words(outcome, removes=_removes(task["command"])) + code


def _took(task: Json) -> str:
    if not task["startedAt"] or not task["finishedAt"]:
        return "-"
    return _duration(task["finishedAt"] - task["startedAt"])


def _duration(seconds: float) -> str:
    """Return a duration in its largest unit: "8 ms", "3.2 s", "5 min", "2 h", "9 d"."""
    if seconds < 1:
        return f"{max(0.0, seconds) * 1000:.0f} ms"
    for below, unit, digits in ((60, 1, 1), (3600, 60, 0), (2 * 86400, 3600, 0)):
        if seconds < below:
            return f"{seconds / unit:.{digits}f} {'s' if unit == 1 else 'min' if unit == 60 else 'h'}"
    return f"{seconds / 86400:.0f} d"


def _label(field: str) -> str:
    """Return a field of the wire in words: `maxCpuNum` is "max vCPUs"."""
    words = _CAPITAL.sub(lambda found: f" {found[0].lower()}", field)
    for ours, said in _LABELS.items():
        words = words.replace(ours, said)
    return words


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _number(value: int | None) -> str:
    return "-" if value is None else str(value)


def _size(value: int | None) -> str:
    return "-" if value is None else format_size(value)


def _exactly(size_bytes: int) -> str:
    """Return a size of which the last byte counts."""
    shown = format_size(size_bytes)
    return f"{shown} ({size_bytes} bytes)" if "." in shown else shown


def _value(name: str, value: Any) -> str:
    """Return a value for people: a size where its name says that it is one, ids as the kernel writes them."""
    if value is None or value == {}:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and name.endswith(("Size", "Bytes")):
        return format_size(value).replace(" ", "")
    if isinstance(value, list) and name in ("ids", "blocks", "known"):
        return format_ids(tuple(value)) or "none"
    if isinstance(value, list):
        return ":".join(str(one) for one in value)
    if isinstance(value, dict):
        return " ".join(f"{key}:{_value(key, one)}" for key, one in value.items())
    return str(value)
