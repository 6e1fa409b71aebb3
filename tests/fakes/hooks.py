"""An operator's hooks: small scripts in a directory."""

from pathlib import Path

# Keeps what it was given, one line for each call, in a file beside the hooks.
KEEP = 'cat >> "{told}"; echo >> "{told}"'


class HookDirectory:
    """A directory of hooks; `told` is where those made with KEEP put what they read."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "hooks"
        self.told = directory / "told"
        self.path.mkdir()

    def write(self, name: str, *commands: str, mode: int = 0o755) -> Path:
        """Write a shell script, such as before.d/10-window, of these commands."""
        path = self.path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(["#!/bin/sh", *(command.format(told=self.told) for command in commands), ""]))
        path.chmod(mode)
        return path

    def lines(self) -> list[str]:
        """What the scripts have kept so far."""
        return self.told.read_text().splitlines() if self.told.exists() else []
