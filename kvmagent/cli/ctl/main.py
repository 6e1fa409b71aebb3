"""The command line of kvmagentctl.

`make_cli()` is the whole parser, a click group, without a connection made: `cli.to_info_dict(click.Context(cli))`
gives every subcommand with its arguments, options, defaults and help as plain data (a man page is made from that);
`exits.MEANINGS` are the exit statuses.
"""

import errno
import os
import re
import sys
import traceback
from typing import Any

import click

from kvmagent import __version__
from kvmagent.cli.ctl.exits import MEANINGS, CtlError, Exit
from kvmagent.cli.ctl.session import Session, shared_options
from kvmagent.cli.ctl.terminal import BAD, OutputLost, Terminal, paint, printable
from kvmagent.model.errors import AgentError

NAME = "kvmagentctl"
_PKI, _VMS, _PLAN, _READY, _BUNDLE = "pki", "vms", "plan", "ready", "support-bundle"
# How the command line asks for a result that programs read; it may be wrong otherwise, and not parsed.
_STRUCTURED = re.compile(r"--json|-o ?(json|yaml)|--output[= ](json|yaml)")
# What only a write fails with.
_OF_WRITING = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class _Cli(click.Group):
    """Subcommands are imported when they are asked for; those of plugins, when none of ours has the name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return all subcommands, in the order in which an operator comes to need them."""
        from kvmagent.cli.ctl import changes, inspect

        status, *others = inspect.COMMANDS
        return [status, _VMS, *others, _PLAN, *changes.names(), _PKI, _BUNDLE]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a subcommand."""
        from kvmagent.cli.ctl import inspect

        if cmd_name in inspect.COMMANDS:
            return inspect.COMMANDS[cmd_name]
        if cmd_name == _PKI:
            from kvmagent.cli.ctl.pki import pki

            return pki
        if cmd_name == _VMS:
            from kvmagent.cli.ctl.fleet import VMS

            return VMS
        if cmd_name == _PLAN:
            from kvmagent.cli.ctl.plan import PLAN

            return PLAN
        if cmd_name == _BUNDLE:
            from kvmagent.cli.ctl.bundle import BUNDLE

            return BUNDLE
        from kvmagent.cli.ctl import changes, fleet

        found = changes.find(cmd_name)
        return fleet.make_ready(found) if found is not None and cmd_name == _READY else found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of subcommands, then the exit statuses."""
        super().format_commands(ctx, formatter)
        with formatter.section("Exit status"):
            formatter.write_dl([(str(status.value), meaning) for status, meaning in MEANINGS.items()])


def make_cli() -> click.Group:
    """Return the parser."""
    cli = _Cli(
        NAME,
        help="Add CPUs and memory to running VMs, and remove them, through the kvmagent on their host.\n\n"
        "Commands set totals: running one twice changes nothing the second time. Sizes have a unit, such as 4G, 1.5GiB "
        "or 512MiB, and count in powers of 1024. Results go to standard output; notices, errors and progress (on a "
        "terminal) go to standard error.",
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )
    shared_options(cli, is_root=True)
    return click.version_option(__version__, "-V", "--version", prog_name=NAME, message="%(prog)s %(version)s")(cli)


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line says and return the exit status. An error is one line, never a traceback."""
    arguments = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    wanted = _STRUCTURED.search(" ".join(arguments))
    _open_closed_streams()
    session = Session()
    try:
        status = make_cli().main(arguments, prog_name=NAME, standalone_mode=False, obj=session)
        sys.stdout.flush()
        return int(status or 0)
    except click.exceptions.Exit as ended:
        return ended.exit_code
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else NAME
        failure = CtlError(Exit.USAGE, "USAGE", error.format_message().rstrip("."), f"See {path} --help.")
    except (KeyboardInterrupt, click.Abort):
        failure = CtlError(Exit.INTERRUPTED, "INTERRUPTED", "interrupted", "")
    except OutputLost as lost:
        return _tell_lost(session.outcome, lost.error)
    except CtlError as error:
        failure = error
    except AgentError as error:
        failure = CtlError(Exit.FAILED, error.code, error.message, error.remedy)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _OF_WRITING:  # what click has written, or a last flush
            return _tell_lost(session.outcome, error)
        if os.environ.get("KVMAGENTCTL_DEBUG"):
            traceback.print_exc()
        remedy = "Report it, with the output of KVMAGENTCTL_DEBUG=1."
        failure = CtlError(Exit.FAILED, "INTERNAL_ERROR", f"{type(error).__name__}: {error}", remedy)
    return _tell(failure, "" if wanted is None else "yaml" if "yaml" in wanted[0] else "json")


def _open_closed_streams() -> None:
    """Write into nothing where the caller has closed standard output or error: what is to be done is done."""
    sys.stdout = sys.stdout or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    sys.stderr = sys.stderr or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")


def _tell_lost(status: int, error: OSError) -> int:
    """Say that the result could not be written, unless whoever read it has enough of it: head(1), say."""
    # Nothing more is written, at exit either.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):
        return status
    words = f"standard output cannot be written: {error.strerror}"
    return _tell(CtlError(Exit(status), "OUTPUT_LOST", words, "Free space there, or write to another file."), "")


def _tell(failure: CtlError, wanted: str) -> int:
    from kvmagent.cli.ctl.inoptions import in_options

    terminal = Terminal()
    terminal.as_yaml = wanted == "yaml"
    if wanted:
        try:
            terminal.print_json(failure.body())
        except OutputLost as lost:
            return _tell_lost(failure.status, lost.error)
    else:
        words: dict[str, Any] = printable(failure.body())
        line = " ".join(f"{words['errorCode']}: {in_options(words['error'])}".split())
        remedy = " ".join(in_options(words["remedy"]).split())
        terminal.tell(f"{paint(NAME, BAD)}: {line}" + (f"; remedy: {remedy}" if remedy else ""))
    return failure.status


if __name__ == "__main__":
    sys.exit(main())
