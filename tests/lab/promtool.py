"""Prometheus' own checker of metrics and rules, from the distribution's package, which is downloaded and not installed.

Installed, it would start a server.
"""

import shutil
import tempfile
from pathlib import Path

from tests.lab.image import ImageError, as_root, cache_directory, call, download, parse_policy, publish

#: Debian 13 has it in a package of its own, Debian 12 in the server's.
PACKAGES = ("promtool", "prometheus")


def find_promtool() -> Path:
    """The program, fetched if need be.

    Raises:
        ImageError: apt offers no package that has it.
    """
    installed = shutil.which("promtool")
    if installed is not None:
        return Path(installed)
    directory = cache_directory() / "promtool"
    program = directory / "usr/bin/promtool"
    if not program.exists():
        with tempfile.TemporaryDirectory(dir=cache_directory()) as scratch:
            Path(scratch).chmod(0o755)  # apt's download user must reach it
            packages, unpacked = Path(scratch) / "packages", Path(scratch) / "unpacked"
            download(_find_package(), packages)
            call("dpkg-deb", "--extract", *map(str, packages.glob("*.deb")), str(unpacked))
            # Of all that is in it one program is wanted.
            for path in (unpacked / "usr").iterdir():
                if path.name != "bin":
                    shutil.rmtree(path)
            (unpacked / "usr/bin/prometheus").unlink(missing_ok=True)
            publish(unpacked, directory)
    return program


def _find_package() -> dict[str, str]:
    for update in (False, True):
        if update:
            call(*as_root(), "apt-get", "update", "-qq")
        offered = parse_policy(call("apt-cache", "policy", *PACKAGES))
        for package in PACKAGES:
            if package in offered:
                return {package: offered[package]}
    raise ImageError(f"apt offers none of {' and '.join(PACKAGES)}, one of which has promtool")


if __name__ == "__main__":
    find_promtool()
