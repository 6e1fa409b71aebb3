"""A remote agent: TLS, certificates and tokens, by options and by environment."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmagent.api.security import new_token
from tests.ctl.ctl import Ctl, settled
from tests.lab.agent import AgentProcess
from tests.lab.pki import LOOPBACK, Authority


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def secured(authority: Authority, node_uri: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    """An agent as SECURITY.md sets one up: only certificates of its CA come in."""
    client = authority.issue("server.example")
    settings = {
        "security": {
            "tls_cert": str(authority.issue(LOOPBACK, file_name="agent")),
            "client_ca": str(authority.ca_file),
        }
    }
    with AgentProcess(uri=node_uri, settings=settings, tls=authority.client(client)) as running:
        yield running


@pytest.fixture
def given(authority: Authority, secured: AgentProcess) -> dict[str, str]:
    """The environment of an operator who is let in."""
    certificate = str(authority.issue("operator.example"))
    return {"KVMAGENT_URL": secured.url, "KVMAGENT_CA": str(authority.ca_file), "KVMAGENT_CERT": certificate}


def test_certificates_come_from_the_environment(given: dict[str, str], secured: AgentProcess) -> None:
    done = Ctl(given)("plug-cpu", "db-7", "2", "--json")
    assert (done.status, done.err) == (3, "")
    task = settled(secured, done.json["taskUuid"])
    assert task["reply"] == {name: value for name, value in done.json.items() if name != "taskUuid"}
    assert task["delivery"]["url"] == "none", "nothing is sent in clear text"


def test_certificates_come_from_options_on_either_side(given: dict[str, str]) -> None:
    ca, certificate = given["KVMAGENT_CA"], given["KVMAGENT_CERT"]
    wrong = {"KVMAGENT_URL": "https://127.0.0.1:1", "KVMAGENT_CA": "/none"}
    options = ("--url", given["KVMAGENT_URL"], "--ca", ca, "--cert", certificate, "--key", certificate)
    assert Ctl(wrong)(*options, "status").status == 0
    assert Ctl(wrong)("status", *options).status == 0


@pytest.mark.parametrize(
    ("change", "code", "remedy"),
    [
        ({"KVMAGENT_CERT": ""}, "TLS_REFUSED", "Give a certificate that the agent's client_ca has signed"),
        ({"KVMAGENT_CA": ""}, "AGENT_NOT_TRUSTED", "Give the CA that signed its certificate with --ca"),
    ],
)
def test_who_is_not_trusted_is_told_what_to_show(
    given: dict[str, str], change: dict[str, str], code: str, remedy: str
) -> None:
    for command in (("status",), ("plug-cpu", "db-7", "2")):
        done = Ctl(given | change)(*command)
        assert (done.status, done.out, done.err.count("\n")) == (4, "", 1)
        assert f"kvmagentctl: {code}: " in done.err
        assert remedy in done.err


def test_plain_http_to_a_tls_port_and_tls_to_a_plain_one_are_told(given: dict[str, str], agent: AgentProcess) -> None:
    done = Ctl(given)("--url", given["KVMAGENT_URL"].replace("https", "http"), "status")
    assert "TLS_REQUIRED" in done.err
    done = Ctl(given)("--url", agent.url.replace("http", "https"), "status")
    assert (done.status, "NOT_TLS" in done.err) == (4, True)


def test_a_token_is_read_from_a_file_that_others_cannot_read(
    authority: Authority, node_uri: str, tmp_path: Path
) -> None:
    token, line = new_token("operator")
    tokens, mine = tmp_path / "tokens", tmp_path / "token"
    for file, text in ((tokens, line), (mine, token)):
        file.write_text(f"{text}\n")
        file.chmod(0o600)
    with AgentProcess(uri=node_uri, settings={"security": {"tokens_file": str(tokens)}}, token=token) as agent:
        ctl = Ctl({"KVMAGENT_URL": agent.url})
        done = ctl("status")
        assert (done.status, "CREDENTIALS_MISSING" in done.err) == (1, True)
        assert ctl("status", environment={"KVMAGENT_TOKEN_FILE": str(mine)}).status == 0
        assert ctl("plug-cpu", "db-7", "2", "--token-file", str(mine)).status == 3
        mine.chmod(0o644)
        done = ctl("status", "--token-file", str(mine))
        assert (done.status, f"remedy: chmod 0600 {mine}" in done.err, token in done.err) == (2, True, False)
        mine.chmod(0o600)
        mine.write_text("guess\n")
        assert "CREDENTIALS_WRONG" in ctl("status", "--token-file", str(mine)).err
