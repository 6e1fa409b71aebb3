"""Installed plugins: entry points of the group `kvmagent.plugins`, each of which is a Plugin."""

import importlib.metadata
from collections.abc import Iterable

from kvmagent.model.command import Command, Plugin
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.host import Query

_GROUP = "kvmagent.plugins"


def installed_plugins() -> list[str]:
    """Return the names of all plugins that are installed, sorted."""
    return sorted({point.name for point in importlib.metadata.entry_points(group=_GROUP)})


def load_plugins(names: Iterable[str]) -> list[Plugin]:
    """Return the plugins of these entry points, in order.

    Raises:
        AgentError: BAD_CONFIGURATION, with the plugin's name and why it cannot be loaded.
    """
    found = {point.name: point for point in importlib.metadata.entry_points(group=_GROUP)}
    plugins = []
    for name in names:
        if name not in found:
            have = ", ".join(sorted(found)) or "none"
            raise AgentError(
                Code.BAD_CONFIGURATION, f"agent.plugins: no plugin {name!r} is installed; installed: {have}"
            )
        try:
            plugin = found[name].load()
        except Exception as error:
            raise AgentError(Code.BAD_CONFIGURATION, f"agent.plugins: {name!r} cannot be loaded: {error}") from error
        if not isinstance(plugin, Plugin):
            raise AgentError(
                Code.BAD_CONFIGURATION, f"agent.plugins: {name!r} is a {type(plugin).__name__}, not a Plugin"
            )
        plugins.append(plugin)
    _check_unique(plugins)
    return plugins


def _check_unique(plugins: Iterable[Plugin]) -> None:
    """Refuse a command or query of a name or a path that another has.

    Raises:
        AgentError: BAD_CONFIGURATION.
    """
    taken: set[str] = set()
    for plugin in plugins:
        declared: tuple[Command | Query, ...] = (*plugin.commands, *plugin.queries)
        for one in declared:
            if {one.name, one.path} & taken:
                raise AgentError(
                    Code.BAD_CONFIGURATION,
                    f"agent.plugins: {plugin.name!r}: another plugin has already declared {one.name} or {one.path}",
                    remedy="Name each plugin once in agent.plugins, or leave one of two out.",
                )
            taken |= {one.name, one.path}
