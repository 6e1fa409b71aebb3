"""Makes a task's reply: the judge's fields, then those that the command adds.

Whatever a plugin raises meanwhile, there is a reply.
"""

from dataclasses import replace
from typing import Any

import msgspec

from kvmagent.logs import Log
from kvmagent.model.command import Command, Ending
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.host import Query
from kvmagent.model.judge import judge, reply_fields
from kvmagent.model.reply import Judgement, Numbers, Outcome, VmReply
from kvmagent.tasks.journal import Task
from kvmagent.tasks.plugincalls import call

log = Log(__name__)

_JUDGED = frozenset(VmReply.__struct_fields__)
# Made once: msgspec evaluates all annotations for it.
_NUMBERS = msgspec.structs.fields(Numbers)
# Of a VM's numbers a log line always has the first, and never those that follow from others or are not the agent's.
_ALWAYS_TOLD = ("cpu_num", "memory_size")
_NEVER_TOLD = ("guest_cpu_num", "guest_memory_size", "free_slots")


def make_error(error: BaseException) -> AgentError:
    """Return the error that a reply has for an exception; an unforeseen one is the agent's own fault."""
    if isinstance(error, AgentError):
        return error
    failure = AgentError(Code.INTERNAL_ERROR, f"{type(error).__name__}: {error}", expected=False)
    failure.__cause__ = error
    return failure


def make_reply(command: Command, ending: Ending) -> tuple[bytes, Judgement]:
    """Return the reply as JSON, and what it was judged to be.

    A command whose reply_fields fails still gets a reply: its own fields are missing then, and where a step
    was performed the task is partial.
    """
    judgement = judge(ending)
    try:
        return _encode(command, ending, judgement, own=True), judgement
    except Exception as error:
        failure = make_error(error)
        log.failure("the command's own fields failed", failure, error_code=failure.code)
        performed = any(report.problem is None for report in ending.reports)
        judgement = judge(replace(ending, error=ending.error or failure))
        outcome = "partial" if performed else judgement.outcome
        judgement = replace(judgement, outcome=outcome, error=judgement.error or failure)
        return _encode(command, ending, judgement, own=False), judgement


def encode_answer(query: Query, answer: object) -> bytes:
    """Return the answer to a host query as JSON.

    Raises:
        Exception: the plugin returned something else than it declares.
    """
    if not isinstance(answer, query.reply):
        raise TypeError(f"{query.name} answers a {type(answer).__name__} instead of {query.reply.__name__}")
    return msgspec.json.encode(answer)


def make_failed_answer(query: Query, error: AgentError) -> bytes:
    """Return the answer as JSON to a host query that ended in an error: the query's own, or a bare one."""
    try:
        return encode_answer(query, call(query.fail, f"{error.message}. {error.remedy}"))
    except Exception as raised:
        log.failure("the query's own error reply failed", make_error(raised), command=query.name)
        return msgspec.json.encode(_bare_fields(error, "refused"))


def bare_reply(task: Task, error: AgentError) -> tuple[bytes, Outcome, AgentError]:
    """Return a reply for a task whose command can make none."""
    outcome: Outcome = "refused" if task.goal is None else "partial"
    fields = _bare_fields(error, outcome) | ({"recovered": True} if task.recovered else {})
    return msgspec.json.encode(fields), outcome, error


def _bare_fields(error: AgentError, outcome: Outcome) -> dict[str, Any]:
    return {
        "success": False,
        "error": error.message,
        "errorCode": error.code,
        "remedy": error.remedy,
        "outcome": outcome,
    }


def tell_totals(judgement: Judgement) -> dict[str, int]:
    """Return what a log line shows of a VM's numbers: its vCPUs and memory, and what else has changed."""
    told = dict[str, int]()
    for field in _NUMBERS:
        before, after = getattr(judgement.before, field.name), getattr(judgement.after, field.name)
        if field.name in _ALWAYS_TOLD or (before != after and field.name not in _NEVER_TOLD):
            told |= {f"{field.encode_name}Before": before, f"{field.encode_name}After": after}
    return {name: amount for name, amount in told.items() if amount is not None}


def _encode(command: Command, ending: Ending, judgement: Judgement, *, own: bool) -> bytes:
    fields = reply_fields(ending, judgement)
    if own:
        added = dict(call(command.reply_fields, replace(ending, error=judgement.error, judgement=judgement)))
        fields["warnings"] += call(list, added.pop("warnings", []))
        if taken := sorted(_JUDGED & added.keys()):
            raise TypeError(f"reply_fields of {command.name} sets {', '.join(taken)}, which only the judge may set")
        fields |= added
    if command.remedies_in_error is not None and (error := judgement.error) is not None:
        remedy = command.remedies_in_error.get(error.code, error.remedy)
        fields["error"] = f"{error.message}. {remedy}" if remedy else error.message
    return msgspec.json.encode(command.reply(**fields))
