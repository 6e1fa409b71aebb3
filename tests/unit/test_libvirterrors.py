"""libvirt's errors: by code, with the command that mends it where the agent knows one."""

import libvirt

from kvmagent.hypervisor.libvirterrors import translate
from kvmagent.model.errors import CODES, Code
from tests.fakes.libvirt import qemu_error


def test_a_call_that_libvirts_access_control_denies_says_how_it_is_let_in() -> None:
    error = translate(qemu_error(libvirt.VIR_ERR_ACCESS_DENIED, "access denied: 'QEMU' denied access"), "plugging")
    assert error.code is Code.LIBVIRT_REFUSED
    assert "60-kvmagent-access.rules /etc/polkit-1/rules.d/" in error.remedy


def test_any_other_refusal_keeps_the_usual_remedy() -> None:
    error = translate(qemu_error(libvirt.VIR_ERR_OPERATION_FAILED, "no"), "plugging")
    assert error.remedy == CODES[Code.LIBVIRT_REFUSED].remedy
