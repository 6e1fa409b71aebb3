"""Who may do what: the socket's callers by user, others by token or certificate; roles, VMs, ownership, revocation."""

import grp
import hashlib
import http.client
import json
import os
import pwd
import re
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvmagent.api.localpeer import LocalUser
from kvmagent.api.security import Peer, Security
from kvmagent.model.errors import AgentError, Code
from kvmagent.settings import SecuritySection
from tests.fakes.agent import write_node
from tests.lab.agent import LOOPBACK, AgentProcess, Reply, UnixConnection, new_task_uuid
from tests.lab.domainxml import GuestSpec
from tests.lab.pki import Authority
from tests.lab.processes import wait_for
from tests.lab.server import ManagementServer

ROLES = (
    "token:watcher read, token:plugger plug, token:remover unplug, token:preparer read prepare, token:zstack host,"
    " token:tenant plug read vm=vm1, token:chief admin"
)
COMMANDS = {
    "plug": ("/vm/hotplug/cpu", {"vmUuid": "vm1", "cpuNum": 2}),
    "unplug": ("/vm/hotunplug/cpu", {"vmUuid": "vm1", "cpuNum": 1}),
    "read": ("/vm/hotplug/ready", {"vmUuid": "vm1"}),
    "prepare": ("/vm/hotplug/ready", {"vmUuid": "vm1", "prepare": True, "dryRun": True}),
    "host": ("/host/echo", {}),
}
MAY = {
    "watcher": {"read"},
    "plugger": {"plug"},
    "remover": {"unplug"},
    "preparer": {"read", "prepare"},
    "zstack": {"host"},
    "tenant": {"plug", "read"},
    "chief": set(COMMANDS),
    "nobody": set(),
}
NOBODY = pwd.getpwnam("nobody")


def read(connection: http.client.HTTPConnection, path: str, **headers: str) -> Reply:
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    return Reply(response.status, json.loads(response.read()))


def write_tokens(path: Path, *names: str) -> None:
    path.touch(mode=0o600)
    path.write_text("".join(f"{name}:{hashlib.sha256(name.encode()).hexdigest()}\n" for name in names))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("tokens") / "tokens"
    write_tokens(path, *MAY)
    return path


@pytest.fixture(scope="module")
def guarded(node_uri: str, tokens: Path) -> Iterator[AgentProcess]:
    """An agent where every token has roles of its own; its name is the token."""
    settings = {"security": {"tokens_file": str(tokens), "roles": ROLES}}
    with AgentProcess(uri=node_uri, settings=settings, token="chief") as running:
        yield running


def test_a_history_tells_who_has_a_role_for_some_vms_nothing_of_another_that_once_had_such_a_name(
    tmp_path: Path, tokens: Path
) -> None:
    settings = {"security": {"tokens_file": str(tokens), "roles": ROLES}}
    first, second = (f"<uuid>11111111-1111-4111-8111-11111111111{n}</uuid>" for n in (1, 2))
    uri = write_node(tmp_path, GuestSpec(name="vm1", domain_xml=first))

    def plug(vm: str, cpus: int) -> None:
        task = new_task_uuid()
        agent.post("/vm/hotplug/cpu", {"vmUuid": vm, "cpuNum": cpus}, task_uuid=task, callback_url="none")
        wait_for(lambda: agent.get(f"/tasks/{task}").body["finishedAt"], timeout_s=60, what=f"task {task}")

    with AgentProcess(uri=uri, settings=settings, token="chief") as agent:
        plug("vm1", 2)
        agent.stop()
        write_node(tmp_path, GuestSpec(name="other", domain_xml=first), GuestSpec(name="vm1", domain_xml=second))
        agent.start()
        plug("other", 3)
        plug("vm1", 4)
        told = agent.get("/vms/vm1/history").body["changes"]
        assert {change["vm"] for change in told} == {"vm1", "other"}
        agent.token = "tenant"
        for query in ("", "?limit=1"):
            changes = agent.get(f"/vms/vm1/history{query}").body["changes"]
            assert {change["vm"] for change in changes} == {"vm1"}, query


def hang_up(agent: AgentProcess) -> None:
    said = agent.log().count("section=callback")
    os.kill(agent.pid, signal.SIGHUP)
    wait_for(lambda: agent.log().count("section=callback") > said, timeout_s=30, what="the reload")


