"""The agent's configuration: what is in force by it, and whether an agent would start with it."""

from kvmagent.api.security import Security
from kvmagent.cli.ctl.terminal import BOLD, DIM, paint
from kvmagent.plugins import load_plugins
from kvmagent.settings import Settings, list_settings, parse_callback_rule
from kvmagent.tasks.callbacks import Callbacks


def check_settings(settings: Settings) -> None:
    """Read what the settings name, as an agent that starts does.

    Raises:
        AgentError: BAD_CONFIGURATION: a plugin, certificate, key or token file cannot be used.
    """
    load_plugins(settings.agent.plugins)
    Security(settings.security).load()
    Callbacks(map(parse_callback_rule, settings.security.allowed_callbacks), settings.callback).load()


def view_settings(settings: Settings) -> list[str]:
    """Return the settings as a file has them; on a terminal those stand out that are not the default."""
    lines: list[str] = []
    last = ""
    for section, key, value, is_default in list_settings(settings):
        if section != last:
            lines += ["", f"[{section}]"] if lines else [f"[{section}]"]
            last = section
        lines.append(paint(f"{key} = {value}".rstrip(), DIM if is_default else BOLD))
    return lines
