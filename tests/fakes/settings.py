"""Settings out of a text."""

from collections.abc import Iterable

from kvmagent.settings import Settings, parse_sources


def parse_settings(text: str, overrides: Iterable[str] = (), *, source: str = "") -> Settings:
    """Return the settings of an INI text, with `section.key=value` overrides applied."""
    return parse_sources([(source, text)], overrides)