def test_nothing_listens_by_tcp_until_somebody_may_come_in_and_the_socket_knows_its_caller(node_uri: str) -> None:
    with AgentProcess(uri=node_uri, by_socket=True) as agent:
        who = agent.get("/whoami").body
        assert who["caller"] == f"unix:{pwd.getpwuid(os.geteuid()).pw_name}"
        assert who["client"] == "local"
        assert "admin" in who["roles"]
        assert agent.socket.stat().st_mode & 0o007 == 0
        with socket.socket() as probe:
            assert probe.connect_ex((LOOPBACK, agent.port)) != 0
        done = subprocess.run(
            [Path(sys.executable).with_name("kvmagentctl"), "--url", agent.url, "status"],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "KVMAGENT_URL": ""},
        )
        assert agent.url in done.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can ask as another user")
def test_another_user_of_the_host_is_known_and_has_what_its_entry_says(node_uri: str) -> None:
    ask = (
        "import http.client, os, socket, sys\n"
        f"os.setgroups([]); os.setgid({NOBODY.pw_gid}); os.setuid({NOBODY.pw_uid})\n"
        "s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])\n"
        "c = http.client.HTTPConnection('localhost'); c.sock = s\n"
        "c.request(*sys.argv[2:4]); r = c.getresponse(); print(r.status, r.read().decode())"
    )

    def as_nobody(agent: AgentProcess, method: str, path: str) -> tuple[int, Any]:
        command = [sys.executable, "-c", ask, str(agent.socket), method, path]
        status, _, body = subprocess.run(command, capture_output=True, text=True, check=True).stdout.partition(" ")
        return int(status), json.loads(body)

    with AgentProcess(uri=node_uri, settings={"security": {"roles": "unix:nobody read, anonymous admin"}}) as agent:
        refused = subprocess.run([sys.executable, "-c", ask, str(agent.socket), "GET", "/whoami"], capture_output=True)
        assert b"PermissionError" in refused.stderr
        agent.directory.chmod(0o711)
        agent.socket.chmod(0o666)
        assert as_nobody(agent, "GET", "/whoami")[1]["caller"] == "unix:nobody"
        assert as_nobody(agent, "GET", "/vms")[0] == 200
        status, body = as_nobody(agent, "POST", "/vm/hotplug/cpu")
        assert (status, body["errorCode"]) == (403, "ROLE_MISSING")
        assert "needs the role plug; it has read" in body["error"]


@pytest.mark.parametrize("token", MAY)
@pytest.mark.parametrize("needs", COMMANDS)
def test_a_caller_may_what_its_roles_say_and_nothing_else(
    guarded: AgentProcess, server: ManagementServer, token: str, needs: str
) -> None:
    path, body = COMMANDS[needs]
    headers = {"Authorization": f"Bearer {token}"}
    task = None if needs == "host" else new_task_uuid()
    reply = guarded.post(path, body, task_uuid=task, callback_url=server.url, headers=headers)
    if needs in MAY[token]:
        assert reply.status == 200
    else:
        assert (reply.status, reply.body["errorCode"]) == (403, "ROLE_MISSING")
        assert reply.body["details"]["role"] in (needs, "read")


def test_a_role_is_asked_for_before_the_body_is_looked_at(guarded: AgentProcess) -> None:
    reply = guarded.post("/vm/hotunplug/cpu", b"{no JSON", headers={"Authorization": "Bearer watcher"})
    assert reply.body["errorCode"] == "ROLE_MISSING"
    assert 'caller=token:watcher client=127.0.0.1 what="POST /vm/hotunplug/cpu" outcome=ROLE_MISSING' in guarded.log()


def test_a_role_for_one_vm_shows_and_changes_no_other(guarded: AgentProcess) -> None:
    headers = {"Authorization": "Bearer tenant"}
    assert [vm["name"] for vm in guarded.get("/vms", headers=headers).body["vms"]] == ["vm1"]
    assert guarded.get("/vms/vm1", headers=headers).status == 200
    other = {"vmUuid": "vm2", "cpuNum": 2}
    for reply in (
        guarded.get("/vms/vm2", headers=headers),
        guarded.get("/metrics", headers=headers),
        guarded.get("/healthz", headers=headers),
        guarded.post("/vm/hotplug/cpu", other, task_uuid="tv2", callback_url="none", headers=headers),
    ):
        assert (reply.status, reply.body["errorCode"]) == (403, "ROLE_MISSING")
    whoami = guarded.get("/whoami", headers=headers).body
    assert (whoami["caller"], whoami["roles"], whoami["vms"]) == ("token:tenant", ["plug", "read"], ["vm1"])


