"""`make fuzz`: one target, led by coverage. New inputs lie in build/fuzz; one that fails is left there as crash-...

    python -m tests.fuzz.coverage_guided wire 60        target, seconds

An input that taught something is worth keeping: put it in tests/fuzz/corpus, and every test run tries it again.
"""

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["kvmagent"]):
    from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).with_name("corpus")
FOUND = Path(__file__).parents[2] / "build/fuzz"


def main() -> None:
    """Fuzz until the time is over; the exit status is not 0 if a target failed."""
    name, seconds = sys.argv[1:]
    found = FOUND / name
    found.mkdir(parents=True, exist_ok=True)
    options = [f"-max_total_time={seconds}", "-max_len=20000", "-timeout=10", f"-artifact_prefix={FOUND}/{name}-"]
    atheris.Setup([sys.argv[0], str(found), str(CORPUS / name), *options], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
