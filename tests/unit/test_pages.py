"""Lists by pages, fields and ETag, for lists, limits and callers of no choosing."""

import json
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmagent.api.resources import Resources
from kvmagent.api.server import Answer, Call, Route
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.roles import Access
from kvmagent.tasks.journal import Journal, Task
from kvmagent_plugins.vm_plugin import PLUGIN
from tests.lab.processes import wait_for

NOBODY: Any = None
DECLARED = [command for command in PLUGIN.commands if command.name == "ReadyForHotplug"]
MANY = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


class FakeNode:
    """VMs by UUID; those that may change while somebody reads the list do so at each look."""

    def __init__(
        self, names: Mapping[str, str], *, at_each_look: Callable[[dict[str, str]], None] | None = None
    ) -> None:
        self.names = dict(names)
        self.described = 0
        self._at_each_look = at_each_look or (lambda _names: None)

    def list_vms(self) -> list[str]:
        self._at_each_look(self.names)
        return list(self.names)

    def describe(self, vm: str) -> Any:
        self.described += 1
        if vm not in self.names:
            raise AgentError(Code.VM_NOT_FOUND, f"no VM {vm}")
        if self.names[vm] == "broken":
            raise AgentError(Code.LIBVIRT_UNAVAILABLE, "it hangs")
        return msgspec.Raw(json.dumps({"vmUuid": vm, "name": self.names[vm], "cpuNum": 1}).encode())


def make_routes(node: Any, journal: Any = NOBODY) -> Mapping[tuple[str, str], Route]:
    """The paths of an agent that has these VMs and tasks."""
    reads = Resources(
        node, journal, NOBODY, NOBODY, DECLARED, describe_vm=node and node.describe, find_stalls=dict, metrics=NOBODY
    )
    return reads.routes(cancel=NOBODY, plan=NOBODY)


def make_reads(node: Any, journal: Any = NOBODY) -> Callable[..., Answer]:
    """Return what reads a list of theirs."""
    routes = make_routes(node, journal)

    def get(path: str, access: Access = READER, tag: str = "", **query: Any) -> Answer:
        headers = {"if-none-match": tag} if tag else {}
        told = {name: str(value) for name, value in query.items()}
        return routes["GET", path].handler(Call(headers, told, (), b"", "127.0.0.1", access))

    return get


READER = Access("token:reader", frozenset({"read"}))


def walk(get: Callable[..., Answer], path: str, name: str, **query: Any) -> Iterator[list[Any]]:
    """All pages, to the last."""
    cursor: dict[str, Any] = {}
    while True:
        body = json.loads(get(path, **query, **cursor).body)
        yield body[name]
        if "next" not in body:
            return
        cursor = {"cursor": body["next"]}


names = st.sampled_from(["db-1", "db-2", "web-1", "broken"])
hosts = st.dictionaries(st.uuids().map(str), names, max_size=40)


@MANY
@given(vms=hosts, limit=st.integers(1, 12), may=st.sampled_from([(), ("db-*",), ("none",)]))
def test_pages_of_vms_are_the_whole_list_each_once_and_only_what_the_caller_may_see(
    vms: dict[str, str], limit: int, may: tuple[str, ...]
) -> None:
    access = Access("token:tenant", frozenset({"read"}), may)
    get = make_reads(FakeNode(vms))
    whole = json.loads(get("/vms", access).body)
    assert "next" not in whole
    shown = sorted(uuid for uuid, name in vms.items() if not may or (access.covers(uuid, name) and name != "broken"))
    assert [vm["vmUuid"] for vm in whole["vms"]] == shown
    pages = list(walk(get, "/vms", "vms", access=access, limit=limit))
    assert [vm for page in pages for vm in page] == whole["vms"]
    assert all(len(page) == limit for page in pages[:-1])


@MANY
@given(vms=hosts, more=hosts, limit=st.integers(1, 6), data=st.data())
def test_a_vm_that_is_there_all_the_time_is_told_once_whatever_comes_and_goes(
    vms: dict[str, str], more: dict[str, str], limit: int, data: Any
) -> None:
    others = iter(list(more.items()))
    going = data.draw(st.sets(st.sampled_from(sorted(vms)))) if vms else set()

    def change(names: dict[str, str]) -> None:
        names.update([one] if (one := next(others, None)) else [])
        if going:
            names.pop(going.pop(), None)

    stay = set(vms) - set(going) - set(more)
    pages = list(walk(make_reads(FakeNode(vms, at_each_look=change)), "/vms", "vms", limit=limit))
    told = [vm["vmUuid"] for page in pages for vm in page]
    assert len(told) == len(set(told))
    assert stay <= set(told)


@MANY
@given(vms=hosts, fields=st.sets(st.sampled_from(["name", "cpuNum", "vmUuid"]), min_size=1))
def test_chosen_fields_are_told_with_the_id_and_an_unreadable_vm_whole(vms: dict[str, str], fields: set[str]) -> None:
    answer = make_reads(FakeNode(vms))("/vms", fields=",".join(sorted(fields)))
    assert "fields" in answer.headers["Content-Type"]
    for vm in json.loads(answer.body)["vms"]:
        unreadable = vms[vm["vmUuid"]] == "broken"
        assert vm["errorCode"] == "LIBVIRT_UNAVAILABLE" if unreadable else set(vm) <= fields | {"vmUuid"}
        assert unreadable or vm.get("name", vms[vm["vmUuid"]]) == vms[vm["vmUuid"]]


