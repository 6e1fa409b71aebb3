"""Many VMs of agents that go wrong: what is no agent, one that is gone midway, VMs that are, files that list none."""

from __future__ import annotations

import json
import re
import socketserver
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from kvmagent.cli.ctl.client import Agent, Target
from kvmagent.cli.ctl.exits import CtlError
from tests.ctl.ctl import Ctl, Done, interrupt
from tests.ctl.front import Answer, Front, Request
from tests.lab.agent import LOOPBACK, AgentProcess, find_free_port
from tests.lab.processes import wait_for

PLAN: dict[str, Any] = {"target": {"cpuNum": 2}, "verdict": "live", "reasons": [], "prepare": [], "took": None}


@pytest.fixture
def bare() -> Ctl:
    """kvmagentctl that knows of no agent."""
    return Ctl({})


def list_vms(*names: str) -> Answer:
    return Answer(200, {"vms": [{"vmUuid": name, "name": name, "after": {"cpuNum": 1}} for name in names]})


def agent_of(*names: str, plan: Callable[[str], Answer | None]) -> Front:
    """An agent of these VMs that answers plans like this."""

    def decide(request: Request) -> Answer | None:
        return list_vms(*names) if request.path.startswith("/vms") else plan(json.loads(request.body)["vmUuid"])

    return Front(decide)


def planned(vm: str) -> Answer:
    return Answer(200, {"vmUuid": vm, "name": vm, "state": "running", "plans": [PLAN]})


def plan_all(ctl: Ctl, tmp_path: Path, **hosts: str) -> Done:
    (file := tmp_path / "hosts").write_text("".join(f"{name} {url}\n" for name, url in hosts.items()))
    return ctl("plan", "--hosts", str(file), "--cpus", "2", "--json")


@pytest.mark.parametrize("body", [{}, {"vms": None}, {"vms": [7]}, {"vms": [{}]}, {"vms": [{"name": "a"}]}])
def test_what_answers_as_no_agent_does_is_told_and_fails_no_other(bare: Ctl, tmp_path: Path, body: Any) -> None:
    with Front(lambda request: Answer(200, body)) as other, agent_of("db", plan=planned) as good:
        done = plan_all(bare, tmp_path, bad=other.url, good=good.url)
    assert [(vm["host"], vm["name"]) for vm in done.json["vms"]] == [("good", "db")]
    assert [(one["host"], one["errorCode"]) for one in done.json["failures"]] == [("bad", "NOT_UNDERSTOOD")]
    assert done.status == 4


def endless(request: Request) -> Answer:
    return Answer(200, {"vms": [{"vmUuid": "a"}], "next": "a"})


def odd(vm: Any) -> Answer:
    return Answer(200, {"vms": [{"vmUuid": "a", **vm}]})


@pytest.mark.parametrize(
    "decide",
    [
        endless,
        lambda request: Answer(200, {"vms": [], "next": "a"}),
        lambda request: Answer(200, {"vms": [{"vmUuid": 5}]}),
        lambda request: Answer(304, {}),
        lambda request: odd({"after": {"maxMemorySize": 10**400}}),
        lambda request: odd({"after": {"maxMemorySize": [1]}}),
        lambda request: odd({"after": "x", "blockers": 5}),
    ],
)
def test_a_host_that_answers_nonsense_hides_no_other(
    bare: Ctl, tmp_path: Path, decide: Callable[[Request], Answer]
) -> None:
    with Front(decide) as other, agent_of("db", plan=planned) as good:
        (file := tmp_path / "hosts").write_text(f"bad {other.url}\ngood {good.url}\n")
        done = bare("vms", "--hosts", str(file))
    assert re.search(r"good +db", done.out), done.err
    assert "bad: NOT_" in done.err
    assert done.status == 4


@pytest.mark.parametrize("answer", [b"[" * 200_000, b'{"vms":[' + b" " * 2**20])
def test_a_host_that_sends_what_is_no_answer_hides_no_other(bare: Ctl, tmp_path: Path, answer: bytes) -> None:
    with raw_server(answer) as url, agent_of("db", plan=planned) as good:
        (file := tmp_path / "hosts").write_text(f"bad {url}\ngood {good.url}\n")
        done = bare("vms", "--hosts", str(file))
    assert re.search(r"good +db", done.out), done.err
    assert "bad: NOT_AN_AGENT" in done.err


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: "])
def test_an_answer_that_comes_byte_by_byte_is_given_up(head: bytes) -> None:
    with raw_server(head, drip=True) as url, pytest.raises(CtlError) as raised:
        Agent(Target(url)).get("healthz", timeout_s=1.5)
    assert (raised.value.code, "no answer in time" in raised.value.message) == ("AGENT_UNREACHABLE", True)


def test_an_answer_without_an_end_is_given_up() -> None:
    with raw_server(b"HTTP/1.1 200 OK\r\n\r\n" + b" " * 2**27) as url, pytest.raises(CtlError) as raised:
        Agent(Target(url)).get("healthz")
    assert "more than 64 MiB" in raised.value.message


