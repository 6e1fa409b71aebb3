"""docs/plugin.md: the distributions that it shows are built, installed beside the agent, and do what they say."""

import ast
import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmagent.model.command import Command, Plugin
from kvmagent.model.facts import POLICY_NAMESPACE
from tests.fakes.agent import format_spec
from tests.lab.agent import AgentProcess, find_command, new_task_uuid
from tests.lab.domainxml import GuestSpec
from tests.lab.server import ManagementServer
from tests.test_floors import FOR_PLUGINS

DOCS = Path(__file__).parents[2] / "docs"
#: The example distributions with their modules.
EXAMPLES = {"give-all-cpus": "give_all_cpus", "return-balloon": "return_balloon"}
PATH, BALLOON_PATH = "/example/give-all-cpus", "/example/return-balloon"
POLICY = f"<policy xmlns='{POLICY_NAMESPACE}' hotplug='off' maxCpuNum='1'/>"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory into which the examples are installed as pip does it, from their sources and without the network."""
    directory = tmp_path_factory.mktemp("plugin")
    sources = [directory / name for name in EXAMPLES]
    for source in sources:
        source.mkdir()
        for name in ("pyproject.toml", f"{EXAMPLES[source.name]}.py"):
            (source / name).write_bytes((DOCS / source.name / name).read_bytes())
    install = (*("install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"), "--target", directory / "at")
    subprocess.run([sys.executable, "-m", "pip", *install, *sources], check=True, capture_output=True, text=True)
    return directory / "at"


@pytest.fixture(scope="module")
def agent(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    """The agent with the plugins, on libvirt's test driver. Half of vm3's memory is in its balloon."""
    node = tmp_path_factory.mktemp("node") / "node.xml"
    refused = format_spec(GuestSpec(name="vm2"), "test").replace("<devices>", f"<metadata>{POLICY}</metadata><devices>")
    ballooned = format_spec(GuestSpec(name="vm3", memory_mib=1024), "test").replace(
        "</memory>", "</memory><currentMemory unit='MiB'>512</currentMemory>"
    )
    node.write_text(f"<node>{format_spec(GuestSpec(name='vm1'), 'test')}{refused}{ballooned}</node>")
    with AgentProcess(
        uri=f"test://{node}",
        settings={"agent": {"plugins": "vm, host, give-all-cpus, return-balloon"}},
        command=["env", f"PYTHONPATH={installed}", *find_command()],
    ) as running:
        yield running


def test_the_command_is_carried_out_and_its_outcome_posted(agent: AgentProcess) -> None:
    with ManagementServer() as server:
        for expected in ("plugged", "unchanged"):
            task = new_task_uuid()
            body = {"vmUuid": "vm1", "leaveOut": 1}
            assert agent.post(PATH, body, task_uuid=task, callback_url=server.url).status == 200
            reply = server.wait(task, 20)
            assert (reply["success"], reply["outcome"], reply["cpuNum"]) == (True, expected, 3)
            assert reply["leftOut"] == 1
            # The test driver has no guest that could say more.
            assert reply["after"]["guestCpuNum"] is None


def test_the_balloon_s_memory_is_given_back_once(agent: AgentProcess) -> None:
    with ManagementServer() as server:
        for keep, outcome, held in ((256, "plugged", 256), (256, "unchanged", 256), (0, "plugged", 0)):
            task = new_task_uuid()
            body = {"vmUuid": "vm3", "keepSize": keep * 2**20}
            assert agent.post(BALLOON_PATH, body, task_uuid=task, callback_url=server.url).status == 200
            reply = server.wait(task, 20)
            assert (reply["success"], reply["outcome"], reply.get("errorCode")) == (True, outcome, None)
            assert reply["heldSize"] == held * 2**20
            assert reply["after"]["balloonSize"] == (1024 - held) * 2**20


def test_it_is_checked_described_and_refused_like_any_other(agent: AgentProcess) -> None:
    document = agent.get("/openapi.json").body
    assert document["paths"][PATH]["post"]["summary"].startswith("Give a VM all the vCPUs")
    assert document["components"]["schemas"]["GiveAllCpusRequest"]["properties"]["leaveOut"]["minimum"] == 0
    refused = agent.post(PATH, {"vmUuid": "vm1", "leaveOut": -1}, task_uuid=new_task_uuid(), callback_url=agent.url)
    assert (refused.status, refused.body["errorCode"]) == (400, "OUT_OF_RANGE")
    with ManagementServer() as server:
        task = new_task_uuid()
        agent.post(PATH, {"vmUuid": "vm1", "leaveOut": 9}, task_uuid=task, callback_url=server.url)
        reply = server.wait(task, 20)
        assert (reply["outcome"], reply["errorCode"], reply["remedy"]) == (
            "refused",
            "CPU_ABOVE_MAXIMUM",
            "Leave out fewer.",
        )


def test_the_owner_is_asked_although_the_plugin_does_not(agent: AgentProcess) -> None:
    with ManagementServer() as server:
        task = new_task_uuid()
        assert agent.post(PATH, {"vmUuid": "vm2"}, task_uuid=task, callback_url=server.url).status == 200
        reply = server.wait(task, 20)
    assert (reply["outcome"], reply["errorCode"]) == ("refused", "VM_OPTED_OUT")
    assert (reply["cpuNum"], reply["steps"]) == (1, [])


def test_a_dry_run_changes_nothing(agent: AgentProcess) -> None:
    with ManagementServer() as server:
        task = new_task_uuid()
        before = agent.get("/vms/vm1").body["after"]
        agent.post(PATH, {"vmUuid": "vm1", "dryRun": True}, task_uuid=task, callback_url=server.url)
        assert server.wait(task, 20)["outcome"] == "planned"
        assert agent.get("/vms/vm1").body["after"] == before


def test_kvmagentctl_offers_it(agent: AgentProcess, installed: Path) -> None:
    done = subprocess.run(
        [find_command()[0] + "ctl", "--url", agent.url, "give-all-cpus", "vm1", "--leave-out", "0"],
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3, done.stdout + done.stderr
    assert "plugged" in done.stdout


@pytest.mark.parametrize("name", EXAMPLES)
def test_its_own_tests_pass(installed: Path, name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", DOCS / name],
        env={**os.environ, "PYTHONPATH": str(installed)},
        cwd=installed,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\b[45] passed", done.stdout)


@pytest.mark.parametrize(("name", "module"), EXAMPLES.items())
def test_it_imports_what_the_model_offers_to_plugins(name: str, module: str) -> None:
    tree = ast.parse((DOCS / name / f"{module}.py").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports}
    assert names <= {f"kvmagent.model.{one}" for one in FOR_PLUGINS} | {"collections.abc", "typing", "msgspec"}


def test_the_document_names_everything_that_a_plugin_declares() -> None:
    text = (DOCS / "plugin.md").read_text()
    for declared in (Command, Plugin):
        for field in dataclasses.fields(declared):
            assert re.search(rf"`{field.name}\b", text), field.name


def test_its_types_are_right() -> None:
    files = [DOCS / name / f"{module}.py" for name, module in EXAMPLES.items()]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", *files],
        cwd=DOCS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
