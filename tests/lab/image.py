"""Owns the guest image: a kernel and an initramfs, made of distribution packages and of nothing else.

    packages (versions from apt) + recipe (this file, rootfs/) -> key -> /var/tmp/kvmagent-lab-<uid>/<key>/

Packages are downloaded and unpacked, never installed: the host's /boot and its services stay as they are, and
the image does not depend on what the host has. The same key is the same image, so it is built once.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import os
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.lab.cpio import Archive

#: Loaded at boot with all that they depend on; a kernel that has one of them built in is as good.
MODULES = (
    *("virtio_pci", "virtio_console", "virtio_balloon", "virtio_mem", "virtio_net", "virtio_blk"),
    *("ext4", "button", "evdev"),
)
KERNELS = ("linux-image-cloud-amd64", "linux-image-virtual", "linux-image-amd64", "linux-image-generic")
AGENT_PACKAGE = "qemu-guest-agent"
BUSYBOX_PACKAGE = "busybox-static"
#: The guest's own files: start-up, the harness that runs commands for the host, and what controls the agent.
ROOTFS = Path(__file__).with_name("rootfs")
#: The files of a finished image.
FILES = ("vmlinuz", "initramfs", "release")


class ImageError(Exception):
    """The image cannot be built; the text says what is missing."""


@dataclass(frozen=True)
class Image:
    """A guest image; every user of the host may read its two files."""

    kernel: Path
    initramfs: Path
    kernel_release: str


def build_image(*, report: Callable[[str], None] = lambda _line: None) -> Image:
    """Return the image of the newest packages that apt offers, built now or before.

    `report` gets a line for each long step. Needs no privileges, except where the host has no package lists.

    Raises:
        ImageError: no suitable package, or a tool failed.
    """
    architecture = call("dpkg", "--print-architecture").strip()
    if architecture != "amd64":
        raise ImageError(f"the lab's guests are x86-64 guests made of the host's packages; this host is {architecture}")
    packages = find_packages(report=report)
    directory = cache_directory() / image_key(packages)
    with (directory.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one build at a time: the other runs wait for its result
        if not all((directory / name).exists() for name in FILES):
            report(f"building the guest image in {directory}")
            with tempfile.TemporaryDirectory(prefix=".build-", dir=directory.parent) as scratch:
                Path(scratch).chmod(0o755)  # apt's download user must reach it
                build(packages, Path(scratch), report=report)
                publish(Path(scratch, "image"), directory)
    release = (directory / "release").read_text().strip()
    return Image(kernel=directory / "vmlinuz", initramfs=directory / "initramfs", kernel_release=release)


def rootfs_files() -> list[Path]:
    """The guest's own files, in a stable order."""
    return sorted(path for path in ROOTFS.rglob("*") if path.is_file())


def image_key(packages: dict[str, str]) -> str:
    """A short name for all that decides what the image is."""
    recipe = [Path(__file__), Path(__file__).with_name("cpio.py"), *rootfs_files()]
    facts = [*sorted(packages.items()), *((path.name, path.read_text()) for path in recipe)]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def cache_directory() -> Path:
    """The directory of this user's images, in /var/tmp: the guests' user cannot look into a private home.

    Raises:
        ImageError: the name is taken by somebody else, who could then change what the guests boot.
    """
    directory = Path(f"/var/tmp/kvmagent-lab-{os.getuid()}")
    directory.mkdir(mode=0o755, exist_ok=True)
    facts = directory.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid():
        raise ImageError(f"{directory} is not a directory of this user: remove it, or ask its owner to")
    directory.chmod(0o755)
    return directory


def publish(built: Path, directory: Path) -> None:
    """Move the finished image to its place at once, so that nobody meets half of it."""
    # What may be there has lost files to a cleaner of old temporary files.
    shutil.rmtree(directory, ignore_errors=True)
    built.rename(directory)


# Packages


def find_packages(*, report: Callable[[str], None]) -> dict[str, str]:
    """The packages of the image and their versions.

    Raises:
        ImageError: apt offers no kernel or no guest agent.
    """
    found = try_find_packages()
    if found is None:
        report("fetching the package lists (apt-get update)")
        call(*as_root(), "apt-get", "update", "-qq")
        found = try_find_packages()
    if found is None:
        wanted = ", ".join((AGENT_PACKAGE, BUSYBOX_PACKAGE, " or ".join(KERNELS)))
        raise ImageError(f"apt offers not all of what the guest image is made of: {wanted}")
    return found


