# Copyright: the kvmagent maintainers
# Apache License 2.0 (see https://www.apache.org/licenses/LICENSE-2.0)
"""The options that all modules of this collection have."""

from __future__ import annotations


class ModuleDocFragment:
    """How the agent is reached, and who asks."""

    DOCUMENTATION = r"""
options:
  url:
    description:
      - Where the agent is.
      - C(unix:///PATH) is its UNIX socket on the host that the module runs on. The agent knows the caller by its user.
      - C(https://HOST:PORT) needs O(ca_path), and O(client_cert) with O(client_key), or O(token).
    type: str
    default: unix:///run/kvmagent/kvmagent.sock
  ca_path:
    description: PEM file of the CA that signed the agent's certificate.
    type: path
  client_cert:
    description: PEM file of the certificate that the module shows.
    type: path
  client_key:
    description: PEM file of its key, without a passphrase; not needed where O(client_cert) has it.
    type: path
  token:
    description: Bearer token, as C(kvmagent --new-token) prints it.
    type: str
  wait_timeout:
    description: Seconds to wait for the outcome. After that the module fails, and the task goes on in the agent.
    type: int
    default: 900
"""
