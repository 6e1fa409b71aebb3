"""The shortcut of SECURITY.md's openssl lines: certificates that an agent and its clients take."""

import ssl
import subprocess
from pathlib import Path

from tests.ctl.ctl import Ctl
from tests.lab.agent import AgentProcess
from tests.lab.pki import LOOPBACK


def test_an_agent_and_its_client_take_what_is_issued(ctl: Ctl, node_uri: str, tmp_path: Path) -> None:
    pki = tmp_path / "pki"
    issue = ("pki", "init", str(pki), "--agent", f"node1,{LOOPBACK}", "--client", "server.example")
    done = ctl(*issue)
    names = ["ca.key", "ca.pem", "node1.key", "node1.pem", "server.example.key", "server.example.pem"]
    assert (done.status, done.out.splitlines()) == (0, [str(pki / name) for name in names])
    assert [path.stat().st_mode & 0o777 for path in sorted(pki.glob("*.key"))] == [0o600] * 3

    again = ctl(*issue)
    assert (again.status, again.err.count("\n"), "node1.key already exists" in again.err) == (1, 1, True)
    assert ctl("pki", "init", str(pki), "--client", "operator", "--json").json["files"] == [
        str(pki / "operator.key"),
        str(pki / "operator.pem"),
    ]
    for leaf, purpose in (("node1", "sslserver"), ("server.example", "sslclient"), ("operator", "sslclient")):
        verify = [
            "openssl",
            "verify",
            "-x509_strict",
            "-purpose",
            purpose,
            "-CAfile",
            pki / "ca.pem",
            pki / f"{leaf}.pem",
        ]
        assert subprocess.run(verify, capture_output=True, check=False).returncode == 0, leaf

    security = {
        "tls_cert": str(pki / "node1.pem"),
        "tls_key": str(pki / "node1.key"),
        "client_ca": str(pki / "ca.pem"),
        "allowed_names": "operator",
    }
    with AgentProcess(uri=node_uri, settings={"security": security}, tls=_context(pki)) as agent:
        options = ("--url", agent.url, "--ca", str(pki / "ca.pem"))

        def ask(name: str) -> int:
            return ctl(*options, "--cert", str(pki / f"{name}.pem"), "--key", str(pki / f"{name}.key"), "status").status

        assert (ask("operator"), ask("server.example"), ask("node1")) == (0, 1, 4)
        told = ctl("doctor", "--config", str(agent.config_file), environment={"KVMAGENT_URL": ""})
        assert f"agent: unix://{agent.socket} is ready" in told.out
        assert told.status == 0, told.out


def test_nothing_to_issue_is_a_wrong_command_line(ctl: Ctl, tmp_path: Path) -> None:
    assert ctl("pki", "init", str(tmp_path / "pki")).status == 2
    assert not (tmp_path / "pki").exists()
    outside = ctl("pki", "init", str(tmp_path / "pki"), "--client", "../outside")
    assert (outside.status, "'../outside' is neither a host name nor an address" in outside.err) == (1, True)
    assert not list(tmp_path.glob("outside*"))


def _context(pki: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=pki / "ca.pem")
    context.load_cert_chain(pki / "operator.pem", pki / "operator.key")
    return context
