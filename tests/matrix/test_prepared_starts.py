"""What started before prepare starts after it: a row for every machine type, and for what is known to be hard."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmagent.hypervisor.node import Node
from tests.fakes.agent import open_node
from tests.lab.libvirtd import PrivateLibvirtd
from tests.lab.orphans import reaping_orphans
from tests.lab.processes import wait_for
from tests.matrix import rows
from tests.matrix.rows import Row, gate_rows, list_machines
from tests.matrix.trial import MAXIMA, Trial, try_row

ROWS = gate_rows(list_machines())


@pytest.fixture(scope="module")
def node(lab: PrivateLibvirtd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """The agent's inside on the lab's libvirt."""
    with reaping_orphans(), open_node(lab.uri, tmp_path_factory.mktemp("node")) as opened:
        yield opened


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_what_started_before_prepare_starts_after_it(lab: PrivateLibvirtd, node: Node, row: Row) -> None:
    with lab.connect() as connection:
        trials = list(try_row(connection, node, row))
    assert [trial.maxima for trial in trials] == list(MAXIMA), "the definition itself has to start"
    expected = "MACHINE_NOT_SUPPORTED" if row.is_old else "starts"
    assert {trial.verdict for trial in trials} == {expected}, [_told(trial) for trial in trials]


def test_the_rows_have_every_value_of_every_dimension() -> None:
    assert {row.cpu for row in ROWS} == set(rows.CPUS)
    assert {row.topology for row in ROWS} == set(rows.TOPOLOGIES)
    assert {row.cells for row in ROWS} == set(rows.CELLS)
    assert {row.hole_gib for row in ROWS} == set(rows.HOLES)
    assert {row.iommu for row in ROWS} == set(rows.IOMMUS)
    assert len(ROWS) >= 60


def test_a_process_that_lost_its_parent_is_reaped_when_it_ends() -> None:
    with reaping_orphans("sleep"):
        done = subprocess.run(["sh", "-c", "sleep 0.1 >&- & echo $!"], capture_output=True, text=True, check=True)
        process = Path(f"/proc/{int(done.stdout)}")
        wait_for(lambda: not process.exists(), timeout_s=30, what="the end of it")


def _told(trial: Trial) -> str:
    return f"{trial.maxima}: {trial.refusal or trial.reply}"
