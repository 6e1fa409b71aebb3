"""Splits the bytes of a connection into requests, and parses their heads. No sockets, no waiting.

    feed(bytes)  ->  take() -> None: more is needed | one whole Request | AgentError: nothing more can come of it

Here alone a request's head is read: everything behind takes the `Request`. It is handed on only when it is there to
its last byte, so that no thread ever waits for a client. What two parsers could read in two ways (two lengths, folded
lines, a header twice that must stand once, a target that begins with a host) is refused.

Source: RFC 9112 sections 3 and 5 to 7, and 11.2 (request smuggling).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from urllib.parse import unquote_to_bytes

from kvmagent.model.errors import AgentError, Code

MAX_HEAD_BYTES = 16384
MAX_URL_BYTES = 4096
# A body that is over the limit by no more than this is read away, so that its client gets to read the answer.
READ_AWAY_BYTES = 16 * 2**20

_END = b"\r\n\r\n"
_MAX_CHUNK_LINE = 256
_ONCE = frozenset(
    {b"authorization", b"callbackurl", b"content-length", b"content-type", b"host", b"taskuuid", b"transfer-encoding"}
)
# RFC 9112 3: method, target and version. Of targets, a path, and none that others take for a host; of versions, those
# whose framing this is.
_REQUEST_LINE = re.compile(rb"([A-Z][!#$%&'*+.^_`|~0-9A-Z-]*) (/(?!/)[!-\"$-~]*) HTTP/1\.([01])")
_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]*)?")
_ESCAPED_SLASH = re.compile(rb"(?i:%2f)")


@dataclass(frozen=True)
class Request:
    """One whole request. Header names are in lower case, the path is decoded and the query is not.

    `minor` is that of its version, HTTP/1.1 or 1.0; `keeps`: its client wants to go on with the connection.
    """

    method: str
    path: str
    query: str
    minor: int
    headers: Mapping[str, str]
    keeps: bool
    body: bytes = b""


class Framing:
    """The bytes of one connection. Not thread-safe."""

    def __init__(self, max_body_bytes: int) -> None:
        self._max_body_bytes = max_body_bytes
        self._buffer = bytearray()
        self._start_over()

    def _start_over(self) -> None:
        self._head: Request | None = None
        self._body = bytearray()
        self._searched = 0
        self._has_skipped = False
        self._expects = False
        self._is_chunked = False
        self._is_too_large = False
        self._inside_chunk = False
        self._left = 0  # bytes still to come of what has been announced
        self._body_bytes = 0  # announced so far

    @property
    def is_empty(self) -> bool:
        """Whether nothing of a next request is there."""
        return not self._buffer and self._head is None

    @property
    def size(self) -> int:
        """How many bytes are kept for a request that is not whole."""
        return len(self._buffer) + len(self._body)

    def feed(self, data: bytes) -> None:
        """Add what came in."""
        self._buffer += data

    def take(self) -> Request | None:
        """Return the next request once it is whole; None while more is needed.

        Raises:
            AgentError: BAD_HTTP, URL_TOO_LONG, HEAD_TOO_LARGE, BODY_TOO_LARGE: close the connection after the answer.
        """
        if self._head is None:
            self._head = self._read_head()
        if self._head is None or not (self._read_chunks() if self._is_chunked else self._read_body()):
            return None
        if self._is_too_large:
            raise self._too_large()
        request = replace(self._head, body=bytes(self._body))
        self._start_over()
        return request

    def take_expectation(self) -> bool:
        """Return, once a request, whether its client waits for 100 Continue before it sends the body."""
        wanted = self._expects
        self._expects = False
        return wanted

    def _read_head(self) -> Request | None:
        if self._buffer.startswith(b"\r\n") and not self._has_skipped:  # RFC 9112 2.2: one empty line is no error
            del self._buffer[:2]
            self._has_skipped = True
        half_a_line = self._buffer == b"\r" and not self._has_skipped
        if self._buffer and not self._buffer[:1].isalpha() and not half_a_line:
            raise AgentError(Code.BAD_HTTP, "the input is not an HTTP request")
        end = self._buffer.find(_END, self._searched)
        self._check_sizes(end)
        if end < 0:
            self._searched = max(0, len(self._buffer) - len(_END) + 1)
            return None
        request_line, *lines = bytes(self._buffer[:end]).split(b"\r\n")
        del self._buffer[: end + len(_END)]
        match = _REQUEST_LINE.fullmatch(request_line)
        if match is None:
            raise AgentError(Code.BAD_HTTP, "the request line is not METHOD /PATH HTTP/1.1 (or 1.0)")
        method, target, minor = match[1].decode(), match[2], int(match[3])
        headers = _parse_headers(lines)
        if "host" not in headers and minor:
            raise AgentError(Code.BAD_HTTP, "an HTTP/1.1 request needs a Host header")
        self._expect_body(headers)
        path, _, query = target.partition(b"?")
        wishes = [wish.strip() for wish in headers.get("connection", "").lower().split(",")]
        keeps = "close" not in wishes if minor else "keep-alive" in wishes
        return Request(method, _decode_path(path), query.decode(), minor, headers, keeps)

    def _expect_body(self, headers: Mapping[str, str]) -> None:
        encoding, length = headers.get("transfer-encoding"), headers.get("content-length")
        if encoding is not None and (length is not None or encoding.lower() != "chunked"):
            raise AgentError(Code.BAD_HTTP, "Transfer-Encoding is not chunked, or comes together with Content-Length")
        if length is not None and not re.fullmatch("[0-9]{1,18}", length):
            raise AgentError(Code.BAD_HTTP, "Content-Length is not a number")
        self._is_chunked = encoding is not None
        self._announce(int(length or 0))
        self._expects = headers.get("expect", "").lower() == "100-continue"

    def _announce(self, size: int) -> None:
        """So many more bytes of the body are to come."""
        self._left = size
        self._body_bytes += size
        self._is_too_large = self._body_bytes > self._max_body_bytes
        if self._body_bytes > self._max_body_bytes + READ_AWAY_BYTES:
            raise self._too_large()

    def _check_sizes(self, end: int) -> None:
        line = self._buffer.find(b"\r\n", 0, MAX_URL_BYTES + 2)
        if line < 0 and len(self._buffer) > MAX_URL_BYTES:
            raise AgentError(Code.URL_TOO_LONG, f"the request line is longer than {MAX_URL_BYTES} bytes")
        if (len(self._buffer) if end < 0 else end) > MAX_HEAD_BYTES:
            raise AgentError(Code.HEAD_TOO_LARGE, f"the headers are longer than {MAX_HEAD_BYTES} bytes")

    def _read_chunks(self) -> bool:
        while self._read_body():
            if self._inside_chunk and not self._read_line_end(0, "a chunk does not have the length that it declares"):
                return False
            self._inside_chunk = False
            end = self._buffer.find(b"\r\n", 0, _MAX_CHUNK_LINE)
            if end < 0:
                if len(self._buffer) >= _MAX_CHUNK_LINE:
                    raise AgentError(Code.BAD_HTTP, "a chunk's size line is too long")
                return False
            match = _CHUNK_SIZE.fullmatch(self._buffer, 0, end)
            if match is None:
                raise AgentError(Code.BAD_HTTP, "a chunk's size is not a hexadecimal number")
            size = int(match[1], 16)
            if not size:
                return self._read_line_end(end + 2, "trailers are not supported")
            del self._buffer[: end + 2]
            self._announce(size)
            self._inside_chunk = True
        return False

    def _read_body(self) -> bool:
        """Read what is left as far as it is there; what is too large is dropped."""
        taken = self._buffer[: self._left]
        del self._buffer[: len(taken)]
        self._left -= len(taken)
        if self._is_too_large:
            self._body.clear()
        else:
            self._body += taken
        return self._left == 0

    def _read_line_end(self, start: int, otherwise: str) -> bool:
        """Read up to the end of a line that must be at `start`; return False while it is not there."""
        ending = bytes(self._buffer[start : start + 2])
        if ending != b"\r\n"[: len(ending)]:
            raise AgentError(Code.BAD_HTTP, otherwise)
        if len(ending) < 2:
            return False
        del self._buffer[: start + 2]
        return True

    def _too_large(self) -> AgentError:
        found = f"the body has {self._body_bytes} bytes or more"
        return AgentError(Code.BODY_TOO_LARGE, f"{found}, the limit is {self._max_body_bytes}")


def _parse_headers(lines: list[bytes]) -> dict[str, str]:
    headers: dict[bytes, bytes] = {}
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or not _NAME.fullmatch(name):
            raise AgentError(Code.BAD_HTTP, "a header line is not of the form Name: value")
        if b"\0" in value or b"\r" in value or b"\n" in value:
            raise AgentError(Code.BAD_HTTP, "a header's value holds a control character")
        name = name.lower()
        value = value.strip(b" \t")
        if name in _ONCE and headers.get(name, value) != value:
            raise AgentError(Code.BAD_HTTP, f"the header {name.decode()} appears twice with different values")
        if name == b"transfer-encoding" and name in headers:
            raise AgentError(Code.BAD_HTTP, "the header transfer-encoding appears twice")
        # RFC 9110 5.3: other headers that stand several times are one list.
        headers[name] = value if name in _ONCE or name not in headers else headers[name] + b", " + value
    return {name.decode(): value.decode("latin-1") for name, value in headers.items()}


def _decode_path(path: bytes) -> str:
    """Return a path with its %XX decoded: UTF-8, and what is not that byte by byte. An escaped slash stays escaped."""
    decoded = b"%2F".join(unquote_to_bytes(part) for part in _ESCAPED_SLASH.split(path))
    try:
        return decoded.decode()
    except UnicodeDecodeError:
        return decoded.decode("latin-1")
