"""The facts of a VM's definitions are those of its XML, whatever was read before, and parsed once where it stays."""

from pathlib import Path

import libvirt
from hypothesis import given
from hypothesis import strategies as st

from kvmagent.hypervisor.definitions import Definitions
from kvmagent.hypervisor.domainxml import parse_definition, parse_live
from kvmagent.model.facts import Definition
from tests.fakes.agent import format_spec, make_domain, make_node
from tests.lab.domainxml import GuestSpec

VMS = ("one", "two", "three")
TEXTS = [
    format_spec(GuestSpec(name="vm", vcpus=vcpus, max_vcpus=4, agent_channel=channel), "kvm")
    for vcpus in (1, 2, 3)
    for channel in (False, True)
]
PARSED = {text: parse_live(text) for text in TEXTS}
DEFINED, STOPPED, UNDEFINED = (
    libvirt.VIR_DOMAIN_EVENT_DEFINED,
    libvirt.VIR_DOMAIN_EVENT_STOPPED,
    libvirt.VIR_DOMAIN_EVENT_UNDEFINED,
)
READS = st.tuples(st.sampled_from(["live", "config"]), st.sampled_from(VMS), st.sampled_from(TEXTS))
EVENTS = st.tuples(st.just("event"), st.sampled_from(VMS), st.sampled_from([DEFINED, STOPPED, UNDEFINED]))
GONE = st.tuples(st.just("forget"), st.sampled_from(VMS), st.just(0))


class Domain:
    """A domain as an event hands it over: it may only be asked who it is."""

    def __init__(self, uuid: str) -> None:
        self._uuid = uuid

    def UUIDString(self) -> str:
        return self._uuid


@given(acts=st.lists(st.one_of(READS, EVENTS, GONE), max_size=40))
def test_what_is_read_is_what_its_xml_says_and_kept_until_it_ends(acts: list[tuple[str, str, str | int]]) -> None:
    definitions, kept = Definitions(), dict[tuple[str, str], tuple[str, Definition]]()
    for act, vm, what in acts:
        if act == "event":
            assert isinstance(what, int)
            definitions.hear(Domain(vm), what, 0)
            kept.pop((vm, {STOPPED: "live", UNDEFINED: "config"}.get(what, "")), None)
        elif act == "forget":
            definitions.forget([vm])
            kept = {key: one for key, one in kept.items() if key[0] != vm}
        else:
            assert isinstance(what, str)
            if act == "live":
                found, connected = definitions.read_live(vm, what)
                assert connected == PARSED[what][1]
            else:
                found = definitions.read_config(vm, what)
            assert found == PARSED[what][0]
            former = kept.get((vm, act))
            if former is not None and former[0] == what:
                assert found is former[1], "parsed again, and nothing has changed"
            kept[vm, act] = what, found
        assert definitions.known() == {vm for vm, _ in kept}


def test_of_many_vms_that_stay_as_they_are_none_is_parsed_a_second_time(tmp_path: Path) -> None:
    """A look at each, again and again, is what a list of VMs is; and a task on one is two."""
    specs = [GuestSpec(name=f"vm{n}", vcpus=1, max_vcpus=4) for n in range(150)]
    domains = [make_domain(spec) for spec in specs]
    for n, domain in enumerate(domains):
        domain._uuid, domain.number = f"00000000-0000-0000-0000-{n:012}", n + 1
    node = make_node(tmp_path, *domains)
    first = [node.observe(spec.name, frozenset()).domain for spec in specs]
    again = [node.observe(spec.name, frozenset()).domain for spec in specs]
    assert all(one.live is two.live and one.config is two.config for one, two in zip(first, again, strict=True))
    domains[0].setVcpusFlags(2, libvirt.VIR_DOMAIN_AFFECT_LIVE)
    changed = node.observe("vm0", frozenset()).domain
    assert changed.live == parse_definition(domains[0].XMLDesc(0)) != first[0].live
    assert changed.config is first[0].config
