"""Where callbacks go, and where they do not: at acceptance, and again at every connection."""

import threading
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from kvmagent.model.errors import AgentError, Code
from kvmagent.settings import CallbackSection, parse_callback_rule
from kvmagent.tasks.callbackclient import CallbackClient
from tests.fakes.settings import parse_settings
from tests.lab.agent import AgentProcess, new_task_uuid
from tests.lab.pki import Authority
from tests.lab.server import Answer, ManagementServer

CALLER = "192.0.2.9"
CPU = "/vm/hotplug/cpu"
NAMES = {
    "caller.example": [CALLER],
    "both.example": ["198.51.100.1", CALLER],
    "other.example": ["198.51.100.1"],
    "inside.example": ["127.0.0.1"],
    "metadata.example": ["169.254.169.254"],
    "mapped.example": [f"::ffff:{CALLER}"],
    "2130706433": ["127.0.0.1"],
}


def resolve(host: str) -> Iterable[str]:
    if host not in NAMES:
        raise OSError(f"no such host: {host}")
    return NAMES[host]


def make_callbacks(*rules: str, **section: str) -> CallbackClient:
    return CallbackClient(map(parse_callback_rule, rules), CallbackSection(**section), resolve=resolve)


@pytest.mark.parametrize(
    ("rules", "client", "url", "allowed"),
    [
        (["caller"], CALLER, f"http://{CALLER}/cb", True),
        (["caller"], CALLER, f"https://{CALLER}:8443/cb", True),
        (["caller"], CALLER, "http://192.0.2.10/cb", False),
        (["caller"], CALLER, "http://127.0.0.1/cb", False),
        (["caller"], CALLER, "http://[::1]/cb", False),
        (["caller"], CALLER, "http://169.254.169.254/latest/meta-data", False),
        (["caller"], CALLER, f"http://[::ffff:{CALLER}]/cb", True),
        (["caller"], CALLER, "http://caller.example/cb", True),
        (["caller"], CALLER, "http://CALLER.example./cb", True),
        (["caller"], CALLER, "http://both.example/cb", True),
        (["caller"], CALLER, "http://mapped.example/cb", True),
        (["caller"], CALLER, "http://other.example/cb", False),
        (["caller"], CALLER, "http://2130706433/cb", False),
        (["caller"], "127.0.0.1", "http://[::1]:8080/cb", True),
        (["caller"], "127.0.0.1", "http://inside.example/cb", True),
        (["caller"], "127.0.0.1", "http://192.0.2.9/cb", False),
        (["caller:8080"], CALLER, f"http://{CALLER}:8080/cb", True),
        (["caller:8080"], CALLER, f"http://{CALLER}/cb", False),
        (["10.0.0.0/24"], CALLER, "http://10.0.0.7/cb", True),
        (["10.0.0.0/24"], CALLER, f"http://{CALLER}/cb", False),
        (["10.0.0.0/24:443"], CALLER, "https://10.0.0.7/cb", True),
        (["10.0.0.0/24:443"], CALLER, "http://10.0.0.7/cb", False),
        (["[2001:db8::/32]:80"], CALLER, "http://[2001:db8::5]/cb", True),
        (["other.example"], CALLER, "http://other.example:99/cb", True),
        (["other.example:80"], CALLER, "http://other.example:99/cb", False),
        (["other.example"], CALLER, "http://198.51.100.1/cb", False),
        ([], CALLER, f"http://{CALLER}/cb", False),
        # What cannot be known now passes now: the check at the connection is the one that counts.
        (["caller"], CALLER, "http://unknown.example/cb", True),
    ],
)
def test_is_refused_at_acceptance_where_it_can_be_known(
    rules: list[str], client: str, url: str, *, allowed: bool
) -> None:
    callbacks = make_callbacks(*rules)
    if allowed:
        callbacks.check(url, client)
        return
    with pytest.raises(AgentError) as caught:
        callbacks.check(url, client)
    assert caught.value.code is Code.CALLBACK_NOT_ALLOWED
    assert caught.value.status == 403


@pytest.mark.parametrize(
    "url", ["", "x", "/cb", "ftp://a/", "http://", "http://a:b/", "http://[/", "http://a\r\nb/", "http://u@a/"]
)
def test_what_is_no_url_is_no_place_to_go(url: str) -> None:
    with pytest.raises(AgentError) as caught:
        make_callbacks("caller").check(url, CALLER)
    assert caught.value.code is Code.BAD_CALLBACK_URL


@pytest.mark.parametrize(
    ("rules", "client", "host"),
    [
        (["caller"], CALLER, "127.0.0.1"),
        (["caller"], CALLER, "inside.example"),
        (["caller"], CALLER, "2130706433"),
        (["inside.example"], CALLER, "inside.example"),
        (["metadata.example"], CALLER, "metadata.example"),
        (["caller", "10.0.0.0/8"], CALLER, "inside.example"),
        (["127.0.0.1:1"], CALLER, "inside.example"),
    ],
)
def test_no_connection_is_made_to_an_address_that_is_not_allowed(rules: list[str], client: str, host: str) -> None:
    NAMES.setdefault("127.0.0.1", ["127.0.0.1"])
    with ManagementServer() as server:
        url = f"http://{host}:{server.port}/callback"
        status, error = make_callbacks(*rules).open(url, client).post(url, b"{}", {"taskuuid": "t"}, 5)
        assert status is None
        assert "may not go" in error
        assert server.callbacks() == []


