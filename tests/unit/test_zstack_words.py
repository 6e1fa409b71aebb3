"""What is said on ZStack's own paths is for who has ZStack's console, whatever the code."""

import json
import re

import pytest

from kvmagent.model.command import Command, Ending
from kvmagent.model.errors import CODES, AgentError, Code
from kvmagent.tasks.replies import make_reply
from kvmagent_plugins.vm.zstack import CHANGE_CPU_MEMORY, INCREASE_CPU, INCREASE_MEMORY

# What only somebody with a shell on the host, or a client of kvmagent's own API, can do.
NOT_FOR_ITS_USER = re.compile(
    r"persistent|XML|</?[a-z]|virsh|\baffect\b|\bmethod\b|\bstrict\b|prepare|ReadyForHotplug|vmUuid|\bdimms?\b|systemctl"
)
# Told at once by the answer's status, to the server and not to its user; or a matter of the host's own setup, which
# ZStack's console has no word for.
TOLD_BY_CALLBACK = (Code.MISSING_FIELD, Code.TASK_UNREADABLE)
BEFORE_A_TASK = {code for code, info in CODES.items() if info.status != 200 and code not in TOLD_BY_CALLBACK}


def told(code: Code) -> str:
    error = AgentError(code, "what was found")
    request = INCREASE_CPU.request(vm_uuid="f" * 32, cpu_num=2)  # type: ignore[call-arg]
    ending = Ending(request=request, goal=None, before=None, after=None, reports=(), error=error)
    reply, _judgement = make_reply(INCREASE_CPU, ending)
    return str(json.loads(reply)["error"])


@pytest.mark.parametrize("code", sorted(set(CODES) - BEFORE_A_TASK))
def test_a_remedy_is_one_of_zstack_s_console(code: Code) -> None:
    words = told(code)
    assert words.startswith("what was found. ")
    assert words.endswith(".")
    assert not NOT_FOR_ITS_USER.search(words), words


@pytest.mark.parametrize("command", [INCREASE_CPU, INCREASE_MEMORY, CHANGE_CPU_MEMORY], ids=lambda one: one.name)
def test_every_refusal_of_its_paths_is_in_its_words(command: Command) -> None:
    for code in command.refusals:
        assert not NOT_FOR_ITS_USER.search(told(code)), code


@pytest.mark.parametrize(
    "code", [Code.CPU_ABOVE_MAXIMUM, Code.MEMORY_ABOVE_MAXIMUM, Code.SLOTS_EXHAUSTED, Code.NO_ACPI]
)
def test_a_limit_of_the_vm_s_start_says_stop_and_start(code: str) -> None:
    assert re.search("[Ss]top the VM and start it again", told(Code(code)))
