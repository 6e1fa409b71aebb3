"""The rule of floors, as a table: who may import whom, and who owns which library.

A new module needs a row; a row that no module matches is stale and fails too.
"""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Module or package -> its floor; tens are the design's floors, and what stands between two tens is a step between.
# The longest match counts; "plugins" is installed as kvmagent_plugins.
FLOORS = {
    "kvmagent.model": 10,
    "kvmagent.inifile": 11,
    "kvmagent.settings": 12,
    "kvmagent.logs": 13,
    "kvmagent.plugins": 13,
    "kvmagent.secretfiles": 14,
    "kvmagent.audit": 14,
    "kvmagent.recorder": 13,
    "kvmagent.certificates": 13,
    "kvmagent.backoff": 13,
    "kvmagent.shares": 13,
    "kvmagent.systemd": 14,
    "kvmagent.hypervisor": 20,
    "kvmagent.tasks.faults": 15,
    "kvmagent.tasks.journalfile": 19,
    "kvmagent.tasks.journal": 20,
    "kvmagent.api.wire": 20,
    "kvmagent.tasks": 30,
    "kvmagent.api": 40,
    "kvmagent.agent": 50,
    "kvmagent.cli": 51,
}

# Third-party library -> who alone may import it.
OWNERS = {
    "libvirt": "kvmagent.hypervisor",
    "libvirt_qemu": "kvmagent.hypervisor",
    "lxml": "kvmagent.hypervisor",
    "sqlite3": "kvmagent.tasks.journalfile",
    "urllib3": "kvmagent.tasks.callbackclient",
    "cherrypy": "kvmagent.api.server",
    "cheroot": "kvmagent.api.listener",
    "simplejson": "kvmagent.api.wire",
    "prometheus_client": "kvmagent.api.metrics",
    "click": "kvmagent.cli.ctl",
    "cryptography": "kvmagent.cli.ctl.ca",
}

# What of the model plugins may import, shipped ones and others alike: docs/plugin.md lists these.
FOR_PLUGINS = (
    "command", "errors", "facts", "steps", "reply", "fields", "units", "checks", "machines", "placement", "guestos",
    "guestuse", "policy", "ownerpolicy", "hostbudget", "judge", "host",
)  # fmt: skip

# What nothing pure may touch: time, chance, environment, files, sockets, threads, logs, processes.
IMPURE = {
    "time", "datetime", "random", "secrets", "os", "pathlib", "io", "tempfile", "socket", "select", "selectors",
    "threading", "queue", "logging", "subprocess", "signal", "asyncio", "urllib", "http",
}  # fmt: skip
PURE = ("kvmagent.model", "plugins")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for top in ("kvmagent", "plugins") for path in sorted((ROOT / top).rglob("*.py"))}


@cache
def imports(module: str) -> set[str]:
    """The absolute names that a module imports, at any depth of its code."""
    path, found = MODULES[module], set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            found |= {name if (name := f"{source}.{alias.name}") in MODULES else source for alias in node.names}
    return found


def row(module: str, table: dict[str, int]) -> str | None:
    matches = [prefix for prefix in table if module == prefix or module.startswith(prefix + ".")]
    return max(matches, key=len, default=None)


def is_inside(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("kvmagent.")])
def test_imports_only_from_lower_floors_or_its_own_package(module: str) -> None:
    own = row(module, FLOORS)
    assert own is not None, f"{module} has no floor: add a row"
    for imported in imports(module):
        if not imported.startswith("kvmagent."):
            continue
        other = row(imported, FLOORS)
        assert other is not None, f"{module} imports {imported}, which has no floor"
        same_package = module.split(".")[:2] == imported.split(".")[:2]
        assert same_package or FLOORS[other] < FLOORS[own], f"{module} imports {imported} from floor {FLOORS[other]}"


@pytest.mark.parametrize("module", MODULES)
def test_each_library_has_one_owner(module: str) -> None:
    for imported in imports(module):
        owner = OWNERS.get(imported.partition(".")[0])
        assert owner is None or is_inside(module, owner), f"{module} imports {imported}, which belongs to {owner}"


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith(PURE)])
def test_model_and_planners_are_pure(module: str) -> None:
    touched = {imported.partition(".")[0] for imported in imports(module)} & IMPURE
    assert not touched, f"{module} imports {sorted(touched)}"
    tree = ast.parse(MODULES[module].read_text())
    calls = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not calls & {"open", "print", "input", "exec", "eval"}, module
    assert not any(isinstance(node, ast.Global | ast.Nonlocal) for node in ast.walk(tree)), f"{module} remembers"
    named = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    named |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert not named & {"cache", "lru_cache"}, f"{module} remembers"


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("plugins")])
def test_plugins_import_what_others_may_import_and_nothing_else(module: str) -> None:
    allowed = {f"kvmagent.model.{name}" for name in FOR_PLUGINS}
    own = {name for name in imports(module) if name.partition(".")[0] in ("kvmagent", *OWNERS)}
    assert own <= allowed, f"{module} imports {sorted(own - allowed)}"


def test_what_plugins_may_import_is_used_by_a_shipped_one() -> None:
    used = {name for module in MODULES if module.startswith("plugins") for name in imports(module)}
    assert {f"kvmagent.model.{name}" for name in FOR_PLUGINS} <= used


def test_every_row_is_used() -> None:
    for prefix in FLOORS:
        assert any(is_inside(module, prefix) for module in MODULES), f"no module is {prefix}"
    for library, owner in OWNERS.items():
        users = [module for module in MODULES if library in {name.partition(".")[0] for name in imports(module)}]
        assert users, f"nothing imports {library}: is {owner} still its owner?"


def test_only_agent_constructs_what_has_threads() -> None:
    """No singletons: the long-lived objects are made in agent.py and handed on."""
    made = {"Connection", "Node", "Journal", "Lanes", "Executor", "Delivery", "Server", "Intake", "Resources"}
    for module, path in MODULES.items():
        calls = {
            node.func.id
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert module == "kvmagent.agent" or not calls & made, f"{module} constructs {sorted(calls & made)}"
