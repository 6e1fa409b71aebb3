"""Bytes from outside, made up by hypothesis and kept in the corpus: each ends as it may."""

import http.client
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS
from tests.lab.agent import LOOPBACK, AgentProcess

CORPUS = Path(__file__).with_name("corpus")
KEPT = [(name, file) for name in TARGETS for file in sorted((CORPUS / name).iterdir())]

LINES = st.lists(
    st.one_of(
        st.sampled_from(
            [
                b"GET /healthz HTTP/1.1\r\n",
                b"POST /vm/hotplug/cpu HTTP/1.1\r\n",
                b"Host: a\r\n",
                b"Content-Length: 5\r\n",
                b"Content-Length: 0\r\n",
                b"Transfer-Encoding: chunked\r\n",
                b"Expect: 100-continue\r\n",
                b"\r\n",
                b"5\r\nhello\r\n",
                b"0\r\n\r\n",
                b"\n",
                b" folded\r\n",
            ]
        ),
        st.binary(max_size=20),
    ),
    max_size=12,
).map(b"".join)
# What a header may hold by RFC 9110, and what it may not.
VALUES = st.binary(max_size=40).filter(lambda value: not set(value) & set(b"\r\n"))
NAMES = st.sampled_from(
    ["taskuuid", "callbackurl", "Content-Type", "Authorization", "Host", "Accept", "Expect", "Cookie", "X-Any", "Range"]
)


@pytest.mark.parametrize(("target", "file"), KEPT, ids=lambda value: getattr(value, "name", value))
def test_the_corpus_still_ends_as_it_may(target: str, file: Path) -> None:
    TARGETS[target](file.read_bytes())


@settings(max_examples=400, deadline=None)
@given(st.one_of(LINES, st.binary(max_size=200)))
@example(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + b"a\r\n0123456789\r\n" * 500)
def test_framing_ends_as_it_may(data: bytes) -> None:
    TARGETS["framing"](data)


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.binary(max_size=200), st.text(max_size=100).map(lambda text: text.encode("utf-8", "ignore"))))
def test_wire_and_domainxml_end_as_they_may(data: bytes) -> None:
    TARGETS["wire"](data)
    TARGETS["domainxml"](data)


@pytest.fixture(scope="module")
def agent() -> Iterator[AgentProcess]:
    with AgentProcess(uri="test:///default") as running:
        yield running


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(headers=st.lists(st.tuples(NAMES, VALUES), max_size=5), path=st.binary(max_size=20), body=st.binary(max_size=50))
def test_headers_and_bodies_get_an_answer_that_is_no_500(
    agent: AgentProcess, headers: list[tuple[str, bytes]], path: bytes, body: bytes
) -> None:
    lines = b"".join(name.encode() + b": " + value + b"\r\n" for name, value in headers)
    target = (
        b"/vm/hotplug/cpu" if len(body) % 2 else b"/" + path.replace(b" ", b"").replace(b"\r", b"").replace(b"\n", b"")
    )
    length = f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
    with socket.create_connection((LOOPBACK, agent.port), timeout=10) as connection:
        connection.sendall(b"POST " + target + b" HTTP/1.1\r\nHost: a\r\n" + lines + length + body)
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert 200 <= response.status < 500, (response.status, response.read())
        assert response.getheader("Content-Type") == "application/json; charset=utf-8"
        response.read()


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=LINES)
def test_no_bytes_harm_the_agent(agent: AgentProcess, data: bytes) -> None:
    with socket.create_connection((LOOPBACK, agent.port), timeout=10) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    assert not any(line.startswith(b"HTTP/1.1 5") for line in answer.split(b"\r\n")), answer
    assert "Traceback" not in agent.log()
