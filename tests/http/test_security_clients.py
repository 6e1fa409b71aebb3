"""Who gets in and who does not: clients against server configurations, over real sockets."""

import hashlib
import http.client
import json
import os
import signal
import socket
import ssl
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kvmagent.api.security import new_token
from tests.lab.agent import LOOPBACK, AgentProcess, Reply, new_task_uuid
from tests.lab.pki import Authority
from tests.lab.processes import wait_for
from tests.lab.server import ManagementServer

GOOD = "good-token"
OTHER_ADDRESS = "127.0.0.2"

# What becomes of a client: it is in; its TLS handshake fails; or the code that it is refused with.
IN, HANDSHAKE = "in", "handshake"


@dataclass(frozen=True)
class Client:
    """A way to come in."""

    certificate: str | None = None
    token: str | None = None
    authorization: str | None = None
    plain: bool = False
    trusts: str = "own"
    source: str = LOOPBACK


CLIENTS = {
    "nothing": Client(),
    "certificate": Client(certificate="server.example"),
    "other name": Client(certificate="other.example"),
    "wrong CA": Client(certificate="stranger"),
    "expired": Client(certificate="expired"),
    "token": Client(token=GOOD),
    "wrong token": Client(token="guess"),
    "revoked token": Client(token="revoked"),
    "empty token": Client(token=""),
    "no Bearer": Client(authorization=f"Basic {GOOD}"),
    "plain": Client(plain=True),
    "plain, token": Client(plain=True, token=GOOD),
    "certificate, other address": Client(certificate="server.example", source=OTHER_ADDRESS),
    "plain, other address": Client(plain=True, source=OTHER_ADDRESS),
}

# The agent's configuration -> what becomes of each client.
MATRIX: dict[str, dict[str, str]] = {
    "certificates": {
        "nothing": HANDSHAKE,
        "certificate": IN,
        "other name": IN,
        "wrong CA": HANDSHAKE,
        "expired": HANDSHAKE,
        "token": HANDSHAKE,
        "plain": "TLS_REQUIRED",
        "certificate, other address": IN,
    },
    "named certificates": {
        "nothing": HANDSHAKE,
        "certificate": IN,
        "other name": "CERTIFICATE_NOT_ALLOWED",
        "expired": HANDSHAKE,
    },
    "tokens": {
        "nothing": "CREDENTIALS_MISSING",
        "certificate": "CREDENTIALS_MISSING",
        "token": IN,
        "wrong token": "CREDENTIALS_WRONG",
        "revoked token": "CREDENTIALS_WRONG",
        "empty token": "CREDENTIALS_WRONG",
        "no Bearer": "CREDENTIALS_WRONG",
        "plain": "TLS_REQUIRED",
        "plain, token": "TLS_REQUIRED",
    },
    "both": {
        "nothing": "CREDENTIALS_MISSING",
        "certificate": IN,
        "token": IN,
        "wrong CA": HANDSHAKE,
        "expired": HANDSHAKE,
        "wrong token": "CREDENTIALS_WRONG",
        "plain, token": "TLS_REQUIRED",
    },
    "tokens on loopback": {
        "plain": "CREDENTIALS_MISSING",
        "plain, token": IN,
        "nothing": HANDSHAKE,
    },
    "certificates of one address": {
        "certificate": IN,
        "wrong CA": HANDSHAKE,
        "certificate, other address": "CLIENT_NOT_ALLOWED",
    },
    "unauthenticated of one address": {
        "plain": IN,
        "plain, other address": "CLIENT_NOT_ALLOWED",
    },
}
CELLS = [(server, client) for server, clients in MATRIX.items() for client in clients]


