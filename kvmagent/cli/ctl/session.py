"""The options that every subcommand takes, before or after its name, and the objects that it works with."""

from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeVar

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from kvmagent.cli.ctl.client import Agent, Target
from kvmagent.cli.ctl.ctlconf import CtlConf, load_conf
from kvmagent.cli.ctl.exits import CtlError, Exit
from kvmagent.cli.ctl.local import find_local_target
from kvmagent.cli.ctl.terminal import WARN, Terminal, paint
from kvmagent.settings import DEFAULT_PATH

#: What -o takes.
OUTPUTS = ("wide", "name", "json", "yaml")
CommandT = TypeVar("CommandT", bound=click.Command)

# Name, environment variable, metavar and meaning of each option that says which agent, and who asks.
_HOST = "host"
_TARGET = (
    (
        _HOST,
        "KVMAGENT_HOST",
        "NAME",
        "Agent to ask, by its name in ~/.config/kvmagent/ctl.conf or /etc/kvmagent/ctl.conf.",
    ),
    ("url", "KVMAGENT_URL", "URL", f"URL of the agent. [default: that in ctl.conf, or this host's by {DEFAULT_PATH}]"),
    ("ca", "KVMAGENT_CA", "FILE", "PEM file with the CAs for verifying the agent. [default: the system's]"),
    ("cert", "KVMAGENT_CERT", "FILE", "PEM file with your client certificate."),
    ("key", "KVMAGENT_KEY", "FILE", "PEM file with its key, mode 0600. [default: the --cert file]"),
    ("token_file", "KVMAGENT_TOKEN_FILE", "FILE", "File with your bearer token, mode 0600."),
)


class Session:
    """One call of kvmagentctl. `agent` is made at its first use: not every subcommand needs one."""

    def __init__(self) -> None:
        self.given: dict[str, str] = {}
        self.environment: dict[str, str] = {}
        #: How lists and answers are printed: "" for people, or wide, name, json, yaml.
        self.output = ""
        #: The output that each command level asked for.
        self.outputs: dict[str, str] = {}
        self.terminal = Terminal()
        #: What the call ends with where its output cannot be written: of a change what became of it.
        self.outcome = Exit.FAILED
        self._agent: Agent | None = None

    @property
    def as_json(self) -> bool:
        """Whether standard output is for programs, as JSON or YAML."""
        return self.output in ("json", "yaml")

    @property
    def is_wide(self) -> bool:
        """Whether lists show every column."""
        return self.output == "wide"

    @cached_property
    def conf(self) -> CtlConf:
        """kvmagentctl's own file.

        Raises:
            CtlError: it says what nobody understands.
        """
        return load_conf()

    @property
    def target(self) -> dict[str, str]:
        """Return how the agent is reached and who asks, by the options' names; without "url" it is this host's.

        An option wins over the agent that --host names, that over the environment, and that over ctl.conf's default.

        Raises:
            CtlError: no such agent; ctl.conf cannot be used.
        """
        named = self.given.get(_HOST) or self.environment.get(_HOST)
        if named:
            rest = {name: value for name, value in self.environment.items() if name != "url"}
            found = {**rest, **self.conf.find(named)}
        elif "url" in self.given or "url" in self.environment or not self.conf.default:
            found = dict(self.environment)
        else:
            found = {**self.environment, **self.conf.find(self.conf.default)}
        return {name: value for name, value in {**found, **self.given}.items() if name != _HOST}

    def target_of(self, name: str, url: str) -> dict[str, str]:
        """Return how the agent of one host of several is reached, and who asks.

        What ctl.conf says of that name holds for it alone: no other host is shown its token.

        Raises:
            CtlError: ctl.conf cannot be used.
        """
        named = self.conf.agents.get(name, {})
        target = {**self.asked_for, **named, **self.given} | ({"url": url} if url else {"url": named["url"]})
        return {option: value for option, value in target.items() if option != _HOST}

    @property
    def asked_for(self) -> dict[str, str]:
        """Return what options and environment say of the agent, without ctl.conf's default: for who looks at this host.

        Raises:
            CtlError: no such agent; ctl.conf cannot be used.
        """
        said = {**self.environment, **self.given}
        return self.target if _HOST in said or "url" in said else said

    @property
    def agent(self) -> Agent:
        """The agent that the options name.

        Raises:
            CtlError: the URL, a certificate or the token cannot be used.
        """
        if self._agent is None:
            target = self.target
            local = {} if "url" in target else find_local_target()
            self._agent = self.connect(Target(**(local | target)))
        return self._agent

    def connect(self, target: Target) -> Agent:
        """Return an agent, after a warning where a token would cross a network in clear text.

        Raises:
            CtlError: the URL, a certificate or the token cannot be used.
        """
        agent = Agent(target)
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
                shell_complete=_complete_agent if name == _HOST else None,
            )
        )
    command.params += [
        click.Option(
            ["--json"],
            is_flag=True,
            help="Print only JSON on standard output.",
            expose_value=False,
            callback=_remember("json"),
        ),
        click.Option(
            ["-o", "--output"],
            type=click.Choice(OUTPUTS),
            help="wide shows all columns of a list and full ids; name prints only names; json is the same as --json.",
            expose_value=False,
            callback=_remember("output"),
            hidden=not is_root,
        ),
    ]
    return command


def _complete_agent(context: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the agents of ctl.conf whose name begins with what was typed."""
    try:
        agents = session_of(context).conf.agents
    except CtlError:
        return []
    return [CompletionItem(name) for name in sorted(agents) if name.startswith(incomplete)]


def session_of(context: click.Context) -> Session:
    """Return the call's session."""
    return context.ensure_object(Session)


def _remember(name: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    def remember(context: click.Context, param: click.Parameter, value: Any) -> None:
        session = session_of(context)
        if not value:
            return
        if name in ("json", "output"):
            session.output = "json" if name == "json" else value
            if session.outputs.setdefault(context.command_path, session.output) != session.output:
                raise click.UsageError("--json and --output name two different outputs", context)
            session.terminal.as_yaml = session.output == "yaml"
        elif param.name and context.get_parameter_source(param.name) is ParameterSource.ENVIRONMENT:
            session.environment[name] = value
        else:
            session.given[name] = value

    return remember
