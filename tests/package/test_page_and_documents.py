"""What is served and what is read from files is in the package."""

import subprocess
from pathlib import Path

import pytest

from kvmagent.api.page import FILES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def listed(deb: Path) -> set[str]:
    """The paths of all files of the package."""
    told = subprocess.run(["dpkg-deb", "--contents", deb], check=True, capture_output=True, text=True).stdout
    return {line.split()[5].removeprefix(".") for line in told.splitlines()}


def test_the_status_page_is_whole(listed: set[str]) -> None:
    for name, _kind in FILES.values():
        assert any(path.endswith(f"/kvmagent/api/page/{name}") for path in listed), name


def test_the_documents_are_where_the_readme_leads_to(listed: set[str]) -> None:
    assert "/usr/share/doc/kvmagent/README.md" in listed
    for document in (ROOT / "docs").glob("*.md"):
        assert f"/usr/share/doc/kvmagent/docs/{document.name}" in listed
