"""A guest fell silent where its agent spoke before in this run of the VM, and does not now; without one, never."""

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmagent.hypervisor.silentguests import SilentGuests
from kvmagent.model.errors import Code
from kvmagent.model.facts import Facts, Guest, GuestBlock, GuestOs, GuestVcpu
from tests.fakes.agent import make_domain, make_node
from tests.lab.domainxml import GuestSpec

SPEC = GuestSpec(name="vm1", vcpus=1, max_vcpus=4)
BOTH = frozenset({"cpus", "memory"})
SILENCES = (Code.GUEST_AGENT_DISCONNECTED, Code.GUEST_AGENT_UNRESPONSIVE)
NEITHER = (Code.GUEST_AGENT_ABSENT, Code.VM_PAUSED, Code.VM_SUSPENDED)
ANSWERS = {
    "vcpus": Guest(vcpus=(GuestVcpu(0, True, False),)),
    "blocks": Guest(blocks=(GuestBlock(0, True, False),)),
    "memory": Guest(mem_total_bytes=1 << 30),
    "system": Guest(os=GuestOs("Debian")),
    "refused": Guest(refused={"guest-get-vcpus": "Command guest-get-vcpus has been disabled"}),
    "frozen": Guest(silence=Code.GUEST_AGENT_FROZEN),
}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    return make_node(tmp_path_factory.mktemp("host"), make_domain(SPEC)).observe("vm1", frozenset())


def look(facts: Facts, guest: Guest, *, run: int | None = 7) -> Facts:
    """The VM with this guest, in the run of this libvirt id; None: off."""
    assert facts.domain.live is not None
    live = None if run is None else msgspec.structs.replace(facts.domain.live, domain_id=run)
    domain = msgspec.structs.replace(facts.domain, live=live)
    return msgspec.structs.replace(facts, domain=domain, guest=guest)


@pytest.mark.parametrize("silence", SILENCES)
@pytest.mark.parametrize("answer", ANSWERS)
def test_a_guest_falls_silent_only_after_it_spoke_and_until_it_speaks_again(
    running: Facts, silence: Code, answer: str
) -> None:
    guests, silent = SilentGuests(), look(running, Guest(silence=silence))
    assert not guests.note(silent), "it may have no agent at all"
    assert not guests.note(look(running, ANSWERS[answer]))
    assert guests.note(silent)
    assert guests.note(silent)
    assert not guests.note(look(running, ANSWERS[answer]))


def test_an_agent_whose_words_cannot_be_used_is_there_and_tells_nothing(running: Facts) -> None:
    guests = SilentGuests()
    assert guests.note(look(running, Guest(silence=Code.GUEST_AGENT_INVALID)))
    assert guests.note(look(running, Guest(silence=Code.GUEST_AGENT_DISCONNECTED)))


def test_what_an_earlier_run_said_is_not_said_by_this_one(running: Facts) -> None:
    guests, answer, silent = SilentGuests(), ANSWERS["vcpus"], Guest(silence=Code.GUEST_AGENT_DISCONNECTED)
    guests.note(look(running, answer))
    assert not guests.note(look(running, silent, run=8)), "it was powered off and on"
    guests.note(look(running, answer, run=8))
    guests.note(look(running, Guest(), run=None))
    assert not guests.note(look(running, silent, run=8)), "it was off"
    guests.note(look(running, answer, run=9))
    guests.forget(guests.known())
    assert not guests.note(look(running, silent, run=9)), "it was gone"


_LOOKS = st.lists(
    st.tuples(
        st.sampled_from([None, 7, 8]),
        st.sampled_from([Guest(), *ANSWERS.values(), *(Guest(silence=one) for one in (*SILENCES, *NEITHER))]),
    )
)


@given(_LOOKS)
def test_over_any_looks_it_is_so_exactly_where_the_same_run_had_spoken(
    running: Facts, looks: list[tuple[int | None, Guest]]
) -> None:
    guests, spoke = SilentGuests(), set[int | None]()
    for run, guest in looks:
        spoke &= {run}
        told = guests.note(look(running, guest, run=run))
        assert told == (guest.silence in SILENCES and run in spoke)
        if run is not None and guest in ANSWERS.values():
            spoke.add(run)


def test_a_look_tells_it_of_a_vm_and_the_metrics_hear_it_too(tmp_path: Path) -> None:
    domain = make_domain(SPEC)
    node = make_node(tmp_path, domain)
    domain.guest.agent = "stopped"
    assert not node.observe("vm1", BOTH).fell_silent, "prepare adds the channel; qemu-ga may not be there"
    domain.guest.agent = "running"
    assert not node.observe("vm1", BOTH).fell_silent
    assert not node.observe("vm1", frozenset()).fell_silent
    for silent in ("stopped", "hung"):
        domain.guest.agent = silent
        assert node.observe("vm1", BOTH).fell_silent
        assert not node.observe("vm1", frozenset()).fell_silent, "nobody asked the guest"
    node.list_vms()
    assert node.observe("vm1", BOTH).fell_silent, "the VM is still there"
