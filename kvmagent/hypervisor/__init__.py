"""The only code that talks to libvirt and reads its XML: what a VM is, and the effects that a plan can name.

node.Node            what tasks/ may ask: observe a VM, perform a step, list VMs, view the host
  connection         a libvirt connection for each piece of work, and libvirt's event loop
  eventconnection    the connection that events come over: deviceevents, vmevents
  domain.VmHandle    one VM: narrow calls, each with libvirt's errors translated
    domainxml        XML to facts and back; conversion only, no policy
    shapexml         a persistent definition prepared for hotplug, everything else in it kept
    guestagent       the guest agent's commands
  performers         one function for each step type
  host, hostfacts    what the compute node has left, and what it is
  libvirterrors      libvirt's errors to the agent's
"""
