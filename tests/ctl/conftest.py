"""kvmagentctl as an operator has it: the console script, an agent, and libvirt's test driver behind that."""

from collections.abc import Iterator

import pytest

from tests.ctl.ctl import Ctl
from tests.fakes.agent import write_node
from tests.lab.agent import AgentProcess
from tests.lab.domainxml import GuestSpec


@pytest.fixture(scope="session")
def node_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """libvirt's test driver with two VMs of ours, one of which can be given nothing."""
    specs = (GuestSpec(name="db-7"), GuestSpec(name="old", max_memory_mib=None, agent_channel=False))
    return write_node(tmp_path_factory.mktemp("node"), *specs, has_uuids=True)


@pytest.fixture(scope="module")
def agent(node_uri: str) -> Iterator[AgentProcess]:
    """An agent on it."""
    with AgentProcess(uri=node_uri) as running:
        yield running


@pytest.fixture(scope="module")
def ctl(agent: AgentProcess) -> Ctl:
    """kvmagentctl, told by its environment where that agent is."""
    return Ctl({"KVMAGENT_URL": agent.url})
