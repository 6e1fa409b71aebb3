"""The parts of docs/ that are made, not written: from the tables, the real planner, and files that are tested.

A document holds `<!-- block: NAME -->`, what NAME makes, `<!-- end -->`; `pytest tests/docs --update-golden` writes
all of them anew.
"""

import importlib
import inspect
import json
import re
import tempfile
import textwrap
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, get_args

import msgspec
import yaml

from kvmagent.api.openapi import build_openapi
from kvmagent.api.resources import OWN_PATHS
from kvmagent.api.schemas import EXTENSIONS
from kvmagent.cli.ctl.exits import MEANINGS
from kvmagent.model.command import VmRequest
from kvmagent.model.errors import CODES, LOOKS, Code
from kvmagent.model.steps import AnyStep
from kvmagent.plugins import load_plugins
from kvmagent.settings import Settings, list_settings
from tests.docs.scale import make_table
from tests.fakes.agent import FakeAgent, make_guest
from tests.fakes.libvirt import FakeDomain
from tests.lab.domainxml import GuestSpec
from tests.test_floors import FOR_PLUGINS

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r"(<!-- block: (?P<name>[^ ]+)(?: (?P<of>[^ ]+))? -->\n).*?(<!-- end -->)", re.DOTALL)

# A definition as a cloud may have it before anybody thought of hotplug.
BARE = """\
<domain type='kvm'>
  <name>db-7</name>
  <uuid>6f1de2a0-5b7c-4a35-9d0e-7d5cb2f0a7b1</uuid>
  <metadata>
    <team:owner xmlns:team='http://example.com/team'>billing</team:owner>
  </metadata>
  <memory unit='KiB'>4194304</memory>
  <currentMemory unit='KiB'>4194304</currentMemory>
  <vcpu placement='static'>2</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
  </os>
  <cpu mode='host-passthrough'>
    <topology sockets='1' cores='2' threads='1'/>
  </cpu>
  <devices>
    <memballoon model='none'/>
  </devices>
</domain>
"""
GIB = 2**30


def fill(text: str) -> str:
    """Return a document with its blocks made anew."""
    return _BLOCK.sub(lambda match: f"{match[1]}{BLOCKS[match['name']](match['of'])}{match[4]}", text)


def codes(_of: str | None) -> str:
    """Every code: what it means, what to do, what to look at."""
    lines, kinds = [], _kinds()
    for code in Code:
        info = CODES[code]
        if code in kinds:
            lines += [f"### {kinds[code]}", ""]
        status = f" (HTTP {info.status})" if info.status != 200 else ""
        lines += [f"#### {code}", "", f"{_escape(info.meaning)}{status}", "", f"- Do: {_escape(info.remedy)}"]
        if code in LOOKS:
            lines.append(f"- Look: {_look(LOOKS[code])}")
        lines.append("")
    return "\n".join(lines)


def _kinds() -> dict[Code, str]:
    """The first code of each kind, with the comment that stands above it in the table."""
    found = re.findall(r"^    # (.+)\n    (\w+) = ", inspect.getsource(Code), re.MULTILINE)
    return {Code[name]: kind if kind in ("libvirt", "vCPUs") else kind[0].upper() + kind[1:] for kind, name in found}


def _look(text: str) -> str:
    """What is run on the host, then what in the guest, each as code."""
    host, _, guest = f"; {text}".partition("; in the guest: ")
    shown = [f"`{host.removeprefix('; ')}`"] if host else []
    return "; ".join([*shown, *([f"in the guest: `{guest}`"] if guest else [])])


def steps(_of: str | None) -> str:
    """Every effect that a plan can name."""
    # A row is one line; and how far the second line of a docstring is indented depends on the Python.
    rows = [
        f"| {step.__struct_config__.tag} | {' '.join((step.__doc__ or '').split())} |" for step in get_args(AnyStep)
    ]
    return "\n".join(["| step | effect |", "|---|---|", *rows, ""])


def model(_of: str | None) -> str:
    """What plugins may import."""
    modules = [importlib.import_module(f"kvmagent.model.{name}") for name in FOR_PLUGINS]
    rows = [f"| `{one.__name__}` | {_cell((inspect.getdoc(one) or '').splitlines()[0])} |" for one in modules]
    return "\n".join(["| module | what |", "|---|---|", *rows, ""])


@cache
def _document() -> dict[str, Any]:
    """What an agent with its own plugins tells of itself."""
    plugins = load_plugins(Settings().agent.plugins)
    return build_openapi([one for plugin in plugins for one in (*plugin.commands, *plugin.queries)], OWN_PATHS)


def _operations() -> list[tuple[str, str, dict[str, Any]]]:
    paths = _document()["paths"].items()
    return [(method.upper(), path, operation) for path, item in paths for method, operation in item.items()]


def paths(_of: str | None) -> str:
    """Every path: who may, and what for."""
    rows = [
        f"| {operation['operationId']} | `{method} {path}` | {operation['x-role']} | {_cell(operation['summary'])} |"
        for method, path, operation in _operations()
    ]
    return "\n".join(["| operation | path | role | what |", "|---|---|---|---|", *rows, ""])