def test_a_task_is_its_callers(guarded: AgentProcess, server: ManagementServer) -> None:
    task, (path, body) = new_task_uuid(), COMMANDS["plug"]
    url = f"{server.url}?token=secret"
    mine, other = {"Authorization": "Bearer plugger"}, {"Authorization": "Bearer tenant"}
    assert guarded.post(path, body, task_uuid=task, callback_url=url, headers=mine).status == 200
    server.wait(task, 20)
    for reply in (
        guarded.post(path, body, task_uuid=task, callback_url=url, headers=other),
        guarded.post(path, body, task_uuid=task, callback_url="none", headers=other),
        guarded.post(f"/tasks/{task}/cancel", b"", headers=other),
        guarded.get(f"/tasks/{task}", headers=other),
    ):
        assert (reply.status, reply.body["errorCode"]) == (403, "TASK_NOT_YOURS")
        assert "HotPlugCpu" not in json.dumps(reply.body)
    listed = {one["taskUuid"] for one in guarded.get("/tasks?limit=1000", headers=other).body["tasks"]}
    assert task not in listed
    assert guarded.get(f"/tasks/{task}", headers=mine).body["delivery"]["url"] == server.url
    assert guarded.get(f"/tasks/{task}", headers={"Authorization": "Bearer watcher"}).status == 200
    assert guarded.post(path, body, task_uuid=task, callback_url=url).status == 200  # by admin
    assert len(server.callbacks(task)) >= 1
    assert "secret" not in guarded.log()


# Who asks about a task of the plugger's -> what becomes of each thing that it may ask.
ACTS = ("send", "send without callback", "read", "list", "cancel")
OWNERS = {
    "plugger": dict.fromkeys(ACTS, "yes"),
    "chief": dict.fromkeys(ACTS, "yes"),
    "watcher": {"send": "ROLE_MISSING", "send without callback": "ROLE_MISSING", "read": "yes", "list": "yes"},
    "preparer": {"send": "ROLE_MISSING", "send without callback": "ROLE_MISSING", "read": "yes", "list": "yes"},
    "tenant": {"send": "TASK_NOT_YOURS", "send without callback": "TASK_NOT_YOURS", "read": "TASK_NOT_YOURS"},
    "remover": {"send": "ROLE_MISSING", "send without callback": "ROLE_MISSING", "read": "TASK_NOT_YOURS"},
    "zstack": {"send": "ROLE_MISSING", "send without callback": "ROLE_MISSING", "read": "TASK_NOT_YOURS"},
    "nobody": {"send": "ROLE_MISSING", "send without callback": "ROLE_MISSING", "read": "TASK_NOT_YOURS"},
}


@pytest.fixture(scope="module")
def owned(guarded: AgentProcess, server: ManagementServer) -> str:
    """A task of the plugger's that has ended."""
    task, (path, body) = new_task_uuid(), COMMANDS["plug"]
    mine = {"Authorization": "Bearer plugger"}
    assert guarded.post(path, body, task_uuid=task, callback_url=server.url, headers=mine).status == 200
    server.wait(task, 60)
    return task


@pytest.mark.parametrize("token", OWNERS)
def test_the_matrix_of_owners(guarded: AgentProcess, server: ManagementServer, owned: str, token: str) -> None:
    assert OWNERS.keys() == MAY.keys()
    headers, (path, body) = {"Authorization": f"Bearer {token}"}, COMMANDS["plug"]
    replies = {
        "read": guarded.get(f"/tasks/{owned}", headers=headers),
        "cancel": guarded.post(f"/tasks/{owned}/cancel", b"", headers=headers),
        "send": guarded.post(path, body, task_uuid=owned, callback_url=server.url, headers=headers),
        "send without callback": guarded.post(path, body, task_uuid=owned, callback_url="none", headers=headers),
    }
    for act, reply in replies.items():
        expected = OWNERS[token].get(act, "TASK_NOT_YOURS")
        told = reply.body.get("errorCode") or "yes"
        # What is done can be taken back by nobody; its caller and an administrator are told so.
        known = ("yes", "TASK_NOT_CANCELLABLE", "TASK_CONFLICT") if expected == "yes" else (expected,)
        assert told in known, act
        if expected != "yes":
            assert "HotPlugCpu" not in json.dumps(reply.body)
            assert server.url not in json.dumps(reply.body)
    listed = guarded.get("/tasks?limit=1000", headers=headers).body["tasks"]
    assert (owned in {one["taskUuid"] for one in listed}) == (OWNERS[token].get("list") == "yes")