def try_find_packages() -> dict[str, str] | None:
    """None if the lists that apt has do not name all that is needed."""
    candidates = parse_policy(call("apt-cache", "policy", AGENT_PACKAGE, BUSYBOX_PACKAGE, *KERNELS))
    kernel = next((name for name in KERNELS if name in candidates), None)
    if kernel is None or AGENT_PACKAGE not in candidates or BUSYBOX_PACKAGE not in candidates:
        return None
    kinds = ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")
    options = ["--recurse", *(f"--no-{kind}" for kind in kinds)]
    depends = parse_depends(call("apt-cache", "depends", *options, kernel, AGENT_PACKAGE))
    names = {
        BUSYBOX_PACKAGE,
        *closure(kernel, depends, follow=r"linux-(image|modules|binary)-"),
        *closure(AGENT_PACKAGE, depends, follow=r"lib"),
    }
    return parse_policy(call("apt-cache", "policy", *sorted(names)))


def parse_policy(text: str) -> dict[str, str]:
    """Package to candidate version, of `apt-cache policy`; packages without a candidate are left out."""
    pattern = re.compile(r"^(\S+):\n(?:  .*\n)*?  Candidate: (?!\(none\))(\S+)$", re.MULTILINE)
    return dict(pattern.findall(text))


def parse_depends(text: str) -> dict[str, set[str]]:
    """Package to the packages it depends on, of `apt-cache depends`."""
    depends: dict[str, set[str]] = {}
    for line in text.splitlines():
        if not line.startswith((" ", "|")):
            depends[line] = needed = set()
        elif match := re.search(r"Depends: (\S+)$", line):
            needed.add(match.group(1))
    return depends


def closure(root: str, depends: dict[str, set[str]], *, follow: str) -> set[str]:
    """`root` and all that it depends on, through packages whose names begin with `follow`."""
    found: set[str] = set()
    pending = [root]
    while pending:
        name = pending.pop()
        if name not in found:
            found.add(name)
            pending += (other for other in depends.get(name, ()) if re.match(follow, other))
    return found


def as_root() -> list[str]:
    """The words before a command that only root may run."""
    if os.getuid() == 0:
        return []
    if shutil.which("sudo") is None:
        raise ImageError("the host has no package lists: run `apt-get update` as root")
    return ["sudo"]


