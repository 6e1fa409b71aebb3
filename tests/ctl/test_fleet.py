"""Many VMs and several hosts: three agents, of which one is dead, and two hundred VMs."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.ctl.ctl import Ctl
from tests.ctl.front import Answer, Front, Request, pass_on
from tests.fakes.agent import write_node
from tests.lab.agent import LOOPBACK, AgentProcess, find_free_port
from tests.lab.domainxml import GuestSpec

GIB = 2**30


@pytest.fixture(scope="module")
def other_agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    """A second host, with two hundred VMs."""
    specs = [GuestSpec(name=f"many-{n:03}") for n in range(200)]
    uri = write_node(tmp_path_factory.mktemp("many"), *specs)
    with AgentProcess(uri=uri, settings={"host": {"memory_overcommit": "100"}}) as running:
        yield running


@pytest.fixture
def hosts(agent: AgentProcess, other_agent: AgentProcess, tmp_path: Path) -> Path:
    """Three hosts, the second of which has no agent."""
    file = tmp_path / "hosts"
    dead = f"http://{LOOPBACK}:{find_free_port()}"
    file.write_text(f"# the lab\nnode1 {agent.url}\nnode2 {dead}\nnode3 {other_agent.url}\n")
    return file


def test_a_plan_is_a_grid_and_says_why(ctl: Ctl) -> None:
    done = ctl("plan", "db-7", "--cpus", "2,4,8", "--memory", "512M,700M,64G")
    assert done.status == 0
    lines = done.out.splitlines()
    assert lines[1].split() == ["MEMORY", "2", "vCPUs", "4", "vCPUs", "8", "vCPUs"]
    assert lines[2].split()[:4] == ["512", "MiB", "live-unconfirmed", "live-unconfirmed"]
    assert "live-rounded 768 MiB" in lines[3]
    assert lines[2].endswith(("restart", "never"))
    assert "reason  CPU_ABOVE_MAXIMUM: " in done.out
    told = ctl("plan", "db-7", "--cpus", "x2", "--json").json
    assert [plan["target"] for plan in told["plans"]] == [{"cpuNum": 2}]


def test_a_wrong_plan_sends_nothing(ctl: Ctl) -> None:
    for arguments in (
        ("plan",),
        ("plan", "db-7"),
        ("plan", "db-7", "--all", "--cpus", "2"),
        ("plan", "db-7", "--cpus", "two"),
        ("plan", "db-7", "--cpus", ",".join(map(str, range(1, 10))), "--memory", "1G,2G,3G,4G,5G,6G,7G,8G"),
        ("ready", "db-7", "--all"),
        ("ready",),
    ):
        assert ctl(*arguments).status == 2, arguments


def test_one_dead_host_is_told_and_is_not_fatal(ctl: Ctl, hosts: Path) -> None:
    done = ctl("vms", "--hosts", str(hosts))
    assert done.status == 4, "that of the worst"
    header, *rows = done.out.splitlines()
    assert header.split()[:2] == ["HOST", "VM"]
    assert [row.split()[0] for row in rows] == ["node1"] * 2 + ["node3"] * 200
    assert done.err.startswith("kvmagentctl: node2: AGENT_UNREACHABLE: ")
    told = ctl("vms", "--hosts", str(hosts), "--not-ready", "--json").json
    assert [(vm["host"], vm["name"]) for vm in told["vms"]] == [("node1", "old")]
    assert [failure["host"] for failure in told["failures"]] == ["node2"]


def test_two_hundred_vms_are_planned(ctl: Ctl, other_agent: AgentProcess) -> None:
    began = time.monotonic()
    child = ctl.start("--url", other_agent.url, "plan", "--all", "--cpus", "x2", "--memory", "x2", "--json")
    out, _ = child.communicate(timeout=300)
    print(f"200 VMs planned, over HTTP, one after another: {time.monotonic() - began:.2f} s")
    assert child.returncode == 0
    assert [[plan["verdict"] for plan in vm["plans"]] for vm in json.loads(out)["vms"]] == [["live-unconfirmed"]] * 200


def test_prepares_all_vms_of_a_host_and_says_what_waits_for_a_restart(ctl: Ctl, agent: AgentProcess) -> None:
    assert ctl("ready", "--all").status == 7, "old is not"
    done = ctl("ready", "--all", "--apply", "--max-cpus", "x8", "--max-memory", "8G", "--json")
    assert {vm["name"]: vm["outcome"] for vm in done.json["vms"]} == {"db-7": "configured", "old": "configured"}
    assert done.status == 0
    assert {vm["name"] for vm in ctl("vms", "--pending-restart", "--json").json["vms"]} == {"db-7", "old"}
    waiting = {vm["name"]: vm["restartRequiredSince"] for vm in ctl("vms", "--pending-restart", "--json").json["vms"]}
    assert all(0 < since <= time.time() for since in waiting.values())
    assert ctl("vms", "--pending-restart").out.count("restart pending since 20") == 2
    assert ctl("ready", "db-7", "--prepare", "--max-cpus", "16").status == 0, "one VM, as ever"


def test_an_ansible_inventory_names_the_hosts(ctl: Ctl, agent: AgentProcess, tmp_path: Path) -> None:
    inventory = tmp_path / "hosts.ini"
    inventory.write_text(
        f"[nodes]\nalpha kvmagent_url={agent.url}\nbeta ansible_host={LOOPBACK} kvmagent_url={agent.url}\n"
    )
    path = f"{ctl.script.parent}:{ctl.environment['PATH']}"
    done = ctl("vms", "--hosts", str(inventory), "--json", environment={"PATH": path})
    assert sorted({vm["host"] for vm in done.json["vms"]}) == ["alpha", "beta"]


@pytest.fixture
def named(ctl: Ctl, agent: AgentProcess, tmp_path: Path) -> Iterator[tuple[Ctl, Front]]:
    """kvmagentctl with two agents of its own file, one of which is a front that keeps what it is asked."""
    tokens = tmp_path / "token"
    tokens.write_text("the-token-of-alpha\n")
    tokens.chmod(0o600)
    conf = tmp_path / "kvmagent/ctl.conf"
    conf.parent.mkdir()
    with Front(lambda request: pass_on(agent.port, request)) as front:
        conf.write_text(
            f"[default]\nagent = alpha\n[agent alpha]\nurl = {front.url}\ntoken_file = {tokens}\n"
            f"[agent beta]\nurl = {agent.url}\n"
        )
        path = f"{ctl.script.parent}:{ctl.environment['PATH']}"
        yield Ctl({"XDG_CONFIG_HOME": str(tmp_path), "PATH": path}), front


@pytest.mark.parametrize(
    ("file", "token"),
    [
        ("alpha\nbeta # the other\n", True),
        ("[nodes]\nalpha ansible_host=192.0.2.1\nbeta\n", True),
        ("alpha {front}\nbeta {agent}\n", True),
        ("[nodes]\nalpha kvmagent_url={front}\nbeta\n", True),
        ("other {front}\nbeta\n", False),
        ("{front}\nbeta\n", False),
        ("other kvmagent_url={front}\nbeta\n", False),
    ],
    ids=["names", "inventory", "urls", "inventory-urls", "another-name", "no-name", "inventory-other"],
)
def test_a_host_that_is_a_named_agent_is_asked_as_the_file_of_agents_says_and_no_other_sees_its_token(
    named: tuple[Ctl, Front], agent: AgentProcess, tmp_path: Path, file: str, token: bool
) -> None:
    bare, front = named
    (hosts := tmp_path / "hosts").write_text(file.format(front=front.url, agent=agent.url))
    done = bare("vms", "--hosts", str(hosts), "--json")
    assert (done.status, {vm["host"] for vm in done.json["vms"]} >= {"beta"}) == (0, True), done.err
    shown = {request.headers.get("authorization") for request in front.requests}
    assert shown == {"Bearer the-token-of-alpha" if token else None}


def test_an_option_wins_over_what_a_named_agent_has(named: tuple[Ctl, Front], tmp_path: Path) -> None:
    bare, front = named
    (mine := tmp_path / "mine").write_text("mine\n")
    mine.chmod(0o600)
    (hosts := tmp_path / "hosts").write_text("alpha\n")
    bare("vms", "--hosts", str(hosts), "--token-file", str(mine))
    assert {request.headers.get("authorization") for request in front.requests} == {"Bearer mine"}


def test_a_name_that_no_file_has_is_told(named: tuple[Ctl, Front], tmp_path: Path) -> None:
    for text, words in (
        ("http://127.0.0.1:9\ngamma\n", "no agent is named 'gamma'; known: alpha, beta"),
        ("alpha\nother ftp://127.0.0.1:9\n", "'ftp://127.0.0.1:9' is not an agent's URL"),
    ):
        (hosts := tmp_path / "hosts").write_text(text)
        done = named[0]("vms", "--hosts", str(hosts))
        assert (done.status, words in done.err) == (2, True), done.err


@contextmanager
def slow_host(agent: AgentProcess) -> Iterator[tuple[Front, threading.Event, threading.Event]]:
    """An agent in front of which everything but lists waits: whether something waits, and what lets it go on."""
    waits, goes_on = threading.Event(), threading.Event()

    def decide(request: Request) -> Answer:
        if not request.path.startswith("/vms"):
            waits.set()
            assert goes_on.wait(60)
        return pass_on(agent.port, request)

    with Front(decide) as front:
        yield front, waits, goes_on


def test_ctrl_c_says_what_is_known_and_begins_with_no_vm_more(ctl: Ctl, agent: AgentProcess) -> None:
    with slow_host(agent) as (front, waits, goes_on):
        child = ctl.start("--url", front.url, "plan", "--all", "--cpus", "2", "--json")
        assert waits.wait(60)
        child.send_signal(signal.SIGINT)
        assert child.stderr is not None
        assert child.stderr.readline().startswith("kvmagentctl: interrupted: waiting for ")
        goes_on.set()
        out, err = child.communicate(timeout=60)
    told = json.loads(out)
    assert (child.returncode, told["interrupted"], len(told["vms"])) == (130, True, 1)
    assert told["vms"][0]["plans"], "what was begun is said whole"
    assert err == "kvmagentctl: interrupted: 1 of 2 VMs\n"


def test_a_second_ctrl_c_waits_for_no_agent_that_hangs(ctl: Ctl, agent: AgentProcess) -> None:
    with slow_host(agent) as (front, waits, goes_on):
        child = ctl.start("--url", front.url, "ready", "--all", "--apply")
        assert waits.wait(60)
        child.send_signal(signal.SIGINT)
        assert child.stderr is not None
        assert "Ctrl-C again does not wait" in child.stderr.readline()
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=60)
        goes_on.set()
    assert child.returncode == 130
    assert "Traceback" not in err
    assert "0 of 2 VMs; not finished: " in err
    assert err.endswith("a task that was sent continues\n")


def test_the_exit_status_is_that_of_the_worst(ctl: Ctl, hosts: Path, agent: AgentProcess, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.write_text(f"{agent.url}\n")
    assert ctl("vms", "--hosts", str(alone)).status == 0
    refused = ctl("plan", "--hosts", str(alone), "--cpus", "2", "--method", "dimm", "--memory", "x2", "--json")
    assert (refused.status, len(refused.json["vms"]), refused.json["failures"]) == (0, 2, [])
    failed = ctl("ready", "--hosts", str(alone), "--apply", "--max-cpus", "1", "--max-memory", "64M", "--json")
    assert {vm["errorCode"] for vm in failed.json["vms"]} == {"TARGET_BELOW_CURRENT"}
    assert failed.status == 1
    # A host that nobody answers for is worse than a VM that is refused.
    lines = hosts.read_text().splitlines()[:3]
    hosts.write_text("\n".join(lines))
    worst = ctl("ready", "--hosts", str(hosts), "--apply", "--max-cpus", "1", "--max-memory", "64M", "--json")
    assert (worst.status, [one["host"] for one in worst.json["failures"]]) == (4, ["node2"])


def test_the_shell_completes_names_options_and_files(ctl: Ctl) -> None:
    def complete(*words: str) -> list[str]:
        line = {"COMP_WORDS": " ".join(["kvmagentctl", *words]), "COMP_CWORD": str(len(words))}
        done = ctl(environment={"_KVMAGENTCTL_COMPLETE": "bash_complete", **line})
        return [one.partition(",")[2] for one in done.out.splitlines()]

    assert complete("plan", "db") == ["db-7"]
    assert {"--cpus", "--memory", "--all", "--hosts"} <= set(complete("plan", "--"))
    assert complete("plan", "db-7", "--affect", "c") == ["config"]
    assert {"--all", "--hosts"} <= set(complete("ready", "--"))
    assert {"--hosts", "--not-ready", "--pending-restart"} <= set(complete("vms", "--"))
