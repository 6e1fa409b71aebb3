"""Where one request ends and the next begins, in bytes as they come in. No sockets, no waiting.

    feed(bytes)  ->  take() -> None: more is needed | one whole request | AgentError: nothing more can come of it

A request is handed on only when it is there to its last byte, so that no thread ever waits for a client. What two
parsers could read in two ways (two lengths, folded lines, a header twice that must stand once) is refused.

Source: RFC 9112 sections 5 to 7, and 11.2 (request smuggling).
"""

import re

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
# RFC 9112 3: method, target and version. Of versions, those whose framing this is.
_REQUEST_LINE = re.compile(rb"[A-Za-z][!#$%&'*+.^_`|~0-9A-Za-z-]* [!-~\x80-\xff]+ HTTP/1\.[01]")
_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]*)?")


class Framing:
    """The bytes of one connection. Not thread-safe."""

    def __init__(self, max_body_bytes: int) -> None:
        self._max_body_bytes = max_body_bytes
        self._buffer = bytearray()
        self._head_bytes = 0
        self._expects = False
        self._start_over()

    @property
    def is_empty(self) -> bool:
        """Whether nothing of a next request is there."""
        return not self._buffer and self._head_bytes == 0

    @property
    def size(self) -> int:
        """How many bytes are kept for a request that is not whole."""
        return len(self._buffer)

    def feed(self, data: bytes) -> None:
        """Add what came in."""
        self._buffer += data

    def take(self) -> bytes | None:
        """Return the next request once it is whole: head and body as they came; None while more is needed.

        Raises:
            AgentError: BAD_HTTP, URL_TOO_LONG, HEAD_TOO_LARGE, BODY_TOO_LARGE: close the connection after the answer.
        """
        if self._head_bytes == 0 and not self._read_head():
            return None
        if not (self._read_chunks() if self._is_chunked else self._read_body()):
            return None
        if self._is_too_large:
            raise self._too_large()
        request = bytes(self._buffer[: self._position])
        del self._buffer[: self._position]
        self._start_over()
        return request

    def take_expectation(self) -> bool:
        """Return, once a request, whether its client waits for 100 Continue before it sends the body."""
        wanted = self._expects
        self._expects = False
        return wanted

    def _start_over(self) -> None:
        self._head_bytes = 0
        self._searched = 0
        self._has_skipped = False
        self._expects = False
        self._is_chunked = False
        self._is_too_large = False
        self._inside_chunk = False
        self._left = 0  # bytes still to come of what has been announced
        self._body_bytes = 0
        self._position = 0  # in the buffer, behind what has been read of the request

    def _read_head(self) -> bool:
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
            return False
        request_line, *lines = bytes(self._buffer[:end]).split(b"\r\n")
        if not _REQUEST_LINE.fullmatch(request_line):
            raise AgentError(Code.BAD_HTTP, "the request line is not METHOD TARGET HTTP/1.1 (or 1.0)")
        headers = _parse_headers(lines)
        encoding, length = headers.get(b"transfer-encoding"), headers.get(b"content-length")
        if encoding is not None and (length is not None or encoding.lower() != b"chunked"):
            raise AgentError(Code.BAD_HTTP, "Transfer-Encoding is not chunked, or comes together with Content-Length")
        if length is not None and (not length.isdigit() or len(length) > 18):
            raise AgentError(Code.BAD_HTTP, "Content-Length is not a number")
        self._head_bytes = self._position = end + len(_END)
        self._is_chunked = encoding is not None
        self._announce(int(length or 0))
        if headers.get(b"expect", b"").lower() == b"100-continue":
            self._expects = True
            self._drop_expect(request_line, lines)
        return True

    def _drop_expect(self, request_line: bytes, lines: list[bytes]) -> None:
        """Take the header out: it is answered here, and whoever parses the request would answer it again."""
        kept = [line for line in lines if not line.lower().startswith(b"expect:")]
        head = b"\r\n".join([request_line, *kept]) + _END
        self._buffer[: self._head_bytes] = head
        self._head_bytes = self._position = len(head)

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
            if (
                self._inside_chunk
                and not self._is_too_large
                and self._buffer[self._position - 2 : self._position] != b"\r\n"
            ):
                raise AgentError(Code.BAD_HTTP, "a chunk does not have the length that it declares")
            end = self._buffer.find(b"\r\n", self._position, self._position + _MAX_CHUNK_LINE)
            if end < 0:
                if len(self._buffer) - self._position >= _MAX_CHUNK_LINE:
                    raise AgentError(Code.BAD_HTTP, "a chunk's first line does not end")
                return False
            match = _CHUNK_SIZE.fullmatch(self._buffer, self._position, end)
            if match is None:
                raise AgentError(Code.BAD_HTTP, "a chunk's size is not a hexadecimal number")
            size = int(match[1], 16)
            if not size:
                return self._read_last_line(end + 2)
            self._announce(size)
            self._left += 2  # the chunk's own CRLF
            self._position = end + 2
            self._inside_chunk = True
        return False

    def _read_body(self) -> bool:
        """Read what is left as far as it is there; what is too large is dropped."""
        here = min(self._left, len(self._buffer) - self._position)
        self._position += here
        self._left -= here
        if self._is_too_large:
            del self._buffer[: self._position]
            self._position = 0
        return self._left == 0

    def _read_last_line(self, start: int) -> bool:
        ending = bytes(self._buffer[start : start + 2])
        if ending != b"\r\n"[: len(ending)]:
            raise AgentError(Code.BAD_HTTP, "trailers are not supported")
        if len(ending) < 2:
            return False
        self._position = start + 2
        return True

    def _too_large(self) -> AgentError:
        found = f"the body has {self._body_bytes} bytes or more"
        return AgentError(Code.BODY_TOO_LARGE, f"{found}, the limit is {self._max_body_bytes}")


def _parse_headers(lines: list[bytes]) -> dict[bytes, bytes]:
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
        headers[name] = value
    return headers
