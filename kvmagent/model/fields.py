"""Fields that requests on VMs share, as on the wire: type, range, meaning. Sizes are bytes."""

from typing import Annotated, Literal

import msgspec

Method = Literal["auto", "dimm", "virtio-mem", "balloon"]

#: No request asks for more.
MOST_CPUS, MOST_BYTES = 8192, 2**53 - 1

CpuNum = Annotated[int, msgspec.Meta(ge=1, le=MOST_CPUS, description="Total vCPUs wanted")]
MemorySize = Annotated[int, msgspec.Meta(ge=1, le=MOST_BYTES, description="Total memory wanted, bytes")]
MemoryMethod = Annotated[
    Method,
    msgspec.Meta(
        description="auto gives back the balloon first, then grows a virtio-mem device that is there, then attaches "
        "dimms; virtio-mem attaches a device where there is none with room"
    ),
]
GuestNode = Annotated[int, msgspec.Meta(ge=0, le=1023, description="Guest NUMA node that is to have it")]
DimmSize = Annotated[int, msgspec.Meta(ge=1, le=2**53 - 1, description="Size of each dimm, bytes")]
Strict = Annotated[bool, msgspec.Meta(description="Refuse an amount that had to be rounded")]
ScaleShares = Annotated[
    bool, msgspec.Meta(description="Scale the VM's CPU shares, where it has its own, with the number of vCPUs")
]
