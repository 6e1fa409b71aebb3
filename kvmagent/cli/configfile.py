"""The configuration file."""

from collections.abc import Iterable
from pathlib import Path

from kvmagent.model.errors import AgentError, Code
from kvmagent.private import read_file
from kvmagent.settings import Settings, parse_settings


def read_settings(path: Path, overrides: Iterable[str] = ()) -> Settings:
    """Return the settings of a file, with `section.key=value` overrides applied.

    Raises:
        AgentError: BAD_CONFIGURATION: the file cannot be read, or what it says is wrong.
    """
    try:
        text = read_file(str(path), "the configuration")
    except AgentError as error:
        raise AgentError(
            Code.BAD_CONFIGURATION,
            error.message,
            remedy="Write the file (kvmagent --sample prints one) so that the agent's user can read it, or name "
            "another with --config.",
        ) from error
    return parse_settings(text, overrides)
