"""Prometheus and its checker of metrics and rules, from the distribution's packages, downloaded and not installed.

Installed, it would start a server.
"""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.lab.image import ImageError, as_root, cache_directory, call, download, parse_policy, publish

#: Debian 13 has it in a package of its own, Debian 12 in the server's.
PACKAGES = ("promtool", "prometheus")


def find_promtool() -> Path:
    """The checker, fetched if need be.

    Raises:
        ImageError: apt offers no package that has it.
    """
    return _find("promtool", PACKAGES)


def find_prometheus() -> Path:
    """The server, fetched if need be.

    Raises:
        ImageError: apt does not offer it.
    """
    return _find("prometheus", ("prometheus",))


def _find(name: str, packages: Sequence[str]) -> Path:
    installed = shutil.which(name)
    if installed is not None:
        return Path(installed)
    directory = cache_directory() / name
    program = directory / "usr/bin" / name
    if not program.exists():
        with tempfile.TemporaryDirectory(dir=cache_directory()) as scratch:
            Path(scratch).chmod(0o755)  # apt's download user must reach it
            fetched, unpacked = Path(scratch) / "packages", Path(scratch) / "unpacked"
            download(_find_package(packages), fetched)
            call("dpkg-deb", "--extract", *map(str, fetched.glob("*.deb")), str(unpacked))
            # Of all that is in it one program is wanted.
            for path in (unpacked / "usr").iterdir():
                if path.name != "bin":
                    shutil.rmtree(path)
            for path in (unpacked / "usr/bin").iterdir():
                if path.name != name:
                    path.unlink()
            publish(unpacked, directory)
    return program


def _find_package(packages: Sequence[str]) -> dict[str, str]:
    for update in (False, True):
        if update:
            call(*as_root(), "apt-get", "update", "-qq")
        offered = parse_policy(call("apt-cache", "policy", *packages))
        for package in packages:
            if package in offered:
                return {package: offered[package]}
    raise ImageError(f"apt offers none of {', '.join(packages)}")


if __name__ == "__main__":
    find_promtool()
    find_prometheus()
