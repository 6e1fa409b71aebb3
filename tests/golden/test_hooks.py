"""Whatever a command would change, a hook that refuses keeps it from all of it."""

import json
from pathlib import Path

import pytest

from kvmagent.tasks.hooks import Hooks
from tests.fakes.agent import FakeAgent
from tests.fakes.hooks import HookDirectory
from tests.golden.test_plans import CASES, PLANS, make_case, xml_of

CHANGING = [name for name in CASES if json.loads((PLANS / f"{name}.json").read_text())["goal"] is not None]


@pytest.mark.parametrize("name", CHANGING)
def test_a_hook_that_refuses_keeps_each_plan_from_being_begun(name: str, tmp_path: Path) -> None:
    case, domain = CASES[name], make_case(name)
    hooks = HookDirectory(tmp_path)
    hooks.write("before.d/10-no", "echo no; exit 1")
    before = xml_of(domain)
    agent = FakeAgent(tmp_path, domain, hooks=Hooks(str(hooks.path)), **case.host)
    done = agent.run(case.command, vmUuid="vm1", **case.request)
    agent.stop()
    told = {key: done.reply[key] for key in ("success", "outcome", "errorCode", "steps")}
    assert told == {
        "success": False,
        "outcome": "refused",
        "errorCode": "REFUSED_BY_HOOK",
        "steps": [],
    }
    assert done.reply["error"].startswith("before.d/10-no: no")
    assert (done.goal, domain.calls, xml_of(domain)) == (None, [], before)