def requests(_of: str | None) -> str:
    """The fields of each command of ours: first those that all have."""
    common = [field.encode_name for field in msgspec.structs.fields(VmRequest)]
    ours = [
        operation
        for _, path, operation in _operations()
        if path.startswith(("/vm/hotplug/", "/vm/hotunplug/")) and "taskuuid" in str(operation["parameters"])
    ]
    shapes = {one["operationId"]: _shape(one["requestBody"]["content"]["application/json"]["schema"]) for one in ours}
    lines = ["Every command:", "", *_field_rows(shapes["HotPlugCpu"], common)]
    for name, shape in shapes.items():
        own = [field for field in shape["properties"] if field not in common]
        lines += ["", f"{name}:", "", *_field_rows(shape, own)]
    return "\n".join([*lines, ""])


def _shape(schema: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in schema:
        schema = _document()["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return schema


def _field_rows(shape: dict[str, Any], names: list[str]) -> list[str]:
    rows = ["| field | value | default | meaning |", "|---|---|---|---|"]
    for name in names:
        field = shape["properties"][name]
        parts = [_shape(part) for part in field.get("anyOf", [field])]
        words = next((part["description"] for part in (field, *parts) if "description" in part), "")
        default = "needed" if name in shape.get("required", ()) else json.dumps(field.get("default"))
        values = ", ".join(_value(part) for part in parts if part.get("type") != "null")
        rows.append(f"| {name} | {values} | {'none' if default == 'null' else default} | {_cell(words)} |")
    return rows


def _value(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return ", ".join(map(str, schema["enum"]))
    least, most = schema.get("minimum"), schema.get("maximum")
    return str(schema["type"]) + (f", {least} to {most}" if most is not None else "")


def exits(_of: str | None) -> str:
    """How kvmagentctl ends."""
    rows = [f"| {status.value} | {_cell(words)} |" for status, words in MEANINGS.items()]
    return "\n".join(["| kvmagentctl ends with | meaning |", "|---|---|", *rows, ""])


def extensions(_of: str | None) -> str:
    """What was added to the API."""
    rows = [f"| `{one.name}` | {_cell(one.words)} |" for one in EXTENSIONS]
    return "\n".join(["| extension | what |", "|---|---|", *rows, ""])


def settings(_of: str | None) -> str:
    """Every key of the configuration."""
    keys: dict[str, list[str]] = {}
    for section, key, _value, _default in list_settings(Settings()):
        keys.setdefault(section, []).append(f"`{key}`")
    rows = [f"| `[{section}]` | {', '.join(found)} |" for section, found in keys.items()]
    return "\n".join(["| section | keys |", "|---|---|", *rows, ""])


def _cell(text: str) -> str:
    return _escape(text).replace("|", "\\|")


def alerts(_of: str | None) -> str:
    """The alerts that are shipped, each with what to do first."""
    groups = yaml.safe_load((ROOT / "conf/prometheus/kvmagent.rules.yml").read_text())["groups"]
    lines = []
    for rule in (rule for group in groups for rule in group["rules"]):
        after = f" after {rule['for']}" if "for" in rule else ""
        what = f"- **{rule['alert']}** ({rule['labels']['severity']}{after}): {rule['annotations']['runbook'].strip()}"
        # A command stays on one line, to be copied from a terminal.
        glued = re.sub("`.*?`", lambda match: match[0].replace(" ", "\0"), _escape(what.replace("**", "\1")))
        wrapped = textwrap.wrap(glued, 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
        lines += [line.replace("\0", " ").replace("\1", "**") for line in wrapped]
    return "\n".join([*lines, ""])


def file(of: str | None) -> str:
    """A file of the project as it stands."""
    assert of is not None
    kind = {"py": "python"}.get(of.rpartition(".")[2], of.rpartition(".")[2])
    return f"```{kind}\n{(ROOT / of).read_text()}```\n"


def prepare_before(_of: str | None) -> str:
    """The definition that is prepared."""
    return f"```xml\n{BARE}```\n"


def prepare_diff(_of: str | None) -> str:
    """What the planner makes of it."""
    told = _prepare(maxCpuNum=8, maxMemorySize=64 * GIB)
    assert not told["clamped"]
    return f"```diff\n{told['diff']}\n```\n"


def prepare_clamped(_of: str | None) -> str:
    """What it says of amounts that cannot be had."""
    told = _prepare(maxCpuNum=7, maxMemorySize=64 * 1024 * GIB)
    return f"```json\n{json.dumps({'clamped': told['clamped']}, indent=1)}\n```\n"


def _prepare(**wanted: Any) -> dict[str, Any]:
    """The reply of the real command to a preparation of the definition above."""
    spec = GuestSpec(name="db-7", vcpus=2, memory_mib=4096)
    with tempfile.TemporaryDirectory() as directory:
        agent = FakeAgent(Path(directory), FakeDomain(BARE, guest=make_guest(spec)))
        done = agent.run("ReadyForHotplug", vmUuid="db-7", prepare=True, **wanted)
        agent.stop()
    assert done.reply["success"], done.reply
    return done.reply


def _escape(text: str) -> str:
    return text.replace("<", "&lt;").replace("*", "\\*")


BLOCKS: dict[str, Callable[[str | None], str]] = {
    "alerts": alerts,
    "codes": codes,
    "exits": exits,
    "extensions": extensions,
    "paths": paths,
    "requests": requests,
    "scale": make_table,
    "settings": settings,
    "steps": steps,
    "model": model,
    "file": file,
    "prepare-before": prepare_before,
    "prepare-diff": prepare_diff,
    "prepare-clamped": prepare_clamped,
}
