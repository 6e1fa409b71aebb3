"""The RPM package: built by its spec, found in order by rpmlint, and its programs started out of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.package.conftest import ROOT, run

pytestmark = pytest.mark.guest


@pytest.fixture(scope="module")
def rpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, for this distribution's Python and with the versions of these tests."""
    directory = tmp_path_factory.mktemp("rpm")
    done = subprocess.run(
        ["sh", str(ROOT / "conf/rpm/build.sh"), "/usr/bin/python3", str(directory)],
        env={**os.environ, "PIP": f"{sys.executable} -m pip"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = directory.glob("kvmagent-*.rpm")
    return built


def test_rpmlint_finds_no_error(rpm: Path) -> None:
    done = run("rpmlint", "-c", str(ROOT / "conf/rpm/kvmagent.rpmlintrc.toml"), str(rpm))
    assert done.returncode == 0, done.stdout
    assert " 0 errors" in done.stdout


def test_it_needs_the_python_that_it_was_built_for_and_brings_no_init_script(rpm: Path) -> None:
    needs = run("rpm", "-qp", "--requires", str(rpm)).stdout.split()
    assert f"/usr/bin/python3.{sys.version_info.minor}" in needs or any(
        word.startswith("/usr/bin/python3.") for word in needs
    )
    assert any(word.startswith("libvirt.so") for word in needs)
    files = run("rpm", "-qpl", str(rpm)).stdout.split()
    assert "/usr/share/kvmagent/60-kvmagent-access.rules" in files
    assert "/usr/lib/systemd/system/kvmagent.service" in files
    assert not [file for file in files if "init.d" in file]
    assert run("rpm", "-qpc", str(rpm)).stdout.split() == ["/etc/kvmagent/kvmagent.conf", "/etc/logrotate.d/kvmagent"]


def test_its_programs_start(rpm: Path, tmp_path: Path) -> None:
    unpack = f"rpm2cpio {rpm} | cpio --quiet -idm"
    subprocess.run(["sh", "-c", unpack], cwd=tmp_path, check=True)
    home = tmp_path / "usr/lib/kvmagent"
    (site,) = home.glob("lib/python3*/site-packages")
    for module in ("kvmagent.cli.daemon", "kvmagent.cli.ctl.main"):
        code = f"import sys; sys.path.insert(0, {str(site)!r}); import {module} as program; program.main(['--version'])"
        done = run(f"/usr/bin/{site.parent.name}", "-I", "-c", code)
        assert done.stdout.split()[-1:] == [
            run(sys.executable, "-m", "kvmagent.cli.daemon", "--version").stdout.split()[-1]
        ]
