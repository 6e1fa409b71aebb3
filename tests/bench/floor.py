"""The floor: what no agent of this kind can go below. The same HTTP server with an empty handler, one durable commit,
and a callback over a connection that is kept.

python -m tests.bench.floor DIRECTORY: serves on a free port, which it prints, until its standard input ends.
"""

from __future__ import annotations

import queue
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cheroot.wsgi
import urllib3

THREADS = 20
CALLBACK = b'{"success": true, "outcome": "unchanged"}'


@contextmanager
def running(directory: Path) -> Iterator[int]:
    """Run the floor in a process of its own; its port."""
    command = [sys.executable, "-m", "tests.bench.floor", str(directory)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        yield int(child.stdout.readline())
    finally:
        child.stdin.close()
        child.wait()


class Floor:
    """Takes a request, commits it, answers; another thread sends the callback."""

    def __init__(self, directory: Path) -> None:
        self._commits = sqlite3.connect(directory / "floor.sqlite", check_same_thread=False, isolation_level=None)
        self._commits.execute("PRAGMA journal_mode=WAL")
        self._commits.execute("PRAGMA synchronous=FULL")
        self._commits.execute("CREATE TABLE task (uuid TEXT PRIMARY KEY, body BLOB)")
        self._lock = threading.Lock()
        self._owed: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
        threading.Thread(target=self._deliver, daemon=True).start()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., object]) -> Iterable[bytes]:
        """The WSGI application."""
        body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
        task, url = environ["HTTP_TASKUUID"], environ["HTTP_CALLBACKURL"]
        with self._lock:
            self._commits.execute("INSERT INTO task VALUES (?, ?)", (task, body))
        self._owed.put((task, url))
        start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", "2")])
        return [b"{}"]

    def _deliver(self) -> None:
        connections = urllib3.PoolManager(maxsize=4)
        while True:
            task, url = self._owed.get()
            connections.request("POST", url, body=CALLBACK, headers={"taskuuid": task})


def main() -> None:
    """Serve until standard input ends."""
    server = cheroot.wsgi.Server(("127.0.0.1", 0), Floor(Path(sys.argv[1])), numthreads=THREADS)
    server.prepare()
    print(server.bind_addr[1], flush=True)
    threading.Thread(target=server.serve, daemon=True).start()
    sys.stdin.read()
    server.stop()


if __name__ == "__main__":
    main()
