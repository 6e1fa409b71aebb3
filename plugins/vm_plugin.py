"""The vm plugin: live CPU and memory hotplug of running VMs."""

from kvmagent.model.command import Plugin

from .vm.cpu import HOT_PLUG_CPU
from .vm.memory import HOT_PLUG_MEMORY
from .vm.readiness import READY_FOR_HOTPLUG
from .vm.zstack import INCREASE_CPU, INCREASE_MEMORY

PLUGIN = Plugin(name="vm", commands=(HOT_PLUG_CPU, HOT_PLUG_MEMORY, READY_FOR_HOTPLUG, INCREASE_CPU, INCREASE_MEMORY))
