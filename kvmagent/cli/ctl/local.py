"""The agent of this host, if the user names none: its configuration says how to reach it."""

from pathlib import Path

from kvmagent.cli.configfile import read_settings
from kvmagent.model.errors import AgentError
from kvmagent.settings import DEFAULT_PATH, Settings

# Who listens on every address is asked on this host's own.
_OWN = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def find_local_target(config: Path = Path(DEFAULT_PATH)) -> dict[str, str]:
    """Return the local agent's URL and CA; those of a configuration without a change where it cannot be read.

    Its socket where it has one: that takes no credentials, however the agent is reached from elsewhere.
    """
    try:
        return target_of(read_settings(config))
    except AgentError:
        return target_of(Settings())


def target_of(settings: Settings) -> dict[str, str]:
    """Return how an agent with these settings is reached. The CA that signs clients often signs the agent too."""
    if settings.http.socket:
        return {"url": f"unix://{settings.http.socket}"}
    host = _OWN.get(settings.http.host, settings.http.host)
    shown = f"[{host}]" if ":" in host else host
    scheme = "https" if settings.security.tls_cert else "http"
    return {"url": f"{scheme}://{shown}:{settings.http.port}", "ca": settings.security.client_ca}
