"""kvmagentctl at three in the morning: tasks and VMs by any name, what is wide, what is narrow, whom to ask."""

import json
import re
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from kvmagent.cli.ctl.ctlconf import read_conf
from kvmagent.cli.ctl.exits import CtlError
from kvmagent.cli.ctl.render import render_history, render_reply
from kvmagent.cli.ctl.terminal import Column, Row, fold, format_table, paint, prose, text_width
from kvmagent.cli.ctl.yaml import write_yaml
from tests.ctl.ctl import Ctl, interrupt, settled
from tests.fakes.agent import write_node
from tests.fakes.hooks import HookDirectory
from tests.lab.agent import AgentProcess, new_task_uuid
from tests.lab.domainxml import GuestSpec
from tests.lab.processes import wait_for

GIB = 2**30
NARROW = {"COLUMNS": "80", "NO_COLOR": "1"}


def post_cpu(agent: AgentProcess, count: int, *, vm: str = "db-7", task: str = "") -> str:
    task = task or new_task_uuid()
    agent.post("/vm/hotplug/cpu", {"vmUuid": vm, "cpuNum": count}, task_uuid=task, callback_url="none")
    settled(agent, task)
    return task


def test_a_task_is_told_by_the_beginning_of_its_id(ctl: Ctl, agent: AgentProcess) -> None:
    for task in ("night-1a", "night-1b", "night-2"):
        post_cpu(agent, 99, task=task)
    assert "night-2" in ctl("task", "night-2").out
    assert ctl("task", "night-1b", "--json").json["taskUuid"] == "night-1b"
    several = ctl("task", "night-1")
    assert (several.status, "several tasks begin with night-1: night-1b, night-1a" in several.err) == (2, True)
    assert "UNKNOWN_TASK" in ctl("task", "never").err
    assert "TASK_NOT_CANCELLABLE" in ctl("cancel", "night-2").err


@pytest.fixture
def held(node_uri: str, tmp_path: Path) -> Iterator[tuple[AgentProcess, Path]]:
    """An agent whose first task a hook holds, and a file that lets it go."""
    hooks = HookDirectory(tmp_path)
    hooks.write("before.d/10-hold", 'echo >> "{told}"; until [ -e "{told}.go" ]; do sleep 0.1; done')
    settings = {"hooks": {"directory": str(hooks.path), "timeout_sec": "300"}}
    with AgentProcess(uri=node_uri, settings=settings) as running:
        running.post("/vm/hotplug/cpu", {"vmUuid": "db-7", "cpuNum": 2}, task_uuid="running", callback_url="none")
        wait_for(hooks.lines, timeout_s=60, what="the first task to be asked about")
        yield running, hooks.told.with_name("told.go")
        hooks.told.with_name("told.go").touch()


def test_a_task_that_waits_is_taken_back_and_never_begins(held: tuple[AgentProcess, Path]) -> None:
    agent, go = held
    ctl = Ctl({"KVMAGENT_URL": agent.url})
    had = agent.get("/vms/db-7").body["after"]["cpuNum"]
    agent.post("/vm/hotplug/cpu", {"vmUuid": "db-7", "cpuNum": 3}, task_uuid="waiting-1", callback_url="none")
    assert "waiting-1" in ctl("tasks", "--state", "accepted", "-o", "name").out
    done = ctl("cancel", "wait")
    assert (done.status, done.out) == (0, "waiting-1: cancelled, its VM was not touched\n")
    reply = settled(agent, "waiting-1")["reply"]
    assert (reply["outcome"], reply["errorCode"], reply["steps"]) == ("refused", "CANCELLED", [])
    # One that a hook still holds has touched nothing either.
    told = ctl("cancel", "running", "--json").json
    assert told["taskUuid"] == "running"
    go.touch()
    assert settled(agent, "running")["reply"]["errorCode"] == "CANCELLED"
    assert ctl("cancel", "waiting-1").out == done.out, "said again where it is asked again"
    named = ctl("cancel", "waiting-1", "-o", "name")
    assert (named.status, named.out) == (0, "waiting-1\n"), "what was sent is no usage error"
    assert agent.get("/vms/db-7").body["after"]["cpuNum"] == had
    assert set(ctl("tasks", "--outcome", "refused", "-o", "name").out.split()) == {"running", "waiting-1"}


@pytest.mark.parametrize("named", ["", " "])
def test_an_id_that_is_empty_is_no_beginning_of_the_only_task(node_uri: str, named: str) -> None:
    with AgentProcess(uri=node_uri) as agent:
        post_cpu(agent, 99)
        ctl = Ctl({"KVMAGENT_URL": agent.url})
        for command in ("task", "cancel"):
            answer = ctl(command, named)
            assert (answer.status, "the id of the task is empty" in answer.err) == (2, True), command


