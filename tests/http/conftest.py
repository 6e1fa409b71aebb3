from collections.abc import Iterator

import pytest

from tests.fakes.agent import write_node
from tests.lab.agent import AgentProcess
from tests.lab.domainxml import GuestSpec


@pytest.fixture(scope="module")
def node_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """libvirt's test driver with two VMs of ours."""
    return write_node(tmp_path_factory.mktemp("node"), *(GuestSpec(name=name) for name in ("vm1", "vm2")))


@pytest.fixture(scope="module")
def agent(node_uri: str) -> Iterator[AgentProcess]:
    """An agent on it."""
    settings = {"http": {"max_body_bytes": "4096"}}
    with AgentProcess(uri=node_uri, settings=settings) as running:
        yield running
