"""A management server on one page: it loses no command, and counts no outcome twice.

    client -- PUT /commands/ID -->  on disk, then 202           the client retries until it gets the 202
    server -- POST to the agent ->  until it answers 200        always the same taskuuid, body and callbackurl
    agent  -- POST /outcomes ---->  on disk, then 200           a copy changes nothing
    client -- GET /commands/ID -->  the outcome, once there is one

The server sends a command without an outcome again after each start and every --ask-again seconds. An agent that
already has the task does not run it twice: it answers with the task's state, and posts the outcome again if it has one.

    server.py --database FILE [--port 8080] [--token-file FILE] [--ask-again 60]
"""

import argparse
import http.client
import json
import re
import sqlite3
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SCHEMA = """
PRAGMA journal_mode = WAL;
CREATE TABLE IF NOT EXISTS commands (
    id TEXT PRIMARY KEY, agent TEXT NOT NULL, path TEXT NOT NULL, request TEXT NOT NULL,
    send_at REAL NOT NULL, trouble TEXT, outcome TEXT, late TEXT);
CREATE TABLE IF NOT EXISTS vms (vm TEXT PRIMARY KEY, cpuNum INTEGER, memorySize INTEGER, outcomes INTEGER NOT NULL);
"""
# Refusals that depend only on the request: the agent never accepted it, and never will. After any other status (a wrong
# token, a full queue, an agent that is stopping) the task may still have been accepted before: the server retries.
FINAL = (400, 409, 413)
RETRY_S, TIMEOUT_S = 1.0, 10.0
# Agents are on the local network: ignore the proxy settings of the environment.
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Store:
    """The database. Each call is one transaction, on disk when it returns."""

    def __init__(self, file: Path) -> None:
        self._file = file
        with closing(sqlite3.connect(file)) as connection:
            connection.executescript(SCHEMA)
            connection.execute("UPDATE commands SET send_at = 0 WHERE outcome IS NULL")
            connection.commit()

    def run(self, *statements: tuple[str, tuple]) -> tuple[list, int]:
        """Return the last statement's rows, and how many the first one changed; if none, the rest does not run."""
        with closing(sqlite3.connect(self._file, timeout=30)) as connection, connection:
            connection.execute("PRAGMA synchronous = FULL")
            rows, changed = [], None
            for text, values in statements:
                cursor = connection.execute(text, values)
                rows, changed = cursor.fetchall(), cursor.rowcount if changed is None else changed
                if changed == 0:
                    break
            return rows, changed or 0


class Sender(threading.Thread):
    """Sends the commands of one agent, in the order in which they arrived. An agent that hangs delays no other."""

    def __init__(self, agent: str, store: Store, callback_url: str, token: str, ask_again_s: float) -> None:
        super().__init__(daemon=True)
        self.wake = threading.Event()
        self._agent, self._store, self._ask_again_s = agent, store, ask_again_s
        self._headers = {"Content-Type": "application/json", "callbackurl": callback_url}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"

    def run(self) -> None:
        due = (
            "SELECT id, path, request FROM commands WHERE outcome IS NULL AND agent = ? AND send_at <= ? ORDER BY rowid"
        )
        while True:
            self.wake.clear()
            for task, path, request in self._store.run((due, (self._agent, time.time())))[0]:
                if not self._send(task, path, request):
                    break
            self.wake.wait(RETRY_S)

    def _send(self, task: str, path: str, request: str) -> bool:
        """Send one command; return false if the agent cannot take the next one either."""
        post = urllib.request.Request(self._agent + path, request.encode(), {**self._headers, "taskuuid": task})
        try:
            OPENER.open(post, timeout=TIMEOUT_S).read()
            self._note(task, None, self._ask_again_s)
            return True
        except urllib.error.HTTPError as error:
            answer = error.read().decode(errors="replace")
            if error.code in FINAL:
                self._store.run(("UPDATE commands SET outcome = ? WHERE id = ? AND outcome IS NULL", (answer, task)))
                return True
            self._note(task, answer, RETRY_S)
            return error.code != 503
        except (OSError, http.client.HTTPException) as error:
            self._note(task, str(error), RETRY_S)
            return False

    def _note(self, task: str, trouble: str | None, pause_s: float) -> None:
        if trouble:
            print(f"{task}: {self._agent}: {trouble}", file=sys.stderr, flush=True)
        note = "UPDATE commands SET trouble = ?, send_at = ? WHERE id = ?"
        self._store.run((note, (trouble, time.time() + pause_s, task)))


