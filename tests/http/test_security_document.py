"""SECURITY.md: its lines work as they stand there."""

import re
import ssl
import subprocess
from pathlib import Path

import pytest

from tests.fakes.settings import parse_settings
from tests.lab.agent import AgentProcess

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "SECURITY.md").read_text()
THREATS = [line for line in DOCUMENT.splitlines() if line.startswith("| ") and not line.startswith("| who |")]
THREATS = THREATS[: next(n for n, line in enumerate(THREATS) if line.startswith("| role |"))]


def block(first: str) -> str:
    """The indented block of the document that begins so."""
    lines = DOCUMENT[DOCUMENT.index(f"    {first}") :].splitlines()
    end = next(n for n, line in enumerate(lines) if line and not line.startswith("    "))
    return "\n".join(line[4:] for line in lines[:end])


def test_the_certificates_of_the_document_let_the_server_in_and_no_agent(node_uri: str, tmp_path: Path) -> None:
    subprocess.run(["bash", "-euc", block("umask 077")], cwd=tmp_path, check=True, capture_output=True)
    pki = tmp_path / "pki"
    security = {
        "tls_cert": str(pki / "node1.pem"),
        "tls_key": str(pki / "node1.key"),
        "client_ca": str(pki / "ca.pem"),
        "allowed_names": "server.example",
    }

    def client(name: str) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=pki / "ca.pem")
        context.load_cert_chain(pki / f"{name}.pem", pki / f"{name}.key")
        context.check_hostname = False  # the document's node has another address
        return context

    with AgentProcess(uri=node_uri, settings={"security": security}, tls=client("server")) as agent:
        assert agent.get("/healthz").status == 200
        agent.tls = client("node1")
        with pytest.raises((ssl.SSLError, ConnectionError)):
            agent.get("/healthz")


def test_the_configuration_of_the_document_is_one() -> None:
    settings = parse_settings(block("[http]"))
    assert settings.security.authenticates
    assert settings.security.allowed_callbacks == ("caller", "10.0.0.100:8080")


@pytest.mark.parametrize("row", THREATS, ids=lambda row: row.split(" | ")[0].removeprefix("| "))
def test_each_threat_has_its_test(row: str) -> None:
    assert len(THREATS) >= 17
    *columns, tests = row.strip("| ").split(" | ")
    assert len(columns) == 4
    assert all(columns)
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", tests)
    assert named
    assert tests.count("`") == 2 * len(named), "nothing else stands in the column"
    for file, name in named:
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE), f"{file} has no {name}"
