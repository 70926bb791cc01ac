"""`make simulate N=… SEED=…`: many schedules on as many processes as are asked for, or one of them again.

Prints a line for each violation with the seed that repeats it, what was injected, and last of all
`N schedules, N operations, N violations`. Seed s is always the same schedule, whatever N is.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable

from tests.simulation.bugs import BUGS, hunt
from tests.simulation.many import Report, run_all, schedule_of
from tests.simulation.schedule import Result, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="make simulate", description=__doc__)
    parser.add_argument("--n", type=int, default=1_000, help="how many schedules")
    parser.add_argument("--seed", type=int, default=1, help="the first one's seed; with --n 1 the one to replay")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--events", action="store_true", help="with --n 1: print every traced event")
    parser.add_argument("--bug", choices=sorted(BUGS), help="plant this bug and look for the first seed that shows it")
    options = parser.parse_args()
    if options.bug:
        found = hunt(BUGS[options.bug])
        print(f"seed {found[0]}: {found[1].violations[0]}" if found else "not found")
        return 0 if found else 1
    began, report = time.monotonic(), Report()
    if options.n == 1:
        results: Iterable[Result] = [run(schedule_of(options.seed), keep_trace=options.events)]
    else:
        results = run_all(range(options.seed, options.seed + options.n), options.processes)
    for result in results:
        report.add(result)
        for line in result.events or ():
            print(line)
        for violation in result.violations[:5]:
            print(f"seed {result.schedule.seed}: {violation}\n    again: make simulate N=1 SEED={result.schedule.seed}")
        if sys.stderr.isatty() and report.schedules % 50 == 0:
            print(f"\r{report.schedules}/{options.n}", end="", file=sys.stderr, flush=True)
        if options.n == 1:
            print(f"trace {result.trace}")
    print("\n".join(report.lines(time.monotonic() - began)))
    return 1 if report.violations else 0


if __name__ == "__main__":
    sys.exit(main())
