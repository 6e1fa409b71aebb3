"""Real guests for the tests of this directory: one private libvirtd for the whole run, guests by specification.

Where the lab cannot run, these tests fail with the reason; they never pass in silence.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from tests.lab.domainxml import GuestSpec
from tests.lab.guest import Guest
from tests.lab.image import Image, build_image
from tests.lab.libvirtd import PrivateLibvirtd

Boot = Callable[[GuestSpec], Guest]


@pytest.fixture(scope="session")
def image() -> Image:
    """The guest image, built if need be."""
    return build_image()


@pytest.fixture(scope="session")
def lab() -> Iterator[PrivateLibvirtd]:
    """A private libvirtd. A test that kills or pauses it starts or resumes it again."""
    with PrivateLibvirtd() as daemon:
        yield daemon


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


@contextmanager
def booting(lab: PrivateLibvirtd, image: Image) -> Iterator[Boot]:
    """A function that boots guests, all of which are destroyed in the end, whether they came up or not."""
    with ExitStack() as guests:

        def boot_guest(spec: GuestSpec) -> Guest:
            guest = Guest(lab, image, spec)
            guests.callback(guest.destroy)
            guest.boot()
            return guest

        yield boot_guest
