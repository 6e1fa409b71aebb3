"""Owns the images of guests of other architectures: made as image.py makes the host's own, of their packages.

    an apt of its own (lists, cache and architecture in the image's directory) -> packages -> kernel and initramfs

The host's apt and its architectures stay as they are, and nothing of the packages is run here: what the guest agent
needs is read out of its file, and busybox makes its own links when the guest starts.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tests.lab.cpio import Archive
from tests.lab.image import (
    AGENT_PACKAGE,
    BUSYBOX_PACKAGE,
    FILES,
    ROOTFS,
    Image,
    ImageError,
    cache_directory,
    call,
    closure,
    find_modules,
    only,
    parse_depends,
    publish,
    rootfs_files,
)
from tests.lab.tree import find_mirror

#: One suite for all hosts: what these guests are told apart by is their architecture.
SUITE = "bookworm"
MODULES = ("virtio_console", "virtio_balloon")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
INIT = "#!/bin/busybox sh\n/bin/busybox --install -s\nexec /bin/busybox init\n"
KINDS = ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")


class Foreign(NamedTuple):
    """An architecture as Debian names it, its kernel's package and modules, where its libraries and its loader are."""

    architecture: str
    kernel_package: str
    modules: tuple[str, ...]
    libraries: str
    loader: str


#: By libvirt's name of the architecture.
FOREIGN = {
    "ppc64le": Foreign(
        "ppc64el", "linux-image-powerpc64le", ("virtio_pci", *MODULES), "powerpc64le-linux-gnu", "lib64/ld64.so.2"
    ),
    "s390x": Foreign("s390x", "linux-image-s390x", MODULES, "s390x-linux-gnu", "lib/ld64.so.1"),
    "aarch64": Foreign(
        "arm64",
        "linux-image-arm64",
        ("virtio_pci", *MODULES, "virtio_mem"),
        "aarch64-linux-gnu",
        "lib/ld-linux-aarch64.so.1",
    ),
}


def build_foreign_image(name: str, *, report: Callable[[str], None] = lambda _line: None) -> Image:
    """Return the image of a guest of an architecture, built now or before: some 60 MiB are downloaded for it, once.

    Raises:
        ImageError: the archive does not have all of it, or a tool failed.
    """
    foreign = FOREIGN[name]
    mirror, _release = find_mirror()
    key = hashlib.sha256(
        repr((mirror, Path(__file__).read_text(), *(path.read_text() for path in rootfs_files()))).encode()
    ).hexdigest()[:16]
    directory = cache_directory() / f"{foreign.architecture}-{key}"
    with (directory.parent / f".lock-{foreign.architecture}").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not all((directory / name).exists() for name in FILES):
            report(f"building the image of a guest of {name} in {directory}")
            with tempfile.TemporaryDirectory(prefix=".build-", dir=directory.parent) as scratch:
                Path(scratch).chmod(0o755)
                _build(foreign, Path(scratch), mirror)
                publish(Path(scratch, "image"), directory)
    kernel_release = (directory / "release").read_text().strip()
    return Image(kernel=directory / "vmlinuz", initramfs=directory / "initramfs", kernel_release=kernel_release)


def _build(foreign: Foreign, scratch: Path, mirror: str) -> None:
    apt = make_apt(foreign.architecture, scratch, mirror)
    call(*apt, "apt-get", "update", "-qq")
    options = ["--recurse", *(f"--no-{kind}" for kind in KINDS)]
    depends = parse_depends(call(*apt, "apt-cache", "depends", *options, foreign.kernel_package, AGENT_PACKAGE))
    kernels = closure(foreign.kernel_package, depends, follow=r"linux-image-")
    packages = sorted({BUSYBOX_PACKAGE, *kernels, *closure(AGENT_PACKAGE, depends, follow=r"lib")})
    downloads = scratch / "packages"
    downloads.mkdir(mode=0o755)
    if os.getuid() == 0:
        shutil.chown(downloads, "_apt")
    call(*apt, "apt-get", "download", *packages, directory=downloads)
    root = scratch / "root"
    for package in sorted(downloads.iterdir()):
        call("dpkg-deb", "--extract", str(package), str(root))
    kernel = only(root.glob("boot/vmlinu[xz]-*"), what="kernel")
    kernel_release = kernel.name.partition("-")[2]
    image = scratch / "image"
    image.mkdir(mode=0o755)
    shutil.copyfile(kernel, image / "vmlinuz")
    with gzip.GzipFile(image / "initramfs", "wb", compresslevel=9, mtime=0) as packed:
        packed.write(_pack(foreign, root, kernel_release))
    (image / "release").write_text(kernel_release + "\n")
    for file in image.iterdir():
        file.chmod(0o644)


