"""The processors of the compute node as the kernel describes them: number, topology, speed.

What cannot be read is None. A clock is the nominal one: that of the moment changes, and is no fact of the hardware.
Source: sysfs-devices-system-cpu; Linux Documentation/admin-guide/pm/cpufreq.rst.
"""

import re
from pathlib import Path

from kvmagent.hypervisor.kernelfiles import read_text

_CPUS = "sys/devices/system/cpu"
_UNITS_KIB = {"K": 1, "M": 1024, "G": 1024 * 1024}


def read_topology(root: Path) -> tuple[int, int] | None:
    """Return how many sockets and cores there are in all."""
    names = ("physical_package_id", "die_id", "core_id")
    cores = {tuple(read_text(one / name) for name in names) for one in root.glob(f"{_CPUS}/cpu[0-9]*/topology")}
    sockets = {socket for socket, _, _ in cores}
    return None if not cores or None in sockets else (len(sockets), len(cores))


def find_nominal_mhz(model: str | None, told_by_firmware: str | None, root: Path) -> int | None:
    """Return the nominal clock: of the model's name, else what the firmware says, else the most that cpufreq offers."""
    if found := re.search(r"(\d+(?:\.\d+)?) ?GHz", model or ""):
        return round(float(found.group(1)) * 1000)
    if found := re.match(r"(\d+) MHz", told_by_firmware or ""):
        return int(found.group(1)) or None
    files = root.glob(f"{_CPUS}/cpu[0-9]*/cpufreq/cpuinfo_max_freq")
    highest_khz = max((int(text) for path in files if (text := read_text(path)) and text.isdecimal()), default=0)
    return round(highest_khz / 1000) or None


def read_caches_kib(root: Path) -> tuple[int, int, int] | None:
    """Return the sizes of all caches of the levels 1 (data and instructions), 2 and 3 together; 0 for a missing one."""
    sizes: dict[tuple[str | None, ...], int] = {}
    for cache in root.glob(f"{_CPUS}/cpu[0-9]*/cache/index[0-9]*"):
        # One cache is listed below each CPU that shares it.
        key = tuple(read_text(cache / name) for name in ("level", "type", "shared_cpu_list"))
        if size := re.fullmatch(r"(\d+)([KMG])", read_text(cache / "size") or ""):
            sizes[key] = int(size.group(1)) * _UNITS_KIB[size.group(2)]
    if not sizes:
        return None
    first, second, third = (sum(size for key, size in sizes.items() if key[0] == level) for level in "123")
    return first, second, third
