"""A request's head is read once: what was written is what comes out, however it arrives."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmagent.api.framing import Framing
from kvmagent.model.errors import AgentError, Code

HEADERS = st.dictionaries(
    st.from_regex(r"x-[a-z0-9-]{1,8}", fullmatch=True),
    st.from_regex(r"[!-~]([ -~]*[!-~])?", fullmatch=True),
    max_size=4,
)


@given(
    headers=HEADERS,
    body=st.binary(max_size=300),
    chunk=st.integers(0, 50),
    cut=st.integers(1, 80),
)
def test_what_was_written_comes_out_whole(headers: dict[str, str], body: bytes, chunk: int, cut: int) -> None:
    lines = [
        b"POST /vms/%C3%A4%2fb?x=%20 HTTP/1.1",
        b"Host: a",
        *(f"{k.title()}:  {v} ".encode() for k, v in headers.items()),
    ]
    if chunk:
        parts = [body[at : at + chunk] for at in range(0, len(body), chunk)]
        lines.append(b"Transfer-Encoding: chunked")
        sent = b"".join(f"{len(part):x}".encode() + b"\r\n" + part + b"\r\n" for part in parts) + b"0\r\n\r\n"
    else:
        lines.append(f"Content-Length: {len(body)}".encode())
        sent = body
    stream = (b"\r\n".join(lines) + b"\r\n\r\n" + sent) * 2
    framing, found = Framing(300), []
    for at in range(0, len(stream), cut):
        framing.feed(stream[at : at + cut])
        while (request := framing.take()) is not None:
            found.append(request)
    assert framing.is_empty
    assert framing.size == 0
    assert len(found) == 2
    for request in found:
        assert (request.method, request.path, request.query) == ("POST", "/vms/ä%2Fb", "x=%20")
        assert request.body == body
        assert {name: value for name, value in request.headers.items() if name.startswith("x-")} == headers


@pytest.mark.parametrize(
    ("line", "connection", "keeps"),
    [
        ("HTTP/1.1", "", True),
        ("HTTP/1.1", "Close", False),
        ("HTTP/1.1", "upgrade, close", False),
        ("HTTP/1.0", "", False),
        ("HTTP/1.0", "Keep-Alive", True),
    ],
)
def test_a_client_says_whether_it_goes_on(line: str, connection: str, *, keeps: bool) -> None:
    framing = Framing(0)
    framing.feed(f"GET / {line}\r\nHost: a\r\nConnection: {connection}\r\n\r\n".encode())
    request = framing.take()
    assert request is not None
    assert request.keeps is keeps


def test_a_header_that_stands_several_times_is_one_list() -> None:
    framing = Framing(0)
    framing.feed(b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\nOrigin: null\r\norigin: http://b\r\n\r\n")
    request = framing.take()
    assert request is not None
    assert request.headers == {"host": "a", "origin": "null, http://b"}


@pytest.mark.parametrize("target", ["*", "vms", "//host/vms", "http://host/vms", "/vms#part", "/v\xe4", ""])
def test_a_target_that_is_no_path_is_refused(target: str) -> None:
    framing = Framing(0)
    framing.feed(f"GET {target} HTTP/1.1\r\nHost: a\r\n\r\n".encode("latin-1"))
    with pytest.raises(AgentError) as caught:
        framing.take()
    assert caught.value.code is Code.BAD_HTTP