def test_a_name_that_leads_elsewhere_later_is_checked_again() -> None:
    answers = iter([[CALLER], ["127.0.0.1"]])
    callbacks = CallbackClient([parse_callback_rule("caller")], CallbackSection(), resolve=lambda _host: next(answers))
    with ManagementServer() as server:
        url = f"http://rebound.example:{server.port}/callback"
        callbacks.check(url, CALLER)
        status, error = callbacks.open(url, CALLER).post(url, b"{}", {"taskuuid": "t"}, 5)
        assert status is None
        assert "127.0.0.1" in error
        assert server.callbacks() == []


def test_connects_to_the_checked_address_and_names_the_host() -> None:
    with ManagementServer() as server:
        url = f"http://inside.example:{server.port}/callback?a=b"
        channel = make_callbacks("caller").open(url, "127.0.0.1")
        assert channel.post(url, b"{}", {"taskuuid": "t"}, 5) == (200, "HTTP 200")
        channel.close()
        (callback,) = server.callbacks("t")
        assert callback.headers["host"] == f"inside.example:{server.port}"
        assert callback.path == "/callback?a=b"


def test_a_resolver_that_hangs_holds_up_a_command_once_and_shortly() -> None:
    hanging = threading.Event()

    def hang(_host: str) -> Iterable[str]:
        hanging.wait(120)
        return []

    callbacks = CallbackClient([parse_callback_rule("caller")], CallbackSection(), resolve=hang)
    try:
        started = time.monotonic()
        callbacks.check("http://slow.example/", CALLER)
        assert time.monotonic() - started < 20
        started = time.monotonic()
        callbacks.check("http://slow.example/", CALLER)
        assert time.monotonic() - started < 20
    finally:
        hanging.set()


@pytest.mark.parametrize(
    ("receiver", "sends", "trusts", "taken"),
    [
        ("inside.example", None, "own", True),
        ("other.example", None, "own", False),
        ("inside.example", None, "foreign", False),
        ("inside.example", "agent", "own", True),
        ("inside.example", None, "own, asks", False),
        ("inside.example", "agent", "own, asks", True),
    ],
)
def test_the_receiver_is_verified_by_its_name_and_may_verify_the_agent(
    tmp_path: Path, receiver: str, sends: str | None, trusts: str, *, taken: bool
) -> None:
    own, foreign = Authority(tmp_path, "own"), Authority(tmp_path, "foreign")
    certificate = str(own.issue("agent.example")) if sends else ""
    trusted = foreign if trusts == "foreign" else own
    callbacks = make_callbacks("caller", server_ca=str(trusted.ca_file), tls_cert=certificate)
    callbacks.load()
    tls = own.server(own.issue(receiver), clients="asks" in trusts)
    with ManagementServer(tls=tls) as server:
        url = f"https://inside.example:{server.port}/callback"
        channel = callbacks.open(url, "127.0.0.1")
        status, error = channel.post(url, b"{}", {"taskuuid": "t"}, 5)
        channel.close()
        assert (status == 200) is taken, error
        assert len(server.callbacks()) == (1 if taken else 0)


def test_a_key_that_others_can_read_stops_the_start(tmp_path: Path) -> None:
    certificate = Authority(tmp_path).issue("agent.example")
    certificate.chmod(0o640)
    with pytest.raises(AgentError) as caught:
        make_callbacks("caller", tls_cert=str(certificate)).load()
    assert "0640" in caught.value.message
    assert caught.value.remedy == f"chmod 0600 {certificate}"


def test_redirects_are_not_followed(agent: AgentProcess) -> None:
    with ManagementServer() as other:
        redirect = Answer(status=307, headers={"Location": other.url})
        with ManagementServer(lambda _task, attempt: redirect if attempt == 1 else Answer()) as server:
            task = new_task_uuid()
            agent.post(CPU, {"vmUuid": "vm1", "cpuNum": 1}, task_uuid=task, callback_url=server.url)
            server.wait(task, 20, attempt=2)
        assert other.callbacks() == []


def test_the_agent_refuses_a_callback_elsewhere_and_stores_nothing(agent: AgentProcess) -> None:
    before = agent.get("/tasks").body
    body = {"vmUuid": "vm1", "cpuNum": 1}
    for url in ("http://192.0.2.1/cb", "http://169.254.169.254/", "https://[2001:db8::1]:8080/"):
        reply = agent.post(CPU, body, task_uuid=new_task_uuid(), callback_url=url)
        assert (reply.status, reply.body["errorCode"]) == (403, "CALLBACK_NOT_ALLOWED")
        assert "allowed_callbacks" in reply.body["remedy"]
    assert agent.get("/tasks").body == before


@pytest.mark.parametrize(
    "entry",
    [
        "10.0.0.999",
        "10.0.0.1/24",
        "a b",
        "a:0",
        "a:99999",
        "http://a",
        "a/b",
        "[a]:1",
        "[::1",
        "[::1]x",
        "[::1]:",
        "a:",
        ":80",
        "-a",
        "*",
    ],
)
def test_a_rule_that_means_nothing_stops_the_start(entry: str) -> None:
    with pytest.raises(AgentError) as caught:
        parse_settings("", [f"security.allowed_callbacks={entry}"])
    assert "allowed_callbacks" in caught.value.message
