"""The OpenAPI document, from the same declarations that the agent runs on."""

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec

from kvmagent import __version__
from kvmagent.api.intake import Accepted
from kvmagent.api.pages import FIELDS_TYPE
from kvmagent.api.schemas import API_VERSION, UnreadableVm
from kvmagent.model.command import NO_CALLBACK, Command
from kvmagent.model.errors import CODES, Code
from kvmagent.model.host import Query
from kvmagent.model.reply import VmReply
from kvmagent.model.roles import Open, Role

_SCHEMES = {"token": {"type": "http", "scheme": "bearer"}, "certificate": {"type": "mutualTLS"}}
_TAGS = {
    "commands": "Changes of VMs: accepted at once, the outcome is posted to the callback URL",
    "host": "Requests of a management server about its host",
    "reads": "VMs, tasks and the agent as they are now",
}
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
    """A path that no plugin declares, what it answers, the role that it needs, and the schemas of its query.

    `host`: it concerns the whole host, so that a role for some VMs is not enough. `operation` is its operationId,
    `answer` what it answers: a shape, "vm" or "vms", or a media type of text; `request` the shape of a body.
    """

    operation: str
    path: str
    summary: str
    needs: Role | Open
    answer: type[msgspec.Struct] | str
    host: bool = False
    query: Mapping[str, Any] = MappingProxyType({})
    method: str = "get"
    request: type[msgspec.Struct] | None = None


def build_openapi(declared: Iterable[Command | Query], own: Iterable[OwnPath]) -> dict[str, Any]:
    """Return the document."""
    declared, own = list(declared), list(own)
    vm = find_vm_shape(declared)
    answers = [one.answer for one in own if not isinstance(one.answer, str)]
    asked = [shape for one in declared for shape in (one.request, one.reply)]
    asked += [one.request for one in own if one.request is not None]
    shapes = [Accepted, Refusal, UnreadableVm, vm, *answers, *asked]
    _, schemas = msgspec.json.schema_components(dict.fromkeys(shapes), ref_template=_REF)
    _finish_schemas(schemas, requests=[one.request for one in (*declared, *own) if one.request is not None])
    paths: dict[str, Any] = {one.path: {"post": _operation(one)} for one in declared}
    paths |= {one.path: {one.method: _own(one, vm, schemas)} for one in own}
    for item in paths.values():
        for operation in item.values():
            _add_examples(operation, schemas)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "kvmagent",
            "version": __version__,
            "x-api-version": API_VERSION,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            "contact": {"name": "the kvmagent maintainers, by the project's issue tracker"},
            "description": "Live CPU and memory hotplug of KVM guests. Commands answer at once; the reply is posted "
            "to the callback URL. No command restarts or migrates a VM; a change that needs a restart says so.",
        },
        "servers": [{"url": "/", "description": "This agent"}],
        "tags": [{"name": name, "description": words} for name, words in _TAGS.items()],
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": _SCHEMES},
        # Which of them an agent asks for is its configuration's; its UNIX socket asks for none.
        "security": [{}, *({name: []} for name in _SCHEMES)],
        "x-error-codes": {
            code.value: {"status": info.status, "meaning": info.meaning, "remedy": info.remedy}
            for code, info in CODES.items()
        },
    }


def find_vm_shape(declared: Iterable[Command | Query]) -> type[msgspec.Struct]:
    """Return the shape of one VM's entry."""
    return next((one.reply for one in declared if one.name == "ReadyForHotplug"), VmReply)


