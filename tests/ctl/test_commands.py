"""What each subcommand says and how it ends, against a real agent."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvmagent.settings import sample_conf
from tests.ctl.ctl import Ctl, interrupt, settled
from tests.lab.agent import AgentProcess, find_free_port
from tests.lab.processes import wait_for
from tests.lab.server import ManagementServer

ESCAPE = "\033["


def test_plugs_and_reads_the_reply_from_the_agent(ctl: Ctl, agent: AgentProcess) -> None:
    done = ctl("plug-cpu", "db-7", "2", "--json")
    assert done.status == 3, "plugged: the test driver has no guest that could confirm it"
    assert (done.json["outcome"], done.json["after"]["cpuNum"]) == ("plugged", 2)
    task = settled(agent, done.json["taskUuid"])
    assert task["delivery"] == {"url": "none", "attempts": 0, "error": None}
    assert task["reply"] == {name: value for name, value in done.json.items() if name != "taskUuid"}
    again = ctl("plug-cpu", "db-7", "2")
    assert (again.status, again.out.splitlines()[0], again.err) == (0, "db-7: unchanged, 2 vCPUs in all", "")


def test_a_reply_shows_what_was_and_what_is(ctl: Ctl) -> None:
    ctl("plug-cpu", "db-7", "2")
    done = ctl("plug-cpu", "db-7", "3")
    assert done.status == 3
    lines = done.out.splitlines()
    assert lines[:5] == [
        "db-7: plugged, 3 vCPUs in all",
        "                  WAS      NOW  IN THE GUEST  AT NEXT START  AT MOST",
        "  vCPUs             2        3             -              3        4",
        "  memory      256 MiB  256 MiB             -        256 MiB    4 GiB",
        "  free slots       16       16",
    ]
    assert lines[5].startswith("  warning  GUEST_AGENT_DISCONNECTED: ")
    assert lines[6].startswith("           remedy: Install and start qemu-ga in the guest.")


def test_a_refusal_is_one_line_with_its_remedy(ctl: Ctl) -> None:
    done = ctl("plug-cpu", "db-7", "99")
    assert (done.status, done.out) == (1, "")
    assert done.err == (
        "kvmagentctl: CPU_ABOVE_MAXIMUM: 99 vCPUs requested, the running definition allows at most 4; "
        "remedy: Request no more than the maximum, or raise <vcpu> (and the topology) in the persistent definition and "
        "power the VM off and on.\n"
    )


def test_a_dry_run_shows_the_plan_and_changes_nothing(ctl: Ctl, agent: AgentProcess) -> None:
    before = agent.get("/vms/db-7").body["after"]
    done = ctl("plug-cpu", "db-7", "4", "--dry-run")
    assert done.status == 0
    assert done.out.splitlines()[:2] == ["db-7: planned", "  1. SetVcpus count=4 target=both"]
    assert "  WAS  " not in done.out
    memory = ctl("plug-memory", "db-7", "0.75GiB", "--dry-run", "--json").json
    assert (memory["outcome"], memory["requested"]) == ("planned", 768 * 2**20)
    assert ctl("plug", "db-7", "4", "1G", "--dry-run").status == 0
    assert agent.get("/vms/db-7").body["after"] == before


def test_vms_are_a_table_with_the_first_blocker(ctl: Ctl, agent: AgentProcess) -> None:
    done = ctl("vms")
    assert done.status == 0
    header, *rows = done.out.splitlines()
    assert header.split() == ["VM", "STATE", "VCPUS", "MAX", "GUEST", "MEMORY", "MAX", "GUEST", "SLOTS", "HOTPLUG"]
    assert [row.split()[0] for row in rows] == ["db-7", "old"]
    first = agent.get("/vms/old").body["blockers"][0]["code"]
    assert rows[1].endswith(f"  {first}")
    assert len({row.index("running") for row in rows} | {header.index("STATE")}) == 1, "aligned"
    assert {vm["name"] for vm in ctl("vms", "--json").json["vms"]} == {"db-7", "old"}
    assert ctl("vms", "--pending-restart").out == "none of 2 VMs needs a restart\n"


def test_ready_tells_every_blocker_and_prepares_only_when_told_to(ctl: Ctl) -> None:
    done = ctl("ready", "old")
    assert done.status == 7
    assert done.out.startswith("old: not ready, ")
    assert "blocker  NO_MAX_MEMORY: " in done.out
    assert done.out.count("blocker  ") + done.out.count("warning  ") == done.out.count("remedy: ")

    preview = ctl("ready", "old", "--prepare", "--max-cpus", "8", "--max-memory", "8G", "--slots", "4", "--diff")
    assert preview.status == 0
    assert re.search(r"^  max memory +none +8GiB$", preview.out, re.MULTILINE)
    assert '+  <maxMemory slots="4" unit="KiB">8388608</maxMemory>' in preview.out.splitlines()
    assert preview.out.endswith("\nNothing was changed. Add --apply to change it.\n")
    assert ctl("ready", "old", "--json").json["after"]["maxMemorySize"] is None

    applied = ctl("ready", "old", "--apply", "--max-memory", "8G", "--json")
    assert (applied.status, applied.json["outcome"], applied.json["restartRequired"]) == (0, "configured", True)
    assert ctl("ready", "old", "--prepare").out.endswith("the persistent definition is prepared: nothing to change\n")
    assert [vm["name"] for vm in ctl("vms", "--pending-restart", "--json").json["vms"]] == ["old"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("plug-memory", "db-7", "512"), "512 has no unit: write 512M for MiB, or 512B for bytes"),
        (("plug-memory", "db-7", "5X"), "'5X' is not a size: write a number and a unit, as in 4G, 1.5GiB or 512MiB"),
        (("plug-cpu", "db-7", "many"), "'many' is not a valid integer range"),
        (("plug-cpu", "", "2"), "Invalid value for 'VM': it is empty; remedy: See kvmagentctl plug-cpu --help."),
        (("log", ""), "Invalid value for 'VM': it is empty"),
        (("plan", "a/b", "--cpus", "2"), "'a/b' cannot be a VM's name or UUID"),
        (("ready", "db-7", "--prepare", "--max-cpus", "9000"), "for '--max-cpus': 9000 is not in the range"),
        (("ready", "--all", "--prepare", "--max-memory", "4"), "for '--max-memory': 4 has no unit"),
        (("plug-cpu", "db-7"), "Missing argument 'CPUS'; remedy: See kvmagentctl plug-cpu --help."),
        (
            ("ready", "db-7", "--slots", "4"),
            "--max-cpus, --max-memory, --slots, --memory-device, --free-page-reporting are for --prepare",
        ),
        (("ready", "db-7", "--apply", "--dry-run"), "--apply and --dry-run contradict each other"),
        (("plug-everything", "db-7"), "No such command 'plug-everything'"),
        (("--url", "node1:7070", "status"), "'node1:7070' is not an agent's URL"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_wrong_command_line_sends_nothing(
    ctl: Ctl, agent: AgentProcess, arguments: tuple[str, ...], problem: str
) -> None:
    newest = agent.get("/tasks?limit=1").body
    done = ctl(*arguments)
    assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)
    assert problem in done.err
    assert "; remedy: " in done.err
    assert agent.get("/tasks?limit=1").body == newest


def test_json_is_all_that_standard_output_has(ctl: Ctl, agent: AgentProcess) -> None:
    task = ctl("plug-cpu", "db-7", "4", "--json").json["taskUuid"]
    config = ("--config", str(agent.config_file))
    calls: list[tuple[str, ...]] = [
        ("status",),
        ("tasks", "--vm", "db-7", "--state", "delivered"),
        ("task", task),
        ("task", "unknown"),
        ("doctor", *config),
        ("config", *config),
        ("config", "--check", *config),
        ("config", "--sample"),
        ("openapi",),
        ("completion", "bash"),
        ("unplug-memory", "db-7", "9G"),
        ("unplug-cpu", "db-7", "1"),
        ("plug-memory", "db-7", "1"),
    ]
    for call in calls:
        done = ctl(*call, "--json")
        assert isinstance(done.json, dict), call
        assert done.err == "", call
        assert done.status == 0 or done.json.get("error"), call
    assert ctl("--json", "task", task).json["reply"]["cpuNum"] == 4


def test_no_agent_is_told_as_such(ctl: Ctl) -> None:
    url = f"http://127.0.0.1:{find_free_port()}"
    for command in (("status",), ("plug-cpu", "db-7", "2")):
        done = ctl("--url", url, *command)
        assert (done.status, done.out, done.err.count("\n")) == (4, "", 1)
        assert done.err.startswith(
            f"kvmagentctl: AGENT_UNREACHABLE: {url}: Connection refused; remedy: Start the agent"
        )
    with ManagementServer() as server:  # speaks HTTP, and is none
        assert "NOT_AN_AGENT" in ctl("--url", server.url, "status").err


def test_colour_is_for_terminals_that_want_it(ctl: Ctl) -> None:
    assert ESCAPE not in ctl("vms").out
    assert ESCAPE in ctl.on_terminal("vms").out
    assert ESCAPE not in ctl.on_terminal("vms", environment={"NO_COLOR": "1"}).out
    assert ESCAPE not in ctl.on_terminal("vms", environment={"TERM": "dumb"}).out


def test_a_terminal_shows_the_steps(ctl: Ctl) -> None:
    ctl("plug-cpu", "db-7", "4")
    shown = ctl.on_terminal("ready", "db-7", "--apply", "--max-cpus", "16", environment={"NO_COLOR": "1"})
    assert re.search(r"(?:^|\x1b\[K)  DefineShape [\d.]+ m?s$", shown.out, re.MULTILINE)


def test_a_terminal_folds_what_is_longer_than_it_is_wide(ctl: Ctl) -> None:
    shown = ctl.on_terminal("ready", "old", environment={"NO_COLOR": "1", "COLUMNS": "60"}).out.splitlines()
    remedy = next(n for n, line in enumerate(shown) if line.lstrip().startswith("remedy: "))
    assert shown[remedy].startswith("           remedy: ")
    assert shown[remedy + 1].startswith(" " * 19)
    assert all(len(line) <= 60 for line in shown)


def test_tasks_are_listed_and_followed(ctl: Ctl, agent: AgentProcess) -> None:
    with ctl.start("tasks", "--follow", "--json") as following:
        assert following.stdout is not None
        task = ctl("plug-cpu", "db-7", "77", "--json").json["taskUuid"]
        seen = []
        while not seen or seen[-1]["taskUuid"] != task or seen[-1]["state"] != "delivered":
            seen.append(json.loads(following.stdout.readline()))
        assert seen[-1]["errorCode"] == "CPU_ABOVE_MAXIMUM"
        assert interrupt(following).status == 130
    settled(agent, task)
    header, newest, *_ = ctl("tasks", "--limit", "2").out.splitlines()
    assert header.split() == ["TASK", "COMMAND", "VM", "STATE", "OUTCOME", "ACCEPTED", "(UTC)", "AGE", "TOOK", "CALLER"]
    assert re.match(rf"{task[:8]}\w* +HotPlugCpu +db-7  delivered  refused CPU_ABOVE_MAXIMUM  ", newest)
    whole = ctl("task", task)
    assert "command   HotPlugCpu  vmUuid=db-7 affect=both" in whole.out
    assert "error  CPU_ABOVE_MAXIMUM: 77 vCPUs requested" in whole.out


def test_status_says_what_the_agent_is_at(ctl: Ctl, agent: AgentProcess) -> None:
    # An earlier test's callback was taken, and perhaps not noted yet.
    wait_for(lambda: not agent.get("/healthz").body["owedCallbacks"], timeout_s=20, what="nothing to be owed")
    done = ctl("status")
    assert (done.status, done.err) == (0, "")
    first, tasks, memory = done.out.splitlines()
    assert re.fullmatch(rf"{agent.url}: ready, version [0-9.]+", first)
    assert tasks == "  0 tasks queued, 0 callbacks undelivered"
    sizes = r"[0-9.]+ [KMGT]?i?B"
    assert re.fullmatch(rf"  memory: {sizes} of {sizes} promised to VMs, {sizes} in use by them; 1 GiB kept .*", memory)


def test_what_could_come_back_is_shown_and_nothing_taken(ctl: Ctl) -> None:
    assert ctl("reclaim").status == 2, "without --dry-run it would look as if it took something"
    done = ctl("reclaim", "--dry-run")
    assert done.out.splitlines()[0].split() == ["VM", "PROMISED", "RESIDENT", "UNUSED", "REMOVABLE", "BY"]
    assert re.search(r"^db-7 +[0-9.]+ MiB +\S+.* -$", done.out, re.MULTILINE)
    assert {vm["name"]: vm["reclaimable"] for vm in ctl("reclaim", "--dry-run", "--json").json["vms"]}["db-7"] == 0


def test_the_configuration_is_shown_and_checked(ctl: Ctl, agent: AgentProcess, tmp_path: Path) -> None:
    assert ctl("config", "--sample").out == sample_conf()
    shown = ctl("config", "--config", str(agent.config_file)).out
    assert f"port = {agent.port}" in shown.splitlines()
    assert ctl("config", "--check", "--config", str(agent.config_file)).status == 0
    wrong = tmp_path / "kvmagent.conf"
    wrong.write_text("[http]\nprot = 1\n")
    done = ctl("config", "--check", "--config", str(wrong))
    assert (done.status, done.out) == (1, "")
    assert "BAD_CONFIGURATION" in done.err
    assert "prot" in done.err


def test_openapi_is_the_agents_own(ctl: Ctl, agent: AgentProcess) -> None:
    assert ctl("openapi").json == agent.get("/openapi.json").body


def test_a_reader_that_has_enough_ends_it_quietly(ctl: Ctl) -> None:
    pipe = f"{ctl.script} openapi | head -1"
    done = subprocess.run(["bash", "-c", pipe], env=ctl.environment, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("{\n", "")


def test_bash_completes_subcommands_options_and_vms(ctl: Ctl) -> None:
    lines = (
        f'export PATH="{ctl.script.parent}:$PATH"; source <(kvmagentctl completion bash); '
        'for words in "kvmagentctl unp" "kvmagentctl ready --max" "kvmagentctl plug-cpu d"; do '
        "COMPREPLY=(); COMP_WORDS=($words); "
        "COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _kvmagentctl_completion kvmagentctl; "
        'echo "${COMPREPLY[*]}"; done'
    )
    done = subprocess.run(["bash", "-c", lines], env=ctl.environment, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["unplug-cpu unplug-memory", "--max-cpus --max-memory", "db-7"], done.stderr
    for shell in ("zsh", "fish"):
        assert "kvmagentctl" in ctl("completion", shell).out


def test_the_help_lists_exit_statuses(ctl: Ctl) -> None:
    shown = ctl("--help")
    assert shown.status == 0
    assert "  130  interrupted (Ctrl-C): a task that was sent continues" in shown.out
    assert ctl() == shown


def test_the_agent_loads_nothing_of_it() -> None:
    foreign = {"click", "cryptography", "kvmagent.cli.ctl"}
    code = f"import sys, kvmagent.cli.daemon; print(sorted({foreign!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_starts_fast(ctl: Ctl) -> None:
    """Processor time, which a busy machine does not stretch as it does the clock."""
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True); "
        "used = resource.getrusage(resource.RUSAGE_CHILDREN); print(used.ru_utime + used.ru_stime)"
    )

    def measure() -> float:
        command = [sys.executable, "-c", code, str(ctl.script), "status"]
        return float(subprocess.run(command, env=ctl.environment, capture_output=True, text=True, check=True).stdout)

    assert wait_for(lambda: measure() < 0.4, timeout_s=20, what="a start in less than 0.4 s")
