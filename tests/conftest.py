"""Real guests for tests: one private libvirtd for the whole run, guests by specification.

Where the lab cannot run, tests that need it fail with the reason; they never pass in silence.
"""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import hypothesis
import libvirt
import pytest

from tests.fakes.agent import end_nodes
from tests.lab.domainxml import GuestSpec
from tests.lab.guest import Guest
from tests.lab.image import Image, build_image
from tests.lab.libvirtd import PrivateLibvirtd
from tests.lab.orphans import reaping_orphans
from tests.lab.server import ManagementServer

Boot = Callable[[GuestSpec], Guest]

# A property is judged by what it finds: how long an example takes is the machine's affair, which others may load.
hypothesis.settings.register_profile("without deadline", deadline=None)
hypothesis.settings.load_profile("without deadline")


#: The files that take a minute or more, the longest first. They are begun first, so that no worker ends long after the
#: others. The first one makes what others at the top of the list need: meanwhile those below do without.
LONGEST = (
    "package/test_contents.py", "matrix/test_prepared_starts.py", "crash/test_random_kills.py", "package/test_rpm.py",
    "crash/test_fault_points.py", "package/test_zstack.py", "package/test_ansible.py", "guest/test_again.py",
    "guest/test_engine_prepare.py", "package/test_systemd.py", "guest/test_newest.py", "crash/test_soak.py",
    "package/test_pythons.py",
    "guest/test_foreign.py", "guest/test_zstack_events.py", "guest/test_engine_memory.py", "ansible/test_collection.py",
    "chaos/test_chaos.py", "guest/test_hotplug.py", "guest/test_power.py", "unit/test_delivery.py",
    "guest/test_zstack_day.py", "package/test_lifecycle.py", "ansible/test_modules.py", "guest/test_budget.py",
    "contract/test_vcpus_and_memory.py", "http/test_memory.py", "page/test_looks.py", "contract/test_states.py",
    "fuzz/test_openapi.py", "http/test_security_connected.py", "contract/test_failure_matrix.py", "page/test_page.py",
    "unit/test_planners_properties.py", "http/test_security_limits.py", "crash/test_libvirt_lost.py",
    "guest/test_engine_both.py", "guest/test_babble.py", "guest/test_lab.py", "fleet/test_fleet.py",
    "clients/test_generated.py", "guest/test_migration.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest; pytest-xdist keeps the order with --no-loadscope-reorder."""
    place = {Path(__file__).parent / name: number for number, name in enumerate(LONGEST)}
    missing = [str(file) for file in place if not file.exists()]
    assert not missing, f"LONGEST names files that are not there: {missing}"
    items.sort(key=lambda item: place.get(item.path, len(place)))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option of the golden tests."""
    parser.addoption("--update-golden", action="store_true", help="write the golden files anew; read the diff")


# Beside what the whole run shares, a daemon and a browser, and what is let go a moment later. select() takes 1,024.
_MOST_LEFT_OPEN = 256


@pytest.fixture(scope="module", autouse=True)
def closes() -> Iterator[None]:
    """Each module closes the files, sockets and threads that it opened: the modules after it share the process."""
    before = _count_open()
    yield
    end_nodes()
    gc.collect()
    _end_connections()
    now = _count_open()
    left = {what: count - before[what] for what, count in now.items() if count - before[what] > _MOST_LEFT_OPEN}
    assert not left, f"left open by this module: {left}"


def _end_connections() -> None:
    """Have libvirt let go of closed connections: its event loop does so, which runs only while an agent's does."""
    with suppress(libvirt.libvirtError):  # no test has registered it
        timer = libvirt.virEventAddTimeout(0, lambda *_: None, None)
        libvirt.virEventRunDefaultImpl()
        libvirt.virEventRemoveTimeout(timer)


def _count_open() -> dict[str, int]:
    return {what: len(os.listdir(f"/proc/self/{what}")) for what in ("fd", "task")}


@pytest.fixture(scope="session")
def image() -> Image:
    """The guest image, built if need be."""
    return build_image()


@pytest.fixture(scope="session")
def lab() -> Iterator[PrivateLibvirtd]:
    """A private libvirtd. A test that kills or pauses it starts or resumes it again."""
    with PrivateLibvirtd() as daemon:
        yield daemon


@pytest.fixture(scope="module")
def server() -> Iterator[ManagementServer]:
    """The management server that takes the callbacks."""
    with ManagementServer() as running:
        yield running


@pytest.fixture
def boot(lab: PrivateLibvirtd, image: Image) -> Iterator[Boot]:
    """Boots a guest that lives until the end of the test."""
    with booting(lab, image) as boot_guest:
        yield boot_guest


@pytest.fixture(scope="module")
def boot_module(lab: PrivateLibvirtd, image: Image) -> Iterator[Boot]:
    """Boots a guest that lives until the end of the module, for a module's own fixtures."""
    with booting(lab, image) as boot_guest:
        yield boot_guest


@pytest.fixture
def define(lab: PrivateLibvirtd, image: Image) -> Iterator[Callable[..., Guest]]:
    """Defines a guest that never runs: QEMU is started paused, or not at all."""
    with reaping_orphans(), ExitStack() as guests:

        def define_guest(spec: GuestSpec, *, running: bool = True) -> Guest:
            guest = Guest(lab, image, spec)
            guests.callback(guest.destroy)
            guest.define()
            if running:
                guest.start_paused()
            return guest

        yield define_guest


@contextmanager
def booting(lab: PrivateLibvirtd, image: Image) -> Iterator[Boot]:
    """A function that boots guests, all of which are destroyed in the end, whether they came up or not."""
    with reaping_orphans(), ExitStack() as guests:

        def boot_guest(spec: GuestSpec) -> Guest:
            guest = Guest(lab, image, spec)
            guests.callback(guest.destroy)
            guest.boot()
            return guest

        yield boot_guest
