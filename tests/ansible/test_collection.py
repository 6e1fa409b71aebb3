"""The collection as a whole: Ansible's own checks, and its playbook against real guests."""

import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.ansible.conftest import COLLECTION, Controller
from tests.lab.agent import AgentProcess
from tests.lab.domainxml import GuestSpec
from tests.lab.guest import Guest
from tests.lab.image import cache_directory
from tests.lab.libvirtd import PrivateLibvirtd

MIB = 2**20
# ansible-test makes virtual environments, and fetches the installer for them from its makers' site. Python has one.
BOOTSTRAP = "import ensurepip\nensurepip.bootstrap()\n"
# Each version of ansible-test asks for another pip.
REQUIREMENTS = Path(sysconfig.get_path("purelib"), "ansible_test/_internal/python_requirements.py")


def run(controller: Controller, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**controller.environment, **environment}
    return subprocess.run(command, cwd=controller.collection, env=env, capture_output=True, text=True, check=False)


def test_ansible_lint_finds_nothing(controller: Controller) -> None:
    done = run(controller, sys.executable, "-m", "ansiblelint", "--offline", "-q", "--profile=production", ".")
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


@pytest.mark.slow
def test_ansible_test_finds_nothing(controller: Controller) -> None:
    # The environments last: they are made anew where ansible-test wants others.
    home = cache_directory() / "ansible-test"
    cache = home / ".ansible/test/cache"
    cache.mkdir(parents=True, exist_ok=True)
    (wanted,) = re.findall(r"\bpip='([\d.]+)'", REQUIREMENTS.read_text())
    (cache / f"get_pip_{wanted.replace('.', '_')}.py").write_text(BOOTSTRAP)
    run(controller, "git", "init", "--quiet", ".")
    run(controller, "git", "add", "--all")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    done = run(controller, "ansible-test", "sanity", "--python", version, HOME=str(home))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    for name in ("validate-modules", "pylint", "import", "ansible-doc", "pep8", "yamllint"):
        assert f'Running sanity test "{name}"' in done.stdout + done.stderr


def test_it_is_built_and_installed_from_its_directory(controller: Controller, tmp_path: Path) -> None:
    install = ("ansible-galaxy", "collection", "install", str(COLLECTION), "-p", str(tmp_path), "--offline")
    done = run(controller, *install, ANSIBLE_COLLECTIONS_PATH=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    installed = tmp_path / "ansible_collections/kvmagent/hotplug"
    for file in ("plugins/modules/vm.py", "roles/kvmagent/tasks/main.yml", "playbooks/site.yml", "README.md"):
        assert (installed / file).exists(), file


@pytest.mark.guest
def test_a_playbook_sizes_real_guests_and_changes_nothing_the_second_time(
    boot: Callable[[GuestSpec], Guest], lab: PrivateLibvirtd, controller: Controller
) -> None:
    db = boot(GuestSpec(name="db-7", kernel_args="memhp_default_state=online_movable"))
    with AgentProcess(uri=lab.uri) as agent:
        how = {"kvmagent_become": False, "kvmagent_connection": {"url": agent.url}}
        wanted = {"name": "db-7", "cpu_num": 3, "memory_size": "500M", "fail_on_plugged": True}
        vms = [{**wanted, "prepare": {"max_cpu_num": 8}}]
        before = db.live_xml(), db.persistent_xml()

        planned = controller.play("kvmagent.hotplug.size", "--check", "--diff", kvmagent_vms=vms, **how)
        assert (planned.status, planned.recap["changed"]) == (0, 2), planned.text
        assert '+    "cpuNum": 3' in planned.text
        assert (db.live_xml(), db.persistent_xml()) == before

        changed = controller.play("kvmagent.hotplug.size", kvmagent_vms=vms, **how)
        assert (changed.status, changed.recap["changed"]) == (0, 2), changed.text
        assert db.cpus_online() == "0-2"
        assert db.mem_total_kib() > 384 * 1024
        assert ">8</vcpu>" in db.persistent_xml()

        before = db.live_xml(), db.persistent_xml()
        again = controller.play("kvmagent.hotplug.size", kvmagent_vms=vms, **how)
        assert (again.status, again.recap["changed"], again.recap["failed"]) == (0, 0, 0), again.text
        assert (db.live_xml(), db.persistent_xml()) == before

        smaller = [{"name": "db-7", "memory_size": "256M", "fail_on_plugged": True}]
        for expected in (1, 0):
            down = controller.play("kvmagent.hotplug.size", kvmagent_vms=smaller, **how)
            assert (down.status, down.recap["changed"]) == (0, expected), down.text
            assert db.mem_total_kib() < 256 * 1024
