"""The configuration file."""

from collections.abc import Iterable
from pathlib import Path

from kvmagent.model.errors import AgentError, Code
from kvmagent.settings import Settings, parse_settings


def read_settings(path: Path, overrides: Iterable[str] = ()) -> Settings:
    """Return the settings of a file, with `section.key=value` overrides applied.

    Raises:
        AgentError: BAD_CONFIGURATION: the file cannot be read, or what it says is wrong.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise AgentError(
            Code.BAD_CONFIGURATION,
            f"{path}: {error}",
            remedy="Write the file (kvmagent --sample prints one) so that the agent's user can read it, or name "
            "another with --config.",
        ) from error
    return parse_settings(text, overrides)
