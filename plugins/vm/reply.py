"""The errors that planners share."""

from kvmagent.model.errors import AgentError, Code


def not_verified(message: str) -> AgentError:
    """Return the error of a change that libvirt confirmed and the VM does not show."""
    return AgentError(Code.NOT_VERIFIED, message, expected=False)
