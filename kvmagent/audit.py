"""The audit trail: one line for each command that was accepted, refused or finished, whatever log level is set.

    audit event=accepted caller=token:zstack client=10.0.0.5 what=HotPlugCpu vm=db-7 task=9f1c outcome=accepted ...

`caller` is who they proved to be, `client` the address that they came from; what is not known is left out,
and a value that could be mistaken for two fields is quoted as JSON is.
"""

from typing import Literal

from kvmagent.logs import Log

log = Log(__name__, always=True)


def audit(
    event: Literal["accepted", "refused", "finished"],
    *,
    caller: str,
    client: str,
    what: str,
    vm: str = "",
    task: str = "",
    outcome: str,
    error: str = "",
) -> None:
    """Write one line. `what` is the command's name, or what was tried; `outcome` a word, for a refusal its code.

    `error` is what a refusal says in words.
    """
    known = {"caller": caller, "client": client, "what": what, "vm": vm, "task": task}
    known |= {"outcome": outcome, "error": error}
    log.info("audit", event=event, **{name: value for name, value in known.items() if value})
