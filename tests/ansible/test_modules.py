"""The modules of the collection, on libvirt's test driver: what they ask for, what they say, how they get in."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kvmagent.api.security import new_token
from tests.ansible.conftest import Controller, Question
from tests.fakes.agent import write_node
from tests.lab.agent import AgentProcess, find_free_port
from tests.lab.domainxml import GuestSpec
from tests.lab.pki import LOOPBACK, Authority


@pytest.fixture(scope="module")
def node_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """libvirt's test driver with VMs of ours, one of which can be given nothing."""
    specs = [GuestSpec(name=name) for name in ("db-7", "web-1", "web-2")]
    specs.append(GuestSpec(name="old", max_memory_mib=None, agent_channel=False))
    return write_node(tmp_path_factory.mktemp("node"), *specs)


@pytest.fixture(scope="module")
def agent(node_uri: str) -> Iterator[AgentProcess]:
    with AgentProcess(uri=node_uri) as running:
        yield running


def ask(module: str, **arguments: Any) -> Question:
    return Question(module, arguments)


def check(module: str, **arguments: Any) -> Question:
    return Question(module, arguments, check=True)


@pytest.fixture(scope="module")
def to(controller: Controller, agent: AgentProcess) -> Callable[..., list[dict[str, Any]]]:
    """Puts questions to the agent."""

    def put(*questions: Question) -> list[dict[str, Any]]:
        return controller.ask(*(one._replace(arguments={"url": agent.url, **one.arguments}) for one in questions))

    return put


Put = Callable[..., list[dict[str, Any]]]


def test_a_check_plans_a_run_changes_and_another_run_changes_nothing(to: Put, controller: Controller) -> None:
    wanted = {"name": "db-7", "cpu_num": 3}
    planned, between, done, again, checked = to(
        check("vm", **wanted),
        ask("vm_info", name="db-7"),
        ask("vm", **wanted),
        ask("vm", **wanted),
        check("vm", **wanted),
    )
    assert (planned["changed"], planned["outcomes"]) == (True, ["planned"])
    assert (planned["diff"]["before"]["cpuNum"], planned["diff"]["after"]["cpuNum"]) == (1, 3)
    assert '-    "cpuNum": 1' in controller.text
    assert '+    "cpuNum": 3' in controller.text
    assert between["vms"][0]["after"]["cpuNum"] == 1

    assert (done["changed"], done["outcomes"], done["before"]["cpuNum"]) == (True, ["plugged"], 1)
    assert (done["after"]["cpuNum"], done["after"]["configCpuNum"]) == (3, 3)
    assert done["after"]["guestCpuNum"] is None
    assert any("GUEST_AGENT_DISCONNECTED" in warning for warning in done["warnings"])

    assert (again["changed"], again["outcomes"]) == (False, ["unchanged"])
    assert (checked["changed"], checked["diff"]["before"]) == (False, checked["diff"]["after"])


def test_a_check_is_the_agents_plan_and_no_task(to: Put, agent: AgentProcess) -> None:
    before = [task["taskUuid"] for task in agent.get("/tasks?limit=1000").body["tasks"]]
    plan, memory, above, off = to(
        check("vm", name="web-2", cpu_num=2, memory_size="512M"),
        check("vm", name="web-2", memory_size="512M", method="dimm", dimm_size="128M"),
        check("vm", name="web-2", cpu_num=64),
        check("vm", name="old", cpu_num=2, affect="config"),
    )
    assert (plan["changed"], plan["plan"]["verdict"], plan["replies"]) == (True, "live-unconfirmed", [])
    assert plan["plan"]["target"] == {
        "cpuNum": 2, "memorySize": 512 * 2**20, "scaleShares": False, "affect": "both", "guestOnline": True,
    }  # fmt: skip
    assert plan["diff"]["after"]["memorySize"] == 512 * 2**20
    assert memory["plan"]["target"]["dimmSize"] == 128 * 2**20
    assert (above["failed"], above["changed"], above["error_code"]) == (True, False, "CPU_ABOVE_MAXIMUM")
    assert above["plan"]["verdict"] in ("restart", "never")
    assert off["plan"]["outcome"] in ("configured", None)
    assert [task["taskUuid"] for task in agent.get("/tasks?limit=1000").body["tasks"]] == before


def test_gets_in_by_the_agents_socket(controller: Controller, node_uri: str) -> None:
    with AgentProcess(uri=node_uri, by_socket=True) as agent:
        assert agent.url.startswith("unix:///")
        every, planned, done, again = controller.ask(
            ask("vm_info", url=agent.url),
            check("vm", url=agent.url, name="web-2", cpu_num=2),
            ask("vm", url=agent.url, name="web-2", cpu_num=2),
            ask("vm", url=agent.url, name="web-2", cpu_num=2),
        )
        assert agent.get(f"/tasks/{done['replies'][0]['taskUuid']}").body["state"] == "delivered"
    assert [(one["changed"]) for one in (every, planned, done, again)] == [False, True, True, False]
    assert sorted(vm["name"] for vm in every["vms"]) == ["db-7", "old", "web-1", "web-2"]