@pytest.mark.parametrize("token", MAY)
def test_a_host_is_taken_over_by_its_management_server_alone(
    guarded: AgentProcess, server: ManagementServer, token: str
) -> None:
    first = {"hostUuid": "first", "sendCommandUrl": server.url, "version": "1"}
    chief, headers = {"Authorization": "Bearer chief"}, {"Authorization": f"Bearer {token}"}
    assert guarded.post("/host/connect", first, headers=chief).body["success"] is True
    reply = guarded.post("/host/connect", {**first, "hostUuid": "second"}, headers=headers)
    sent = {"task_uuid": new_task_uuid(), "callback_url": server.url}
    moved = guarded.post("/host/update/configuration", {**first, "hostUuid": "second"}, headers=headers, **sent)
    asked = new_task_uuid()
    assert guarded.post("/host/ping", {}, task_uuid=asked, callback_url=server.url, headers=chief).status == 200
    known = server.wait(asked, 60)["hostUuid"]
    if "host" in MAY[token]:
        assert (reply.status, known) == (200, "second")
    else:
        assert (reply.status, reply.body["errorCode"], known) == (403, "ROLE_MISSING", "first")
        assert (moved.status, moved.body["errorCode"]) == (403, "ROLE_MISSING")


# The socket's caller: its entry in the table -> what it may.
SOCKET_PEERS = {
    "unix:nobody read": {"read"},
    "unix:nobody plug prepare": {"plug"},
    "unix:nobody host": {"host"},
    f"group:{grp.getgrgid(NOBODY.pw_gid).gr_name} unplug read": {"unplug", "read"},
    "unix:nobody admin": {"read", "plug", "unplug", "prepare", "host"},
    "unix:root admin": set(),
    "token:nobody admin": set(),
}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can ask as another user")
def test_the_matrix_of_the_socket_s_callers(node_uri: str) -> None:
    ask = (
        "import http.client, json, os, socket, sys\n"
        f"os.setgroups([]); os.setgid({NOBODY.pw_gid}); os.setuid({NOBODY.pw_uid})\n"
        "def one(path, body):\n"
        "    s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])\n"
        "    c = http.client.HTTPConnection('localhost'); c.sock = s\n"
        "    h = {'Content-Type': 'application/json'}\n"
        "    c.request('POST', path, json.dumps(body), h); return json.loads(c.getresponse().read()).get('errorCode')\n"
        "print(json.dumps({name: one(*request) for name, request in json.loads(sys.argv[2]).items()}))"
    )
    first = next(iter(SOCKET_PEERS))
    with AgentProcess(uri=node_uri, settings={"security": {"roles": first}}, by_socket=True) as agent:
        agent.directory.chmod(0o711)
        agent.socket.chmod(0o666)
        for entry, may in SOCKET_PEERS.items():
            text = re.sub(r"(?m)^roles = .*$", f"roles = {entry}", agent.config_file.read_text())
            agent.config_file.write_text(text)
            hang_up(agent)
            command = [sys.executable, "-c", ask, str(agent.socket), json.dumps(COMMANDS)]
            told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            # Without a task's id a command goes no further than to say so.
            let_in = {name for name, code in told.items() if code != "ROLE_MISSING"}
            assert let_in - {"prepare"} == may - {"prepare"}, entry


