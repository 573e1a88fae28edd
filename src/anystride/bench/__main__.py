"""The benchmark on a bare machine: ``python -m anystride.bench --suite mla``; needs torch and Triton alone.

``anystride bench --from FILE`` shows the same lines elsewhere, as tables and as plots.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from anystride.bench.clock import ROUNDS
from anystride.bench.lines import Line, append
from anystride.bench.run import RESULTS, device_for, exit_code, file_of, head_of, rows_asked_for, start
from anystride.bench.suites import SUITES

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Time suites, print a line a row, append the lines to a file a suite.

    Args:
        arguments: Of the command line; None: those of the process.

    Returns:
        The exit code: 1 if a kernel of ours was wrong, 2 if nothing was timed.
    """
    parser = argparse.ArgumentParser(prog="python -m anystride.bench", description=__doc__)
    parser.add_argument("--suite", nargs="+", choices=SUITES, required=True)
    parser.add_argument("--device", default="", help="cuda, cuda:1, ...; by default what the suite is for")
    parser.add_argument("--backend", nargs="+", default=[], help="ours to time; by default the usual ones")
    parser.add_argument("--peers", type=Path, help="the folder of peers that are not installed")
    parser.add_argument("--without", nargs="+", default=[], help="peers to leave out")
    parser.add_argument("--only", default="", help="rows whose case or layout contains this")
    parser.add_argument("--hot", action="store_true", help="leave the L2 cache as the call before left it")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of each kernel")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the lines")
    parser.add_argument("--commit", default="", help="where git cannot tell")
    given = parser.parse_args(arguments)
    try:
        device = device_for(given.suite, given.device)
        bench = start(
            device, given.backend, given.peers, given.without, given.hot, given.rounds, given.commit
        )
    except ValueError as error:
        parser.error(str(error))
    for name, why in bench.absent.items():
        _say(f"absent: {name}: {why}")
    _say(head_of(bench.facts))
    every: list[Line] = []
    for suite in given.suite:
        began, path = time.perf_counter(), file_of(given.results, suite, bench.facts)
        for row in rows_asked_for(suite, given.only):
            lines = bench.measure(row)
            append(path, lines)
            every += lines
            _say(f"{row.name:<60} " + " | ".join(map(_cell, lines)))
        _say(f"{suite}: {time.perf_counter() - began:.0f} s, {path}")
    return exit_code(every)


def _cell(line: Line) -> str:
    return f"{line.kernel} {line.median_us:.1f}" if line.median_us else f"{line.kernel} {line.note[:60]}"


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
