"""The lab: real guests on a private libvirtd, and the two ends of the agent's wire to talk to it.

packages.sh (what the host needs) -> image (kernel and initramfs) -> libvirtd (a private daemon) -> guest;
server (receives callbacks) and agent (the agent as a process); demo plays all of them once, to be watched.
The lab never touches the host's own libvirtd and leaves no process behind.
"""