@MANY
@given(vms=hosts, name=names)
def test_an_unchanged_list_has_no_body_and_a_changed_one_has(vms: dict[str, str], name: str) -> None:
    node = FakeNode(vms)
    get = make_reads(node)
    tag = get("/vms").headers["ETag"]
    for asked in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        again = get("/vms", tag=asked)
        assert (again.status, again.body, again.headers["ETag"]) == (304, b"", tag)
    assert get("/vms", tag='"other"').status == 200
    node.names[str(uuid.uuid4())] = name
    assert get("/vms", tag=tag).status == 200


def test_a_page_asks_no_more_vms_than_it_tells() -> None:
    node = FakeNode({str(uuid.uuid4()): "db-1" for _ in range(1000)})
    assert len(json.loads(make_reads(node)("/vms", limit=20).body)["vms"]) == 20
    assert node.described == 20


# In a process of its own, whose memory nothing else takes and gives back. As much as lists of VMs really have.
READ_A_THOUSAND = """
import ctypes
import http.client
import time
from contextlib import closing
from pathlib import Path
from kvmagent.api.security import Security
from kvmagent.api.server import Server
from kvmagent.cli.daemon import _share_memory
from kvmagent.settings import HttpSection, SecuritySection
from tests.lab.agent import find_free_port
from tests.unit.test_pages import *

_share_memory()
node = FakeNode({str(uuid.UUID(int=n)): "db-" + "x" * 4000 for n in range(1000)})
everybody = SecuritySection(allow_unauthenticated=True, allowed_clients=("127.0.0.0/8",))
port = find_free_port()
server = Server(HttpSection(socket="", port=port), Security(everybody), make_routes(node))
server.bind()
server.start()

def read():
    with closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
        connection.request("GET", "/vms")
        assert len(connection.getresponse().read()) > 4_000_000

def resident():
    return int(Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0])

read()
ctypes.CDLL(None).malloc_trim(0)
before = resident()
for _ in range(3):
    read()
# The thread that wrote the last answer may still be about to let go of it.
for _ in range(600):
    server.look_after()
    if (left := resident() - before) < 1024:
        break
    time.sleep(0.1)
print(left)
server.stop()
"""


def test_a_list_of_a_thousand_vms_leaves_no_megabyte_behind() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", READ_A_THOUSAND], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 1024


def make_task(number: int, caller: str) -> Task:
    return Task(
        task_uuid=f"t{number}", command="C", lane="vm1", request=b"{}", callback_url="none", client="::1", caller=caller
    )


@contextmanager
def journal_in(directory: Path) -> Iterator[Journal]:
    journal = Journal(directory / "journal.sqlite", on_accepted=lambda _task: None, on_left=lambda _left: None)
    journal.start()
    try:
        yield journal
    finally:
        journal.stop()


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Journal]:
    with journal_in(tmp_path_factory.mktemp("journal")) as running:
        for number in range(30):
            running.accept(make_task(number, caller="token:own" if number % 3 else "token:reader"))
        yield running


@MANY
@given(limit=st.integers(1, 12), caller=st.sampled_from(["token:own", "token:reader"]))
def test_pages_of_tasks_are_the_whole_list_each_once_whatever_is_accepted_meanwhile(
    journal: Journal, limit: int, caller: str
) -> None:
    get = make_reads(None, journal)
    access = READER if caller == READER.caller else Access(caller, frozenset({"plug"}))
    before = json.loads(get("/tasks", access, limit=1000).body)["tasks"]
    assert [task["taskUuid"] for task in before[-3:]] == (
        ["t2", "t1", "t0"] if access is READER else ["t4", "t2", "t1"]
    )
    told: list[Any] = []
    for number, page in enumerate(walk(get, "/tasks", "tasks", access=access, limit=limit)):
        told += page
        if number < 3:
            journal.accept(make_task(uuid.uuid4().int, caller))
    assert told == before


def test_a_task_is_told_with_the_fields_that_were_asked_for(journal: Journal) -> None:
    get = make_reads(None, journal)
    tasks = json.loads(get("/tasks", fields="state,command", limit=3).body)["tasks"]
    assert [set(task) for task in tasks] == [{"taskUuid", "state", "command"}] * 3


def test_tasks_that_are_as_they_were_have_no_body(journal: Journal) -> None:
    get = make_reads(None, journal)
    tag = get("/tasks").headers["ETag"]
    assert get("/tasks", tag=tag).status == 304
    journal.start_task("t0")  # which does not wait for the disk
    wait_for(lambda: get("/tasks", limit=1000, tag=tag).status == 200, timeout_s=60, what="the change to be told")
    tag = get("/tasks").headers["ETag"]
    journal.accept(make_task(uuid.uuid4().int, "token:own"))
    assert get("/tasks", tag=tag).status == 200


@pytest.mark.parametrize(
    "query",
    [
        {"limit": "0"},
        {"limit": "1001"},
        {"limit": "9" * 5000},
        {"limit": "²"},
        {"limit": ""},
        {"cursor": ""},
        {"cursor": "next"},
        {"cursor": "9" * 40},
        {"fields": ""},
        {"fields": "name,"},
        {"fields": "name,nothing"},
        {"fields": "name cpuNum"},
    ],
    ids=str,
)
@pytest.mark.parametrize("path", ["/vms", "/tasks"])
def test_a_query_that_is_none_is_refused(path: str, query: dict[str, str]) -> None:
    with pytest.raises(AgentError) as caught:
        make_reads(FakeNode({}))(path, **query)
    assert caught.value.code is Code.BAD_QUERY
