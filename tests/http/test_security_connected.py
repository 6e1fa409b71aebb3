"""A right that ends while its client is connected: the connection ends with it, whatever the client has in the pipe.

Each client keeps its connection, and always sends the first byte of its next request with the one before, so that
something of it is there whenever the agent looks.
"""

import json
import os
import pwd
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.http.test_security_access import hang_up, write_tokens
from tests.lab.agent import LOOPBACK, AgentProcess
from tests.lab.pki import Authority
from tests.lab.processes import wait_for

NOBODY = pwd.getpwnam("nobody")
# Long enough to start an agent and be let in on a busy machine.
LIVES_S = 25


class Client:
    """A connection that asks who it is, always a byte ahead."""

    def __init__(self, connection: socket.socket, token: str = "") -> None:
        self._connection = connection
        authorization = f"Authorization: Bearer {token}\r\n" if token else ""
        self._request = f"GET /whoami HTTP/1.1\r\nHost: a\r\n{authorization}\r\n".encode()
        self._ahead = 0

    def ask(self) -> tuple[int, dict[str, Any]] | None:
        """The status and the body of an answer; None where the connection has ended."""
        received = b""
        try:
            self._connection.sendall(self._request[self._ahead :] + self._request[:1])
            self._ahead = 1
            while b"\r\n\r\n" not in received:
                if not (part := self._connection.recv(65536)):
                    return None
                received += part
            head, _, body = received.partition(b"\r\n\r\n")
            (length,) = (int(line.split(b":")[1]) for line in head.splitlines() if line.startswith(b"Content-Length:"))
            while len(body) < length:
                body += self._connection.recv(65536)
        except (OSError, ssl.SSLError):
            return None
        return int(head.split()[1]), json.loads(body)

    def goes_on(self) -> bool:
        """Whether it is let in."""
        answer = self.ask()
        return answer is not None and answer[0] == 200


@contextmanager
def connected(agent: AgentProcess, context: ssl.SSLContext | None, token: str = "") -> Iterator[Client]:
    with socket.create_connection((LOOPBACK, agent.port), timeout=30) as plain:
        if context is None:
            yield Client(plain, token)
        else:
            with context.wrap_socket(plain, server_hostname=LOOPBACK) as secured:
                yield Client(secured, token)


def replace(agent: AgentProcess, old: str, new: str) -> None:
    text = agent.config_file.read_text()
    assert old in text
    agent.config_file.write_text(text.replace(old, new))


class Site:
    """What lets a client in, and each way to take that back."""

    def __init__(self, directory: Path) -> None:
        self.authority, self.other = Authority(directory, "own"), Authority(directory, "other")
        self.server_file = self.authority.issue(LOOPBACK, file_name="agent")
        self.certificate = self.authority.issue("server.example")
        self.tokens, self.crl = directory / "tokens", directory / "crl.pem"
        write_tokens(self.tokens, "zstack", "chief")
        self.crl.write_bytes(self.authority.revoke())

    def security(self) -> dict[str, str]:
        return {
            "tls_cert": str(self.server_file),
            "client_ca": str(self.authority.ca_file),
            "client_crl": str(self.crl),
            "tokens_file": str(self.tokens),
            "allowed_names": "server.example",
            "roles": "certificate:* admin, token:* admin",
        }


Take = Callable[[Site, AgentProcess], None]
WAYS: dict[str, tuple[str, Take]] = {
    "token removed": ("zstack", lambda site, _: write_tokens(site.tokens, "chief")),
    "CA replaced": ("", lambda site, _: _copy(site.other.ca_file, site.authority.ca_file)),
    "certificate on the CRL": (
        "",
        lambda site, _: _write(site.crl, site.authority.revoke(site.certificate)),
    ),
    "name no longer allowed": (
        "",
        lambda _, agent: replace(agent, "allowed_names = server.example", "allowed_names = x"),
    ),
}


def _copy(source: Path, target: Path) -> None:
    _write(target, source.read_bytes())


def _write(target: Path, content: bytes) -> None:
    target.write_bytes(content)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])
def test_a_reload_ends_what_was_connected_before(
    node_uri: str, tmp_path: Path, way: str, version: ssl.TLSVersion
) -> None:
    site, (token, take) = Site(tmp_path), WAYS[way]
    context = site.authority.client(None if token else site.certificate)
    context.maximum_version = version
    admin = site.authority.client()
    with (
        AgentProcess(uri=node_uri, settings={"security": site.security()}, tls=admin, token="chief") as agent,
        connected(agent, context, token) as client,
    ):
        assert client.goes_on()
        assert client.goes_on()
        take(site, agent)
        hang_up(agent)
        # The request that was under way is the last; a token and a name are looked at anew for it too.
        answer = client.ask()
        assert answer is None or answer[0] in (401, 403) or way in ("CA replaced", "certificate on the CRL")
        assert client.ask() is None


