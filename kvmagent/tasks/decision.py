"""The decision of a command: a plugin's own, the VM's owner asked, and the host's memory looked at.

Whoever asks before a task does, asks this.
"""

import msgspec

from kvmagent.model.command import Command, Goal, VmRequest
from kvmagent.model.facts import Facts
from kvmagent.model.hostbudget import refuse_growth
from kvmagent.model.ownerpolicy import check_owner_policy
from kvmagent.model.steps import AnyStep


def decide(command: Command, request: VmRequest, facts: Facts, task_uuid: str) -> tuple[Goal, tuple[AnyStep, ...]]:
    """Return the goal of a request, for this VM in this run of it, and the first steps towards it.

    Raises:
        AgentError: what the command, the owner or the host's memory refuses.
    """
    # No plugin has to remember which VM and which run it was.
    goal = msgspec.structs.replace(command.decide(request, facts, task_uuid), vm=facts.domain.uuid, run=facts.run)
    steps = command.next_steps(goal, facts, frozenset())
    if steps or goal.totals:
        check_owner_policy(facts, request.affect, goal, steps)
        refuse_growth(goal.totals, facts)
    return goal, steps
