"""`kvmagentctl pki`: makes a CA and certificates, as SECURITY.md does with openssl.

Nothing that is there is written over: a CA that is there signs what is asked for now.
"""

import os
from pathlib import Path

import click

from kvmagent.cli.ctl.ca import Authority, Issued, Use, load_authority, make_authority
from kvmagent.cli.ctl.exits import CtlError, Exit
from kvmagent.cli.ctl.session import session_of, shared_options


@click.command()
@click.argument("action", type=click.Choice(["init"]), metavar="init")
@click.argument("directory", metavar="DIRECTORY", type=click.Path(path_type=Path, file_okay=False))
@click.option("--agent", "agents", metavar="NAME[,NAME]", multiple=True, help="An agent, by its names and addresses.")
@click.option(
    "--client", "clients", metavar="NAME", multiple=True, help="A client of agents: a management server, or you."
)
@click.option(
    "--days", type=click.IntRange(1, 3650), default=365, show_default=True, help="Days that the certificates are valid."
)
@click.pass_context
def pki(
    context: click.Context, action: str, directory: Path, agents: tuple[str, ...], clients: tuple[str, ...], days: int
) -> None:
    """Issue certificates for agents and their clients.

    It makes a CA in the directory, or uses the one that is there, and writes NAME.pem and NAME.key for each name.

    Give the names and addresses by which clients reach an agent: --agent node1.example,10.0.0.21. Keep ca.key off
    the agents' hosts.
    """
    if not agents and not clients:
        raise click.UsageError("nothing to issue: give --agent or --client", context)
    session = session_of(context)
    written: list[str] = []
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        authority = _find_authority(directory, written)
        for use, wanted in ((Use.AGENT, agents), (Use.CLIENT, clients)):
            for names in wanted:
                parts = [name.strip() for name in names.split(",") if name.strip()]
                written += _write(directory, parts[0], authority.issue(parts, use, days=days))
    except FileExistsError as error:
        remedy = "Move it away, or choose another name or directory."
        raise CtlError(Exit.FAILED, "FILE_EXISTS", f"{error.filename} already exists", remedy) from error
    except (OSError, ValueError, IndexError) as error:
        remedy = "Name a directory that can be written, and host names or addresses."
        raise CtlError(Exit.FAILED, "NOT_ISSUED", f"{directory}: {error}", remedy) from error
    if session.as_json:
        session.terminal.print_json({"success": True, "files": written})
    else:
        session.terminal.print(*written)


def _find_authority(directory: Path, written: list[str]) -> Authority:
    """Return the directory's CA; a new one is written and added to `written`."""
    certificate, key = directory / "ca.pem", directory / "ca.key"
    if certificate.exists() and key.exists():
        return load_authority(certificate.read_bytes(), key.read_bytes())
    authority = make_authority()
    written += _write(directory, "ca", authority.issued)
    return authority


def _write(directory: Path, name: str, issued: Issued) -> list[str]:
    """Write a certificate and its key, which its owner alone can read; return the files' names."""
    files = []
    for suffix, content, mode in (("key", issued.key, 0o600), ("pem", issued.certificate, 0o644)):
        path = directory / f"{name}.{suffix}"
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content)
        files.append(str(path))
    return files


shared_options(pki)
