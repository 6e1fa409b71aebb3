"""POST /vm/hotplug/plan: a request that changes nothing, answered at once and without a task."""

from kvmagent.api.deadline import Asker
from kvmagent.api.intake import check_content_type
from kvmagent.api.server import Answer, Call
from kvmagent.api.wire import decode_request, encode
from kvmagent.model.plans import PlanRequest
from kvmagent.tasks.planner import Planner

PATH = "/vm/hotplug/plan"
# How long libvirt and the guest may take. So many plans at once leave the server threads for commands and reads.
_WAIT_S, _AT_ONCE = 20.0, 3


class Planning:
    """Thread-safe."""

    def __init__(self, planner: Planner) -> None:
        self._planner = planner
        self._asker = Asker(at_once=_AT_ONCE)

    def answer(self, call: Call) -> Answer:
        """Answer one request.

        Raises:
            AgentError: everything that refuses it.
        """
        check_content_type(call.headers.get("content-type", "application/json"))
        request = decode_request(call.body, PlanRequest)
        call.access.check("read", vm=request.vm_uuid)
        reply = self._asker.ask(
            lambda: self._planner.plan(request), timeout_s=_WAIT_S, about=f"planning VM {request.vm_uuid}"
        )
        return Answer(encode(reply))
