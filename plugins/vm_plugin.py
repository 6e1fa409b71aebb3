"""The vm plugin: live CPU and memory hotplug of running VMs."""

from kvmagent.model.command import Plugin

from .vm.cpu import HOT_PLUG_CPU
from .vm.cpumemory import HOT_PLUG_CPU_MEMORY
from .vm.memory import HOT_PLUG_MEMORY
from .vm.readiness import READY_FOR_HOTPLUG
from .vm.unplugcpu import HOT_UNPLUG_CPU
from .vm.unplugmemory import HOT_UNPLUG_MEMORY
from .vm.zstack import INCREASE_CPU, INCREASE_MEMORY

PLUGIN = Plugin(
    name="vm",
    commands=(
        HOT_PLUG_CPU,
        HOT_PLUG_MEMORY,
        HOT_PLUG_CPU_MEMORY,
        HOT_UNPLUG_CPU,
        HOT_UNPLUG_MEMORY,
        READY_FOR_HOTPLUG,
        INCREASE_CPU,
        INCREASE_MEMORY,
    ),
)