def test_nothing_is_taken_back_where_no_task_has_that_id(ctl: Ctl) -> None:
    answer = ctl("cancel", "nobody")
    assert (answer.status, "UNKNOWN_TASK" in answer.err) == (1, True)


def test_tasks_are_chosen_and_tell_when_and_by_whom(ctl: Ctl, agent: AgentProcess) -> None:
    caller = agent.get("/whoami").body["caller"]
    refused = post_cpu(agent, 99)
    uuid = agent.get(f"/tasks/{refused}").body["vmUuid"]
    assert refused in ctl("tasks", "--outcome", "refused", "--vm", uuid, "-o", "name").out.splitlines()
    assert refused in ctl("tasks", "--caller", caller, "--since", "1h", "-o", "name").out.splitlines()
    assert ctl("tasks", "--until", "2020-01-01").out == "no task matches these options\n"
    assert ctl("tasks", "--since", "yesterday").status == 2
    header, newest, *_ = ctl("tasks", "--vm", "db-7", "--limit", "1", "-o", "wide").out.splitlines()
    assert header.split() == [
        *["TASK", "COMMAND", "VM", "STATE", "OUTCOME", "ACCEPTED", "(UTC)", "AGE", "TOOK", "CALLER", "CLIENT", "UUID"]
    ]
    assert re.match(rf"{refused}  HotPlugCpu  db-7  delivered  refused CPU_ABOVE_MAXIMUM  \d{{4}}-\d\d-\d\d ", newest)
    assert newest.endswith(f"{caller}  127.0.0.1  {uuid}")


