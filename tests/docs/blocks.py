"""The parts of docs/ that are made, not written: from the tables, the real planner, and files that are tested.

A document holds `<!-- block: NAME -->`, what NAME makes, `<!-- end -->`; `pytest tests/docs --update-golden` writes
all of them anew.
"""

import inspect
import json
import re
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import yaml

from kvmagent.model.errors import CODES, LOOKS, Code
from kvmagent.model.steps import AnyStep
from tests.fakes.agent import FakeAgent, make_guest
from tests.fakes.libvirt import FakeDomain
from tests.lab.domainxml import GuestSpec

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
    rows = [f"| {step.__struct_config__.tag} | {(step.__doc__ or '').strip()} |" for step in get_args(AnyStep)]
    return "\n".join(["| step | effect |", "|---|---|", *rows, ""])


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
    "steps": steps,
    "file": file,
    "prepare-before": prepare_before,
    "prepare-diff": prepare_diff,
    "prepare-clamped": prepare_clamped,
}