@pytest.mark.parametrize("path", ["/vms", "/whoami"])
def test_a_connection_ends_with_its_request_once_who_may_has_changed(node_uri: str, tmp_path: Path, path: str) -> None:
    """Also where its client always has the first byte of the next request in the pipe."""
    file = tmp_path / "tokens"
    write_tokens(file, "watcher", "chief")
    settings = {"security": {"tokens_file": str(file), "roles": "token:* admin"}}
    request = f"GET {path} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer watcher\r\n\r\n".encode()
    with AgentProcess(uri=node_uri, settings=settings, token="chief") as agent:
        with socket.create_connection((LOOPBACK, agent.port), timeout=10) as client:
            client.sendall(request + request[:1])
            assert client.recv(65536).startswith(b"HTTP/1.1 200")
            write_tokens(file, "chief")
            hang_up(agent)
            client.sendall(request[1:] + request[:1])
            answer = b"".join(iter(lambda: client.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 401")
        assert answer.count(b"HTTP/1.1") == 1
        assert b"Connection: close" in answer


def test_a_changed_role_counts_from_the_reload_on(node_uri: str, tokens: Path) -> None:
    settings = {"security": {"tokens_file": str(tokens), "roles": "token:* admin"}}
    with AgentProcess(uri=node_uri, settings=settings, token="chief") as agent:
        agent.config_file.write_text(agent.config_file.read_text().replace("token:* admin", "token:chief read"))
        hang_up(agent)
        assert agent.get("/whoami").body["roles"] == ["read"]
        assert agent.get("/vms", headers={"Authorization": "Bearer watcher"}).status == 403
        agent.config_file.write_text(agent.config_file.read_text().replace("token:chief read", "token:chief reed"))
        hang_up(agent)
        assert agent.get("/whoami").body["roles"] == ["read"]


def test_a_certificate_that_ends_while_its_client_is_connected_lets_in_no_longer() -> None:
    now = [1000.0]
    security = Security(SecuritySection(client_ca="/ca"), clock=lambda: now[0])
    peer = Peer(LOOPBACK, names=("server.example",), not_after=2000.0)
    assert security.identify(peer, None).caller == "certificate:server.example"
    now[0] = 2000.0
    with pytest.raises(AgentError, match="expired") as caught:
        security.identify(peer, None)
    assert caught.value.code is Code.CERTIFICATE_NOT_ALLOWED


def test_a_revoked_certificate_is_refused_from_the_reload_on(node_uri: str, tmp_path: Path) -> None:
    authority = Authority(tmp_path, "own")
    crl, server_file = tmp_path / "crl.pem", authority.issue(LOOPBACK, file_name="agent")
    good, bad = authority.issue("good.example"), authority.issue("bad.example")
    crl.write_bytes(authority.revoke())
    security = {"tls_cert": str(server_file), "client_ca": str(authority.ca_file), "client_crl": str(crl)}
    with AgentProcess(uri=node_uri, settings={"security": security}, tls=authority.client(good)) as agent:
        agent.tls = authority.client(bad)
        assert agent.get("/healthz").status == 200
        crl.write_bytes(authority.revoke(bad))
        hang_up(agent)
        with pytest.raises((ssl.SSLError, ConnectionError)):
            agent.get("/healthz")
        agent.tls = authority.client(good)
        assert agent.get("/healthz").status == 200


@pytest.mark.parametrize("name", ["2001:db8::1", "2001:DB8:0:0:0:0:0:1"])
def test_an_ipv6_address_in_allowed_names_is_one_however_it_is_written(name: str) -> None:
    security = Security(SecuritySection(client_ca="/ca", allowed_names=(name,)))
    assert security.identify(Peer(LOOPBACK, names=("2001:db8::1",)), None).caller == "certificate:2001:db8::1"


@pytest.mark.parametrize("named", ["watcher.example", "WATCHER.Example"])
@pytest.mark.parametrize("written", ["watcher.example", "Watcher.EXAMPLE", "*.Example"])
def test_no_spelling_of_a_certificate_s_name_passes_the_entry_that_gives_less(named: str, written: str) -> None:
    section = SecuritySection(client_ca="/ca", roles=(f"certificate:{written} read", "certificate:* admin"))
    found = Security(section).identify(Peer(LOOPBACK, names=(named,)), None)
    assert (found.caller, found.roles) == ("certificate:watcher.example", {"read"})


def test_root_and_the_agents_own_user_may_everything_on_the_socket_whatever_the_table_says() -> None:
    security = Security(SecuritySection(roles=("group:ops read",)))
    for uid in (0, os.geteuid()):
        assert security.identify(Peer("local", user=LocalUser(uid, "name")), None).is_admin
    other = security.identify(Peer("local", user=LocalUser(4_000_000, "eve", ("users",))), None)
    assert other.roles == frozenset()


@pytest.mark.parametrize("host", ["evil.example", "evil.example.:7070"])
def test_a_web_page_s_name_is_refused_by_the_socket_too(agent: AgentProcess, host: str) -> None:
    reply = read(UnixConnection(agent.socket), "/vms", Host=host)
    assert (reply.status, reply.body["errorCode"]) == (403, "WEB_PAGE_NOT_ALLOWED")


def test_a_name_of_the_host_is_good_where_the_configuration_has_it(node_uri: str) -> None:
    section = {"allow_unauthenticated": "true", "allowed_clients": LOOPBACK, "host_names": "node17.example"}
    with AgentProcess(uri=node_uri, settings={"security": section}) as agent:
        assert agent.get("/vms", headers={"Host": "node17.example:7070"}).status == 200
        assert agent.get("/vms", headers={"Host": "node18.example:7070"}).status == 403


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /vms HTTP/1.-1\r\nHost: a\r\n\r\n",
        b"GET /vms HTTP/ 1. 1\r\nHost: a\r\n\r\n",
        b"GET /vms HTTP/1.x\r\nHost: a\r\n\r\n",
        b"GET /vms HTTP/2.0\r\nHost: a\r\n\r\n",
        b"GET  /vms HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /vms\r\nHost: a\r\n\r\n",
        b"GET /vms HTTP/1.1\r\n\r\n",
        b"GET /vms?a=1&a=%ff HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /vms HTTP/1.1\r\nHost: a\r\nX: =?foo?q?x?=\r\nConnection: close\r\n\r\n",
        b"GET /vms HTTP/1.1\r\nHost: a\r\nCookie: \xff=;;=\r\nConnection: close\r\n\r\n",
    ],
)
def test_whatever_comes_in_is_answered_in_json_and_without_a_trace(agent: AgentProcess, request_bytes: bytes) -> None:
    with socket.create_connection((LOOPBACK, agent.port), timeout=10) as client:
        client.sendall(request_bytes)
        client.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: client.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 200 ", b"HTTP/1.0 400 "))
    json.loads(body)
    assert b"Traceback" not in answer
    assert b".py" not in answer


