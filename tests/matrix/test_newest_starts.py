"""What libvirt 9.0 and QEMU 7.2 do not have at all: IOMMUs that carry many vCPUs, before and after prepare."""

from collections.abc import Iterator

import libvirt
import pytest

from kvmagent.hypervisor.domainxml import parse_definition
from kvmagent.hypervisor.node import Node
from kvmagent.hypervisor.schema import DOMAIN_SCHEMA
from kvmagent.model.checks import find_vcpu_limit
from tests.fakes.agent import open_node
from tests.lab.libvirtd import PrivateLibvirtd
from tests.lab.newest import build_newest_tree
from tests.lab.orphans import reaping_orphans
from tests.matrix import rows
from tests.matrix.rows import Row, newest_gate_rows
from tests.matrix.trial import MAXIMA, try_row

pytestmark = pytest.mark.guest


@pytest.fixture(scope="module")
def newest() -> Iterator[PrivateLibvirtd]:
    """The newest libvirt and QEMU that Debian has."""
    with PrivateLibvirtd(build_newest_tree()) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def node(newest: PrivateLibvirtd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """The agent's inside on it."""
    schema = build_newest_tree() / DOMAIN_SCHEMA.relative_to("/")
    directory = tmp_path_factory.mktemp("node")
    with reaping_orphans(), open_node(newest.uri, directory, domain_schema=schema) as opened:
        yield opened


@pytest.mark.parametrize("row", newest_gate_rows(), ids=str)
def test_what_started_before_prepare_starts_after_it(newest: PrivateLibvirtd, node: Node, row: Row) -> None:
    with newest.connect() as connection:
        trials = list(try_row(connection, node, row))
    assert [(trial.maxima, trial.verdict) for trial in trials] == [(name, "starts") for name in MAXIMA], [
        trial.refusal or trial.reply for trial in trials
    ]


@pytest.mark.parametrize(
    "iommu",
    [
        "",
        "<iommu model='intel'/>",
        "<iommu model='intel'><driver eim='on' intremap='on'/></iommu>",
        "<iommu model='intel'><driver eim='off' intremap='on'/></iommu>",
        "<iommu model='intel'><driver intremap='off'/></iommu>",
        "<iommu model='virtio'/>",
        "<iommu model='amd'><driver xtsup='on'/></iommu>",
        "<iommu model='amd'><driver xtsup='off'/></iommu>",
    ],
)
def test_libvirt_sees_to_the_iommu_of_many_vcpus_where_the_limit_says_so(
    newest: PrivateLibvirtd, node: Node, iommu: str
) -> None:
    few = Row("q35").format("many").replace("</devices>", f"{iommu}</devices>")
    with newest.connect() as connection:
        domain = connection.defineXML(few)
        host = node.observe("many", frozenset()).host
        domain.undefine()
        limit, _why = find_vcpu_limit(host, parse_definition(few.replace("type='qemu'", "type='kvm'")))
        try:
            domain = connection.defineXML(few.replace("<vcpu>6<", "<vcpu>300<"))
        except libvirt.libvirtError:
            is_carried = False
        else:
            is_carried = parse_definition(domain.XMLDesc()).iommu_eim
            domain.undefine()
    assert limit is not None
    assert (limit >= 300) == is_carried


def test_the_rows_have_every_newer_iommu_and_older_libvirt_has_no_such(lab: PrivateLibvirtd) -> None:
    assert {row.iommu for row in newest_gate_rows()} == set(rows.NEWER_IOMMUS)
    with lab.connect() as connection:
        if connection.getLibVersion() < 10_000_000:
            with pytest.raises(libvirt.libvirtError, match="'iommu': 'amd'"):
                connection.defineXML(Row("q35", iommu="amd").format("amd"))
