"""Fields that requests on VMs share, as on the wire: type, range, meaning. Sizes are bytes."""

from typing import Annotated, Literal

import msgspec

Method = Literal["auto", "dimm", "virtio-mem", "balloon"]

#: No request asks for more.
MOST_CPUS, MOST_BYTES = 8192, 2**53 - 1

CpuNum = Annotated[int, msgspec.Meta(ge=1, le=MOST_CPUS, description="Total number of vCPUs")]
MemorySize = Annotated[int, msgspec.Meta(ge=1, le=MOST_BYTES, description="Total memory, bytes")]
MemoryMethod = Annotated[
    Method,
    msgspec.Meta(
        description="auto first deflates the balloon, then grows an existing virtio-mem device, then attaches dimms; "
        "virtio-mem attaches a device if none has room"
    ),
]
GuestNode = Annotated[int, msgspec.Meta(ge=0, le=1023, description="Guest NUMA node that gets the memory")]
DimmSize = Annotated[int, msgspec.Meta(ge=1, le=2**53 - 1, description="Size of each dimm, bytes")]
Strict = Annotated[bool, msgspec.Meta(description="Refuse an amount that would have to be rounded")]
ScaleShares = Annotated[
    bool, msgspec.Meta(description="Scale the VM's CPU shares, if it has its own, with the number of vCPUs")
]
