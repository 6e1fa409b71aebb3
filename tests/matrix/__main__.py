"""The whole product: python -m tests.matrix [WORDS]; only rows with these words in them. Prints a table."""

import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.fakes.agent import open_node
from tests.lab.libvirtd import PrivateLibvirtd
from tests.matrix.rows import all_rows, list_machines
from tests.matrix.trial import try_row


def main() -> int:
    """Try every row; return 1 where one started before prepare and not after it."""
    words, verdicts = sys.argv[1:], Counter[str]()
    with (
        PrivateLibvirtd() as lab,
        tempfile.TemporaryDirectory() as directory,
        open_node(lab.uri, Path(directory)) as node,
        lab.connect() as connection,
    ):
        for row in all_rows(list_machines()):
            if not all(word in str(row) for word in words):
                continue
            for trial in try_row(connection, node, row):
                verdicts[trial.verdict] += 1
                why = (trial.refusal or str(trial.reply.get("error", "")))[-160:].strip().replace("\n", " ")
                print(f"{row!s:90} {trial.maxima:8} {trial.verdict:22} {why}", flush=True)
    print(", ".join(f"{verdict}: {count}" for verdict, count in verdicts.most_common()))
    return 1 if verdicts["DOES NOT START"] or verdicts["DEFINITION_REFUSED"] else 0


sys.exit(main())
