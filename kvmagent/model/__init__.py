"""The agent's vocabulary as plain data: errors, units, facts, steps, commands.

Nothing here reads a clock, a file, a socket or the environment, starts a thread or writes a log line.
A plugin needs nothing but this package: docs/plugin.md lists the modules that are for plugins.
"""