def call(*command: str, directory: Path | None = None) -> str:
    """The standard output of a command, in plain English.

    Raises:
        ImageError: the command is missing or failed; the text has its last words.
    """
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command,
            cwd=directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
    except FileNotFoundError as error:
        raise ImageError(f"{command[0]} is not installed (tests/lab/packages.sh installs it)") from error
    if done.returncode != 0:
        raise ImageError(f"`{' '.join(command)}` failed: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout.decode()


# The build


def build(packages: dict[str, str], scratch: Path, *, report: Callable[[str], None]) -> None:
    """Make `scratch`/image of the given package versions."""
    report(f"downloading {len(packages)} packages")
    download(packages, scratch / "packages")
    report("unpacking")
    root = scratch / "root"
    for package in sorted((scratch / "packages").iterdir()):
        call("dpkg-deb", "--extract", str(package), str(root))
    kernel = only(root.glob("boot/vmlinuz-*"), what="kernel")
    release = kernel.name.removeprefix("vmlinuz-")
    report(f"packing kernel {release}")
    image = scratch / "image"
    image.mkdir(mode=0o755)
    shutil.copyfile(kernel, image / "vmlinuz")
    with gzip.GzipFile(image / "initramfs", "wb", compresslevel=9, mtime=0) as packed:
        packed.write(pack_initramfs(root, release))
    (image / "release").write_text(release + "\n")
    image.chmod(0o755)
    for file in image.iterdir():
        file.chmod(0o644)


def download(packages: dict[str, str], directory: Path) -> None:
    """Have apt download packages into a new directory, which it checks against the archive's signatures."""
    directory.mkdir(mode=0o755)
    if os.getuid() == 0:
        # apt gives up its privileges to download; without this it would keep them, and warn.
        shutil.chown(directory, "_apt")
    call(
        "apt-get",
        "download",
        *(f"{name}={version}" for name, version in packages.items()),
        directory=directory,
    )


def pack_initramfs(root: Path, release: str) -> bytes:
    """The initramfs as a cpio archive: busybox, guest agent and libraries, modules, the guest's own files."""
    archive = Archive()
    archive.add_device("dev/console", 5, 1)
    for name in ("proc", "sys", "run", "tmp"):
        archive.add_directory(name)
    busybox = only(root.glob("**/bin/busybox"), what="busybox")
    archive.add_file("bin/busybox", busybox.read_bytes(), mode=0o755)
    for applet in call(str(busybox), "--list-full").split():
        if applet != "bin/busybox" and not (ROOTFS / applet).exists():
            archive.add_link(applet, "/bin/busybox")
    archive.add_link("init", "/bin/busybox")
    agent = only(root.glob("**/*bin/qemu-ga"), what="qemu-ga")
    archive.add_file("sbin/qemu-ga", agent.read_bytes(), mode=0o755)
    for name, library in find_libraries(root, agent):
        archive.add_file(name, library.read_bytes(), mode=0o755)
    for file in rootfs_files():
        mode = 0o755 if os.access(file, os.X_OK) else 0o644
        archive.add_file(str(file.relative_to(ROOTFS)), file.read_bytes(), mode=mode)
    modules = find_modules(root, release)
    for name, content in modules.items():
        archive.add_file(f"lib/modules/{name}.ko", content, mode=0o644)
    archive.add_file("lib/modules/order", "".join(f"{name}.ko\n" for name in modules).encode(), mode=0o644)
    return archive.finish()


def find_libraries(root: Path, program: Path) -> Iterator[tuple[str, Path]]:
    """Name in the guest, and file, of a program's loader and shared libraries: the packages', not the host's."""
    loader = only(root.glob("**/ld-linux-x86-64.so.2"), what="loader")
    if loader.is_symlink():
        # Absolute in older releases: followed, it would lead to the host's.
        loader = only(root.glob(f"**/{loader.readlink().name}"), what="loader")
    directories = (root / "lib/x86_64-linux-gnu", root / "usr/lib/x86_64-linux-gnu")
    yield "lib64/ld-linux-x86-64.so.2", loader
    for line in call(
        str(loader), "--library-path", ":".join(map(str, directories)), "--list", str(program)
    ).splitlines():
        match line.split():
            case [name, "=>", file, _address] if "/" not in name:
                if not file.startswith(str(root)):
                    raise ImageError(f"no package of the image has {name}, which {program.name} needs")
                yield f"lib/{name}", Path(file)


def find_modules(root: Path, release: str, wanted: Iterable[str] = MODULES) -> dict[str, bytes]:
    """The modules to load, in an order in which each finds what it needs, uncompressed."""
    tree = only(root.glob(f"**/lib/modules/{release}"), what="modules")
    files = {module_name(path.name): path for path in tree.glob("kernel/**/*.ko*")}
    built_in = {module_name(Path(line).name) for line in (tree / "modules.builtin").read_text().split()}
    ordered: dict[str, bytes] = {}

    def add(name: str) -> None:
        if name in ordered or name in built_in:
            return
        if name not in files:
            raise ImageError(f"kernel {release} has no module {name}")
        content = read_module(files[name])
        match = re.search(rb"\0depends=([^\0]*)\0", content)
        for needed in match.group(1).decode().split(",") if match else ():
            if needed:
                add(module_name(needed))
        ordered[name] = content

    for name in wanted:
        add(name)
    return ordered


def module_name(file: str) -> str:
    return file.partition(".")[0].replace("-", "_")


def read_module(path: Path) -> bytes:
    tools = {".ko": (), ".xz": ("xz", "-dc"), ".zst": ("zstd", "-dc"), ".gz": ("gzip", "-dc")}
    tool: Sequence[str] = tools[path.suffix]
    if not tool:
        return path.read_bytes()
    try:
        return subprocess.run([*tool, str(path)], check=True, capture_output=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise ImageError(f"{path.name} cannot be unpacked: {error}") from error


def only(found: Iterable[Path], *, what: str) -> Path:
    """The first of the paths found; the packages have one of each."""
    for path in found:
        return path
    raise ImageError(f"the packages hold no {what}")


def main() -> None:
    """Build the image if need be, and say where it is."""
    image = build_image(report=lambda line: print(f"==> {line}", flush=True))
    print(f"==> guest image: {image.kernel.parent} (kernel {image.kernel_release})")


if __name__ == "__main__":
    main()
