"""When a certificate ends, of files as the agent is given them."""

import time
from datetime import UTC, datetime
from pathlib import Path

from kvmagent.certificates import find_end
from kvmagent.cli.ctl.ca import read_certificates
from tests.lab.pki import Authority


def test_the_end_is_that_of_the_first_certificate_as_another_library_reads_it(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    for file in (authority.issue("node1.example"), authority.issue("old.example", expired=True)):
        end = find_end(str(file))
        assert end is not None
        assert datetime.fromtimestamp(end, UTC) == read_certificates(file)[0].not_after
    assert end < time.time()
