"""The doctor on a node that ZStack's own agent and ours share: it finds what is wrong between server and agent."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from kvmagent.api.security import new_token
from kvmagent.cli.configfile import read_settings
from kvmagent.cli.ctl.findings import Finding
from kvmagent.cli.ctl.front import examine_front, find_front
from tests.lab.agent import AgentProcess
from tests.lab.haproxy import SHIPPED, Haproxy

TOKEN, LINE = new_token("zstack")
WATCHER, WATCHER_LINE = new_token("watcher")
CALLBACKS = "127.0.0.1:8080"


class Echo(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def original() -> Iterator[int]:
    """The port of ZStack's own agent."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    tokens = tmp_path_factory.mktemp("front") / "tokens"
    tokens.touch(mode=0o600)
    tokens.write_text(f"{LINE}\n{WATCHER_LINE}\n")
    settings = {
        "agent": {"plugins": "vm"},
        "security": {
            "tokens_file": str(tokens),
            "roles": "token:zstack plug, token:watcher admin",
            "allowed_callbacks": CALLBACKS,
        },
    }
    with AgentProcess(uri="test:///default", settings=settings, token=WATCHER) as running:
        yield running


def ill(findings: Iterator[Finding]) -> list[str]:
    found = list(findings)
    assert all(one.remedy for one in found if one.level != "good")
    return [one.message for one in found if one.level != "good"]


def test_a_node_as_the_manual_makes_it_is_healthy(agent: AgentProcess, original: int) -> None:
    with Haproxy(kvmagent=agent.port, original=original, token=TOKEN, servers="192.0.2.9") as front:
        findings = list(examine_front(read_settings(agent.config_file), front.config))
        assert [one.level for one in findings] == ["good", "good"]


def test_a_token_that_the_agent_does_not_know_is_found(agent: AgentProcess, original: int) -> None:
    with Haproxy(kvmagent=agent.port, original=original, token="another") as front:
        (message,) = ill(examine_front(read_settings(agent.config_file), front.config))
        assert "does not accept haproxy's token" in message


def test_an_agent_that_is_away_is_found_and_so_is_the_original(agent: AgentProcess) -> None:
    with Haproxy(kvmagent=1, original=1, token=TOKEN) as front:
        messages = ill(examine_front(read_settings(agent.config_file), front.config))
    assert f"haproxy sends hotplug to 127.0.0.1:1, but the agent listens on 127.0.0.1:{agent.port}" in messages
    assert "haproxy cannot reach an agent at 127.0.0.1:1" in messages
    assert any("ZStack's own agent does not answer" in message for message in messages)


def test_a_front_that_does_not_run_or_lets_nobody_in_is_found(agent: AgentProcess, original: int) -> None:
    settings = read_settings(agent.config_file)
    with Haproxy(kvmagent=agent.port, original=original, token=TOKEN, servers="# none yet") as front:
        (message,) = ill(examine_front(settings, front.config))
        assert "names no management server: haproxy lets nobody through" in message
        kept = front.config.read_text()
    config = agent.directory / "stopped.cfg"
    config.write_text(kept)
    assert any("cannot be reached" in message for message in ill(examine_front(settings, config)))


def test_settings_that_do_not_fit_are_found(agent: AgentProcess, original: int, tmp_path: Path) -> None:
    text = agent.config_file.read_text()
    other = tmp_path / "kvmagent.conf"
    for line in ("plugins = vm", f"allowed_callbacks = {CALLBACKS}"):
        assert line in text
    kept = [line for line in text.splitlines() if not line.startswith(("plugins", "allowed_callbacks", "tokens_file"))]
    other.write_text("\n".join(kept))
    with Haproxy(kvmagent=agent.port, original=original, token=TOKEN) as front:
        messages = ill(examine_front(read_settings(other), front.config))
    assert [message.partition(" ")[0] for message in messages] == [
        "agent.plugins", "security.tokens_file", "security.allowed_callbacks"
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["", "frontend web\n    bind :80\nbackend app\n    server a 127.0.0.1:8080\n", "\x00"])
def test_a_haproxy_of_others_is_none_of_ours(text: str, agent: AgentProcess, tmp_path: Path) -> None:
    config = tmp_path / "haproxy.cfg"
    config.write_text(text)
    assert list(examine_front(read_settings(agent.config_file), config)) == []
    assert list(examine_front(read_settings(agent.config_file), tmp_path / "none")) == []


def test_the_shipped_configuration_is_recognised() -> None:
    assert find_front(SHIPPED.read_text()) == (7072, "127.0.0.1:7071", "/etc/haproxy/zstack-servers")
