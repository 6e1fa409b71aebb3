"""Host agent for live CPU and memory hotplug of KVM guests."""

__version__ = "1.0.0"