def _finish_schemas(schemas: Mapping[str, Any], *, requests: Iterable[type[msgspec.Struct]]) -> None:
    """Make them such that client generators take them, and that their clients take what is added later.

    An array says what its items are, be it anything. A word that only answers have, such as a code, may come to have
    more values: `x-extensible-enum`, since what a generator makes of `enum` fails on a value that it does not know.
    A pattern ends as ECMA-262 has it, where Python's end of a text is the letter Z.
    """
    taken = [name for shape in requests for name in _find_reached(schemas, shape.__name__)]
    for name, schema in schemas.items():
        for part in _walk(schema):
            if part.get("type") == "array":
                part.setdefault("items", {})
            if isinstance(part.get("pattern"), str):
                part["pattern"] = part["pattern"].replace(r"\Z", "$")
            if name not in taken and isinstance(part.get("enum"), list):
                part |= {"type": "string", "x-extensible-enum": part.pop("enum")}


def _find_reached(schemas: Mapping[str, Any], name: str) -> set[str]:
    """Return the names of a schema and of all that it refers to."""
    found, ahead = set[str](), [name]
    while ahead:
        name = ahead.pop()
        if name not in found:
            found.add(name)
            references = (part.get("$ref") for part in _walk(schemas[name]))
            ahead += [one.rpartition("/")[2] for one in references if isinstance(one, str)]
    return found


def _walk(schema: Any) -> Iterator[dict[str, Any]]:
    """Yield each object of a JSON document."""
    if isinstance(schema, dict):
        yield schema
    for part in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        yield from _walk(part)


def _operation(command: Command | Query) -> dict[str, Any]:
    if isinstance(command, Query) and command.sync:
        return _sync_operation(command)
    refusals = f"; refusals: {', '.join(command.refusals)}" if isinstance(command, Command) else ""
    return {
        "operationId": command.name,
        "tags": ["commands" if isinstance(command, Command) else "host"],
        "summary": command.summary,
        "x-role": command.role,
        "parameters": [
            _header("taskuuid", {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"}),
            _header("callbackurl", {"type": "string", "pattern": f"^(https?://|{NO_CALLBACK}$)"}),
            {"name": "traceparent", "in": "header", "required": False, "schema": {"type": "string"}},
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
                            "404": {"description": "The receiver does not know the task: the agent does not retry"},
                        },
                    }
                }
            }
        },
    }


def _sync_operation(query: Query) -> dict[str, Any]:
    return {
        "operationId": query.name,
        "tags": ["host"],
        "summary": query.summary,
        "x-role": query.role,
        "requestBody": {"required": False, "content": _json(query.request)},
        "responses": {
            "200": {"description": "The answer", "content": _json(query.reply)},
            **_refusals(_ANY),
        },
    }


