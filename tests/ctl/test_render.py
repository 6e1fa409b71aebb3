"""What people read, word by word; and that nothing which a command declares or answers is left out."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import click
import pytest

from kvmagent.cli.ctl.changes import find, names
from kvmagent.cli.ctl.declared import find_commands
from kvmagent.cli.ctl.exits import MEANINGS, Exit, exit_of
from kvmagent.cli.ctl.local import find_local_target
from kvmagent.cli.ctl.main import make_cli
from kvmagent.cli.ctl.render import format_step, render_readiness, render_reply, render_task, render_tasks, render_vms
from kvmagent.cli.ctl.terminal import format_table, paint
from kvmagent.model.command import Plugin
from kvmagent.model.reply import SUCCESSFUL, Outcome
from kvmagent_plugins.vm_plugin import PLUGIN

MIB = 2**20


def plain(lines: list[str]) -> list[str]:
    return [click.unstyle(line) for line in lines]


def test_columns_are_aligned_whatever_their_colour() -> None:
    rows = [["db-7", paint("12", "red")], ["a-longer-name", "3"]]
    assert plain(format_table(("VM", ">VCPUS"), rows)) == [
        "VM             VCPUS",
        "db-7              12",
        "a-longer-name      3",
    ]


def test_vms_that_hang_that_are_off_and_that_leave_cpus_offline_are_told() -> None:
    vms: list[dict[str, Any]] = [
        {"vmUuid": "7e1f", "success": False, "error": "no answer", "errorCode": "LIBVIRT_UNAVAILABLE"},
        {
            "vmUuid": "1", "name": "off", "state": "shutoff", "ready": False,
            "after": {"configCpuNum": 2, "maxCpuNum": 4, "configMemorySize": 512 * MIB},
            "blockers": [{"code": "VM_NOT_RUNNING"}],
        },
        {"vmUuid": "3", "name": "full", "state": "running", "atMaximum": True, "blockers": [], "restartRequired": True},
        {
            "vmUuid": "2", "name": "db-7", "state": "running", "ready": True, "blockers": [],
            "pluggedOffline": {"cpuNum": 2, "memorySize": 0, "ballooned": 0},
            "after": {"cpuNum": 4, "maxCpuNum": 8, "guestCpuNum": 2, "memorySize": 1536 * MIB, "freeSlots": 3,
                      "maxMemorySize": 8192 * MIB, "guestMemorySize": 1470000000},
        },
    ]  # fmt: skip
    shown = render_vms(vms)
    assert plain(shown) == [
        "VM    STATE    VCPUS  MAX  GUEST    MEMORY    MAX    GUEST  SLOTS  HOTPLUG",
        "7e1f  -            -    -      -         -      -        -      -  LIBVIRT_UNAVAILABLE",
        "db-7  running      4    8      2  1536 MiB  8 GiB  1.4 GiB      3  ready",
        "full  running      -    -      -         -      -        -      -  at its maximum, restart pending",
        "off   shutoff      2    4      -   512 MiB      -        -      -  VM_NOT_RUNNING",
    ]
    assert paint("2", "yellow") in shown[2], "plugged, and offline in the guest"
    assert paint("1.4 GiB", "yellow") not in shown[2]


def test_a_partial_reply_tells_how_far_it_came_and_what_differs() -> None:
    reply = {
        "vmUuid": "db-7", "outcome": "partial", "success": False, "error": "the disk is full", "errorCode": "X",
        "remedy": "Make room.", "before": {"cpuNum": 1, "freeSlots": 4}, "after": {"cpuNum": 3, "freeSlots": 4},
        "requested": 130 * MIB + 1, "aligned": 256 * MIB,
        "drift": [{"field": "maxMemorySize", "live": 1024 * MIB, "config": None}],
    }  # fmt: skip
    assert plain(render_reply(reply)) == [
        "db-7: partial",
        "              WAS  NOW  IN THE GUEST  AT NEXT START  AT MOST",
        "  vCPUs         1    3             -              -        -",
        "  free slots    4    4",
        "  rounded  from 130.0 MiB (136314881 bytes) to 256 MiB",
        "  drift  max memory: 1GiB running, none in the definition",
    ]


@pytest.mark.parametrize(
    ("was", "now", "shown"),
    [
        ((1024, 1024), (1024, 512), True),
        ((1024, 512), (1024, 800), True),
        ((1024, 1024), (1536, 1536), False),
        ((1024, 1024), (1024, 1024), False),
        ((1024, 512), (1536, 1024), False),
        ((1024, 512), (1536, 1536), True),
        ((1024, None), (1024, 512), False),
    ],
)
def test_what_the_balloon_took_or_gave_is_shown(
    was: tuple[int, int | None], now: tuple[int, int], *, shown: bool
) -> None:
    """Dimms move its size, too: that is shown as memory."""

    def numbers(memory: int, balloon: int | None) -> dict[str, Any]:
        return {"memorySize": memory << 20, "balloonSize": None if balloon is None else balloon << 20}

    def size(mib: int | None) -> list[str]:
        return ["1", "GiB"] if mib == 1024 else [str(mib), "MiB"]

    reply = {"success": True, "outcome": "online", "vmUuid": "db-7", "before": numbers(*was), "after": numbers(*now)}
    lines = [line.split() for line in plain(render_reply(reply)) if "balloon" in line]
    assert [line[2:6] for line in lines] == ([[*size(was[1]), *size(now[1])]] if shown else [])


def test_readiness_tells_room_blockers_and_limits() -> None:
    reply = {
        "vmUuid": "db-7", "ready": False, "readyAfterRestart": False, "outcome": "planned", "diff": "",
        "headroom": {"cpuNum": 1, "memorySize": 0, "slots": 1, "removableCpuNum": 0, "removableMemorySize": 128 * MIB,
                     "memoryGranularity": 128 * MIB, "memoryMethods": []},
        "blockers": [{"code": "NO_ACPI", "message": "no ACPI", "remedy": "Add it.", "needsRestart": True}],
        "warnings": [{"code": "GUEST_CPU_OFFLINE", "message": "2 vCPUs", "remedy": "Online them."}],
        "changes": [{"field": "numaCells", "former": {}, "prepared": {"0": "0-7"}},
                    {"field": "acpi", "former": False, "prepared": True}],
        "clamped": [{"field": "maxMemorySize", "asked": 2**50, "prepared": 2**40, "why": "40 address bits"}],
    }  # fmt: skip
    assert plain(render_readiness(reply, with_diff=True)) == [
        "db-7: not ready, nor after a restart",
        "  room for  1 vCPU; 0 B in 1 slot, multiples of 128 MiB (no way to add any)",
        "  can free  0 vCPUs; 128 MiB",
        "  blocker  NO_ACPI: no ACPI (needs a restart)",
        "           remedy: Add it.",
        "  warning  GUEST_CPU_OFFLINE: 2 vCPUs",
        "           remedy: Online them.",
        "",
        "prepare would change, for the next start:",
        "  WHAT        WAS   IS",
        "  NUMA cells  none  0:0-7",
        "  ACPI        no    yes",
        "  limited  max memory: 1TiB instead of 1024TiB: 40 address bits",
        "",
        "Nothing was changed. Add --apply to change it.",
    ]
    last = plain(render_readiness(reply, with_diff=False))[-1]
    assert last == "Nothing was changed. Add --apply to change it, or --diff to see the XML."


def test_tasks_tell_how_long_ago_and_how_long() -> None:
    task: dict[str, Any] = {
        "taskUuid": "9f1c", "command": "HotPlugCpu", "vm": "db-7", "state": "running", "outcome": None,
        "acceptedAt": 1000.0, "startedAt": 1000.0, "finishedAt": None, "client": "10.0.0.5", "caller": "token:zstack",
        "delivery": {"url": "http://10.0.0.5/", "attempts": 0, "error": None},
    }  # fmt: skip
    refused = {
        "taskUuid": "9f1d",
        "state": "given_up",
        "outcome": "refused",
        "finishedAt": 1002.5,
        "errorCode": "DRIFT",
    }
    assert plain(render_tasks([task, {**task, **refused}], 1000 + 3 * 86400)) == [
        "TASK  COMMAND     VM    STATE     OUTCOME        ACCEPTED (UTC)           AGE   TOOK  CALLER",
        "9f1c  HotPlugCpu  db-7  running   -              1970-01-01 00:16:40  3 d ago      -  token:zstack",
        "9f1d  HotPlugCpu  db-7  given_up  refused DRIFT  1970-01-01 00:16:40  3 d ago  2.5 s  token:zstack",
    ]
    assert plain(render_tasks([], 0)) == ["no tasks"]
    assert plain(render_tasks([], 0, chosen=True)) == ["no task matches these options"]
    whole = {**task, "request": {"vmUuid": "db-7", "memorySize": 2048 * MIB}, "reply": None,
             "steps": [{"step": "SetVcpus", "count": 2, "elapsedMs": None}]}  # fmt: skip
    assert plain(render_task(whole, 1090.0)) == [
        "task      9f1c",
        "command   HotPlugCpu  vmUuid=db-7 memorySize=2GiB",
        "state     running",
        "accepted  1970-01-01 00:16:40 UTC, 2 min ago, by token:zstack from 10.0.0.5",
        "took      -",
        "callback  http://10.0.0.5/  attempts=0",
        "",
        "  1. SetVcpus count=2",
    ]


def test_a_step_that_failed_says_with_what() -> None:
    step = {
        "step": "OnlineGuestVcpus",
        "ids": [1, 2, 5],
        "elapsedMs": 61000.0,
        "problem": {"code": "GUEST_CPU_OFFLINE"},
    }
    assert click.unstyle(format_step(step)) == "OnlineGuestVcpus ids=1-2,5 1 min GUEST_CPU_OFFLINE"


@pytest.mark.parametrize("outcome", get_args(Outcome))
def test_every_outcome_has_an_exit_status_that_agrees_with_success(outcome: Outcome) -> None:
    status = exit_of({"outcome": outcome, "success": outcome in SUCCESSFUL})
    assert status in MEANINGS
    assert (status in (Exit.REACHED, Exit.PLUGGED)) == (outcome in SUCCESSFUL)


def test_what_a_plugin_of_others_answers_is_judged_by_its_success() -> None:
    assert (exit_of({"success": True}), exit_of({"success": False})) == (Exit.REACHED, Exit.FAILED)
    assert plain(render_reply({"success": True})) == ["task: done"]


@pytest.mark.parametrize("command", [command for command in PLUGIN.commands if command.subcommand])
def test_every_field_of_a_request_can_be_given(command: Any) -> None:
    subcommand = find(command.subcommand)
    assert subcommand is not None
    offered = {param.name for param in subcommand.params}
    assert set(command.request.__struct_fields__) - offered <= {"late_callback"}
    for param in subcommand.params:
        assert isinstance(param, click.Argument) or (param.help or "").strip(". "), f"{param.name} says nothing"


def test_a_command_of_another_plugin_has_its_subcommand() -> None:
    theirs = replace(PLUGIN.commands[0], name="Freeze", subcommand="freeze")
    plugin = Plugin(name="theirs", commands=(theirs, replace(theirs, name="Thaw", subcommand="")))
    assert find_commands([PLUGIN, plugin])["freeze"] is theirs
    assert "" not in find_commands([plugin])


def test_the_commands_of_a_zstack_server_are_not_offered() -> None:
    assert names() == ["plug-cpu", "plug-memory", "plug", "unplug-cpu", "unplug-memory", "ready"]


@pytest.mark.parametrize(
    ("conf", "target"),
    [(None, ("unix:///run/kvmagent/kvmagent.sock",)), ("[http]\nprot = 1\n", ("unix:///run/kvmagent/kvmagent.sock",)),
     ("[http]\nhost = ::\nsocket =\n[security]\ntls_cert = /a\nclient_ca = /c\n", ("https://[::1]:7070", "/c"))],
)  # fmt: skip
def test_the_local_agent_is_where_the_configuration_says(
    tmp_path: Path, conf: str | None, target: tuple[str, ...]
) -> None:
    file = tmp_path / "kvmagent.conf"
    if conf is not None:
        file.write_text(conf)
    assert tuple(find_local_target(file).values()) == target


def test_who_may_not_look_into_the_configuration_asks_the_agent_at_its_usual_place(tmp_path: Path) -> None:
    """The package's directory is closed to all but the agent's group: whoever else asks is told by the socket."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    code = (
        "import pathlib, sys; from kvmagent.cli.ctl.local import *; print(find_local_target(pathlib.Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", code, str(closed / "kvmagent.conf")]
    if os.getuid() == 0:
        command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *command]
    else:
        closed.chmod(0)
    for directory in tmp_path.parents:
        if os.getuid() == 0 and directory.stat().st_mode & 0o001 == 0:
            directory.chmod(0o755)
    tmp_path.chmod(0o755)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "{'url': 'unix:///run/kvmagent/kvmagent.sock'}\n", done.stderr


def test_the_parser_can_be_read_as_data() -> None:
    cli = make_cli()
    told = cli.to_info_dict(click.Context(cli))
    assert {"status", "vms", "tasks", "task", "doctor", "config", "openapi", *names()} <= set(told["commands"])
    assert all(re.search(r"\w", command["help"]) for command in told["commands"].values())
    listed = cli.get_help(click.Context(cli, terminal_width=80)).partition("Commands:")[2].partition("Exit status:")[0]
    assert "support-bundle" in listed
    assert "..." not in listed, "a summary that is too long is cut off"


def test_a_step_that_was_cut_off_is_told_apart_from_one_under_way_and_from_one_that_ended() -> None:
    step = {"step": "SetVcpus", "count": 3, "target": "both"}
    shown = {
        name: click.unstyle(format_step(step | fields))
        for name, fields in (
            ("cut off", {"elapsedMs": None, "cutOff": True}),
            ("under way", {"elapsedMs": None, "cutOff": False}),
            ("ended", {"elapsedMs": 8.0}),
        )
    }
    assert shown == {
        "cut off": "SetVcpus count=3 target=both interrupted",
        "under way": "SetVcpus count=3 target=both",
        "ended": "SetVcpus count=3 target=both 8 ms",
    }