def test_what_cannot_be_decoded_leaves_an_audit_line(node_uri: str) -> None:
    requests = [
        (b"GET /vms?x=%ff HTTP/1.1\r\nHost: a\r\n\r\n", "outcome=BAD_QUERY"),
        (b"GET /vms?limit=1&limit=1 HTTP/1.1\r\nHost: a\r\n\r\n", "outcome=BAD_QUERY"),
        (b"GET /vms HTTP/1.-1\r\nHost: a\r\n\r\n", "outcome=BAD_HTTP"),
        (
            b"POST /vm/hotplug/cpu HTTP/1.1\r\nHost: a\r\ntaskuuid: \xff\r\nContent-Length: 0\r\n\r\n",
            "outcome=BAD_TASK_UUID",
        ),
        (b"\x80\x00\r\n\r\n", "outcome=BAD_HTTP"),
    ]
    with AgentProcess(uri=node_uri) as agent:
        for request, outcome in requests:
            before = [line for line in agent.log().splitlines() if "audit event=refused" in line]
            with socket.create_connection((LOOPBACK, agent.port), timeout=30) as client:
                client.sendall(request)
                client.shutdown(socket.SHUT_WR)
                while client.recv(65536):
                    pass
            after = [line for line in agent.log().splitlines() if "audit event=refused" in line]
            assert outcome in after[len(before)], request


def test_a_header_means_what_it_says(agent: AgentProcess, server: ManagementServer) -> None:
    body = {"vmUuid": "vm1", "cpuNum": 1}
    reply = agent.post("/vm/hotplug/cpu", body, task_uuid="=?utf-8?q?a5?=", callback_url=server.url)
    assert (reply.status, reply.body["errorCode"]) == (400, "BAD_TASK_UUID")


@pytest.mark.parametrize("path", ["/tasks?limit=1&limit=2", "/vms?x=%ff", "/vms?x=1"])
def test_a_refused_query_leaves_an_audit_line(agent: AgentProcess, path: str) -> None:
    before = agent.log().count("outcome=BAD_QUERY")
    assert agent.get(path).body["errorCode"] == "BAD_QUERY"
    wait_for(lambda: agent.log().count("outcome=BAD_QUERY") > before, timeout_s=5, what="the audit line")


def test_a_pipe_in_place_of_a_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokens", 0o600)
    with pytest.raises(AgentError, match="must be a file"):
        Security(SecuritySection(tokens_file=str(tmp_path / "tokens"))).load()


def test_a_log_file_that_is_a_link_stops_the_start(node_uri: str, tmp_path: Path) -> None:
    (tmp_path / "log").symlink_to(tmp_path / "other")
    with pytest.raises(RuntimeError, match=r"log\.file"):
        AgentProcess(uri=node_uri, settings={"log": {"file": str(tmp_path / "log")}}).__enter__()
    assert not (tmp_path / "other").exists()
