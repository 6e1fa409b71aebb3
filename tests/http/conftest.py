from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.agent import format_spec
from tests.lab.agent import AgentProcess
from tests.lab.domainxml import GuestSpec
from tests.lab.server import ManagementServer


@pytest.fixture(scope="module")
def server() -> Iterator[ManagementServer]:
    """The management server that takes the callbacks."""
    with ManagementServer() as running:
        yield running


@pytest.fixture(scope="module")
def node_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """libvirt's test driver with two VMs of ours."""
    domains = "".join(format_spec(GuestSpec(name=name), "test") for name in ("vm1", "vm2"))
    file: Path = tmp_path_factory.mktemp("node") / "node.xml"
    file.write_text(f"<node>{domains}</node>")
    return f"test://{file}"


@pytest.fixture(scope="module")
def agent(node_uri: str) -> Iterator[AgentProcess]:
    """An agent on it."""
    settings = {"http": {"max_body_bytes": "4096"}}
    with AgentProcess(uri=node_uri, settings=settings) as running:
        yield running
