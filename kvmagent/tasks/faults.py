"""Named points of a task at which the tests crash the agent.

The agent calls `fault(name)` at each; as shipped that does nothing. A test hands in a function that ends the process
there, so that "killed between these two writes" is a test and not a hope.

    journal.NAME:written     the change NAME is made, not committed
    journal.NAME:committed   it is on disk, nobody has been notified
    step:begun, step:done    on either side of each step's effect
    callback:taken           the receiver has answered, nothing about it is written
"""

from collections.abc import Callable

Fault = Callable[[str], None]


def no_fault(name: str) -> None:
    """Go on."""
