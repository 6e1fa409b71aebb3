"""The only code that talks to libvirt and reads its XML: what a VM is, and the effects that a plan can name.

node.Node            what tasks/ may ask: observe a VM, perform a step, list VMs
  connection         one libvirt connection and its event loop
  domain.VmHandle    one VM: narrow calls, each with libvirt's errors translated
    domainxml        XML to facts and back; conversion only, no policy
    guestagent       the guest agent's commands
  performers         one function for each step type
  libvirterrors      libvirt's errors to the agent's
"""
