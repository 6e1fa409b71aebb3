"""Prints kvmagent.conf(5), made from the table of settings: what conf/kvmagent.conf says, and types and ranges."""

import sys
from typing import Any, Literal, get_args, get_origin

import msgspec
from mdoc import DATE, text

from kvmagent.settings import DEFAULT_PATH, Settings, describe

HEAD = f"""\
.Dd {DATE}
.Dt KVMAGENT.CONF 5
.Os
.Sh NAME
.Nm kvmagent.conf
.Nd configuration of kvmagent
.Sh SYNOPSIS
.Nm {DEFAULT_PATH}
.Sh DESCRIPTION
An INI file: sections in brackets, one
.Ql key = value
per line, comments after
.Ql # .
Every key has a default, so the file may be empty.
An unknown section or key keeps the agent from starting.
Items of a list are separated by commas.
.Pp
.Ic systemctl reload kvmagent
applies changes, except to keys that need a restart.
.Pp
.Ic kvmagent --sample
prints the file with every key at its default.
.Ic kvmagent --set Ar section.key=value
overrides one key."""

TAIL = """\
.Sh FILES
.Bl -tag -width Ds
.It Pa /etc/kvmagent/kvmagent.conf
this file
.El
.Sh SEE ALSO
.Xr kvmagent 8
"""


def make_page() -> str:
    """Return the page, mdoc."""
    lines = []
    for section in msgspec.structs.fields(Settings):
        lines += [f".Sh SECTION {section.name.upper()}", text((section.type.__doc__ or "").strip())]
        lines += [".Bl -tag -width Ds"]
        lines += [_item(field.name, field.type, field.default) for field in msgspec.structs.fields(section.type)]
        lines += [".El"]
    return "\n".join([HEAD, *lines, TAIL])


def _item(name: str, annotation: Any, default: Any) -> str:
    kind, *metas = get_args(annotation)
    facts = [_kind(kind), *(_range(meta) for meta in metas), f"default: {_value(default)}"]
    return f".It Ic {name}\n{text(describe(annotation))}\n.br\n{text('(' + '; '.join(filter(None, facts)) + ')')}"


def _kind(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    return (
        "list"
        if get_origin(kind) is tuple
        else {str: "text", int: "number", float: "number", bool: "true or false"}[kind]
    )


def _range(meta: msgspec.Meta) -> str:
    if meta.ge is not None and meta.le is not None:
        return f"{meta.ge} to {meta.le}"
    return "" if meta.ge is None else f"at least {meta.ge}"


def _value(default: Any) -> str:
    if isinstance(default, bool):
        return str(default).lower()
    return (", ".join(default) if isinstance(default, tuple) else str(default)) or "empty"


if __name__ == "__main__":
    sys.stdout.write(make_page())
