"""Makes a subcommand from each declared Command: its arguments, options, ranges and help from the request's fields.

A required field is an argument, an optional one an option. Names are those of the wire as an operator says them:
`maxCpuNum` is --max-cpus, `memorySize` --memory, `timeoutSec` --timeout. Fields whose name ends in `Size` are sizes.
"""

from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

import click
import msgspec
from msgspec import inspect

from kvmagent.model.command import Command, VmName
from kvmagent.model.errors import AgentError
from kvmagent.model.units import format_size, parse_size
from kvmagent.plugins import installed_plugins, load_plugins

# Fields that say nothing to whom waits for one answer and goes.
_NOT_OFFERED = {"late_callback"}
_WORDS = {"vm_uuid": "vm", "cpu_num": "cpus", "memory_size": "memory", "timeout_sec": "timeout"}


class Size(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.3 on alone
    """A size such as 4G or 512MiB, as bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the bytes, or end with what is wrong."""
        if isinstance(value, int):
            return value
        try:
            return parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class VmNameType(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.3 on alone
    """A VM's name or UUID, which may be no VM's: a variable of a script that is not set is told as such."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name, or end with what is wrong."""
        try:
            return msgspec.convert(value, VmName)
        except msgspec.ValidationError:
            self.fail("it is empty" if value == "" else f"{value!r} cannot be a VM's name or UUID", param, ctx)


VM_NAME = VmNameType()


class More(NamedTuple):
    """So much more than there is: +1 or +2G."""

    amount: int


class Total(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.3 on alone
    """A total, or where it `adds` and + is before it what is to be added."""

    def __init__(self, kind: "click.ParamType[Any]", *, adds: bool) -> None:
        self.kind = kind
        self.adds = adds
        self.name = kind.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the total, or More."""
        if isinstance(value, str) and value.startswith("+"):
            if not self.adds:
                self.fail(f"{value} would add: give the total that is to remain", param, ctx)
            return More(int(self.kind.convert(value[1:], param, ctx)))
        return self.kind.convert(value, param, ctx)


class _Shape(NamedTuple):
    """What a field's annotation says of its values."""

    type: Any
    description: str
    is_flag: bool


def find_commands(plugins: Iterable[Any]) -> dict[str, Command]:
    """Return the commands that kvmagentctl offers, by subcommand."""
    return {command.subcommand: command for plugin in plugins for command in plugin.commands if command.subcommand}


@cache
def load_commands() -> dict[str, Command]:
    """Return the commands of all plugins that can be loaded, by subcommand, in the order in which they are declared."""
    plugins = []
    for name in installed_plugins():
        try:
            plugins += load_plugins([name])
        except AgentError:
            continue  # a broken one takes only its own subcommands away; doctor tells of it
    return find_commands(plugins)


def find_options(request: type[msgspec.Struct]) -> dict[str, str | None]:
    """Return what each field is here, by its name on the wire: an option, an argument, or None: not offered."""
    return {
        field.encode_name: None
        if field.name in _NOT_OFFERED
        else _word(field).upper()
        if field.required
        else f"--{_word(field)}"
        for field in _all_fields(request)
    }


def make_params(request: type[msgspec.Struct], *, complete_vm: Any, adds: bool = False) -> list[click.Parameter]:
    """Return the arguments and options for a request; `complete_vm` completes names of VMs.

    `adds`: a required number may be what to add, and is More then.
    """
    params: list[click.Parameter] = []
    fields = _fields(request)
    for field in sorted(fields, key=lambda field: not field.required):
        shape = _shape(field)
        if field.required:
            complete = complete_vm if field.name == "vm_uuid" else None
            kind = Total(shape.type, adds=adds) if isinstance(shape.type, Size | click.IntRange) else shape.type
            kind = VM_NAME if field.name == "vm_uuid" else kind
            params.append(
                click.Argument([field.name], type=kind, metavar=_word(field).upper(), shell_complete=complete)
            )
            continue
        option = f"--{_word(field)}"
        if field.default is True:
            option = f"{option}/--no-{_word(field)}"
        params.append(
            click.Option(
                [option, field.name],
                type=None if shape.is_flag else shape.type,
                is_flag=shape.is_flag,
                default=None,
                metavar=_metavar(field, shape),
                help=_help(field, shape),
            )
        )
    return params


def make_body(request: type[msgspec.Struct], values: dict[str, Any]) -> dict[str, Any]:
    """Return the request's JSON: the fields that were given, by their names on the wire."""
    names = {field.name: field.encode_name for field in _fields(request)}
    return {names[name]: value for name, value in values.items() if name in names and value is not None}


def _fields(request: type[msgspec.Struct]) -> list[inspect.Field]:
    return [field for field in _all_fields(request) if field.name not in _NOT_OFFERED]


def _all_fields(request: type[msgspec.Struct]) -> tuple[inspect.Field, ...]:
    shape = inspect.type_info(request)
    assert isinstance(shape, inspect.StructType)
    return shape.fields


def _shape(field: inspect.Field) -> _Shape:
    kind, description = field.type, ""
    if isinstance(kind, inspect.UnionType):  # X | None
        kind = next(one for one in kind.types if not isinstance(one, inspect.NoneType))
    if isinstance(kind, inspect.Metadata):
        description = (kind.extra_json_schema or {}).get("description", "")
        kind = kind.type
    if isinstance(kind, inspect.IntType) and field.name.endswith("_size"):
        return _Shape(Size(), description.removesuffix(", bytes"), is_flag=False)
    if isinstance(kind, inspect.IntType):
        return _Shape(click.IntRange(kind.ge, kind.le), description, is_flag=False)
    if isinstance(kind, inspect.LiteralType):
        return _Shape(click.Choice([str(value) for value in kind.values]), description, is_flag=False)
    return _Shape(click.STRING, description, is_flag=isinstance(kind, inspect.BoolType))


def _word(field: inspect.Field) -> str:
    word = field.name
    for name, said in _WORDS.items():
        word = word.replace(name, said)
    return word.replace("_", "-")


def _metavar(field: inspect.Field, shape: _Shape) -> str | None:
    if shape.is_flag or isinstance(shape.type, click.Choice):
        return None
    if isinstance(shape.type, Size):
        return "SIZE"
    return "SECONDS" if field.name.endswith("_sec") else "NUMBER"


def _help(field: inspect.Field, shape: _Shape) -> str:
    default = field.default
    if default is None or default is msgspec.NODEFAULT or isinstance(default, bool):
        return f"{shape.description}."
    shown = format_size(default) if isinstance(shape.type, Size) else default
    return f"{shape.description}. [default: {shown}]"
