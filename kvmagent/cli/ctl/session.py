"""The options that every subcommand takes, before or after its name, and what a subcommand works with."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from kvmagent.cli.ctl.agent import Agent, Target
from kvmagent.cli.ctl.local import find_local_target
from kvmagent.cli.ctl.terminal import WARN, Terminal, paint
from kvmagent.settings import DEFAULT_PATH

CommandT = TypeVar("CommandT", bound=click.Command)

# Name, environment variable, metavar and meaning of each option that says which agent, and who asks.
_TARGET = (
    ("url", "KVMAGENT_URL", "URL", f"The agent. [default: this host's, by {DEFAULT_PATH}]"),
    ("ca", "KVMAGENT_CA", "FILE", "PEM file of the CAs that the agent is verified by. [default: the system's]"),
    ("cert", "KVMAGENT_CERT", "FILE", "PEM certificate to show to the agent."),
    ("key", "KVMAGENT_KEY", "FILE", "PEM key of that certificate, mode 0600. [default: in --cert]"),
    ("token_file", "KVMAGENT_TOKEN_FILE", "FILE", "File that holds the bearer token, mode 0600."),
)


class Session:
    """One call of kvmagentctl. `agent` is made when first asked for: not every subcommand has one."""

    def __init__(self) -> None:
        self.given: dict[str, str] = {}
        self.as_json = False
        self.terminal = Terminal()
        self._agent: Agent | None = None

    @property
    def agent(self) -> Agent:
        """The agent that the options name.

        Raises:
            CtlError: the URL, a certificate or the token cannot be used.
        """
        if self._agent is None:
            local = {} if "url" in self.given else find_local_target()
            self._agent = self.connect(local | self.given)
        return self._agent

    def connect(self, target: Mapping[str, str]) -> Agent:
        """Return an agent, after a warning where a token would cross a network in clear text.

        Raises:
            CtlError: the URL, a certificate or the token cannot be used.
        """
        agent = Agent(Target(**target))
        if agent.warning:
            self.terminal.tell(paint(f"kvmagentctl: {agent.warning}; use https://", WARN))
        return agent


def shared_options(command: CommandT, *, is_root: bool = False) -> CommandT:
    """Add the shared options to a command. Those of a subcommand win over the root's, which know the environment."""
    for name, variable, metavar, meaning in _TARGET:
        command.params.append(
            click.Option(
                [f"--{name.replace('_', '-')}"],
                metavar=metavar,
                envvar=variable if is_root else None,
                show_envvar=is_root,
                help=meaning,
                expose_value=False,
                callback=_remember(name),
                hidden=not is_root,
            )
        )
    command.params.append(
        click.Option(
            ["--json", "as_json"],
            is_flag=True,
            help="Print JSON, and nothing else, on standard output.",
            expose_value=False,
            callback=_remember("as_json"),
        )
    )
    return command


def session_of(context: click.Context) -> Session:
    """Return the call's session."""
    return context.ensure_object(Session)


def _remember(name: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    def remember(context: click.Context, _param: click.Parameter, value: Any) -> None:
        session = session_of(context)
        if name == "as_json":
            session.as_json = session.as_json or bool(value)
        elif value:
            session.given[name] = value

    return remember