def test_a_vm_s_history_says_who_changed_it_from_what_to_what(ctl: Ctl, agent: AgentProcess) -> None:
    for count in (1, 3):  # in whatever state an earlier test has left it
        agent.post("/vm/hotunplug/cpu" if count == 1 else "/vm/hotplug/cpu", {"vmUuid": "old", "cpuNum": count},
                   task_uuid=(task := new_task_uuid()), callback_url="none")  # fmt: skip
        settled(agent, task)
    header, newest, *_ = ctl("log", "old").out.splitlines()
    assert header.split() == ["WHEN", "(UTC)", "AGE", "CHANGE", "OUTCOME", "BY", "TASK"]
    assert re.search(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d +[\d.]+ m?s ago  vCPUs \d to 3", newest)
    assert newest.endswith(task[:8])
    assert ctl("log", "old", "--json").json["changes"][0]["after"]["cpuNum"] == 3
    assert "VM_NOT_FOUND" in ctl("log", "nobody").err


def test_a_history_of_refusals_and_of_nothing_is_told() -> None:
    change = {
        "taskUuid": "9f1c", "vm": "db-7", "command": "HotUnplugCpu", "caller": "token:zstack", "client": "10.0.0.5",
        "finishedAt": 1000.0, "outcome": "refused", "errorCode": "CPU_NOT_REMOVABLE", "asked": {"cpuNum": 1},
        "before": {"cpuNum": 2}, "after": {"cpuNum": 2},
    }  # fmt: skip
    removed = {**change, "outcome": "online", "errorCode": None, "after": {"cpuNum": 1}}
    lines = [click.unstyle(line) for line in render_history([removed, change], 4600.0)]
    assert lines[1].split("  ")[2:4] == ["vCPUs 2 to 1", "removed"] or "vCPUs 2 to 1" in lines[1]
    assert "removed" in lines[1]
    assert "none; requested: vCPUs 1  refused CPU_NOT_REMOVABLE" in lines[2]
    assert render_history([], 0.0) == ["no changes to this VM"]


def test_what_is_removed_is_not_told_as_online() -> None:
    reply = {"vmUuid": "db-7", "outcome": "online", "success": True, "after": {"cpuNum": 2}}
    assert click.unstyle(render_reply(reply, removes=True, asked={"cpuNum"})[0]) == "db-7: removed, 2 vCPUs in all"


def test_more_is_added_to_what_there_is_and_holds_for_that_alone(ctl: Ctl, agent: AgentProcess) -> None:
    before = agent.get("/vms/db-7").body["after"]
    for command, more, field, total in (
        ("plug-memory", "+1G", "MemorySize", before["memorySize"] + GIB),
        ("plug-cpu", "+99", "CpuNum", before["cpuNum"] + 99),
    ):
        ctl(command, "db-7", more)
        (newest,) = agent.get("/tasks?vm=db-7&limit=1").body["tasks"]
        request = agent.get(f"/tasks/{newest['taskUuid']}").body["request"]
        name = field[0].lower() + field[1:]
        assert (request[name], request[f"expected{field}"]) == (total, before[name])
    assert ctl("plug-memory", "db-7", "+1").status == 2, "no unit"
    assert ctl("unplug-cpu", "db-7", "+1").status == 2, "it would say that something is added"


def test_output_is_wide_names_json_or_yaml(ctl: Ctl, agent: AgentProcess) -> None:
    assert ctl("vms", "-o", "name").out == "db-7\nold\n"
    assert (
        yaml.safe_load(ctl("vms", "-o", "yaml").out)["vms"][0].keys() == ctl("vms", "-o", "json").json["vms"][0].keys()
    )
    uuid = next(vm["vmUuid"] for vm in agent.get("/vms").body["vms"] if vm["name"] == "db-7")
    assert uuid in ctl("vms", "-o", "wide").out
    assert uuid not in ctl("vms").out
    refused = ctl("task", "never", "-o", "yaml")
    assert yaml.safe_load(refused.out)["errorCode"] == "UNKNOWN_TASK"
    assert ctl("status", "-o", "name").status == 2


@pytest.mark.parametrize("output", ["wide", "name", "yaml"])
def test_two_different_outputs_are_a_usage_error_for_programs_too(ctl: Ctl, output: str) -> None:
    for arguments in (("vms", "--json", "-o", output), ("vms", "-o", output, "--json")):
        refused = ctl(*arguments)
        assert refused.status == 2
        assert "two different outputs" in yaml.safe_load(refused.out)["error"]
    assert ctl("vms", "--json", "-o", "json").status == 0
    assert ctl("--json", "vms", "-o", output).out == ctl("vms", "-o", output).out, "a subcommand's own option wins"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(json_values)
@example("🙂")
@example({"🙂": 1, "\ufffd": 2})
def test_yaml_says_what_json_does(value: object) -> None:
    value = json.loads(json.dumps(value))
    read = yaml.safe_load(write_yaml(value))
    assert read == value
    assert json.dumps(read, sort_keys=True) == json.dumps(value, sort_keys=True)


def test_vms_are_watched(ctl: Ctl, agent: AgentProcess) -> None:
    with ctl.start("vms", "--watch", "--json") as watching:
        assert watching.stdout is not None
        first = json.loads(watching.stdout.readline())
        assert {vm["name"] for vm in first["vms"]} == {"db-7", "old"}
        had = next(vm for vm in first["vms"] if vm["name"] == "old")["after"]["cpuNum"]
        post_cpu(agent, had + 1 if had < 4 else had, vm="old")
        if had < 4:
            later = json.loads(watching.stdout.readline())
            assert next(vm for vm in later["vms"] if vm["name"] == "old")["after"]["cpuNum"] == had + 1
        assert interrupt(watching).status == 130


@pytest.mark.parametrize(
    ("text", "width"),
    [
        ("db-7", 4), ("数据库", 6), ("\N{FULLWIDTH LATIN SMALL LETTER D}b", 3), ("é", 1),
        ("e\N{COMBINING ACUTE ACCENT}", 1), ("🙂", 2),
        ("👩\N{ZERO WIDTH JOINER}💻", 2), ("👍🏽", 2), ("🇩🇪", 2), ("❤\N{VARIATION SELECTOR-16}", 2), ("한국", 4),
        (paint("12", "red"), 2), ("\N{ZERO WIDTH SPACE}a", 1),
    ],
)  # fmt: skip
def test_width_is_what_a_terminal_shows(text: str, width: int) -> None:
    assert text_width(text) == width


words = st.text(st.sampled_from("abc数🙂-e\u0301"), min_size=1, max_size=12)
tables = st.integers(2, 6).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(0, 9), min_size=n, max_size=n),
        st.lists(st.lists(st.lists(words, min_size=1, max_size=3).map(" ".join), min_size=n, max_size=n), max_size=5),
    )
)


