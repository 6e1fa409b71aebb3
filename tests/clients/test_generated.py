"""Clients that common generators make of the running agent's document: each is type-checked, and plugs vCPUs.

`openapi-python-client` and `openapi-typescript`, as many take them for their own clients. The sizes of what they make
are told in docs/api.md.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.agent import write_node
from tests.lab.agent import AgentProcess, new_task_uuid
from tests.lab.domainxml import GuestSpec
from tests.lab.nodepackages import CLIENTS, NODE, find_node, find_node_packages

API_PAGE = Path(__file__).parents[2] / "docs/api.md"
BIN = Path(sys.executable).parent
# One cast too many is the generator's, in what it makes of a list of anything.
MYPY = ("mypy", "--strict", "--no-warn-redundant-casts")


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    specs = (GuestSpec(name=name) for name in ("python", "typescript"))
    with AgentProcess(uri=write_node(tmp_path_factory.mktemp("node"), *specs)) as running:
        yield running


@pytest.fixture(scope="module")
def document(agent: AgentProcess, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the agent tells of itself, in a file."""
    file = tmp_path_factory.mktemp("document") / "openapi.json"
    file.write_text(json.dumps(agent.get("/openapi.json").body))
    return file


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """What a program says; it succeeds."""
    env = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "NO_COLOR": "1", **environment}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def check_size(generator: str, files: Iterable[Path]) -> None:
    """Hold the number of lines that docs/api.md tells to what there is, within a quarter."""
    told = re.search(rf"`{generator}`[^|]*\|[^|]*?\b(\d+) lines", API_PAGE.read_text())
    assert told is not None, generator
    lines = sum(len(file.read_text().splitlines()) for file in files)
    assert 0.75 < lines / int(told.group(1)) < 1.25, f"{generator}: {lines} lines, docs/api.md says {told.group(1)}"


def check_plug(agent: AgentProcess, vm: str, said: str) -> None:
    told: Any = json.loads(said)
    assert told == {"outcome": "plugged", "cpuNum": 3, "refused": "OUT_OF_RANGE"}
    assert agent.get(f"/vms/{vm}").body["cpuNum"] == 3


def test_a_generated_python_client_is_typed_and_plugs(agent: AgentProcess, document: Path, tmp_path: Path) -> None:
    client = tmp_path / "client"
    command = (BIN / "openapi-python-client", "generate", "--path", document, "--output-path", client)
    said = run(*command, "--fail-on-warning", cwd=tmp_path)
    # It leaves out what it cannot read, and says so.
    assert "Unable" not in said, said
    shutil.copy(CLIENTS / "plug.py", client)
    run(sys.executable, "-m", *MYPY, "kvmagent_client", "plug.py", cwd=client)
    arguments = ("plug.py", agent.url, "python", "3", new_task_uuid())
    check_plug(agent, "python", run(sys.executable, *arguments, cwd=client))
    check_size("openapi-python-client", client.rglob("*.py"))


@pytest.mark.skipif(find_node() is None, reason=f"no node {NODE} or newer here")
def test_a_generated_typescript_client_is_typed_and_plugs(agent: AgentProcess, document: Path, tmp_path: Path) -> None:
    packages = find_node_packages()
    for name in ("plug.ts", "tsconfig.json", "package.json"):
        shutil.copy(CLIENTS / name, tmp_path)
    (tmp_path / "node_modules").symlink_to(packages)
    types = tmp_path / "agent.ts"
    generator = packages / "openapi-typescript/bin/cli.js"
    # Else a field with a default is one that a request must have.
    run("node", generator, document, "--default-non-nullable=false", "--output", types, cwd=tmp_path)
    run("node", packages / "typescript/bin/tsc", "--project", tmp_path, cwd=tmp_path)
    check_plug(agent, "typescript", run("node", "plug.js", agent.url, "typescript", "3", new_task_uuid(), cwd=tmp_path))
    check_size("openapi-typescript", [types])
