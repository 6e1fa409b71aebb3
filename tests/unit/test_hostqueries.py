"""Questions to the host: each that was accepted is answered, once, whatever its plugin does."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmagent.logs import Event
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.host import HostView, ManagementServer, Query
from kvmagent.settings import CallbackSection, parse_callback_rule
from kvmagent.tasks.callbackclient import CallbackClient
from kvmagent.tasks.faults import no_fault
from kvmagent.tasks.hostqueries import HostQueries
from kvmagent.tasks.journal import Journal, Task
from kvmagent.tasks.lanes import Lanes
from kvmagent.tasks.managementserver import ManagementServerFile
from kvmagent.tasks.withdrawal import Withdrawal
from tests.unit.test_told import Counted


class AskRequest(msgspec.Struct, frozen=True, rename="camel"):
    """What is asked."""

    number: int = 0


class AskReply(msgspec.Struct, rename="camel"):
    """What is answered."""

    success: bool = True
    error: str = ""
    words: Any = None


class Unforeseen(Exception):
    """What no code of the agent raises on purpose."""


def returning(value: Any) -> Callable[..., Any]:
    return lambda *arguments: value


def raising(error: BaseException) -> Callable[..., Any]:
    def function(*arguments: Any) -> Any:
        raise error

    return function


#: What a plugin's function may do instead of its work.
MISDEEDS: dict[str, Callable[..., Any]] = {
    "refuses": raising(AgentError(Code.VM_NOT_FOUND, "no such VM")),
    "has a bug": raising(Unforeseen("a bug")),
    "ends its thread": raising(SystemExit("bye")),
    "is interrupted": raising(KeyboardInterrupt()),
    **{f"claims {code}": raising(AgentError(code, "made up")) for code in Code if code in (
        Code.CANCELLED, Code.JOURNAL_UNAVAILABLE, Code.LIBVIRT_UNAVAILABLE, Code.STOPPING, Code.CPU_REMOVAL_PENDING
    )},
    "answers nothing": returning(None),
    "answers no JSON": returning(object()),
    "answers what has no JSON in it": returning(AskReply(words=object())),
    "answers a number": returning(7),
    "answers text that is not UTF-8": returning(AskReply(words="\ud800")),
}  # fmt: skip
CALLS = ("notice", "remember", "answer", "fail")
#: Each write of a task's way.
POINTS = [f"journal.{name}:{when}" for name in ("start_task", "finish") for when in ("written", "committed")]


class Host:
    """What answers questions, on a journal of its own; `calls` are the plugin's functions that misbehave."""

    def __init__(
        self, directory: Path, calls: dict[str, Callable[..., Any]], fault: Callable[[str], None] = no_fault
    ) -> None:
        self.query = Query(
            **{
                "name": "Ask", "path": "/ask", "summary": "", "request": AskRequest, "reply": AskReply,
                "needs": frozenset(), "answer": returning(AskReply(words="yes")), "role": "host",
                "fail": lambda words: AskReply(success=False, error=words), **calls,
            }
        )  # fmt: skip
        self.finished: list[str] = []
        self.recorder = Counted()
        began: list[bool] = []
        self.journal = Journal(
            directory / "journal.sqlite",
            on_accepted=lambda task: None,
            fault=lambda name: fault(name) if began else None,
        )
        self.journal.start()
        self.began = began
        self.memory = ManagementServerFile(directory / "server.json")
        self.queries = HostQueries(
            self,
            self.journal,
            {"Ask": self.query},
            self.memory,
            CallbackClient((parse_callback_rule("127.0.0.1"),), CallbackSection()),
            on_finished=lambda owed: self.finished.append(owed.task_uuid),
            recorder=self.recorder,
        )

    def view_host(self, needs: frozenset[str]) -> HostView:
        return HostView()

    def run(self, request: bytes = b"{}") -> dict[str, Any]:
        task = Task(
            task_uuid="t1",
            command="Ask",
            lane="host/Ask",
            request=request,
            callback_url="http://127.0.0.1:9/",
            client="127.0.0.1",
        )
        task, _ = self.journal.accept(task)
        self.began.append(True)
        self.queries.run(task)
        return self.reply()

    def reply(self) -> dict[str, Any]:
        task = self.journal.find("t1")
        assert task is not None
        assert (task.state, self.finished) == ("finished", ["t1"])
        assert task.reply is not None
        answer: dict[str, Any] = msgspec.json.decode(task.reply, type=dict)
        ((command, outcome, code),) = self.recorder.endings
        assert (command, outcome) == ("Ask", task.outcome)
        assert (outcome == "refused") == (code is not None)
        assert (outcome == "answered") == answer["success"] == (not answer["error"])
        return answer


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Host]]:
    made: list[Host] = []

    def make(calls: dict[str, Callable[..., Any]] | None = None, fault: Callable[[str], None] = no_fault) -> Host:
        directory = tmp_path / str(len(made))
        directory.mkdir()
        made.append(Host(directory, calls or {}, fault))
        return made[-1]

    yield make
    for host in made:
        host.journal.stop()


