"""How a URL is shown: in logs, errors, /tasks. The only place that does it, so that no password gets out by another."""

import re

# From a scheme to the next blank or quote, as libraries print it in the middle of a text.
_URL = re.compile(r"""(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)(?P<rest>[^\s"'<>]+)""")
_USER = re.compile(r"[^/?#]*@")
_SECRET = re.compile(r"[?#].*", re.DOTALL)


def shown_url(url: str) -> str:
    """Return a URL, or a text with URLs in it, without user names, passwords, queries and fragments."""
    return _URL.sub(_without_secrets, url)


def _without_secrets(match: re.Match[str]) -> str:
    return match["scheme"] + _SECRET.sub("", _USER.sub("", match["rest"]))
