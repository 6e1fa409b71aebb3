"""The management server of docs/management-server, with a fleet's certificates, and counted.

    server.py --database FILE --port 8080 --ask-again 60 --tls CA CERTIFICATE

GET /figures    connections with callbacks, callbacks and copies since it started
PUT /slow/2.5   answer each callback so many seconds late from now on

It is that server: what is on disk, what is answered and when something is sent again is done by its code. What it has
to send again after a start is spread over --ask-again: all at once would be a herd of the server's own making.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import ssl
import sys
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

PAGE_FILE = Path(__file__).parents[2] / "docs/management-server/server.py"


def load_page() -> Any:
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("management_server", PAGE_FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAGE = load_page()


class Counts:
    """Thread-safe. Times are of the epoch."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open = self._most_open = 0
        self._connections: Counter[int] = Counter()
        self._callbacks: Counter[int] = Counter()
        self._copies = self._differing = 0
        self._first_at = self._last_at = 0.0
        self.slow_s = 0.0

    def connected(self) -> None:
        """A connection has its first callback."""
        with self._lock:
            self._open += 1
            self._most_open = max(self._most_open, self._open)
            self._connections[int(time.time())] += 1

    def closed(self) -> None:
        """One that had callbacks is closed."""
        with self._lock:
            self._open -= 1

    def took(self, former: Any, told: Any) -> None:
        """A callback was taken; `former` is the outcome that was known before."""
        with self._lock:
            self._last_at = time.time()
            self._first_at = self._first_at or self._last_at
            self._callbacks[int(self._last_at)] += 1
            self._copies += former is not None
            self._differing += former is not None and former != told

    def tell(self) -> dict[str, float]:
        """What was counted."""
        with self._lock:
            return {
                "callbacks": self._callbacks.total(),
                "mostCallbacksPerSecond": max(self._callbacks.values(), default=0),
                "connections": self._connections.total(),
                "mostConnections": self._most_open,
                "mostConnectionsPerSecond": max(self._connections.values(), default=0),
                "copies": self._copies,
                "differing": self._differing,
                "firstAt": self._first_at,
                "lastAt": self._last_at,
            }


class CountingServer(PAGE.Server):  # type: ignore[misc, name-defined]
    """Its queue of connections is a server's, not an example's."""

    request_queue_size = 1024

    def __init__(self, *given: Any) -> None:
        self.counts = Counts()
        super().__init__(*given)
        self.RequestHandlerClass = CountingHandler


class CountingHandler(PAGE.Handler):  # type: ignore[misc, name-defined]
    """Counts around what the example does."""

    disable_nagle_algorithm = True
    _is_counted = False
    _told = ""

    def do_GET(self) -> None:
        """The figures, or what became of a command."""
        if self.path == "/figures":
            self._answer(200, self.server.counts.tell())
        else:
            super().do_GET()

    def do_PUT(self) -> None:
        """How slow to be, or a command."""
        if self.path.startswith("/slow/"):
            self._body()
            self.server.counts.slow_s = float(self.path.removeprefix("/slow/"))
            self._answer(200, {})
        else:
            super().do_PUT()

    def do_POST(self) -> None:
        """An outcome."""
        if not self._is_counted:
            self._is_counted = True
            self.server.counts.connected()
        if self.server.counts.slow_s:
            time.sleep(self.server.counts.slow_s)
        asked = ("SELECT outcome FROM commands WHERE id = ?", (self.headers.get("taskuuid", ""),))
        rows, _ = self.server.store.run(asked)
        super().do_POST()
        former = json.loads(rows[0][0] or "null") if rows else None
        self.server.counts.took(former, json.loads(self._told))

    def finish(self) -> None:
        """The connection ends."""
        if self._is_counted:
            self.server.counts.closed()
        super().finish()

    def _body(self) -> str:
        self._told = super()._body()
        return str(self._told)


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--database", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--ask-again", type=float, required=True)
    parser.add_argument("--tls", nargs=2, required=True)
    given = parser.parse_args()
    authority, certificate = given.tls
    context = ssl.create_default_context(cafile=authority)
    context.load_cert_chain(certificate)
    handlers = (urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    PAGE.OPENER = urllib.request.build_opener(*handlers)
    store = PAGE.Store(given.database)
    later = "UPDATE commands SET send_at = ? + ? * (abs(random()) % 1000) / 1000.0 WHERE outcome IS NULL"
    store.run((later, (time.time(), given.ask_again)))
    server = CountingServer(given.port, store, "", given.ask_again)
    print("serving", file=sys.stderr, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
