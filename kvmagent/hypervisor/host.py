"""What the compute node has left, read from the kernel.

Source: proc(5), /proc/meminfo: MemAvailable is what can be had without swapping.
"""

from pathlib import Path

from kvmagent.model.facts import Host
from kvmagent.model.units import KIB


def read_host(meminfo: Path = Path("/proc/meminfo")) -> Host:
    """Return the host's facts; a part that cannot be read is None."""
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return Host()
    values = dict(line.split(":", 1) for line in lines if ":" in line)
    available = values.get("MemAvailable")
    return Host(memory_available_bytes=int(available.split()[0]) * KIB if available else None)
