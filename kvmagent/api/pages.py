"""Lists that clients read by pages and fields, and again at little cost.

limit, cursor -> a page: what follows the entry that the cursor stands for; `next` is the cursor of the next page
fields        -> of each entry its id and these fields alone
ETag          -> a list that is as it was when it was read last: 304, and no body
"""

import hashlib
import re
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec

from kvmagent.api.server import Answer, Call
from kvmagent.model.errors import AgentError, Code

MAX_LIMIT = 1000
#: Of a list whose entries have the chosen fields alone: another shape, and so another type.
FIELDS_TYPE = "application/vnd.kvmagent.fields+json"
_NUMBER = re.compile(r"[1-9][0-9]{0,3}")
_FIELDS = re.compile(r"\w+(?:,\w+)*", re.ASCII)
_ENTITY_TAG = re.compile(r'(?:W/)?"([^"]*)"')


class Page(NamedTuple):
    """What a caller wants to read: None where it does not say."""

    limit: int | None
    cursor: str | None
    fields: frozenset[str] | None


#: The query parameters of a list.
LIST_QUERY: Mapping[str, Any] = MappingProxyType(
    {
        "limit": {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "description": "Maximum number of entries"},
        "cursor": {"type": "string", "description": "`next` of the previous page; its format may change"},
        "fields": {
            "type": "string",
            "pattern": f"^{_FIELDS.pattern}$",
            "description": "Fields of each entry besides its id, separated by commas",
        },
    }
)


def read_page(query: Mapping[str, str], *, cursor: re.Pattern[str], fields: Collection[str]) -> Page:
    """Return what a query says of the page.

    Raises:
        AgentError: BAD_QUERY.
    """
    limit, after, chosen = query.get("limit"), query.get("cursor"), query.get("fields")
    if limit is not None and not (_NUMBER.fullmatch(limit) and int(limit) <= MAX_LIMIT):
        raise AgentError(Code.BAD_QUERY, f"limit must be 1 to {MAX_LIMIT}, got {limit!r}")
    if after is not None and not cursor.fullmatch(after):
        raise AgentError(Code.BAD_QUERY, f"cursor must be the `next` of a page, got {after!r}")
    if chosen is None:
        return Page(None if limit is None else int(limit), after, None)
    names = frozenset(chosen.split(","))
    if unknown := sorted(names - set(fields)):
        raise AgentError(
            Code.BAD_QUERY, f"no field is named {unknown[0]!r}; the fields are {', '.join(sorted(fields))}"
        )
    return Page(None if limit is None else int(limit), after, names)


def choose_fields(entry: bytes, names: Collection[str]) -> msgspec.Raw:
    """Return a JSON object with those of its fields that are named."""
    return msgspec.Raw(
        msgspec.json.encode({name: part for name, part in _OBJECT.decode(entry).items() if name in names})
    )


def answer_list(call: Call, page: Page, body: bytes) -> Answer:
    """Return the answer: 304 where the caller has it already."""
    tag = hashlib.blake2b(body, digest_size=12).hexdigest()
    headers = {"ETag": f'"{tag}"'}
    asked = call.headers.get("if-none-match", "")
    if asked.strip() == "*" or tag in _ENTITY_TAG.findall(asked):
        return Answer(b"", status=304, headers=headers)
    return Answer(body, headers={**headers, **({"Content-Type": FIELDS_TYPE} if page.fields is not None else {})})


_OBJECT = msgspec.json.Decoder(dict[str, msgspec.Raw])