def test_a_renewed_certificate_of_the_agent_ends_nothing_that_is_connected(node_uri: str, tmp_path: Path) -> None:
    site = Site(tmp_path)
    admin = site.authority.client(site.certificate)
    with (
        AgentProcess(uri=node_uri, settings={"security": site.security()}, tls=admin) as agent,
        connected(agent, admin) as client,
        # One that has asked nothing yet: its first request may be on its way when the agent reads its files.
        connected(agent, admin) as silent,
    ):
        assert client.goes_on()
        former = ssl.get_server_certificate((LOOPBACK, agent.port))
        site.authority.issue(LOOPBACK, file_name="agent")
        hang_up(agent)
        assert ssl.get_server_certificate((LOOPBACK, agent.port)) != former
        assert all(one.goes_on() for one in (client, silent, client, silent))
        # What counts then ends them as ever, a change back too.
        for content in (site.authority.revoke(site.certificate), site.authority.revoke()):
            site.crl.write_bytes(content)
            hang_up(agent)
        answers = [silent.ask(), client.ask()]
        assert answers == [None, None] or [silent.ask(), client.ask()] == [None, None]


def test_a_role_that_was_taken_counts_for_no_request_after_the_reload(node_uri: str, tmp_path: Path) -> None:
    site = Site(tmp_path)
    settings = {"security": site.security()}
    with (
        AgentProcess(uri=node_uri, settings=settings, tls=site.authority.client(), token="chief") as agent,
        connected(agent, site.authority.client(site.certificate)) as client,
    ):
        assert client.goes_on()
        replace(agent, "certificate:* admin", "certificate:* read")
        hang_up(agent)
        answer = client.ask()
        assert answer is None or answer[1]["roles"] == ["read"]
        assert client.ask() is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can ask as another user")
def test_a_role_that_was_taken_from_a_user_of_the_host_counts_from_the_reload_on(node_uri: str, tmp_path: Path) -> None:
    ask = (
        "import os, socket, sys\n"
        f"os.setgroups([]); os.setgid({NOBODY.pw_gid}); os.setuid({NOBODY.pw_uid})\n"
        "s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); ahead = b''\n"
        "r = b'GET /whoami HTTP/1.1\\r\\nHost: a\\r\\n\\r\\n'\n"
        "for _ in sys.stdin:\n"
        "    try: s.sendall(r[len(ahead):] + r[:1]); a = s.recv(65536)\n"
        "    except OSError: a = b''\n"
        "    ahead = r[:1]; print(a.partition(b'\\r\\n\\r\\n')[2].decode() or '{}', flush=True)\n"
    )
    with AgentProcess(uri=node_uri, settings={"security": {"roles": "unix:nobody read plug"}}, by_socket=True) as agent:
        agent.directory.chmod(0o711)
        agent.socket.chmod(0o666)
        command = [sys.executable, "-c", ask, str(agent.socket)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as asker:
            assert asker.stdin is not None
            assert asker.stdout is not None

            def roles() -> list[str] | None:
                print("ask", file=asker.stdin, flush=True)
                return json.loads(asker.stdout.readline()).get("roles")

            assert roles() == ["plug", "read"]
            replace(agent, "unix:nobody read plug", "unix:nobody read")
            hang_up(agent)
            assert roles() in (["read"], None)
            assert roles() is None
            asker.stdin.close()


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])
def test_a_certificate_that_ends_lets_in_nobody_who_was_connected_and_no_session_is_resumed_past_it(
    node_uri: str, tmp_path: Path, version: ssl.TLSVersion
) -> None:
    site = Site(tmp_path)
    settings = {"security": site.security()}
    with AgentProcess(uri=node_uri, settings=settings, tls=site.authority.client(), token="chief") as agent:
        ends = datetime.now(UTC) + timedelta(seconds=LIVES_S)
        context = site.authority.client(site.authority.issue("server.example", file_name="short", not_after=ends))
        context.maximum_version = version
        with socket.create_connection((LOOPBACK, agent.port), timeout=30) as plain:
            secured = context.wrap_socket(plain, server_hostname=LOOPBACK)
            client = Client(secured)
            assert client.goes_on()
            session = secured.session
            # It asks all the time: one that is idle is let go before.
            wait_for(lambda: not client.goes_on() and datetime.now(UTC) >= ends, timeout_s=120, what="its end")
            answer = client.ask()
            assert answer is not None
            assert (answer[0], answer[1]["errorCode"]) == (403, "CERTIFICATE_NOT_ALLOWED")
            assert "expired" in answer[1]["error"]
        for kept in (session, None):
            with socket.create_connection((LOOPBACK, agent.port), timeout=30) as plain:
                try:
                    with context.wrap_socket(plain, server_hostname=LOOPBACK, session=kept) as again:
                        assert not Client(again).goes_on()
                except ssl.SSLError:
                    pass  # refused in the handshake


def test_a_list_that_cannot_be_read_leaves_the_one_in_force(node_uri: str, tmp_path: Path) -> None:
    site = Site(tmp_path)
    settings = {"security": site.security()}
    refused, let_in = (
        site.authority.client(site.certificate),
        site.authority.client(site.authority.issue("server.example", file_name="two")),
    )
    site.crl.write_bytes(site.authority.revoke(site.certificate))
    with AgentProcess(uri=node_uri, settings=settings, tls=site.authority.client(), token="chief") as agent:
        site.crl.write_text("no list\n")
        os.kill(agent.pid, signal.SIGHUP)
        wait_for(lambda: "client_crl" in agent.log(), timeout_s=60, what="the reload to say why")
        for context, is_in in ((let_in, True), (refused, False)):
            try:
                with connected(agent, context) as client:
                    assert client.goes_on() is is_in
            except ssl.SSLError:
                assert not is_in
