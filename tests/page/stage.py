"""The page on the agent's own server, with answers that the test says: the same each time, or none at all."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from email.utils import formatdate
from types import TracebackType
from typing import Any

from kvmagent.api.page import page_routes
from kvmagent.api.pages import LIST_QUERY, Page, answer_list
from kvmagent.api.security import Security
from kvmagent.api.server import Answer, Call, Route, Server
from kvmagent.api.wire import encode
from kvmagent.settings import HttpSection, SecuritySection
from tests.lab.agent import LOOPBACK, find_free_port

# The agent's clock, as the page is told it with each answer.
NOW = 1_790_000_000


class Stage:
    """Serves the page and `answers`: path to (status, body), which may be replaced at any time.

    A body that can be called is made of what was asked, and its path is one of POST.

    While `gate` is cleared nothing but the page itself is answered. Counts requests by path, and those that wait.
    """

    def __init__(self, answers: Mapping[str, tuple[int, Any]]) -> None:
        self.answers = dict(answers)
        #: What each VM's history is.
        self.changes: list[dict[str, Any]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.asked: Counter[str] = Counter()
        self.most_waiting: Counter[str] = Counter()
        self._waiting: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._port = find_free_port()
        self._server: Server | None = None

    def __enter__(self) -> Stage:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{LOOPBACK}:{self._port}/"

    def start(self) -> None:
        """Listen; on the earlier port, if there was one."""
        routes = {
            ("POST" if callable(body) else "GET", path): Route(
                self._answer(path), "read", query=frozenset(LIST_QUERY), changes=False
            )
            for path, (_, body) in self.answers.items()
        }
        routes["GET", "/vms/*/history"] = Route(
            lambda _call: Answer(encode({"changes": self.changes}), headers={"Date": formatdate(NOW, usegmt=True)}),
            "read",
            query=frozenset({"limit"}),
        )
        self._server = Server(
            HttpSection(host=LOOPBACK, port=self._port, socket=""),
            Security(SecuritySection(allow_unauthenticated=True, allowed_clients=(LOOPBACK,))),
            {**routes, **page_routes()},
        )
        self._server.bind()
        self._server.start()

    def stop(self) -> None:
        """Be gone. May be called again."""
        self.gate.set()
        if self._server is not None:
            self._server.stop()
            self._server = None

    def _answer(self, path: str) -> Callable[[Call], Answer]:
        def answer(call: Call) -> Answer:
            with self._lock:
                self.asked[path] += 1
                self._waiting[path] += 1
                self.most_waiting[path] = max(self.most_waiting[path], self._waiting[path])
            self.gate.wait()
            with self._lock:
                self._waiting[path] -= 1
            status, body = self.answers[path]
            if callable(body):
                body = body(json.loads(call.body))
            if status == 200 and path == "/vms":
                body = choose_page(json.loads(encode(body)), call.query)
            told = Answer(encode(body), status=status)
            if status == 200 and path in ("/vms", "/tasks"):
                told = answer_list(call, Page(None, None, None), told.body)
            return replace(told, headers={**told.headers, "Date": formatdate(NOW, usegmt=True)})

        return answer


def choose_page(body: Any, query: Mapping[str, str]) -> Any:
    """A page of the VMs, as the agent has it; its cursor is the last one's UUID."""
    after = query.get("cursor", "")
    vms = sorted((vm for vm in body["vms"] if vm["vmUuid"] > after), key=lambda vm: vm["vmUuid"])
    told = vms[: int(query.get("limit", len(vms)))]
    return {"vms": told, **({"next": told[-1]["vmUuid"]} if len(told) < len(vms) else {})}