class Site:
    """The CAs, certificates and tokens of the matrix, and an agent for each configuration, started when needed."""

    def __init__(self, directory: Path, node_uri: str, agents: ExitStack) -> None:
        self._node_uri = node_uri
        self._agents = agents
        self._running: dict[str, AgentProcess] = {}
        self.own, self.foreign = Authority(directory, "own"), Authority(directory, "foreign")
        self.tokens_file = directory / "tokens"
        self.write_tokens(GOOD)
        self.server_file = self.own.issue(LOOPBACK, file_name="agent")
        self.certificates = {
            "server.example": self.own.issue("server.example"),
            "other.example": self.own.issue("other.example"),
            "stranger": self.foreign.issue("server.example", file_name="stranger"),
            "expired": self.own.issue("server.example", expired=True, file_name="expired"),
        }
        tls = {"tls_cert": str(self.server_file)}
        certificates = {**tls, "client_ca": str(self.own.ca_file)}
        tokens = {"tokens_file": str(self.tokens_file)}
        self.configurations: dict[str, dict[str, str]] = {
            "certificates": certificates,
            "named certificates": {**certificates, "allowed_names": "SERVER.example, 192.0.2.1"},
            "tokens": {**tls, **tokens},
            "both": {**certificates, **tokens},
            "tokens on loopback": tokens,
            "certificates of one address": {**certificates, "allowed_clients": "127.0.0.1/32"},
            "unauthenticated of one address": {"allow_unauthenticated": "true", "allowed_clients": "127.0.0.1"},
        }

    def write_tokens(self, *tokens: str) -> None:
        self.tokens_file.touch(mode=0o600)
        lines = [f"t{number}:{hashlib.sha256(token.encode()).hexdigest()}" for number, token in enumerate(tokens)]
        self.tokens_file.write_text("\n".join(["# tokens of the test", "", *lines, ""]))

    def agent(self, name: str) -> AgentProcess:
        """The agent of that configuration, on loopback."""
        if name not in self._running:
            section = self.configurations[name]
            certificate = self.certificates["server.example"] if "client_ca" in section else None
            agent = AgentProcess(
                uri=self._node_uri,
                settings={"security": section},
                tls=self.own.client(certificate) if "tls_cert" in section else None,
                token=GOOD if "tokens_file" in section else None,
            )
            self._running[name] = self._agents.enter_context(agent)
        return self._running[name]

    def connect(self, agent: AgentProcess, client: Client) -> http.client.HTTPConnection:
        source = (client.source, 0)
        if client.plain:
            return http.client.HTTPConnection(LOOPBACK, agent.port, timeout=10, source_address=source)
        certificate = self.certificates[client.certificate] if client.certificate else None
        context = self.own.client(certificate)
        return http.client.HTTPSConnection(LOOPBACK, agent.port, timeout=10, source_address=source, context=context)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, node_uri: str) -> Iterator[Site]:
    with ExitStack() as agents:
        yield Site(tmp_path_factory.mktemp("pki"), node_uri, agents)


def ask(connection: http.client.HTTPConnection, client: Client, path: str = "/healthz") -> Reply:
    headers = {} if client.token is None else {"Authorization": f"Bearer {client.token}"}
    if client.authorization is not None:
        headers["Authorization"] = client.authorization
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    return Reply(response.status, json.loads(response.read()))


@pytest.mark.parametrize(("server", "client"), CELLS)
def test_the_matrix_of_clients_and_servers(site: Site, server: str, client: str) -> None:
    agent, expected = site.agent(server), MATRIX[server][client]
    connection = site.connect(agent, CLIENTS[client])
    try:
        if expected == HANDSHAKE:
            with pytest.raises((ssl.SSLError, ConnectionError, http.client.BadStatusLine)):
                ask(connection, CLIENTS[client])
            return
        reply = ask(connection, CLIENTS[client])
    finally:
        connection.close()
    if expected == IN:
        assert reply.status == 200
        return
    assert reply.body["errorCode"] == expected
    assert reply.body["remedy"]
    assert reply.status == {"CREDENTIALS": 401, "TLS": 400}.get(expected.partition("_")[0], 403)


def test_speaks_no_tls_before_1_2(site: Site) -> None:
    agent = site.agent("tokens")
    context = site.own.client()
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    with socket.create_connection((LOOPBACK, agent.port), timeout=10) as plain, pytest.raises(ssl.SSLError):
        context.wrap_socket(plain, server_hostname=LOOPBACK)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_connection((LOOPBACK, agent.port), timeout=10) as plain:
        assert context.wrap_socket(plain, server_hostname=LOOPBACK).version() == "TLSv1.2"


def test_tokens_are_read_anew_on_sighup(site: Site, node_uri: str) -> None:
    settings = {"security": site.configurations["tokens on loopback"]}
    with AgentProcess(uri=node_uri, settings=settings, token=GOOD) as agent:
        try:
            site.write_tokens("newer", GOOD)
            hang_up(agent)
            assert_status(agent, "newer", 200)
            site.write_tokens("newer")
            hang_up(agent)
            assert_status(agent, GOOD, 401)
            # A file that cannot be used changes nothing; nor does one that others can read.
            site.tokens_file.write_text("newer:nohash\n")
            hang_up(agent)
            site.write_tokens(GOOD)
            site.tokens_file.chmod(0o644)
            hang_up(agent)
            assert_status(agent, "newer", 200)
            assert_status(agent, GOOD, 401)
            assert "nohash" not in agent.log()
        finally:
            site.tokens_file.chmod(0o600)
            site.write_tokens(GOOD)


