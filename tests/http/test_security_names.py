"""Text from outside: names, markup and secrets change nothing and go nowhere."""

import time
from collections.abc import Iterator
from pathlib import Path
from xml.sax.saxutils import escape

import pytest
from lxml import etree

from kvmagent.hypervisor.domainxml import format_dimm, parse_definition
from tests.fakes.agent import format_spec
from tests.lab.agent import AgentProcess, new_task_uuid
from tests.lab.domainxml import GuestSpec
from tests.lab.server import ManagementServer

CPU = "/vm/hotplug/cpu"
SECRET = "s3cr3t-vnc"
ODD = "odd \"name\" '<&>' $(touch odd); `id` | x=1 --help %s {0} é"
NASTY = [
    "<name>vm1</name>",
    "vm1' or '1'='1",
    'vm1"/><x y="',
    "vm1; touch /tmp/x",
    "$(touch /tmp/x)",
    "`touch /tmp/x`",
    "vm1 outcome=online",
    "vm1\nINFO audit event=accepted",
    "vm1\r\nSet-Cookie: a",
    "vm1\u2028INFO audit",
    "vm1\x00",
    "../vm1",
    "%00%0a",
    "&xxe;",
    "]]>",
    "\ud800",
    "-1",
    "' ; DROP TABLE tasks; --",
    "\u202evm1",
]


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    """An agent on VMs with a password, and one with a name that no shell and no XML would like."""
    graphics = f"<graphics type='vnc' port='5900' passwd='{SECRET}'/></devices>"
    plain = format_spec(GuestSpec(name="vm1"), "test").replace("</devices>", graphics)
    odd = format_spec(GuestSpec(name="vm2"), "test").replace("<name>vm2</name>", f"<name>{escape(ODD)}</name>")
    assert escape(ODD) in odd
    assert SECRET in plain
    file = tmp_path_factory.mktemp("node") / "node.xml"
    file.write_text(f"<node>{plain}{odd}</node>")
    with AgentProcess(uri=f"test://{file}", settings={"log": {"level": "debug"}}) as running:
        yield running


def numbers(agent: AgentProcess) -> list[object]:
    return [(vm["cpuNum"], vm["memorySize"]) for vm in agent.get("/vms").body["vms"]]


@pytest.mark.parametrize("name", NASTY, ids=ascii)
def test_a_name_with_markup_or_commands_changes_nothing(
    agent: AgentProcess, server: ManagementServer, name: str
) -> None:
    before, task = numbers(agent), new_task_uuid()
    reply = agent.post(CPU, {"vmUuid": name, "cpuNum": 4}, task_uuid=task, callback_url=server.url)
    if reply.status == 200:
        assert server.wait(task, 20)["errorCode"] == "VM_NOT_FOUND"
    else:
        assert (reply.status, reply.body["errorCode"]) in ((400, "OUT_OF_RANGE"), (400, "BAD_JSON"))
    assert numbers(agent) == before
    stamps = [line[:4] for line in agent.log().splitlines()]
    assert set(stamps) == {str(time.gmtime().tm_year)}, "a line of the log was forged"


def test_a_vm_with_an_odd_name_is_found_by_it_and_no_other_is_touched(
    agent: AgentProcess, server: ManagementServer
) -> None:
    task = new_task_uuid()
    agent.post(CPU, {"vmUuid": ODD, "cpuNum": 3}, task_uuid=task, callback_url=server.url)
    reply = server.wait(task, 20)
    assert (reply["vmUuid"], reply["cpuNum"]) == (ODD, 3)
    assert agent.get("/vms/vm1").body["cpuNum"] != 3


def test_a_vm_s_secrets_are_in_no_reply_no_journal_and_no_log(agent: AgentProcess, server: ManagementServer) -> None:
    task = new_task_uuid()
    agent.post(CPU, {"vmUuid": "vm1", "cpuNum": 2}, task_uuid=task, callback_url=f"{server.url}?key={SECRET}-url")
    server.wait(task, 20)
    said = str([agent.get(path).body for path in ("/vms", "/vms/vm1", "/tasks?vm=vm2", "/openapi.json", "/healthz")])
    said += str(server.callbacks(task)[0].body) + str(agent.get(f"/tasks/{task}").body["reply"]) + agent.log()
    assert SECRET not in said
    stored = b"".join(file.read_bytes() for file in (agent.directory / "state").iterdir())
    assert f"{SECRET}-url".encode() in stored, "the URL is needed to deliver"
    assert stored.count(SECRET.encode()) == stored.count(f"{SECRET}-url".encode())


def test_entities_are_not_expanded_and_nothing_is_fetched(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("1048576")
    xml = format_spec(GuestSpec(name="vm1"), "test")
    start = xml.index("<domain")
    for declared in (
        f'<!ENTITY x SYSTEM "file://{tmp_path}/secret">',
        '<!ENTITY x SYSTEM "http://127.0.0.1:1/x">',
        '<!ENTITY x "1"><!ENTITY y "&x;&x;&x;">',
    ):
        hostile = f"<!DOCTYPE domain [{declared}]>{xml[start:]}".replace("<memory unit", "<memory a='1' unit", 1)
        hostile = hostile[: hostile.index("</memory>")] + "&x;" + hostile[hostile.index("</memory>") :]
        assert parse_definition(hostile).total_bytes == parse_definition(xml).total_bytes


def test_a_bomb_of_entities_is_refused_at_once() -> None:
    entities = "".join(f'<!ENTITY e{n + 1} "{f"&e{n};" * 20}">' for n in range(12))
    bomb = f'<!DOCTYPE domain [<!ENTITY e0 "x">{entities}]><domain><name>&e12;</name></domain>'
    started = time.monotonic()
    with pytest.raises((ValueError, etree.XMLSyntaxError)):
        parse_definition(bomb)
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("alias", ["ua-kvmagent-1", *(name for name in NASTY if name.isprintable())], ids=ascii)
def test_xml_that_is_built_says_what_was_meant_and_no_more(alias: str) -> None:
    device = etree.fromstring(format_dimm(alias=alias, size_bytes=2**27, node=0))
    assert [(element.tag, dict(element.attrib)) for element in device.iter()] == [
        ("memory", {"model": "dimm"}),
        ("target", {}),
        ("size", {"unit": "KiB"}),
        ("node", {}),
        ("alias", {"name": alias}),
    ]
