"""What the doctor checks if haproxy shares a ZStack node between two agents: conf/zstack/haproxy.cfg.

The configuration says where it listens and where it sends hotplug; then each agent is asked through it what changes
nothing.
"""

import http.client
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from kvmagent.cli.ctl.findings import Finding
from kvmagent.settings import Settings

DEFAULT_CONFIG = Path("/etc/haproxy/haproxy.cfg")
_TIMEOUT_S = 10.0


class Front(NamedTuple):
    """What a configuration says: the port for the server, kvmagent's address, the file with the servers' addresses."""

    port: int
    agent: str
    servers_file: str


def examine_front(settings: Settings, config: Path = DEFAULT_CONFIG) -> Iterator[Finding]:
    """Look whether a front leads hotplug here and the rest to ZStack's own agent; no finding where there is none."""
    try:
        front = find_front(config.read_text())
    except OSError:
        return
    if front is None:
        return
    yield from _examine_settings(settings, front)
    yield from _examine_servers(front)
    yield from _ask_this_agent(front)
    yield from _ask_original(front)


def find_front(text: str) -> Front | None:
    """Return what a haproxy configuration says of the front; None where it is another's."""
    sections: dict[str, list[list[str]]] = {}
    lines: list[list[str]] = []
    for line in text.splitlines():
        words = line.partition("#")[0].split()
        if words and not line[0].isspace():
            lines = sections.setdefault(" ".join(words[:2]), [])
        elif words:
            lines.append(words)
    binds = [words[1] for words in sections.get("frontend zstack", []) if words[0] == "bind"]
    agents = [words[2] for words in sections.get("backend kvmagent", []) if words[0] == "server" and len(words) > 2]
    acls = [words for words in sections.get("frontend zstack", []) if words[:3] == ["acl", "from_server", "src"]]
    port = binds[0].rpartition(":")[2] if binds else ""
    if not port.isdecimal() or not agents:
        return None
    return Front(int(port), agents[0], acls[0][-1] if acls and "-f" in acls[0] else "")


def _examine_settings(settings: Settings, front: Front) -> Iterator[Finding]:
    here = f"{settings.http.host}:{settings.http.port}"
    if front.agent != here:
        message = f"haproxy sends hotplug to {front.agent}, but the agent listens on {here}"
        yield Finding("front", "wrong", message, f"Set http.port = {front.agent.rpartition(':')[2]} in kvmagent.conf.")
    if "host" in settings.agent.plugins:
        message = "agent.plugins contains host, but ZStack's own agent answers for the host"
        yield Finding("front", "warning", message, "Set agent.plugins = vm in kvmagent.conf.")
    if not settings.security.tokens_file:
        message = "security.tokens_file is not set: every user of this host could plug"
        remedy = "Make a token: kvmagent --new-token zstack (docs/zstack.md)."
        yield Finding("front", "wrong", message, remedy)
    if set(settings.security.allowed_callbacks) <= {"caller"}:
        message = "security.allowed_callbacks names no management server: all commands come from haproxy"
        remedy = "Set security.allowed_callbacks = SERVER:8080 in kvmagent.conf."
        yield Finding("front", "wrong", message, remedy)


def _examine_servers(front: Front) -> Iterator[Finding]:
    try:
        lines = (
            [line.strip() for line in Path(front.servers_file).read_text().splitlines()] if front.servers_file else []
        )
    except OSError as error:
        message, remedy = f"{front.servers_file}: {error.strerror}", "Run doctor as root."
        yield Finding("front", "note", message, remedy)
        return
    if not any(line and not line.startswith("#") for line in lines):
        message = (
            f"{front.servers_file or 'the acl from_server'} names no management server: haproxy lets nobody through"
        )
        yield Finding("front", "wrong", message, "Write their addresses, one per line, then: systemctl reload haproxy.")


def _ask_this_agent(front: Front) -> Iterator[Finding]:
    """Send a command without a task: the agent refuses it, and so says that it was reached and knows the front."""
    try:
        status, body = _post(front.port, "/vm/increase/cpu")
    except OSError as error:
        message = f"port {front.port} of haproxy cannot be reached: {error}"
        yield Finding(
            "front", "wrong", message, "Start it: systemctl start haproxy; journalctl -u haproxy says why not."
        )
        return
    code = body.get("errorCode", "") if isinstance(body, dict) else ""
    if code == "MISSING_TASK_UUID":
        yield Finding(
            "front", "good", f"port {front.port} forwards hotplug to this agent, which accepts haproxy's token"
        )
    elif code.startswith("CREDENTIALS") or code == "ROLE_MISSING":
        message = f"the agent does not accept haproxy's token: {body['error']}"
        remedy = (
            "Put the token into /etc/default/haproxy and its line into security.tokens_file, then: systemctl restart "
        )
        yield Finding("front", "wrong", message, f"{remedy}kvmagent haproxy.")
    elif status == http.HTTPStatus.SERVICE_UNAVAILABLE:
        message = f"haproxy cannot reach an agent at {front.agent}"
        yield Finding("front", "wrong", message, "Start it: systemctl start kvmagent.")
    else:
        message = f"a hotplug command on port {front.port} is answered by HTTP {status}, not by this agent"
        yield Finding(
            "front", "wrong", message, "Compare with conf/zstack/haproxy.cfg, then: systemctl reload haproxy."
        )


def _ask_original(front: Front) -> Iterator[Finding]:
    try:
        status, _ = _post(front.port, "/host/echo")
    except OSError:
        return  # told already
    if status == http.HTTPStatus.OK:
        yield Finding("front", "good", "everything else goes to ZStack's own agent, which answers")
    else:
        message = f"ZStack's own agent does not answer: HTTP {status}"
        yield Finding("front", "wrong", message, "Start it: /etc/init.d/zstack-kvmagent start.")


def _post(port: int, path: str) -> tuple[int, Any]:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_S)) as connection:
        try:
            connection.request("POST", path, b"{}", {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read()
        except http.client.HTTPException as error:
            raise OSError(f"{type(error).__name__}: {error}") from error
    try:
        return answer.status, json.loads(text)
    except ValueError:
        return answer.status, None
