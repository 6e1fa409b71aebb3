"""The whole product: python -m tests.matrix [WORDS]; only rows with these words in them. Prints a table.

With --seconds as many rows as that time allows, in an order that --seed decides. With --newest the rows that need the
newest libvirt and QEMU, on those.
"""

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from kvmagent.hypervisor.schema import DOMAIN_SCHEMA
from tests.fakes.agent import open_node
from tests.lab.libvirtd import PrivateLibvirtd
from tests.lab.newest import build_newest_tree
from tests.lab.orphans import reaping_orphans
from tests.matrix.rows import all_rows, list_machines, newest_rows
from tests.matrix.trial import try_row


def main() -> int:
    """Try every row; return 1 where one started before prepare and not after it."""
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    parser.add_argument("words", nargs="*", help="only rows with all of these words")
    parser.add_argument("--seconds", type=float, help="stop after so long; rows are then shuffled")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--newest", action="store_true", help="on the newest libvirt and QEMU of Debian; needs root")
    options, verdicts = parser.parse_args(), Counter[str]()
    listed = newest_rows() if options.newest else all_rows(list_machines())
    rows = [row for row in listed if all(word in str(row) for word in options.words)]
    if options.seconds is not None:
        random.Random(options.seed).shuffle(rows)
    tree = build_newest_tree(report=print) if options.newest else None
    schema = DOMAIN_SCHEMA if tree is None else tree / DOMAIN_SCHEMA.relative_to("/")
    end_at = None if options.seconds is None else time.monotonic() + options.seconds
    tried = 0
    with (
        reaping_orphans(),
        PrivateLibvirtd(tree) as lab,
        tempfile.TemporaryDirectory() as directory,
        open_node(lab.uri, Path(directory), domain_schema=schema) as node,
        lab.connect() as connection,
    ):
        for row in rows:
            if end_at is not None and time.monotonic() > end_at:
                break
            tried += 1
            for trial in try_row(connection, node, row):
                verdicts[trial.verdict] += 1
                why = (trial.refusal or str(trial.reply.get("error", "")))[-160:].strip().replace("\n", " ")
                print(f"{row!s:90} {trial.maxima:8} {trial.verdict:22} {why}", flush=True)
    print(
        f"{tried} of {len(rows)} rows: " + ", ".join(f"{verdict}: {count}" for verdict, count in verdicts.most_common())
    )
    return 1 if verdicts["DOES NOT START"] or verdicts["DEFINITION_REFUSED"] else 0


sys.exit(main())