class Server(ThreadingHTTPServer):
    """Accepts commands and outcomes; runs one sender per agent."""

    def __init__(self, port: int, store: Store, token: str, ask_again_s: float) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.store, self._token, self._ask_again_s = store, token, ask_again_s
        self._senders: dict[str, Sender] = {}
        self._lock = threading.Lock()
        for (agent,) in store.run(("SELECT DISTINCT agent FROM commands WHERE outcome IS NULL", ()))[0]:
            self.wake(agent)

    def wake(self, agent: str) -> None:
        """Send an agent its new commands."""
        with self._lock:
            if agent not in self._senders:
                url = f"http://127.0.0.1:{self.server_port}/outcomes"
                self._senders[agent] = Sender(agent, self.store, url, self._token, self._ask_again_s)
                self._senders[agent].start()
        self._senders[agent].wake.set()


class Handler(BaseHTTPRequestHandler):
    """One request. An exception closes the connection without an answer, and the peer retries."""

    server: Server
    protocol_version = "HTTP/1.1"
    timeout = 60

    def do_PUT(self) -> None:
        """A command: {"agent": "http://node1:7070", "path": "/vm/hotplug/cpu", "request": {...}}."""
        task, body = self.path.removeprefix("/commands/"), json.loads(self._body())
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", task):
            return self._answer(404, {})
        command = (body["agent"], body["path"], json.dumps(body["request"]))
        new = "INSERT INTO commands (id, agent, path, request, send_at) VALUES (?, ?, ?, ?, 0) ON CONFLICT DO NOTHING"
        self.server.store.run((new, (task, *command)))
        (known,), _ = self.server.store.run(("SELECT agent, path, request FROM commands WHERE id = ?", (task,)))
        self.server.wake(body["agent"])
        return self._answer(202 if known == command else 409, {"id": task})

    def do_GET(self) -> None:
        """The state of a command: its last error, and its outcome if there is one."""
        query = "SELECT trouble, outcome, late FROM commands WHERE id = ?"
        rows, _ = self.server.store.run((query, (self.path.removeprefix("/commands/"),)))
        for trouble, outcome, late in rows:
            outcomes = {"outcome": json.loads(outcome or "null"), "late": json.loads(late or "null")}
            return self._answer(200, {"trouble": trouble, **outcomes})
        return self._answer(404, {})

    def do_POST(self) -> None:
        """An outcome. Its effect is in the same transaction, so it happens once, however often the outcome arrives."""
        task, body = self.headers.get("taskuuid", ""), self._body()
        reply = json.loads(body)
        column = "late" if reply.get("late") else "outcome"
        take = (f"UPDATE commands SET {column} = ? WHERE id = ? AND {column} IS NULL", (body, task))
        # This server updates an inventory; a real one bills, or starts the next step of a job.
        count = (
            "INSERT INTO vms VALUES (?, ?, ?, 1) ON CONFLICT DO UPDATE SET outcomes = outcomes + 1, cpuNum = "
            "coalesce(excluded.cpuNum, cpuNum), memorySize = coalesce(excluded.memorySize, memorySize)",
            (reply.get("vmUuid"), reply.get("cpuNum"), reply.get("memorySize")),
        )
        _, taken = self.server.store.run(take, count)
        known = taken or self.server.store.run(("SELECT 1 FROM commands WHERE id = ?", (task,)))[0]
        print(f"{task}: {'accepted' if taken else 'a copy' if known else 'unknown task'}", file=sys.stderr, flush=True)
        # 404 makes the agent give up. This is safe only because a command is on disk before it is sent.
        return self._answer(200 if known else 404, {})

    def _body(self) -> str:
        length = int(self.headers["Content-Length"])
        body = self.rfile.read(length)
        if len(body) < length:
            raise ConnectionError("the sender closed the connection early")
        return body.decode()

    def _answer(self, status: int, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing here: do_POST and Sender log what matters."""


def main() -> None:
    """Serve until killed: no shutdown is needed, because everything is on disk."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--database", type=Path, required=True)
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--token-file", type=Path)
    parser.add_argument("--ask-again", type=float, default=60.0, metavar="SECONDS")
    given = parser.parse_args()
    token = given.token_file.read_text().strip() if given.token_file else ""
    Server(given.port, Store(given.database), token, given.ask_again).serve_forever()


if __name__ == "__main__":
    main()
