"""Questions that may hang, asked so that whoever asks does not."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import copy_context
from typing import TypeVar

from kvmagent.model.errors import AgentError, Code

AnswerT = TypeVar("AnswerT")

# How long a question waits for a thread when all are taken.
_SLOT_WAIT_S = 0.5


class Asker:
    """Asks on a thread of its own and waits no longer than told. Thread-safe.

    libvirt has no call that can be broken off: a thread that hangs is left to itself and occupies one of `at_once`
    places until its call returns.
    """

    def __init__(self, *, at_once: int) -> None:
        self._places = threading.BoundedSemaphore(at_once)

    def ask(self, question: Callable[[], AnswerT], *, timeout_s: float, about: str) -> AnswerT:
        """Return the answer, or raise what the question raises.

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