def test_half_an_answer_is_none() -> None:
    with raw_server(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}") as url, pytest.raises(CtlError) as raised:
        Agent(Target(url)).get("healthz")
    assert raised.value.code == "AGENT_UNREACHABLE"


@contextmanager
def raw_server(answer: bytes, *, drip: bool = False) -> Iterator[str]:
    """A server that sends these bytes to whoever asks; `drip`: and then one more now and then, as long as it can."""
    ended = threading.Event()

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with suppress(OSError):
                self.request.recv(2**16)
                if not answer.startswith(b"HTTP"):
                    self.request.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                self.request.sendall(answer)
                while drip and not ended.wait(0.2):
                    self.request.sendall(b" ")

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

    with Server((LOOPBACK, 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://{LOOPBACK}:{server.server_address[1]}"
        finally:
            ended.set()
            server.shutdown()
            thread.join()


def test_plans_that_are_not_those_of_the_targets_are_not_shown(bare: Ctl, tmp_path: Path) -> None:
    with agent_of("db", plan=lambda vm: Answer(200, {"vmUuid": vm, "plans": []})) as other:
        done = plan_all(bare, tmp_path, bad=other.url)
    assert [one["errorCode"] for one in done.json["failures"]] == ["NOT_UNDERSTOOD"]


def test_an_agent_that_is_gone_midway_is_asked_no_more(bare: Ctl, tmp_path: Path) -> None:
    with agent_of("a", "b", "c", "d", plan=lambda vm: planned(vm) if vm == "a" else None) as front:
        done = plan_all(bare, tmp_path, node=front.url)
        asked = [json.loads(request.body)["vmUuid"] for request in front.requests if request.method == "POST"]
    assert [vm.get("errorCode") for vm in done.json["vms"]] == [None, "AGENT_UNREACHABLE", "NOT_ASKED", "NOT_ASKED"]
    assert (set(asked), done.status) == ({"a", "b"}, 4)


def test_a_vm_that_is_gone_midway_fails_no_other_and_says_why(bare: Ctl) -> None:
    gone = Answer(404, {"success": False, "error": "no VM is named b", "errorCode": "VM_NOT_FOUND", "remedy": "Look."})
    with agent_of("a", "b", "c", plan=lambda vm: gone if vm == "b" else planned(vm)) as front:
        done = bare("--url", front.url, "plan", "--all", "--cpus", "2")
    rows = [line.split() for line in done.out.splitlines()]
    assert [(row[0], row[-2]) for row in rows[1:4]] == [("a", "-"), ("b", "-"), ("c", "-")]
    assert "VM_NOT_FOUND" in rows[2]
    assert "VM_NOT_FOUND: no VM is named b" in done.out
    assert done.status == 1


def test_no_vms_are_no_failure(bare: Ctl) -> None:
    with agent_of(plan=planned) as front:
        for arguments in (("vms",), ("plan", "--all", "--cpus", "x2"), ("ready", "--all", "--apply")):
            done = bare("--url", front.url, *arguments)
            assert (done.status, done.out) == (0, "no VMs\n")


def test_a_filter_that_no_vm_passes_says_what_the_vms_are(bare: Ctl, tmp_path: Path) -> None:
    """Not "no VMs": there are some, or nobody knows."""

    def list_chosen(*filters: str, names: str = "", dead: int = 0) -> str:
        vms = [{"vmUuid": name, "name": name, "ready": name != "full", "atMaximum": True} for name in names.split()]
        with Front(lambda _request: Answer(200, {"vms": vms})) as front:
            lines = [f"node1 {front.url}"] if names or not dead else []
            lines += [f"dead{n} http://{LOOPBACK}:{find_free_port()}" for n in range(dead)]
            (file := tmp_path / "hosts").write_text("\n".join(lines))
            several = ("--hosts", str(file)) if dead else ()
            done = bare("--url", front.url, "vms", *filters, *several)
        assert done.status == (4 if dead else 0)
        return done.out.strip()

    assert list_chosen("--not-ready", names="a full") == "all 2 VMs are ready or at their maximum"
    assert list_chosen("--not-ready", names="a") == "the only VM is ready or at its maximum"
    assert list_chosen("--pending-restart", names="a full") == "none of 2 VMs needs a restart"
    assert list_chosen("--pending-restart", names="a") == "the only VM needs no restart"
    assert list_chosen("--pending-restart", "--not-ready", names="a full") == "no VM matches both options"
    assert list_chosen("--pending-restart", "--not-ready") == "no VMs"
    few = list_chosen("--not-ready", names="a full", dead=1)
    assert few == "all 2 VMs are ready or at their maximum on the hosts that answered"
    assert list_chosen("--not-ready", dead=2) == "no host answered"
    assert list_chosen(dead=1) == "no host answered"


def test_a_plan_says_what_to_prepare_so_that_it_does_for_every_target(bare: Ctl) -> None:
    def prepared(**request: Any) -> dict[str, Any]:
        target = {name: request[name] for name in ("cpuNum", "memorySize")}
        prepare = {"path": "/vm/hotplug/ready", "request": {"vmUuid": "a b", "prepare": True, **request}}
        return {**PLAN, "target": target, "verdict": "restart", "prepare": [prepare]}

    plans = [prepared(cpuNum=cpus, memorySize=size) for size in (2**33, 2**35) for cpus in (8, 4)]
    answer = Answer(200, {"vmUuid": "a b", "name": "a b", "state": "running", "plans": plans})
    with Front(lambda request: list_vms("a b") if request.method == "GET" else answer) as front:
        done = bare("--url", front.url, "plan", "a b", "--cpus", "8,4", "--memory", "8G,32G")
    assert "kvmagentctl ready 'a b' --prepare --max-cpus 8 --max-memory 32G --diff" in done.out


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "lists no host"),
        (b"# all are gone\n\n", "lists no host"),
        (b"a http://127.0.0.1:9\nb at http://127.0.0.1:9\n", "line 2: 'b at http://127.0.0.1:9' is neither a URL"),
        (b"\xff\xfe\x00 \x80 \x81", "ansible-inventory is not installed"),
    ],
)
def test_a_file_that_lists_no_hosts_is_told_with_its_line(bare: Ctl, tmp_path: Path, text: bytes, words: str) -> None:
    (file := tmp_path / "hosts").write_bytes(text)
    done = bare("vms", "--hosts", str(file), environment={"PATH": "/nowhere"})
    assert (done.status, words in done.err) == (2, True), done.err


