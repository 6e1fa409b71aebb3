"""Reads a file of hosts: which agents to ask, under which names.

NAME                 an agent of ctl.conf: its URL, its certificates and its token
URL, or NAME URL     where NAME is in ctl.conf too, its certificates and its token
anything else        an Ansible inventory, which ansible-inventory reads; a host that ctl.conf names is as named there
"""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from kvmagent.cli.ctl.ctlconf import CtlConf
from kvmagent.cli.ctl.exits import CtlError, Exit

HOSTS_FILE = "FILE lists one agent per line, as URL, NAME URL, or a NAME from ctl.conf; or it is an Ansible inventory."
_INVENTORY_S = 60.0
_PORT = 7070
# Of whatever scheme: one that is no agent's is told as such.
_URL = re.compile(r"[a-z][a-z0-9+.-]*:/", re.IGNORECASE)


class Host(NamedTuple):
    """One agent, by the name that the operator has for its host; empty for the one that the options name.

    The URL is empty where ctl.conf's is meant.
    """

    name: str
    url: str


def read_hosts(path: Path, conf: CtlConf) -> list[Host]:
    """Return the hosts of a file.

    Raises:
        CtlError: it names none, or one that nobody knows, or is an inventory that cannot be read.
    """
    text = path.read_text(errors="replace").splitlines()
    lines = {n: words for n, line in enumerate(text, 1) if (words := line.split("#", 1)[0].split())}
    names = [words[0] for words in lines.values() if len(words) == 1 and not _URL.match(words[0])]
    urls = [words for words in lines.values() if len(words) <= 2 and _URL.match(words[-1])]
    # An inventory in YAML has keys. Names alone are a list where ctl.conf has all of them, and else what an inventory
    # may be.
    has_keys = any(words[0].endswith(":") for words in lines.values())
    if not has_keys and (urls or (names and len(names) == len(lines) and all(name in conf.agents for name in names))):
        for n, words in lines.items():
            if words not in urls and len(words) > 1:
                odd = f"{path}, line {n}: {' '.join(words)!r} is neither a URL, nor NAME URL"
                raise CtlError(Exit.USAGE, "BAD_HOSTS", odd, "Write one URL per line: https://node1:7070.")
        for name in names:
            conf.find(name)
        return [Host(words[0], words[-1] if words in urls else "") for words in lines.values()]
    if not lines:
        raise _no_hosts(path)
    found = _read_inventory(path, conf)
    if not found:
        raise _no_hosts(path)
    return found


def _no_hosts(path: Path) -> CtlError:
    return CtlError(Exit.USAGE, "NO_HOSTS", f"{path} lists no host", "Write one URL per line: https://node1:7070.")


def _read_inventory(path: Path, conf: CtlConf) -> list[Host]:
    """Ansible's own reader knows ranges, groups, variables and plugins; whoever has an inventory has it."""
    reader = shutil.which("ansible-inventory")
    if reader is None:
        raise CtlError(
            Exit.USAGE,
            "NO_ANSIBLE",
            f"{path} is not a list of URLs, and ansible-inventory is not installed to read it",
            "Install ansible-core, or write one URL per line: https://node1:7070.",
        )
    command = [reader, "-i", str(path), "--list"]
    found, words = None, ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_INVENTORY_S, check=False)
        words = " ".join(done.stderr.split())[:300]
        found = json.loads(done.stdout) if done.returncode == 0 else None
    except subprocess.TimeoutExpired:
        words = f"ansible-inventory did not end within {_INVENTORY_S:g} s"
    except (OSError, ValueError) as error:
        words = words or f"ansible-inventory: {error}"
    if not isinstance(found, dict):
        raise CtlError(Exit.USAGE, "BAD_HOSTS", f"{path}: {words}", "Try it with: ansible-inventory --list -i FILE.")
    variables = found.get("_meta", {}).get("hostvars", {})
    names = {name for group in found.values() for name in group.get("hosts", ())} | set(variables)
    return [Host(name, _make_url(name, variables.get(name, {}), conf)) for name in sorted(names)]


def _make_url(name: str, variables: dict[str, Any], conf: CtlConf) -> str:
    if given := variables.get("kvmagent_url"):
        return str(given)
    if name in conf.agents:
        return ""
    return f"https://{variables.get('ansible_host', name)}:{variables.get('kvmagent_port', _PORT)}"
