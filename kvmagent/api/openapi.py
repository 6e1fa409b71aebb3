"""The OpenAPI document, from the same declarations that the agent runs on."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec

from kvmagent import __version__
from kvmagent.api.intake import Accepted
from kvmagent.model.command import NO_CALLBACK, Command
from kvmagent.model.errors import CODES, Code
from kvmagent.model.host import Query
from kvmagent.model.roles import Open, Role

_SCHEMES = {"token": {"type": "http", "scheme": "bearer"}, "certificate": {"type": "mutualTLS"}}
_REF = "#/components/schemas/{name}"
# What any request may be refused with, by status; what a command may be beside that, and a read.
_ANY = (400, 401, 403, 405, 408, 413, 414, 431, 500, 503)
_COMMAND, _READ = (409,), (404,)


class Refusal(msgspec.Struct, kw_only=True, rename="camel"):
    """A request that was refused at once: nothing was stored."""

    success: bool
    error: str
    error_code: Code
    remedy: str
    details: dict[str, Any] = {}


class OwnPath(NamedTuple):
    """A path that no plugin declares, what it answers, the role that it needs, and the schemas of its query and answer.

    `host`: it concerns the whole host, so that a role for some VMs is not enough.
    `request` and `reply` are the shapes of bodies that have one.
    """

    path: str
    summary: str
    needs: Role | Open
    host: bool = False
    query: Mapping[str, Any] = MappingProxyType({})
    method: str = "get"
    content: Mapping[str, Any] = MappingProxyType({"application/json": {"schema": {}}})
    request: type[msgspec.Struct] | None = None
    reply: type[msgspec.Struct] | None = None


def build_openapi(declared: Iterable[Command | Query], own: Iterable[OwnPath]) -> dict[str, Any]:
    """Return the document."""
    declared, own = list(declared), list(own)
    shapes = [Accepted, Refusal, *(shape for one in declared for shape in (one.request, one.reply))]
    shapes += [shape for one in own for shape in (one.request, one.reply) if shape is not None]
    _, schemas = msgspec.json.schema_components(dict.fromkeys(shapes), ref_template=_REF)
    paths: dict[str, Any] = {one.path: {"post": _operation(one)} for one in declared}
    paths |= {one.path: {one.method: _own(one)} for one in own}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "kvmagent",
            "version": __version__,
            "description": "Live CPU and memory hotplug of KVM guests. Commands answer at once; the reply is posted "
            "to the callback URL. No command restarts or migrates a VM; a change that needs a restart says so.",
        },
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": _SCHEMES},
        # Which of them an agent asks for is its configuration's; its UNIX socket asks for none.
        "security": [{}, *({name: []} for name in _SCHEMES)],
        "x-error-codes": {
            code.value: {"status": info.status, "meaning": info.meaning, "remedy": info.remedy}
            for code, info in CODES.items()
        },
    }


def _operation(command: Command | Query) -> dict[str, Any]:
    if isinstance(command, Query) and command.sync:
        return _sync_operation(command)
    refusals = f"; refusals: {', '.join(command.refusals)}" if isinstance(command, Command) else ""
    return {
        "operationId": command.name,
        "summary": command.summary,
        "x-role": command.role,
        "parameters": [
            _header("taskuuid", {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"}),
            _header("callbackurl", {"type": "string", "pattern": f"^(https?://|{NO_CALLBACK}$)"}),
        ],
        "requestBody": {"required": True, "content": _json(command.request)},
        "responses": {
            "200": {"description": "The task is on disk", "content": _json(Accepted)},
            **_refusals(_ANY + _COMMAND),
        },
        "callbacks": {
            "outcome": {
                "{$request.header.callbackurl}": {
                    "post": {
                        "summary": f"The outcome of {command.name}{refusals}",
                        "parameters": [_header("taskuuid", {"type": "string"})],
                        "requestBody": {"required": True, "content": _json(command.reply)},
                        "responses": {
                            "2XX": {"description": "Taken"},
                            "404": {"description": "The task is unknown: it is not sent again"},
                        },
                    }
                }
            }
        },
    }


def _sync_operation(query: Query) -> dict[str, Any]:
    return {
        "operationId": query.name,
        "summary": query.summary,
        "x-role": query.role,
        "requestBody": {"required": False, "content": _json(query.request)},
        "responses": {
            "200": {"description": "The answer", "content": _json(query.reply)},
            **_refusals(_ANY),
        },
    }


def _own(own: OwnPath) -> dict[str, Any]:
    names = [segment[1:-1] for segment in own.path.split("/") if segment.startswith("{")]
    return {
        "summary": own.summary,
        "x-role": own.needs,
        "parameters": [
            *({"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names),
            *({"name": name, "in": "query", "schema": schema} for name, schema in own.query.items()),
        ],
        **({"requestBody": {"required": True, "content": _json(own.request)}} if own.request else {}),
        "responses": {
            "200": {"description": own.summary, "content": _json(own.reply) if own.reply else dict(own.content)},
            **_refusals(_ANY + _READ + (_COMMAND if own.method == "post" else ())),
        },
    }


def _refusals(statuses: Iterable[int]) -> dict[str, Any]:
    return {str(status): {"description": "Refused", "content": _json(Refusal)} for status in statuses}


def _header(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": True, "schema": schema}


def _json(shape: type[msgspec.Struct]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _REF.format(name=shape.__name__)}}}