def make_apt(architecture: str, scratch: Path, mirror: str) -> list[str]:
    """Return the words before a command of an apt of its own, in a directory: of SUITE, for one architecture."""
    state = scratch / "apt"
    for name in ("lists/partial", "cache/archives/partial", "sources"):
        (state / name).mkdir(parents=True)
    (state / "status").touch()
    (state / "sources/archive.sources").write_text(
        f"Types: deb\nURIs: {mirror}\nSuites: {SUITE}\nComponents: main\nSigned-By: {KEYRING}\n"
    )
    settings = {
        "Dir::State": state,
        "Dir::State::Lists": state / "lists",
        "Dir::State::status": state / "status",
        "Dir::Cache": state / "cache",
        "Dir::Etc::SourceList": "/dev/null",
        "Dir::Etc::SourceParts": state / "sources",
        "APT::Architecture": architecture,
        "Acquire::Check-Valid-Until": "false",
    }
    lines = [f'{name} "{value}";' for name, value in settings.items()]
    (state / "apt.conf").write_text("\n".join([*lines, f'APT::Architectures {{ "{architecture}"; }};', ""]))
    return ["env", f"APT_CONFIG={state / 'apt.conf'}"]


def _pack(foreign: Foreign, root: Path, kernel_release: str) -> bytes:
    archive = Archive()
    archive.add_device("dev/console", 5, 1)
    for name in ("proc", "sys", "run", "tmp", "usr/bin", "usr/sbin"):
        archive.add_directory(name)
    archive.add_file("bin/busybox", only(root.glob("**/bin/busybox"), what="busybox").read_bytes(), mode=0o755)
    archive.add_link("bin/sh", "/bin/busybox")
    archive.add_file("init", INIT.encode(), mode=0o755)
    agent = only(root.glob("**/*bin/qemu-ga"), what="qemu-ga")
    archive.add_file("sbin/qemu-ga", agent.read_bytes(), mode=0o755)
    loader = only(root.glob(f"**/{foreign.libraries}/{Path(foreign.loader).name}"), what="loader")
    archive.add_file(foreign.loader, loader.read_bytes(), mode=0o755)
    for name, library in _find_libraries(foreign, root, agent):
        archive.add_file(f"lib/{name}", library.read_bytes(), mode=0o755)
    for file in rootfs_files():
        mode = 0o755 if os.access(file, os.X_OK) else 0o644
        archive.add_file(str(file.relative_to(ROOTFS)), file.read_bytes(), mode=mode)
    modules = find_modules(root, kernel_release, foreign.modules)
    for name, content in modules.items():
        archive.add_file(f"lib/modules/{name}.ko", content, mode=0o644)
    archive.add_file("lib/modules/order", "".join(f"{name}.ko\n" for name in modules).encode(), mode=0o644)
    return archive.finish()


def _find_libraries(foreign: Foreign, root: Path, program: Path) -> Iterator[tuple[str, Path]]:
    """Name and file of the shared libraries that a program needs, and those that they need: read, nothing is run."""
    known, pending = {Path(foreign.loader).name}, [program]
    while pending:
        for name in re.findall(r"\(NEEDED\).*\[(.+)\]", call("readelf", "--dynamic", str(pending.pop()))):
            if name in known:
                continue
            known.add(name)
            found = [path for path in root.glob(f"**/{foreign.libraries}/{name}") if path.is_file()]
            if not found:
                raise ImageError(f"no package of the image has {name}, which {program.name} needs")
            yield name, found[0]
            pending.append(found[0])


def main() -> None:
    """Build the images if need be, and say where they are."""
    for name in FOREIGN:
        image = build_foreign_image(name, report=lambda line: print(f"==> {line}", flush=True))
        print(f"==> guest image of {name}: {image.kernel.parent} (kernel {image.kernel_release})")


if __name__ == "__main__":
    main()
