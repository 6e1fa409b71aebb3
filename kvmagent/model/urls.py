"""Shows a URL without its secrets: the only way that URLs reach logs, errors, the journal and /tasks.

Never shown: user names and passwords, queries, fragments. Of what is no URL but might have been meant as one, no more.
"""

import re
from typing import Any

# From a scheme to the next blank or quote, as it stands in the middle of a text. A password may hold a single quote.
# With a bound, so that a long word takes no longer than its length.
_URL = re.compile(r"""(?P<scheme>[A-Za-z][A-Za-z0-9+.-]{0,30}://)(?P<rest>[^\s"<>]+)""")
_SECRET = re.compile(r"[?#].*", re.DOTALL)
# Of a request line, which libraries print without the host.
_QUERY = re.compile(r"""\?[^\s"']+""")


def shown_url(url: str) -> str:
    """Return a URL, or what somebody gave as one, without its secrets."""
    scheme, mark, rest = url.partition("://")
    return scheme + mark + _shown_rest(rest) if mark else _shown_rest(url)


def shown_text(text: str) -> str:
    """Return a text, each URL in it without its secrets."""
    if "://" not in text:  # almost every text; the expression takes 1.5 us to find that out
        return text
    return _URL.sub(lambda match: match["scheme"] + _shown_rest(match["rest"]), text)


def shown_line(text: str) -> str:
    """Return a library's log line, without the secrets of URLs and of request lines in it."""
    return shown_text(_QUERY.sub("?...", text))


def shown_field(name: str, value: str) -> str:
    """Return the text of a field; one that is named as a URL is one whole, with blanks in its secrets too."""
    return shown_url(value) if name.lower().endswith("url") else shown_text(value)


def shown_json(value: Any) -> Any:
    """Return JSON, each text in it as `shown_text` has it, each field as `shown_field`."""
    if isinstance(value, str):
        return shown_text(value)
    if isinstance(value, list):
        return [shown_json(one) for one in value]
    if isinstance(value, dict):
        return {
            name: shown_field(name, one) if isinstance(one, str) else shown_json(one) for name, one in value.items()
        }
    return value


def _shown_rest(rest: str) -> str:
    before, at, after = _SECRET.sub("", rest).rpartition("@")
    # With a slash before it nobody knows whether it is of a path or of a password.
    return f"...@{after}" if at and "/" in before else after
