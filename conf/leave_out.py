"""Takes out of a package's environment what nothing in it imports: leave_out.py SITE-PACKAGES.

Libraries of our libraries ask for it, for commands and features that the agent does not use. It is named here and
nowhere else; tests/package starts everything without it.
"""

import shutil
import sys
from importlib.metadata import distributions
from pathlib import Path

#: jaraco.text's command line, cffi's compiler, what pip brings.
DISTRIBUTIONS = frozenset(
    {
        "annotated-doc",
        "annotated-types",
        "autocommand",
        "markdown-it-py",
        "mdurl",
        "pip",
        "pycparser",
        "pydantic",
        "pydantic-core",
        "pygments",
        "rich",
        "setuptools",
        "shellingham",
        "typer",
        "typer-slim",
        "typing-inspection",
        "tzdata",
    }
)
#: Tests, tutorials and sources to compile with, of what is kept.
PARTS = (
    "cheroot/test",
    "cherrypy/scaffold",
    "cherrypy/test",
    "cherrypy/tutorial",
    "lxml/includes",
    "lxml/isoschematron",
    "lxml/objectify*.so",
    "simplejson/tests",
    "dateutil/zoneinfo",
)


def leave_out(site: Path) -> list[str]:
    """Delete them; what was there of them."""
    gone = []
    for distribution in list(distributions(path=[str(site)])):
        name = distribution.metadata["Name"].lower().replace("_", "-").replace(".", "-")
        if name not in DISTRIBUTIONS:
            continue
        gone.append(name)
        for file in distribution.files or ():
            path = Path(str(distribution.locate_file(file)))
            if path.resolve().is_relative_to(site.resolve()):
                path.unlink(missing_ok=True)
    for part in PARTS:
        for path in site.glob(part):
            gone.append(part)
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for directory in sorted((path for path in site.rglob("*") if path.is_dir()), reverse=True):
        if not any(directory.iterdir()):
            directory.rmdir()
    return gone


if __name__ == "__main__":
    sys.stdout.write(f"left out: {', '.join(leave_out(Path(sys.argv[1])))}\n")
