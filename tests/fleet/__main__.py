"""make fleet N=100 SECONDS=120: the scenes over so many agents; build/fleet.json has the figures."""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from contextlib import ExitStack
from pathlib import Path

from tests.fleet.hosts import Fleet
from tests.fleet.limits import find_room
from tests.fleet.scenes import Table, play
from tests.fleet.waves import can_play, play_waves

BUILD = Path(__file__).parents[2] / "build"


def main() -> int:
    """Play all scenes; 1 where the invariant was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.fleet")
    parser.add_argument("agents", type=int)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--no-upgrade", action="store_true", help="without the waves of the Ansible role, minutes long")
    given = parser.parse_args()
    room = find_room()
    count = min(given.agents, room.agents)
    if count < given.agents:
        print(f"this machine has room for {count} agents, not {given.agents}: {room.limit}", flush=True)
    if count < 1:
        return 2
    table, began = Table(), time.monotonic()
    try:
        with ExitStack() as stack:
            play(Fleet(stack, count), table, seconds=given.seconds)
        if can_play() and not given.no_upgrade:
            play_waves(table, count)
        elif not given.no_upgrade:
            print("no upgrade by the Ansible role: that needs root, on Debian", flush=True)
    except Exception:
        traceback.print_exc()
        table.faults.append("it came to no end")
    print(f"\n{count} agents, {given.seconds:g} s of outage, {time.monotonic() - began:.0f} s in all\n\n{table}")
    BUILD.mkdir(exist_ok=True)
    (BUILD / "fleet.json").write_text(json.dumps({"agents": count, "rows": table.rows, "faults": table.faults}))
    for fault in table.faults:
        print(fault, file=sys.stderr)
    return 1 if table.faults else 0


if __name__ == "__main__":
    sys.exit(main())
