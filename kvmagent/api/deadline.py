"""Makes calls that may hang on other threads, with a deadline. `question` here is such a call, not a host query."""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextvars import copy_context
from typing import Generic, TypeVar

from kvmagent.logs import Log
from kvmagent.model.errors import AgentError, Code

log = Log(__name__)

AnswerT = TypeVar("AnswerT")

# How long a call waits for a thread when all are busy.
_SLOT_WAIT_S = 0.5
# Threads that many calls share: libvirt answers some while Python makes replies of others.
_SIDE_BY_SIDE = 2


class Asker:
    """Makes a call on another thread and waits for it until a deadline. Thread-safe.

    A call of libvirt cannot be interrupted: a thread that hangs is abandoned, and occupies one of `at_once` places
    until its call returns.
    """

    def __init__(self, *, at_once: int) -> None:
        self._places = threading.BoundedSemaphore(at_once)

    def ask(self, question: Callable[[], AnswerT], *, timeout_s: float, about: str) -> AnswerT:
        """Return the call's answer, or raise what it raises.

        Raises:
            AgentError: LIBVIRT_UNAVAILABLE, when there is no answer in time, or too many others wait for one.
        """
        if not self._places.acquire(timeout=_SLOT_WAIT_S):
            raise AgentError(Code.LIBVIRT_UNAVAILABLE, f"{about}: too many reads wait for an answer")
        answer: Future[AnswerT] = Future()

        def run() -> None:
            try:
                answer.set_result(question())
            except BaseException as error:
                answer.set_exception(error)
            finally:
                self._places.release()

        # With the log context of who asks.
        threading.Thread(target=copy_context().run, args=(run,), name=f"read {about}", daemon=True).start()
        try:
            return answer.result(timeout_s)
        except TimeoutError as error:
            raise AgentError(Code.LIBVIRT_UNAVAILABLE, f"{about}: no answer in {timeout_s:g} s") from error

    def ask_all(
        self, questions: Mapping[str, Callable[[], AnswerT]], *, timeout_s: float, about: str
    ) -> dict[str, AnswerT | AgentError]:
        """Make the calls on a few threads; return each one's answer, or why there is none.

        If a call hangs, its thread is abandoned and another one goes on with the rest: it delays others by `timeout_s`
        at most, and most of them not at all. If a call raises anything but an AgentError, that is logged and returned
        as INTERNAL_ERROR of that call; the others are not affected.

        Observed: 1,000 reads of libvirt's test driver take 12 ms of CPU time by themselves, 13 ms this way and 220 ms
        by `ask`, with a thread for each; and VMs that hang would there add up their times.
        """
        series = _Series(questions, timeout_s, about)

        def add_thread() -> bool:
            # The first waits for a place, as `ask` does; what is more is taken where it is free.
            if not self._places.acquire(timeout=0.0 if series.is_begun else _SLOT_WAIT_S):
                return False
            threading.Thread(target=run, name=f"read {about}", daemon=True).start()
            return True

        def run() -> None:
            try:
                series.work()
            finally:
                self._places.release()

        return series.finish(add_thread)


class _Series(Generic[AnswerT]):
    """Calls that several threads share. Thread-safe."""

    def __init__(self, questions: Mapping[str, Callable[[], AnswerT]], timeout_s: float, about: str) -> None:
        self._waiting = deque(questions.items())
        self._timeout_s = timeout_s
        self._about = about
        self._changed = threading.Condition()
        self._begun_at: dict[str, float] = {}
        self._answers: dict[str, AnswerT | AgentError] = dict.fromkeys(questions, self._failure("not asked"))
        self._threads = 0

    @property
    def is_begun(self) -> bool:
        """Whether a thread works on it."""
        return self._threads > 0

    def work(self) -> None:
        """Make calls until none waits, or until one took so long that it was given up."""
        answer: AnswerT | AgentError
        while (taken := self._take()) is not None:
            key, question = taken
            try:
                answer = question()
            except AgentError as error:
                answer = error
            except Exception as error:
                log.failure("question failed", error, about=self._about, key=key)
                words = f"{self._about}: {type(error).__name__}: {error}"
                answer = AgentError(Code.INTERNAL_ERROR, words, expected=False)
            if not self._put(key, answer):
                return

    def finish(self, add_thread: Callable[[], bool]) -> dict[str, AnswerT | AgentError]:
        """Keep threads at work until every call has an answer or was given up."""
        with self._changed:
            while self._waiting or self._begun_at:
                while self._threads < min(_SIDE_BY_SIDE, len(self._waiting)) and add_thread():
                    self._threads += 1
                if not self._threads:
                    self._answers |= dict.fromkeys(
                        (key for key, _ in self._waiting), self._failure("too many reads wait for an answer")
                    )
                    break
                self._changed.wait(
                    min(self._begun_at.values(), default=time.monotonic()) + self._timeout_s - time.monotonic()
                )
                self._give_up_late()
        return self._answers

    def _take(self) -> tuple[str, Callable[[], AnswerT]] | None:
        with self._changed:
            if not self._waiting:
                self._threads -= 1
                return None
            key, question = self._waiting.popleft()
            self._begun_at[key] = time.monotonic()
            return key, question

    def _put(self, key: str, answer: AnswerT | AgentError) -> bool:
        """Take an answer; return False where it comes too late."""
        with self._changed:
            if key not in self._begun_at:
                return False
            del self._begun_at[key]
            self._answers[key] = answer
            if not self._waiting and not self._begun_at:
                self._changed.notify_all()
            return True

    def _give_up_late(self) -> None:
        """Leave what has taken too long to its thread, which no longer counts."""
        late = time.monotonic() - self._timeout_s
        for key in [key for key, at in self._begun_at.items() if at <= late]:
            del self._begun_at[key]
            self._answers[key] = self._failure(f"no answer in {self._timeout_s:g} s")
            self._threads -= 1

    def _failure(self, words: str) -> AgentError:
        return AgentError(Code.LIBVIRT_UNAVAILABLE, f"{self._about}: {words}")
