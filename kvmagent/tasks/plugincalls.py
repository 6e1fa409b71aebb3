"""Calls a plugin's functions: whatever they raise is a refusal or the plugin's fault, and never controls the agent."""

from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar, cast

from kvmagent.model.errors import AgentError, Code

# The agent itself raises these: a task is left, or continues later.
_AGENTS_OWN = (Code.CANCELLED, Code.JOURNAL_UNAVAILABLE, Code.LIBVIRT_UNAVAILABLE, Code.STOPPING)

P = ParamSpec("P")
T = TypeVar("T")


def call(function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """Call a function of a plugin's. Of a generator the items are returned: it is the plugin's code that makes them.

    Raises:
        AgentError: its refusal; INTERNAL_ERROR where it says what only the agent can know, or would end the thread.
        Exception: its fault.
    """
    try:
        made = function(*arguments, **named)
        return cast("T", tuple(made)) if isinstance(made, Iterator) else made
    except AgentError as error:
        if error.code not in _AGENTS_OWN:
            raise
        message = f"a plugin raised {error.code}: {error.message}"
        raise AgentError(Code.INTERNAL_ERROR, message, expected=False) from error
    except Exception:
        raise
    except BaseException as error:
        raise AgentError(Code.INTERNAL_ERROR, f"{type(error).__name__}: {error}", expected=False) from error
