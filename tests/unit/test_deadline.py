"""Questions that hang hold up nobody but themselves."""

import threading

from kvmagent.api.deadline import Asker
from kvmagent.model.errors import AgentError, Code


def fail(code: Code) -> int:
    raise AgentError(code, "words")


def test_every_question_of_many_has_its_own_answer_or_error_in_the_order_of_asking() -> None:
    questions = {str(n): (lambda n=n: n) if n % 10 else (lambda: fail(Code.VM_NOT_FOUND)) for n in range(100)}
    answers = Asker(at_once=12).ask_all(questions, timeout_s=30, about="counting")
    assert list(answers) == list(questions)
    for n in range(100):
        answer = answers[str(n)]
        assert answer.code is Code.VM_NOT_FOUND if isinstance(answer, AgentError) else answer == n


def test_questions_that_hang_are_told_as_such_and_the_others_are_answered() -> None:
    release = threading.Event()
    hangs = {f"hangs-{n}": release.wait for n in range(6)}
    others = {f"answers-{n}": lambda: True for n in range(20)}
    try:
        answers = Asker(at_once=12).ask_all({**hangs, **others}, timeout_s=0.1, about="asking")
        assert all(answers[name] is True for name in others)
        for name in hangs:
            answer = answers[name]
            assert isinstance(answer, AgentError)
            assert (answer.code, "no answer in 0.1 s" in answer.message) == (Code.LIBVIRT_UNAVAILABLE, True)
    finally:
        release.set()


def test_where_all_places_hang_what_is_left_is_told_and_not_waited_for() -> None:
    release = threading.Event()
    try:
        answers = Asker(at_once=2).ask_all({str(n): release.wait for n in range(5)}, timeout_s=0.1, about="asking")
        assert ["too many reads" in str(answers[str(n)]) for n in range(5)] == [False, False, True, True, True]
    finally:
        release.set()


def test_an_error_that_nothing_expected_is_of_its_question_alone() -> None:
    answers = Asker(at_once=2).ask_all({"a": lambda: 1 // 0, "b": lambda: 1}, timeout_s=5, about="dividing")
    failure = answers["a"]
    assert isinstance(failure, AgentError)
    assert (failure.code, failure.expected) == (Code.INTERNAL_ERROR, False)
    assert "ZeroDivisionError" in failure.message
    assert answers["b"] == 1


def test_the_places_are_free_again_afterwards() -> None:
    asker = Asker(at_once=1)
    for _ in range(3):
        assert asker.ask_all({"a": lambda: 1, "b": lambda: 2}, timeout_s=5, about="a") == {"a": 1, "b": 2}
    assert asker.ask(lambda: 3, timeout_s=5, about="b") == 3
