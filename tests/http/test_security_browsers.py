"""Browsers: what they are served without credentials holds no secret, and no web page of others gets anything done."""

import http.client
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmagent.api.page import FILES
from kvmagent.api.security import new_token
from tests.lab.agent import AgentProcess, new_task_uuid


@pytest.fixture(scope="module")
def guarded(node_uri: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    """An agent that asks for a token."""
    token, line = new_token("operator")
    tokens: Path = tmp_path_factory.mktemp("guarded") / "tokens"
    tokens.write_text(line + "\n")
    tokens.chmod(0o600)
    with AgentProcess(uri=node_uri, settings={"security": {"tokens_file": str(tokens)}}, token=token) as running:
        yield running


def ask(
    agent: AgentProcess, path: str, *, method: str = "GET", headers: dict[str, str] | None = None
) -> tuple[http.client.HTTPResponse, bytes]:
    connection = agent.connect()
    try:
        connection.request(method, path, headers=headers or {})
        response = connection.getresponse()
        return response, response.read()
    finally:
        connection.close()


@pytest.mark.parametrize("path", sorted(FILES))
def test_the_page_is_served_without_a_token_under_a_strict_policy(guarded: AgentProcess, path: str) -> None:
    response, body = ask(guarded, path)
    assert response.status == 200
    policy = response.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "*" not in policy
    assert "http" not in policy
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["Server"] == "kvmagent"
    assert b"http://" not in body.replace(b"http://www.w3.org/", b"")
    assert b"https://" not in body


def test_the_page_is_kept_by_the_browser_until_it_changes(guarded: AgentProcess) -> None:
    first, body = ask(guarded, "/page.js")
    assert first.headers["Cache-Control"] == "no-cache"
    again, nothing = ask(guarded, "/page.js", headers={"If-None-Match": first.headers["ETag"]})
    assert (again.status, nothing) == (304, b"")
    assert again.headers["ETag"] == first.headers["ETag"]
    changed, whole = ask(guarded, "/page.js", headers={"If-None-Match": '"another"'})
    assert (changed.status, whole) == (200, body)


@pytest.mark.parametrize("path", ["/vms", "/tasks", "/healthz", "/openapi.json", "/metrics", "/page", "/page.js/x"])
def test_all_else_asks_who_it_is(guarded: AgentProcess, path: str) -> None:
    response, _ = ask(guarded, path)
    assert response.status == 401
    assert response.headers["Cache-Control"] == "no-store"
    assert response.headers["X-Content-Type-Options"] == "nosniff"


def test_the_page_only_reads(guarded: AgentProcess) -> None:
    response, _ = ask(guarded, "/", method="POST")
    assert (response.status, response.headers["Allow"]) == (405, "GET")


def test_a_command_of_a_web_page_is_refused_and_leaves_no_task(agent: AgentProcess) -> None:
    """Whoever's browser it is: it reaches loopback, and shows its user's certificate, for any page."""
    task = new_task_uuid()
    reply = agent.post(
        "/vm/hotplug/cpu",
        {"vmUuid": "vm1", "cpuNum": 3},
        task_uuid=task,
        callback_url="http://127.0.0.1:9/",
        headers={"Origin": "http://evil.example"},
    )
    assert (reply.status, reply.body["errorCode"]) == (403, "WEB_PAGE_NOT_ALLOWED")
    assert agent.get(f"/tasks/{task}").status == 404
    reply = agent.post("/host/ping", {}, headers={"Origin": agent.url})
    assert reply.status == 403


def test_the_agents_own_page_may_ask_for_plans_and_no_other_page(agent: AgentProcess) -> None:
    def plan(origin: str, **headers: str) -> int:
        body = {"vmUuid": "vm1", "targets": [{"cpuNum": 2}]}
        return agent.post("/vm/hotplug/plan", body, headers={"Origin": origin, **headers}).status

    assert plan(agent.url) == 200
    for origin in ("http://evil.example", "null", "", f"{agent.url}.evil.example", "http://127.0.0.1", "http://"):
        assert plan(origin) == 403, origin
    # A name that was made to resolve to the agent is its page's origin and the request's host.
    assert plan("http://evil.example", Host="evil.example") == 403


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:7070", "127.0.0.1.evil.example", "localhost.evil.example."]
)
@pytest.mark.parametrize("path", ["/", "/vms"])
def test_a_name_that_was_made_to_resolve_to_loopback_reads_nothing(agent: AgentProcess, host: str, path: str) -> None:
    response, _ = ask(agent, path, headers={"Host": host})
    assert response.status == 403


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:7070", "localhost:8443", "[::1]:7070", "node17"])
def test_an_address_is_good_and_so_is_a_name_that_no_web_page_can_have(agent: AgentProcess, host: str) -> None:
    assert ask(agent, "/vms", headers={"Host": host})[0].status == 200


def test_where_everybody_says_who_they_are_any_name_will_do(guarded: AgentProcess) -> None:
    assert guarded.get("/vms", headers={"Host": "node17.example"}).status == 200


def test_an_address_that_may_not_connect_gets_no_page_either(node_uri: str) -> None:
    agent = AgentProcess(
        uri=node_uri, settings={"security": {"allow_unauthenticated": "true", "allowed_clients": "127.0.0.2"}}
    )
    try:
        agent.start(health=403)
        assert ask(agent, "/")[0].status == 403
    finally:
        agent.remove()
