"""The promise of docs/api.md: a client of a released version goes on working.

A frozen document per version in tests/http/contracts/, and lists in names/ beside it; `--update-golden` writes those of
a version not yet released.
"""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvmagent import __version__
from kvmagent.api.metrics.table import METRICS
from kvmagent.api.schemas import EXTENSIONS
from kvmagent.cli.ctl.exits import Exit
from kvmagent.settings import Settings
from tests.lab.agent import AgentProcess

CONTRACTS = Path(__file__).with_name("contracts")
#: What no document has: exit statuses, metrics, configuration keys.
NAMES = CONTRACTS / "names"


def resolve(schema: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return schema


def find_breaks(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """What a client that knows the old document would stumble over in the new one."""
    for path, item in old["paths"].items():
        for method, before in item.items():
            after = new["paths"].get(path, {}).get(method)
            if after is None:
                yield f"{method} {path} is gone"
                continue
            where = f"{method} {path}"
            if "requestBody" in before:
                pair = [one["requestBody"]["content"]["application/json"]["schema"] for one in (before, after)]
                yield from find_request_breaks(*pair, old, new, where)
            yield from find_parameter_breaks(before, after, where)
            if after["x-role"] not in (before["x-role"], "caller", "public"):
                yield f"{where} needs the role {after['x-role']}, it was {before['x-role']}"
            for status, answer in before["responses"].items():
                if status not in after["responses"]:
                    yield f"{where}: status {status} is gone"
                elif status == "200":
                    for kind, content in answer["content"].items():
                        there = after["responses"]["200"]["content"].get(kind)
                        if there is None:
                            yield f"{where}: it answers no {kind}"
                        else:
                            yield from find_reply_breaks(content["schema"], there["schema"], old, new, where)
            if "callbacks" in before:
                replies = [
                    next(iter(one["callbacks"]["outcome"].values()))["post"]["requestBody"]["content"]
                    for one in (before, after)
                ]
                schemas = [reply["application/json"]["schema"] for reply in replies]
                yield from find_reply_breaks(*schemas, old, new, f"{where}, callback")
    for code, info in old["x-error-codes"].items():
        known = new["x-error-codes"].get(code)
        if known is None:
            yield f"code {code} is gone"
        elif known["status"] != info["status"]:
            yield f"code {code} has status {known['status']}, it was {info['status']}"


def find_parameter_breaks(before: dict[str, Any], after: dict[str, Any], where: str) -> Iterator[str]:
    was, has = ({(one["name"], one["in"]): one for one in each.get("parameters", ())} for each in (before, after))
    for (name, place), one in has.items():
        if one.get("required") and not was.get((name, place), {}).get("required"):
            yield f"{where}: parameter {name} is needed now"
        if (name, place) in was:
            for narrowed in find_narrowing(was[name, place]["schema"], one["schema"], {}, {}):
                yield f"{where}: {place} parameter {name} is narrower: {narrowed}"
    for name, place in was.keys() - has.keys():
        yield f"{where}: {place} parameter {name} is gone"


def find_request_breaks(
    before: dict[str, Any], after: dict[str, Any], old: dict[str, Any], new: dict[str, Any], where: str
) -> Iterator[str]:
    """A request that was taken is taken."""
    before, after = resolve(before, old), resolve(after, new)
    for name in set(after.get("required", ())) - set(before.get("required", ())):
        yield f"{where}: field {name} is needed now"
    for name, field in before.get("properties", {}).items():
        there = after.get("properties", {}).get(name)
        if there is None:
            yield f"{where}: request field {name} is gone"
        else:
            for narrowed in find_narrowing(field, there, old, new):
                yield f"{where}: request field {name} is narrower: {narrowed}"


def find_narrowing(
    before: dict[str, Any], after: dict[str, Any], old: dict[str, Any], new: dict[str, Any]
) -> Iterator[str]:
    before, after = resolve(before, old), resolve(after, new)
    if "anyOf" in before or "anyOf" in after:
        others = after.get("anyOf", [after])
        for one in before.get("anyOf", [before]):
            if all(any(True for _ in find_narrowing(one, other, old, new)) for other in others):
                yield f"{resolve(one, old).get('type', one)}"
        return
    if before.get("type") != after.get("type"):
        yield f"{after.get('type')}, it was {before.get('type')}"
    if "enum" in after and not set(before.get("enum", ["anything"])) <= set(after["enum"]):
        yield f"one of {after['enum']}"
    for limit, is_narrower in (
        *((name, lambda then, now: then is None or now > then) for name in ("minimum", "minLength", "minItems")),
        *((name, lambda then, now: then is None or now < then) for name in ("maximum", "maxLength", "maxItems")),
        ("pattern", lambda then, now: then != now),
    ):
        if limit in after and is_narrower(before.get(limit), after[limit]):
            yield f"{limit} {after[limit]}"


def find_options(schema: dict[str, Any], document: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """What a value may be, by its kind."""
    schema = resolve(schema, document)
    found: dict[str, list[dict[str, Any]]] = {}
    for one in schema.get("anyOf", [schema]):
        one = resolve(one, document)
        found.setdefault("string" if "enum" in one else one.get("type", "anything"), []).append(one)
    return found


def find_reply_breaks(
    before: dict[str, Any], after: dict[str, Any], old: dict[str, Any], new: dict[str, Any], where: str, depth: int = 0
) -> Iterator[str]:
    """A field that was told is told, and has no kind of value that it had not."""
    was, has = find_options(before, old), find_options(after, new)
    if depth > 6:
        return
    if "anything" not in was and (more := sorted(set(has) - set(was))):
        yield f"{where}: it is {', '.join(more)}, it was {', '.join(sorted(was))}"
        return
    for kind in ("object", "array"):
        for there in has.get(kind, ()):
            found = [list(find_part_breaks(one, there, old, new, where, depth + 1)) for one in was.get(kind, ())]
            yield from min(found, key=len, default=[])


def find_part_breaks(
    before: dict[str, Any], after: dict[str, Any], old: dict[str, Any], new: dict[str, Any], where: str, depth: int
) -> Iterator[str]:
    """Of an object its fields, of an array its items."""
    for name, field in before.get("properties", {}).items():
        there = after.get("properties", {}).get(name)
        if there is None or (name in before.get("required", ()) and name not in after.get("required", ())):
            yield f"{where}: reply field {name} is gone, or no longer always there"
        else:
            yield from find_reply_breaks(field, there, old, new, f"{where}.{name}", depth)
    if "items" in before and "items" in after:
        yield from find_reply_breaks(before["items"], after["items"], old, new, f"{where}[]", depth)


@pytest.fixture(scope="module")
def document(agent: AgentProcess) -> Any:
    return agent.get("/openapi.json").body


def test_the_version_s_own_document_is_frozen(document: Any, request: pytest.FixtureRequest) -> None:
    file = CONTRACTS / f"{__version__}.json"
    if request.config.getoption("--update-golden"):
        file.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    assert file.exists()


@pytest.mark.parametrize("file", sorted(CONTRACTS.glob("*.json")), ids=lambda file: file.stem)
def test_a_client_of_a_released_version_goes_on_working(file: Path, document: Any) -> None:
    assert list(find_breaks(json.loads(file.read_text()), document)) == []


def remove_request_field(document: Any) -> None:
    del document["components"]["schemas"]["HotPlugCpuRequest"]["properties"]["guestOnline"]


def narrow_request_field(document: Any) -> None:
    document["components"]["schemas"]["HotPlugCpuRequest"]["properties"]["cpuNum"]["maximum"] = 64


def need_another_field(document: Any) -> None:
    document["components"]["schemas"]["HotPlugMemoryRequest"]["required"].append("method")


def remove_reply_field(document: Any) -> None:
    del document["components"]["schemas"]["Numbers"]["properties"]["guestCpuNum"]


def change_what_a_reply_field_is(document: Any) -> None:
    document["components"]["schemas"]["Numbers"]["properties"]["freeSlots"] = {"type": "string"}


def make_a_reply_field_null(document: Any) -> None:
    schema = document["components"]["schemas"]["TaskEntry"]["properties"]
    schema["acceptedAt"] = {"anyOf": [schema["acceptedAt"], {"type": "null"}]}


def change_a_code(document: Any) -> None:
    document["x-error-codes"]["QUEUE_FULL"]["status"] = 429


def narrow_a_parameter(document: Any) -> None:
    parameters = {one["name"]: one for one in document["paths"]["/tasks"]["get"]["parameters"]}
    parameters["limit"]["schema"]["maximum"] = 100
    parameters["state"]["schema"]["enum"].remove("gone")


def need_a_parameter(document: Any) -> None:
    parameters = {one["name"]: one for one in document["paths"]["/tasks"]["get"]["parameters"]}
    parameters["vm"]["required"] = True


def need_another_role(document: Any) -> None:
    document["paths"]["/vm/hotplug/plan"]["post"]["x-role"] = "plug"


def remove_a_read(document: Any) -> None:
    del document["paths"]["/whoami"]


BREAKS = {
    remove_request_field: "request field guestOnline is gone",
    narrow_request_field: "request field cpuNum is narrower: maximum 64",
    need_another_field: "field method is needed now",
    remove_reply_field: "reply field guestCpuNum is gone",
    change_what_a_reply_field_is: "freeSlots: it is string",
    make_a_reply_field_null: "acceptedAt: it is null, it was number",
    change_a_code: "code QUEUE_FULL has status 429",
    remove_a_read: "get /whoami is gone",
    narrow_a_parameter: "query parameter limit is narrower: maximum 100",
    need_a_parameter: "parameter vm is needed now",
    need_another_role: "post /vm/hotplug/plan needs the role plug, it was read",
}


@pytest.mark.parametrize("change", BREAKS, ids=lambda change: change.__name__)
def test_a_change_that_breaks_a_client_is_refused(change: Any, document: Any) -> None:
    changed = copy.deepcopy(document)
    change(changed)
    found = list(find_breaks(document, changed))
    assert any(BREAKS[change] in one for one in found), found


def test_what_is_added_breaks_nobody(document: Any) -> None:
    changed = copy.deepcopy(document)
    schemas = changed["components"]["schemas"]
    schemas["HotPlugCpuRequest"]["properties"]["more"] = {"type": "integer"}
    schemas["Numbers"]["properties"]["more"] = {"type": "integer"}
    changed["paths"]["/more"] = changed["paths"]["/whoami"]
    changed["x-error-codes"]["MORE"] = {"status": 400}
    assert list(find_breaks(document, changed)) == []


def find_additions(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """What a client may send to the new one, and the old one refuses."""
    for path, item in new["paths"].items():
        for method, after in item.items():
            before = old["paths"].get(path, {}).get(method)
            if before is None:
                yield f"{method.upper()} {path}"
                continue
            known = [one["name"] for one in before.get("parameters", ()) if one["in"] == "query"]
            for one in after.get("parameters", ()):
                if one["in"] == "query" and one["name"] not in known:
                    yield f"{method.upper()} {path} ?{one['name']}"
            if "requestBody" in before:
                shapes = [
                    resolve(one["requestBody"]["content"]["application/json"]["schema"], whole)["properties"]
                    for one, whole in ((before, old), (after, new))
                ]
                yield from (f"{method.upper()} {path} {name}" for name in shapes[1] if name not in shapes[0])


def test_what_was_added_since_version_1_is_an_extension(agent: AgentProcess, document: Any) -> None:
    first = json.loads(min(CONTRACTS.glob("*.json")).read_text())
    assert sorted(find_additions(first, document)) == sorted(one for extension in EXTENSIONS for one in extension.adds)
    assert agent.get("/healthz").body["extensions"] == [extension.name for extension in EXTENSIONS]


def list_names() -> dict[str, Any]:
    """Exit statuses by name, metrics with type and labels, and of each configuration key what it takes."""
    schema = msgspec.json.schema(Settings)
    sections = schema["$defs"]["Settings"]["properties"]
    return {
        "exitStatuses": {status.name: status.value for status in Exit},
        "metrics": {one.exported: {"type": one.type, "labels": list(one.labels)} for one in METRICS.values()},
        "settings": {
            f"{section}.{key}": {name: part for name, part in taken.items() if name not in ("description", "default")}
            for section, described in sections.items()
            for key, taken in schema["$defs"][find_reference(described)]["properties"].items()
        },
    }


def find_reference(schema: dict[str, Any]) -> str:
    parts = [schema, *schema.get("anyOf", ()), *schema.get("allOf", ())]
    return next(str(part["$ref"]) for part in parts if "$ref" in part).rpartition("/")[2]


def find_name_breaks(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    for kind in ("exitStatuses", "metrics"):
        for name, before in old[kind].items():
            if new[kind].get(name) != before:
                yield f"{kind}: {name} is {new[kind].get(name, 'gone')}, it was {before}"
    for key, before in old["settings"].items():
        after = new["settings"].get(key)
        if after is None:
            yield f"settings: {key} is gone"
        else:
            yield from (f"settings: {key} is narrower: {what}" for what in find_narrowing(before, after, {}, {}))


def test_the_version_s_own_names_are_frozen(request: pytest.FixtureRequest) -> None:
    file = NAMES / f"{__version__}.json"
    if request.config.getoption("--update-golden"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(list_names(), indent=1, sort_keys=True) + "\n")
    assert file.exists()


@pytest.mark.parametrize("file", sorted(NAMES.glob("*.json")), ids=lambda file: file.stem)
def test_scripts_alerts_and_configurations_of_a_released_version_go_on_working(file: Path) -> None:
    assert list(find_name_breaks(json.loads(file.read_text()), list_names())) == []


def renumber_an_exit_status(names: Any) -> None:
    names["exitStatuses"]["PARTIAL"] = 9


def relabel_a_metric(names: Any) -> None:
    names["metrics"]["kvmagent_commands_total"]["labels"].remove("outcome")


def remove_a_metric(names: Any) -> None:
    del names["metrics"]["kvmagent_libvirt_up"]


def remove_a_key(names: Any) -> None:
    del names["settings"]["http.port"]


def narrow_a_key(names: Any) -> None:
    names["settings"]["agent.workers"]["maximum"] = 16


NAME_BREAKS = {
    renumber_an_exit_status: "PARTIAL is 9, it was 5",
    relabel_a_metric: "kvmagent_commands_total is",
    remove_a_metric: "kvmagent_libvirt_up is gone",
    remove_a_key: "http.port is gone",
    narrow_a_key: "agent.workers is narrower: maximum 16",
}


@pytest.mark.parametrize("change", NAME_BREAKS, ids=lambda change: change.__name__)
def test_a_change_of_a_name_that_breaks_somebody_is_refused(change: Any) -> None:
    names = list_names()
    changed = copy.deepcopy(names)
    change(changed)
    (found,) = find_name_breaks(names, changed)
    assert NAME_BREAKS[change] in found