def _own(own: OwnPath, vm: type[msgspec.Struct], schemas: dict[str, Any]) -> dict[str, Any]:
    names = [segment[1:-1] for segment in own.path.split("/") if segment.startswith("{")]
    refusals = _refusals(_ANY + _READ + (_COMMAND if own.method == "post" else ()))
    content = _answer(own.answer, vm)
    if own.path == "/healthz":
        both = [content["application/json"]["schema"], _ref(Refusal)]
        refusals["503"] = {"description": "Not ready", "content": {"application/json": {"schema": {"anyOf": both}}}}
    if is_list := "fields" in own.query:
        content[FIELDS_TYPE] = {"schema": _tell_chosen(content["application/json"]["schema"], schemas)}
        refusals["304"] = {"description": "Unchanged since the answer with that ETag"}
    return {
        "operationId": own.operation,
        "tags": ["reads" if own.method == "get" else "commands"],
        "summary": own.summary,
        "x-role": own.needs,
        "parameters": [
            *({"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names),
            *({"name": name, "in": "query", "schema": schema} for name, schema in own.query.items()),
            *([{"name": "If-None-Match", "in": "header", "schema": {"type": "string"}}] if is_list else []),
        ],
        **({"requestBody": {"required": True, "content": _json(own.request)}} if own.request else {}),
        "responses": {
            "200": {"description": own.summary, "content": content, **({"headers": _ETAG} if is_list else {})},
            **refusals,
        },
    }


def _tell_chosen(listed: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a list whose entries have only some fields; the schema of such an entry is added."""
    while "$ref" in listed:
        listed = schemas[listed["$ref"].rpartition("/")[2]]
    (name,) = listed["required"]
    entry, *others = listed["properties"][name]["items"].get("anyOf", [listed["properties"][name]["items"]])
    whole = entry["$ref"].rpartition("/")[2]
    key = next(key for key in ("taskUuid", "vmUuid") if key in schemas[whole]["properties"])
    chosen = f"{whole}Fields"
    words = f"Those fields of a {whole} that were requested."
    schemas[chosen] = schemas[whole] | {"title": chosen, "description": words, "required": [key]}
    items = {"anyOf": [{"$ref": _REF.format(name=chosen)}, *others]} if others else {"$ref": _REF.format(name=chosen)}
    return {
        "type": "object",
        "required": [name],
        "properties": {**listed["properties"], name: {"type": "array", "items": items}},
    }


_ETAG = {"ETag": {"description": "The answer's ETag; send it back as If-None-Match", "schema": {"type": "string"}}}


def _answer(answer: type[msgspec.Struct] | str, vm: type[msgspec.Struct]) -> dict[str, Any]:
    """Return the content of an answer; `vm` is the shape of one VM's entry."""
    if not isinstance(answer, str):
        return _json(answer)
    if answer == "vm":
        return _json(vm)
    if answer == "vms":
        items = {"anyOf": [_ref(vm), _ref(UnreadableVm)]}
        properties = {"vms": {"type": "array", "items": items}, "next": {"type": "string"}}
        return {"application/json": {"schema": {"type": "object", "required": ["vms"], "properties": properties}}}
    return {answer: {"schema": {"type": "object" if answer == "application/json" else "string"}}}


def _refusals(statuses: Iterable[int]) -> dict[str, Any]:
    """Return the answers to a request that is refused, each with the codes that it may have."""
    return {
        str(status): {
            "description": f"Refused: {', '.join(code for code, info in CODES.items() if info.status == status)}",
            "content": _json(Refusal),
        }
        for status in statuses
    }


def _add_examples(operation: dict[str, Any], schemas: Mapping[str, Any]) -> None:
    """Give the request and the first answer of an operation an example each."""
    parts = [operation.get("requestBody", {}), operation["responses"]["200"]]
    for part in parts:
        for content in part.get("content", {}).values():
            content["example"] = _example(content["schema"], schemas)


# What a field of that name may hold, where its schema alone would make a poor example.
_SAMPLES: Mapping[str, Any] = MappingProxyType(
    {
        "vmUuid": "db-7",
        "taskUuid": "9f1c",
        "cpuNum": 4,
        "memorySize": 8 * 2**30,
        "state": "accepted",
        "targets": [{"cpuNum": 4}],
    }
)


def _example(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> Any:
    """Return a value that fits a schema: of an object what is required."""
    if "$ref" in schema:
        return _example(schemas[schema["$ref"].rpartition("/")[2]], schemas)
    if "anyOf" in schema:
        return _example(schema["anyOf"][0], schemas)
    if words := schema.get("enum", schema.get("x-extensible-enum")):
        return words[0]
    kind = schema.get("type")
    if kind == "object":
        fields = schema.get("properties", {})
        return {name: _sample(name, fields[name], schemas) for name in schema.get("required", ())}
    simple = {"string": "text", "integer": schema.get("minimum", 0), "number": 0.0, "boolean": True, "array": []}
    return simple.get(str(kind))


def _sample(name: str, schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> Any:
    words = schema.get("enum", schema.get("x-extensible-enum"))
    fits = words is None or _SAMPLES.get(name) in words
    return _SAMPLES[name] if name in _SAMPLES and fits else _example(schema, schemas)


def _header(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": True, "schema": schema}


def _json(shape: type[msgspec.Struct]) -> dict[str, Any]:
    return {"application/json": {"schema": _ref(shape)}}


def _ref(shape: type[msgspec.Struct]) -> dict[str, Any]:
    return {"$ref": _REF.format(name=shape.__name__)}