def test_an_inventory_in_yaml_is_none_of_names(bare: Ctl, tmp_path: Path) -> None:
    with agent_of("db", plan=planned) as front:
        (file := tmp_path / "hosts.yml").write_text(
            f"all:\n  hosts:\n    alpha:\n      kvmagent_url: {front.url}\n    beta:\n      kvmagent_url: {front.url}\n"
        )
        path = f"{Path(sys.executable).parent}:{bare.environment['PATH']}"
        done = bare("vms", "--hosts", str(file), "--json", environment={"PATH": path})
    assert [vm["host"] for vm in done.json["vms"]] == ["alpha", "beta"], done.err


def test_a_host_whose_token_cannot_be_read_is_told_and_fails_no_other(agent: AgentProcess, tmp_path: Path) -> None:
    conf = tmp_path / "kvmagent" / "ctl.conf"
    conf.parent.mkdir()
    conf.write_text(f"[agent good]\nurl = {agent.url}\n[agent bad]\nurl = {agent.url}\ntoken_file = /nowhere/token\n")
    ctl = Ctl({"XDG_CONFIG_HOME": str(tmp_path)})
    (hosts := tmp_path / "hosts").write_text("bad\ngood\n")
    done = ctl("vms", "--hosts", str(hosts), "--json")
    assert done.status == 4
    assert {vm["host"] for vm in done.json["vms"]} == {"good"}
    (failure,) = done.json["failures"]
    assert (failure["host"], failure["errorCode"]) == ("bad", "BAD_CREDENTIALS")
    assert "start the agent" not in failure["remedy"]
    assert "bad: BAD_CREDENTIALS: " in done.err
    # Where no host can be asked nothing was sent: the command line is wrong.
    hosts.write_text("bad\n")
    assert ctl("vms", "--hosts", str(hosts)).status == 2


def test_an_agent_with_two_names_is_asked_once_and_told_by_both(bare: Ctl, tmp_path: Path) -> None:
    with agent_of("db", plan=planned) as front:
        lines = f"one {front.url}\ntwo {front.url}/\ntwo {front.url}/\none {front.url}\n"
        (hosts := tmp_path / "hosts").write_text(lines)
        done = bare("vms", "--hosts", str(hosts), "--json")
        assert [vm["host"] for vm in done.json["vms"]] == ["one", "two"]
        assert len(front.requests) == 1


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_a_host_that_fails_is_told_once_below_what_is_watched(bare: Ctl, tmp_path: Path, form: tuple[str, ...]) -> None:
    with agent_of("db", plan=planned) as front:
        (hosts := tmp_path / "hosts").write_text(f"up {front.url}\ndead http://{LOOPBACK}:{find_free_port()}\n")
        with subprocess.Popen(
            [bare.script, "vms", "--watch", "--hosts", hosts, *form],
            env=bare.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as watching:
            wait_for(lambda: len(front.requests) >= 3, timeout_s=60, what="three looks")
            shown, _ = interrupt(watching)[1:]
    assert shown.count("dead: AGENT_UNREACHABLE") == 1
    assert shown.index("db") < shown.index("dead: AGENT_UNREACHABLE")
    if form:
        body = json.loads(shown.splitlines()[0])
        assert [failure["host"] for failure in body["failures"]] == ["dead"]
