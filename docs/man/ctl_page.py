"""Prints kvmagentctl(1), made from its parser: every subcommand, argument, option and exit status."""

import sys

import click
from mdoc import DATE, paragraphs, text, word

from kvmagent.cli.ctl.exits import MEANINGS
from kvmagent.cli.ctl.main import NAME, make_cli

HEAD = f"""\
.Dd {DATE}
.Dt KVMAGENTCTL 1
.Os
.Sh NAME
.Nm {NAME}
.Nd add CPUs and memory to running VMs, and remove them
.Sh SYNOPSIS
.Nm
.Op Ar options
.Ar command
.Op Ar arguments
.Sh DESCRIPTION"""

FILES = """\
.Sh FILES
.Pa ~/.config/kvmagent/ctl.conf
over
.Pa /etc/kvmagent/ctl.conf :
agents by name, for
.Fl -host ,
and the one that is asked where none is named:
.Bd -literal -offset indent
[default]
agent = node1

[agent node1]
url = https://node1.example:7070
ca = /etc/kvmagent/ca.pem
token_file = ~/.config/kvmagent/token
.Ed
.Pp
A section takes url, ca, cert, key and token_file.
An option wins over the section, that over the environment."""

TAIL = """\
.Sh EXAMPLES
Four vCPUs and 8 GiB of memory in all, or neither:
.Pp
.Dl kvmagentctl plug db-7 4 8G
.Pp
An agent on another host, over TLS:
.Pp
.Dl kvmagentctl --url https://10.0.0.21:7070 --ca ca.pem --cert me.pem vms
.Pp
Two GiB more than it has, and who changed it last:
.Pp
.Dl kvmagentctl plug-memory db-7 +2G
.Dl kvmagentctl log db-7
.Sh SEE ALSO
.Xr kvmagent.conf 5 ,
.Xr kvmagent 8
"""


def make_page() -> str:
    """Return the page, mdoc."""
    cli = make_cli()
    context = click.Context(cli, info_name=NAME)
    shared = {param.name for param in cli.get_params(context)}
    lines = [HEAD, paragraphs(cli.help or ""), ".Sh OPTIONS", "These go before the command or after it."]
    lines += _options(cli, context, hidden=set())
    lines += [".Sh COMMANDS"]
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        inner = click.Context(command, info_name=name, parent=context)
        usage = [piece for piece in command.collect_usage_pieces(inner) if piece != "[OPTIONS]"]
        lines += [f".Ss {word(' '.join([name, *usage]))}", paragraphs(command.help or "")]
        lines += _options(command, inner, hidden=shared)
    lines += [FILES, ".Sh EXIT STATUS", ".Bl -tag -width Ds"]
    lines += [f".It {status.value}\n{text(meaning)}" for status, meaning in MEANINGS.items()]
    return "\n".join([*lines, ".El", TAIL])


def _options(command: click.Command, context: click.Context, *, hidden: set[str | None]) -> list[str]:
    options = [one for one in command.get_params(context) if isinstance(one, click.Option) and one.name not in hidden]
    records = [record for option in options if (record := option.get_help_record(context))]
    if not records:
        return []
    return [".Bl -tag -width Ds", *(f".It {word(names)}\n{text(meaning)}" for names, meaning in records), ".El"]


if __name__ == "__main__":
    sys.stdout.write(make_page())