def test_certificates_are_read_anew_on_sighup_and_old_connections_end(
    site: Site, node_uri: str, tmp_path: Path
) -> None:
    ca_file, server_file = tmp_path / "ca.pem", tmp_path / "agent.pem"
    newer = Authority(tmp_path, "newer")

    def install(authority: Authority) -> Path:
        ca_file.write_bytes(authority.ca_file.read_bytes())
        server_file.touch(mode=0o600)
        server_file.write_bytes(authority.issue(LOOPBACK, file_name="fresh").read_bytes())
        return authority.issue("server.example")

    certificate = install(site.own)
    security = {"tls_cert": str(server_file), "client_ca": str(ca_file)}
    with AgentProcess(uri=node_uri, settings={"security": security}, tls=site.own.client(certificate)) as agent:
        kept = agent.connect()
        assert ask(kept, Client()).status == 200
        certificate = install(newer)
        hang_up(agent)
        with pytest.raises((OSError, http.client.HTTPException)):
            ask(kept, Client())
        with pytest.raises(ssl.SSLError):
            agent.get("/healthz")
        agent.tls = newer.client(certificate)
        assert agent.get("/healthz").status == 200


def test_who_came_is_on_each_audit_line(site: Site) -> None:
    agent, task = site.agent("both"), new_task_uuid()
    with ManagementServer() as server:
        body = {"vmUuid": "vm1", "cpuNum": 1}
        agent.token = None
        assert agent.post("/vm/hotplug/cpu", body, task_uuid=task, callback_url=server.url).status == 200
        server.wait(task, 20)
        agent.token = GOOD
        assert agent.post("/vm/hotplug/cpu", {"vmUuid": "v=1 x"}, task_uuid="t2", callback_url=server.url).status == 400
        assert agent.post("/vm/hotplug/gpu", body, task_uuid="t3", callback_url=server.url).status == 404
        agent.token = "guess"
        assert agent.post("/vm/hotplug/cpu", body, task_uuid="t4", callback_url=server.url).status == 401
        agent.token = GOOD
        uuid = agent.get(f"/tasks/{task}").body["vmUuid"]
    of_task = f"caller=certificate:server.example client=127.0.0.1 what=HotPlugCpu vm=vm1 uuid={uuid} task={task}"
    lines = wait_for(
        lambda: (found := audit_lines(agent)) and any("event=finished" in line for line in found) and found,
        timeout_s=5,
        what="the audit of the end",
    )
    assert f"event=accepted {of_task} outcome=accepted command=HotPlugCpu role=admin" in lines
    assert any(line.startswith(f"event=finished {of_task} outcome=") for line in lines)
    refused = "event=refused caller=token:t0 client=127.0.0.1 what=HotPlugCpu task=t2 outcome=MISSING_FIELD error="
    assert any(line.startswith(refused) for line in lines)
    assert any('what="POST /vm/hotplug/gpu"' in line and "outcome=UNKNOWN_PATH" in line for line in lines)
    assert any('what="POST /vm/hotplug/cpu"' in line and "outcome=CREDENTIALS_WRONG" in line for line in lines)
    assert "guess" not in agent.log()
    assert GOOD not in agent.log()


def test_a_made_token_gets_in() -> None:
    token, line = new_token("zstack")
    assert line == f"zstack:{hashlib.sha256(token.encode()).hexdigest()}"
    assert len(token) >= 43


def hang_up(agent: AgentProcess) -> None:
    """Send SIGHUP and wait until the agent says that it has read its files, or that it could not."""
    said = reloads(agent)
    os.kill(agent.pid, signal.SIGHUP)
    wait_for(lambda: reloads(agent) > said, timeout_s=10, what="the reload")


def reloads(agent: AgentProcess) -> int:
    return agent.log().count("section=callback")


def assert_status(agent: AgentProcess, token: str, status: int) -> None:
    assert agent.get("/healthz", headers={"Authorization": f"Bearer {token}"}).status == status


def audit_lines(agent: AgentProcess) -> list[str]:
    return [line.partition(" audit ")[2].strip() for line in agent.log().splitlines() if " INFO audit " in line]


def test_the_shapes_of_the_matrix_are_all_used() -> None:
    used: set[Any] = {client for _, client in CELLS}
    assert used == set(CLIENTS)