@given(tables, st.integers(20, 100))
def test_a_table_fits_its_terminal_breaks_no_word_and_loses_no_cell(
    table: tuple[list[int], list[list[str]]], columns: int
) -> None:
    folds, rows = table
    headers = [Column(f"C{n}", rank, f"c{n}") for n, rank in enumerate(folds)]
    lines = format_table(headers, rows)
    for line, cells in zip(lines[1:], rows, strict=True):
        assert isinstance(line, Row)
        shown = line.folded(columns)
        for cell in cells:  # a dash says that there is nothing: it may go
            assert cell == "-" or all(word in shown.split() or f"{word}," in shown.split() for word in cell.split()), (
                cell
            )
        kept = [n for n, rank in enumerate(folds) if not rank]
        needed = max([text_width(word) for cell in cells for word in cell.split()]) + 10
        widest = sum(max(text_width(row[n]) for row in [*rows, [f"C{n}" for n in range(len(folds))]]) + 2 for n in kept)
        assert all(text_width(part) <= max(columns, needed, widest) for part in shown.splitlines())


@given(st.lists(words, min_size=1, max_size=30), st.integers(20, 80))
def test_prose_is_folded_between_words(parts: list[str], columns: int) -> None:
    line = prose("  warning  ", " ".join(parts))
    shown = fold(line, columns)
    assert shown.split() == str(line).split()
    assert all(text_width(one) <= max(columns, 11 + 24) for one in shown.splitlines())


def test_a_terminal_of_80_columns_holds_every_list(ctl: Ctl, agent: AgentProcess) -> None:
    post_cpu(agent, 99)
    plan = ("plan", "db-7", "--cpus", "2,64", "--memory", "512M,16G")
    for call in (("vms",), ("tasks",), ("log", "db-7"), ("reclaim", "--dry-run"), ("status",), ("ready", "db-7"), plan):
        shown = ctl.on_terminal(*call, environment=NARROW).out.splitlines()
        assert [line for line in shown if text_width(line) > 80] == [], call


def test_named_agents_are_asked_by_name(ctl: Ctl, agent: AgentProcess, tmp_path: Path) -> None:
    conf = tmp_path / "kvmagent" / "ctl.conf"
    conf.parent.mkdir()
    conf.write_text(
        f"[default]\nagent = here\n[agent here]\nurl = {agent.url}\n[agent gone]\nurl = http://127.0.0.1:9\n"
    )
    bare = Ctl({"XDG_CONFIG_HOME": str(tmp_path)})
    assert bare("vms", "-o", "name").out == "db-7\nold\n"
    assert bare("--host", "gone", "status").status == 4
    assert bare("status", "--host", "here").status == 0
    assert bare("--host", "gone", "--url", agent.url, "status").status == 0, "an option wins"
    assert bare("--host", "here", "status", environment={"KVMAGENT_URL": "http://127.0.0.1:9"}).status == 0
    unknown = bare("--host", "elsewhere", "status")
    assert (unknown.status, "no agent is named 'elsewhere'; known: gone, here" in unknown.err) == (2, True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[agent a]\nurll = x\n", "ctl.conf, line 2: unknown key 'urll'; did you mean url?"),
        ("[agent a]\nca = x\n", "ctl.conf, line 1: [agent a] has no url"),
        ("[agents]\n", "ctl.conf, line 1: section [agents]; allowed are [default] and [agent NAME]"),
        ("[default]\nagent = b\n", "no agent is named 'b'; known: none"),
        ("url = x\n", "ctl.conf"),
    ],
)
def test_a_wrong_file_is_told_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "ctl.conf"
    file.write_text(text)
    with pytest.raises(CtlError) as raised:
        read_conf((file,))
    assert words in raised.value.message


def test_the_user_s_file_wins_over_the_host_s(tmp_path: Path) -> None:
    host, user = tmp_path / "host", tmp_path / "user"
    host.write_text("[default]\nagent = a\n[agent a]\nurl = http://a\n[agent b]\nurl = http://b\n")
    user.write_text("[default]\nagent = b\n[agent a]\nurl = https://a\ntoken_file = ~/token\n")
    conf = read_conf((host, user, tmp_path / "none"))
    assert (conf.default, conf.agents["a"]["url"], conf.agents["b"]["url"]) == ("b", "https://a", "http://b")
    assert conf.agents["a"]["token_file"] == str(Path("~/token").expanduser())