def test_prepares_a_virtio_mem_device_where_told_to(to: Put) -> None:
    (planned,) = to(check("prepare", name="web-1", max_memory_size="4G", memory_device="virtio-mem"))
    assert planned["changed"]
    assert "virtio-mem" in planned["diff"]["prepared"]


def test_a_refusal_fails_with_its_code_and_an_unconfirmed_plug_where_it_was_asked_to(to: Put) -> None:
    strict = ask("vm", name="web-1", cpu_num=2, fail_on_plugged=True)
    plugged, again, above, unknown, wrong = to(
        strict,
        strict,
        ask("vm", name="web-1", cpu_num=64),
        ask("vm", name="no-such-vm", cpu_num=2),
        ask("vm", name="web-1", memory_size="much"),
    )
    assert (plugged["failed"], plugged["changed"], plugged["error_code"]) == (True, True, "PLUGGED")
    assert plugged["reply"]["cpuNum"] == 2
    # It stays plugged: nothing is left to do.
    assert (again["failed"], again["changed"]) == (False, False)
    assert (above["failed"], above["changed"], above["error_code"]) == (True, False, "CPU_ABOVE_MAXIMUM")
    assert above["reply"]["remedy"] in above["msg"]
    assert (unknown["failed"], unknown["error_code"]) == (True, "VM_NOT_FOUND")
    assert wrong["failed"]
    assert "'much' is no size" in wrong["msg"]


def test_prepare_shows_its_diff_and_says_when_a_restart_is_needed(to: Put) -> None:
    wanted = {"name": "old", "max_cpu_num": 8, "max_memory_size": "2G", "slots": 8}
    planned, done, again, clamped = to(
        check("prepare", **wanted),
        ask("prepare", **wanted),
        ask("prepare", **wanted),
        check("prepare", name="web-1", max_cpu_num=8000, fail_on_clamped=True),
    )
    assert planned["changed"]
    assert "+  <maxMemory slots=" in planned["diff"]["prepared"]
    assert (done["changed"], done["restart_required"]) == (True, True)
    assert "maxMemorySize" in [change["field"] for change in done["changes"]]
    assert (again["changed"], again["changes"], again["restart_required"]) == (False, [], True)
    assert (clamped["failed"], clamped["error_code"]) == (True, "CLAMPED")


def test_info_tells_all_vms_one_vm_and_what_one_is_ready_for(to: Put) -> None:
    every, one, refused, unknown = to(
        ask("vm_info"),
        ask("vm_info", name="web-2"),
        ask("vm_info", name="web-2", cpu_num=64),
        ask("vm_info", name="no-such-vm"),
    )
    assert sorted(vm["name"] for vm in every["vms"]) == ["db-7", "old", "web-1", "web-2"]
    (vm,) = one["vms"]
    assert (vm["name"], vm["after"]["maxCpuNum"]) == ("web-2", 4)
    (vm,) = refused["vms"]
    assert (vm["ready"], [blocker["code"] for blocker in vm["blockers"]]) == (False, ["CPU_ABOVE_MAXIMUM"])
    assert unknown["error_code"] == "VM_NOT_FOUND"


def test_gets_in_by_certificate_and_by_token_over_tls(controller: Controller, node_uri: str, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    host, client = authority.issue(LOOPBACK), str(authority.issue("controller.example"))
    token, line = new_token("controller")
    tokens = tmp_path / "tokens"
    tokens.write_text(f"{line}\n")
    tokens.chmod(0o600)
    tls = {"tls_cert": str(host), "tls_key": str(host)}
    ca = {"ca_path": str(authority.ca_file)}
    by_certificate = {"security": {**tls, "client_ca": str(authority.ca_file)}}
    by_token = {"security": {**tls, "tokens_file": str(tokens)}}
    with (
        AgentProcess(uri=node_uri, settings=by_certificate, tls=authority.client(Path(client))) as one,
        AgentProcess(uri=node_uri, settings=by_token, tls=authority.client(), token=token) as other,
    ):
        certificate, nobody, untrusted, bearer, guess = controller.ask(
            ask("vm_info", url=one.url, client_cert=client, **ca),
            ask("vm_info", url=one.url, **ca),
            ask("vm_info", url=one.url, client_cert=client),
            ask("vm_info", url=other.url, token=token, **ca),
            ask("vm_info", url=other.url, token="guess", **ca),
        )
    assert certificate["vms"]
    assert bearer["vms"]
    assert token not in controller.text
    assert [one["error_code"] for one in (nobody, untrusted)] == ["AGENT_UNREACHABLE"] * 2
    assert guess["error_code"] == "CREDENTIALS_WRONG"


def test_no_agent_and_what_answers_and_is_none_are_told(controller: Controller) -> None:
    with closing(socket.create_server((LOOPBACK, 0))) as server:

        def answer() -> None:
            client, _ = server.accept()
            with closing(client):
                client.recv(65536)
                client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello")

        thread = threading.Thread(target=answer)
        thread.start()
        other, nowhere = controller.ask(
            ask("vm_info", url=f"http://{LOOPBACK}:{server.getsockname()[1]}"),
            ask("vm_info", url=f"http://{LOOPBACK}:{find_free_port()}"),
        )
        thread.join()
    assert other["error_code"] == "NOT_AN_AGENT"
    assert nowhere["error_code"] == "AGENT_UNREACHABLE"
