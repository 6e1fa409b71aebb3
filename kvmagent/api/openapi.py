"""The OpenAPI document, from the same declarations that the agent runs on."""

from collections.abc import Iterable
from typing import Any

import msgspec

from kvmagent import __version__
from kvmagent.api.intake import Accepted
from kvmagent.model.command import Command
from kvmagent.model.errors import CODES, Code
from kvmagent.model.host import Query

_REF = "#/components/schemas/{name}"
# What any command may be refused with at once, by status.
_STATUSES = (400, 403, 405, 409, 413, 503)


class Refusal(msgspec.Struct, kw_only=True, rename="camel"):
    """A request that was refused at once: nothing was stored."""

    success: bool
    error: str
    error_code: Code
    remedy: str
    details: dict[str, Any] = {}


def build_openapi(declared: Iterable[Command | Query], reads: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Return the document. `reads` are the GET paths with what each answers."""
    declared = list(declared)
    shapes = [Accepted, Refusal, *(shape for one in declared for shape in (one.request, one.reply))]
    _, schemas = msgspec.json.schema_components(dict.fromkeys(shapes), ref_template=_REF)
    paths: dict[str, Any] = {one.path: {"post": _operation(one)} for one in declared}
    for path, summary in reads:
        paths[path] = {"get": _read(path, summary)}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "kvmagent",
            "version": __version__,
            "description": "Live CPU and memory hotplug of KVM guests. Commands answer at once; the reply is posted "
            "to the callback URL.",
        },
        "paths": paths,
        "components": {"schemas": schemas},
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
        "parameters": [
            _header("taskuuid", {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"}),
            _header("callbackurl", {"type": "string", "format": "uri", "pattern": "^https?://"}),
        ],
        "requestBody": {"required": True, "content": _json(command.request)},
        "responses": {
            "200": {"description": "The task is on disk", "content": _json(Accepted)},
            **{str(status): {"description": "Refused at once", "content": _json(Refusal)} for status in _STATUSES},
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
        "requestBody": {"required": False, "content": _json(query.request)},
        "responses": {
            "200": {"description": "The answer", "content": _json(query.reply)},
            **{str(status): {"description": "Refused at once", "content": _json(Refusal)} for status in _STATUSES},
        },
    }


def _read(path: str, summary: str) -> dict[str, Any]:
    names = [segment[1:-1] for segment in path.split("/") if segment.startswith("{")]
    operation: dict[str, Any] = {
        "summary": summary,
        "responses": {
            "200": {"description": summary, "content": {"application/json": {"schema": {}}}},
            "default": {"description": "Refused", "content": _json(Refusal)},
        },
    }
    if names:
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    return operation


def _header(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": True, "schema": schema}


def _json(shape: type[msgspec.Struct]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _REF.format(name=shape.__name__)}}}