def test_a_support_bundle_has_what_helps_and_no_secret(ctl: Ctl, agent: AgentProcess, tmp_path: Path) -> None:
    file, config = tmp_path / "bundle.tar.gz", tmp_path / "kvmagent.conf"
    config.write_text(f"{agent.config_file.read_text()}\n[log]\nfile = {agent.log_file}\n")
    done = ctl("support-bundle", "--file", str(file), "--config", str(config), "--json")
    assert done.status == 0, done.err
    assert file.stat().st_mode & 0o777 == 0o600
    with tarfile.open(file) as archive:
        names = {name.partition("/")[2]: name for name in archive.getnames()}
        parts = {name: (archive.extractfile(whole) or file.open("rb")).read().decode() for name, whole in names.items()}
    assert {
        "health.json",
        "vms.json",
        "tasks.json",
        "metrics.txt",
        "versions.txt",
        "doctor.json",
        "log.txt",
    } <= names.keys()
    assert sum(name.startswith("definitions/") for name in names) == 4, "two VMs, running and at their next start"
    assert "kvmagent_" in parts["metrics.txt"]
    assert "agent ready" in parts["log.txt"]
    assert "NOT_WRITTEN" in ctl("support-bundle", "--file", str(file)).err, "never over another file"


def test_a_support_bundle_has_each_vm_s_own_definition(ctl: Ctl, tmp_path: Path) -> None:
    # A VM with the name that is another's number; names that look like options, and like two lines.
    names = ("first", "1", "--inactive", "-h", "\u2028 x ", "..")
    config = tmp_path / "kvmagent.conf"
    uri = write_node(tmp_path, *(GuestSpec(name=name) for name in names), has_uuids=True)
    config.write_text(f"[agent]\nstate_dir = {tmp_path}\n[libvirt]\nuri = {uri}\n")
    file = tmp_path / "bundle.tar.gz"
    done = ctl("support-bundle", "--file", str(file), "--config", str(config), "--json")
    assert not [line for line in json.loads(done.out)["missing"] if "definitions" in line]
    with tarfile.open(file) as archive:
        files = [name for name in archive.getnames() if "/definitions/" in name]
        xml = [(archive.extractfile(name) or file.open("rb")).read().decode() for name in files]
    assert sorted(names * 2) == sorted(re.findall("<name>([^<]+)</name>", "".join(xml)))


def test_a_support_bundle_is_written_whole_or_not_at_all(ctl: Ctl, tmp_path: Path) -> None:
    file = tmp_path / "bundle.tar.gz"
    command = ["prlimit", "--fsize=1024", str(ctl.script), "support-bundle", "--file", str(file)]
    done = subprocess.run(command, env=ctl.environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert f"NOT_WRITTEN: {file}: File too large" in done.stderr
    assert not file.exists()


COMPLETIONS = (("tasks --vm d", "db-7"), ("log o", "old"), ("task night-2", "night-2"), ("--host he", "here"))


@pytest.fixture(scope="module")
def completing(ctl: Ctl, agent: AgentProcess, tmp_path_factory: pytest.TempPathFactory) -> Ctl:
    """kvmagentctl on the PATH, with a named agent and a task to complete."""
    post_cpu(agent, 99, task="night-2")
    directory = tmp_path_factory.mktemp("config")
    (directory / "kvmagent").mkdir()
    (directory / "kvmagent/ctl.conf").write_text(f"[agent here]\nurl = {agent.url}\n")
    path = f"{ctl.script.parent}:/usr/bin:/bin"
    return Ctl({**ctl.environment, "PATH": path, "XDG_CONFIG_HOME": str(directory)})


@pytest.mark.parametrize("shell", ["bash", "fish", "zsh"])
def test_shells_complete_vms_tasks_and_agents(completing: Ctl, shell: str) -> None:
    script = {
        "bash": "source <(kvmagentctl completion bash); COMP_WORDS=(kvmagentctl {words}); "
        "COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _kvmagentctl_completion kvmagentctl; "
        'printf "%s\\n" "${{COMPREPLY[@]}}"',
        "fish": "kvmagentctl completion fish | source; complete --do-complete 'kvmagentctl {words}'",
        # compsys hands words over and takes the answer by these two; the rest of it needs a terminal.
        "zsh": "compdef() {{}}; _describe() {{ print -rl -- ${{(P)${{@[-2]}}}} ${{(P)2}}; }}; "
        'compadd() {{ print -rl -- "${{@[-1]}}" ${{(P)${{@[-1]}}}}; }}; '
        'source <(kvmagentctl completion zsh | sed "/^if \\[\\[/,/^fi/d"); words=(kvmagentctl {words}); '
        "CURRENT=${{#words}}; "
        "_kvmagentctl_completion",
    }[shell]
    for words_typed, expected in COMPLETIONS:
        done = subprocess.run(
            [shell, "-c", script.format(words=words_typed)],
            env=completing.environment, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert re.search(rf"(?m)(^|\s){re.escape(expected)}(\s|:|$)", done.stdout), (
            words_typed,
            done.stdout,
            done.stderr,
        )