@pytest.mark.parametrize("misdeed", MISDEEDS)
@pytest.mark.parametrize("call", CALLS)
def test_whatever_a_plugin_does_in_whichever_call_its_task_is_answered_once(
    make: Callable[..., Host], call: str, misdeed: str
) -> None:
    calls = {call: MISDEEDS[misdeed]}
    if call == "fail":
        calls["answer"] = raising(Unforeseen("a bug"))
    host = make(calls)
    host.run()
    ((_, _, code),) = host.recorder.endings
    if misdeed == "refuses" and call != "fail":
        assert code == "VM_NOT_FOUND"
    if misdeed.startswith("claims") and "PENDING" not in misdeed and call != "fail":
        assert code == "INTERNAL_ERROR"


@settings(max_examples=40, deadline=None)
@given(
    calls=st.dictionaries(st.sampled_from(CALLS), st.sampled_from(sorted(MISDEEDS))),
    request=st.sampled_from([b"{}", b'{"number": "x"}', b"[", b"\xff", b'{"number": 1e999}']),
)
def test_several_misdeeds_together_leave_nothing_unanswered(
    tmp_path_factory: pytest.TempPathFactory, calls: dict[str, str], request: bytes
) -> None:
    host = Host(tmp_path_factory.mktemp("host"), {name: MISDEEDS[misdeed] for name, misdeed in calls.items()})
    try:
        host.run(request)
        asked = host.queries.answer(host.query, AskRequest(), "127.0.0.1")
        assert isinstance(msgspec.json.decode(asked.reply), dict)
    finally:
        host.journal.stop()


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("calls", [{}, {"answer": "has a bug", "fail": "has a bug"}], ids=["well", "badly"])
def test_whatever_is_raised_at_a_write_it_is_answered_once(
    make: Callable[..., Host], point: str, calls: dict[str, str]
) -> None:
    raised: list[str] = []

    def fault(name: str) -> None:
        if name == point and not raised:
            raised.append(name)
            raise Unforeseen(point)

    reply = make({name: MISDEEDS[misdeed] for name, misdeed in calls.items()}, fault).run()
    assert raised == [point]
    assert not (calls and reply["success"])


def test_a_question_that_cannot_be_read_is_answered_counted_and_told(
    make: Callable[..., Host], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    host = make()
    reply = host.run(b'{"number": "x"}')
    assert reply["success"] is False
    assert "number" in reply["error"]
    assert host.recorder.endings == [("Ask", "refused", "TASK_UNREADABLE")]
    check_told(caplog, "TASK_UNREADABLE")


def test_the_end_of_a_question_is_told_as_a_command_s_is(
    make: Callable[..., Host], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    host = make({"answer": MISDEEDS["refuses"]})
    assert host.run()["error"].startswith("no such VM")
    check_told(caplog, "VM_NOT_FOUND")
    assert not [record for record in caplog.records if record.exc_info]


def check_told(caplog: pytest.LogCaptureFixture, code: str) -> None:
    lines = [record.msg for record in caplog.records if isinstance(record.msg, Event)]
    (finished,) = [dict(line.fields) for line in lines if line.name == "task finished"]
    (audited,) = [dict(line.fields) for line in lines if line.name == "audit"]
    assert (finished["outcome"], finished["error_code"]) == ("refused", code)
    assert finished["error"]
    assert finished["remedy"]
    assert (audited["outcome"], audited["error_code"], audited["error"]) == ("refused", code, finished["error"])


@pytest.mark.parametrize("has_words", [True, False])
def test_a_question_can_be_cancelled_whatever_words_its_plugin_has_for_it(
    make: Callable[..., Host], has_words: bool
) -> None:
    host = make({} if has_words else {"fail": MISDEEDS["has a bug"]})
    task = Task(
        task_uuid="t1", command="Ask", lane="host/Ask", request=b"{}", callback_url="http://x/", client="127.0.0.1"
    )
    host.journal.accept(task)
    lanes = Lanes(lambda task: None, workers=1, max_queued=9, max_queued_per_lane=9, max_queued_per_client=9)
    cancelled = Withdrawal(
        host.journal,
        lanes,
        {"Ask": host.query},
        on_finished=lambda owed: host.finished.append(owed.task_uuid),
        recorder=host.recorder,
    )
    # The second time it is cancelled already, and no second callback is due.
    for _ in range(2):
        cancelled.withdraw("t1")
        assert (host.reply()["success"], "cancelled" in host.reply()["error"]) == (False, True)
        assert host.finished == ["t1"]
    # A worker that had it in hand does nothing with it.
    host.queries.run(task)
    assert "cancelled" in host.reply()["error"]


def test_a_server_that_is_remembered_stays_so_where_its_answer_fails(make: Callable[..., Host]) -> None:
    server = ManagementServer("h1", "http://127.0.0.1/send")
    host = make({"remember": returning(server), "answer": MISDEEDS["has a bug"]})
    assert host.run()["success"] is False
    assert host.memory.get() == msgspec.structs.replace(server, client="127.0.0.1")
