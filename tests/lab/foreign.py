"""Owns the guest image of a POWER guest: made as image.py makes the host's own, of another architecture's packages.

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

DEBIAN_ARCHITECTURE, KERNEL_PACKAGE = "ppc64el", "linux-image-powerpc64le"
MODULES = ("virtio_pci", "virtio_console", "virtio_balloon")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
INIT = "#!/bin/busybox sh\n/bin/busybox --install -s\nexec /bin/busybox init\n"
KINDS = ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")


def build_power_image(*, report: Callable[[str], None] = lambda _line: None) -> Image:
    """Return the image of a POWER guest, built now or before: 60 MiB are downloaded for it, once.

    Raises:
        ImageError: the archive does not have all of it, or a tool failed.
    """
    mirror, release = find_mirror()
    key = hashlib.sha256(
        repr((mirror, release, Path(__file__).read_text(), *(path.read_text() for path in rootfs_files()))).encode()
    ).hexdigest()[:16]
    directory = cache_directory() / f"{DEBIAN_ARCHITECTURE}-{key}"
    with (directory.parent / f".lock-{DEBIAN_ARCHITECTURE}").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not all((directory / name).exists() for name in FILES):
            report(f"building the image of a POWER guest in {directory}")
            with tempfile.TemporaryDirectory(prefix=".build-", dir=directory.parent) as scratch:
                Path(scratch).chmod(0o755)
                _build(Path(scratch), mirror, release)
                publish(Path(scratch, "image"), directory)
    kernel_release = (directory / "release").read_text().strip()
    return Image(kernel=directory / "vmlinuz", initramfs=directory / "initramfs", kernel_release=kernel_release)


def _build(scratch: Path, mirror: str, release: str) -> None:
    apt = _make_apt(scratch, mirror, release)
    call(*apt, "apt-get", "update", "-qq")
    options = ["--recurse", *(f"--no-{kind}" for kind in KINDS)]
    depends = parse_depends(call(*apt, "apt-cache", "depends", *options, KERNEL_PACKAGE, AGENT_PACKAGE))
    kernels = closure(KERNEL_PACKAGE, depends, follow=r"linux-image-")
    packages = sorted({BUSYBOX_PACKAGE, *kernels, *closure(AGENT_PACKAGE, depends, follow=r"lib")})
    downloads = scratch / "packages"
    downloads.mkdir(mode=0o755)
    if os.getuid() == 0:
        shutil.chown(downloads, "_apt")
    call(*apt, "apt-get", "download", *packages, directory=downloads)
    root = scratch / "root"
    for package in sorted(downloads.iterdir()):
        call("dpkg-deb", "--extract", str(package), str(root))
    kernel = only(root.glob("boot/vmlinux-*"), what="kernel")
    kernel_release = kernel.name.removeprefix("vmlinux-")
    image = scratch / "image"
    image.mkdir(mode=0o755)
    shutil.copyfile(kernel, image / "vmlinuz")
    with gzip.GzipFile(image / "initramfs", "wb", compresslevel=9, mtime=0) as packed:
        packed.write(_pack(root, kernel_release))
    (image / "release").write_text(kernel_release + "\n")
    for file in image.iterdir():
        file.chmod(0o644)


def _make_apt(scratch: Path, mirror: str, release: str) -> list[str]:
    """The words before a command of the apt that knows the other architecture alone."""
    state = scratch / "apt"
    for name in ("lists/partial", "cache/archives/partial", "sources"):
        (state / name).mkdir(parents=True)
    (state / "status").touch()
    (state / "sources/archive.sources").write_text(
        f"Types: deb\nURIs: {mirror}\nSuites: {release}\nComponents: main\nSigned-By: {KEYRING}\n"
    )
    settings = {
        "Dir::State": state,
        "Dir::State::Lists": state / "lists",
        "Dir::State::status": state / "status",
        "Dir::Cache": state / "cache",
        "Dir::Etc::SourceList": "/dev/null",
        "Dir::Etc::SourceParts": state / "sources",
        "APT::Architecture": DEBIAN_ARCHITECTURE,
        "Acquire::Check-Valid-Until": "false",
    }
    lines = [f'{name} "{value}";' for name, value in settings.items()]
    (state / "apt.conf").write_text("\n".join([*lines, f'APT::Architectures {{ "{DEBIAN_ARCHITECTURE}"; }};', ""]))
    return ["env", f"APT_CONFIG={state / 'apt.conf'}"]


def _pack(root: Path, kernel_release: str) -> bytes:
    archive = Archive()
    archive.add_device("dev/console", 5, 1)
    for name in ("proc", "sys", "run", "tmp", "usr/bin", "usr/sbin"):
        archive.add_directory(name)
    archive.add_file("bin/busybox", only(root.glob("**/bin/busybox"), what="busybox").read_bytes(), mode=0o755)
    archive.add_link("bin/sh", "/bin/busybox")
    archive.add_file("init", INIT.encode(), mode=0o755)
    agent = only(root.glob("**/*bin/qemu-ga"), what="qemu-ga")
    archive.add_file("sbin/qemu-ga", agent.read_bytes(), mode=0o755)
    loader = only(root.glob("**/powerpc64le-linux-gnu/ld64.so.2"), what="loader")
    archive.add_file("lib64/ld64.so.2", loader.read_bytes(), mode=0o755)
    for name, library in _find_libraries(root, agent):
        archive.add_file(f"lib/{name}", library.read_bytes(), mode=0o755)
    for file in rootfs_files():
        mode = 0o755 if os.access(file, os.X_OK) else 0o644
        archive.add_file(str(file.relative_to(ROOTFS)), file.read_bytes(), mode=mode)
    modules = find_modules(root, kernel_release, MODULES)
    for name, content in modules.items():
        archive.add_file(f"lib/modules/{name}.ko", content, mode=0o644)
    archive.add_file("lib/modules/order", "".join(f"{name}.ko\n" for name in modules).encode(), mode=0o644)
    return archive.finish()


def _find_libraries(root: Path, program: Path) -> Iterator[tuple[str, Path]]:
    """Name and file of the shared libraries that a program needs, and those that they need: read, nothing is run."""
    known, pending = {"ld64.so.2"}, [program]
    while pending:
        for name in re.findall(r"\(NEEDED\).*\[(.+)\]", call("readelf", "--dynamic", str(pending.pop()))):
            if name in known:
                continue
            known.add(name)
            found = [path for path in root.glob(f"**/powerpc64le-linux-gnu/{name}") if path.is_file()]
            if not found:
                raise ImageError(f"no package of the image has {name}, which {program.name} needs")
            yield name, found[0]
            pending.append(found[0])


def main() -> None:
    """Build the image if need be, and say where it is."""
    image = build_power_image(report=lambda line: print(f"==> {line}", flush=True))
    print(f"==> POWER guest image: {image.kernel.parent} (kernel {image.kernel_release})")


if __name__ == "__main__":
    main()
