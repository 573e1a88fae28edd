"""The benchmark on a bare machine: ``python -m anystride.bench --suite mla``; needs torch and Triton alone.

``anystride bench --from FILE`` shows the same lines elsewhere, as tables and as plots.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from anystride.bench.clock import ROUNDS, Clock
from anystride.bench.lines import Line, append
from anystride.bench.measure import commit, facts_of, kernels, measure
from anystride.bench.suites import SUITES, rows_of
from anystride.plan import AUTOMATIC

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Time suites, print a line a row, append the lines to a file a suite.

    Args:
        arguments: Of the command line; None: those of the process.

    Returns:
        The exit code: 1 if a kernel of ours was wrong.
    """
    parser = argparse.ArgumentParser(prog="python -m anystride.bench", description=__doc__)
    parser.add_argument("--suite", nargs="+", choices=SUITES, required=True)
    parser.add_argument("--device", default="")
    parser.add_argument("--backend", nargs="+", help="ours to time; by default those that run by themselves")
    parser.add_argument("--peers", type=Path, help="the folder of peers that are not installed")
    parser.add_argument("--without", nargs="+", default=[], help="peers to leave out")
    parser.add_argument("--only", default="", help="cases or layouts whose name contains this")
    parser.add_argument("--hot", action="store_true", help="leave the L2 cache as the call before left it")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument(
        "--results", type=Path, default=Path("benchmarks/results"), help="folder of the lines"
    )
    parser.add_argument("--commit", default=commit(), help="where git cannot tell")
    given = parser.parse_args(arguments)
    is_right = True
    for suite in given.suite:
        usual = "cpu" if suite == "cpu" or not torch.cuda.is_available() else "cuda"
        device = torch.device(given.device or usual)
        backends = given.backend or [name for name in AUTOMATIC if (name == "cpu") == (device.type == "cpu")]
        asked, absent = kernels(backends, device, given.peers, given.without)
        for name, why in absent.items():
            _say(f"absent: {name}: {why}")
        clock = Clock(device, given.hot, given.rounds)
        facts = facts_of(clock, not given.hot, given.commit)
        _say(
            f"{suite}: {facts.device}, torch {facts.torch}, Triton {facts.triton}, commit {facts.commit}: "
            f"read {facts.read / 1e9:.0f} GB/s, product {facts.product / 1e12:.1f} TFLOP/s"
        )
        path = given.results / f"{suite}-{facts.device.replace(' ', '-')}-{facts.date[:10]}.jsonl"
        began = time.perf_counter()
        for row in rows_of(suite):
            if given.only in row.case.name or given.only in row.layout.name:
                lines = list(measure(row, asked, clock, facts))
                append(path, lines)
                _say(f"{row.case.name:<38} {row.layout.name:<26} " + " | ".join(map(_cell, lines)))
                is_right &= not any(
                    "WRONG" in line.note for line in lines if line.kernel.startswith("anystride")
                )
                if device.type == "cuda":
                    torch.cuda.empty_cache()
        _say(f"{suite}: {time.perf_counter() - began:.0f} s, {path}")
    return 0 if is_right else 1


def _cell(line: Line) -> str:
    return f"{line.kernel} {line.median_us:.1f}" if line.median_us else f"{line.kernel} {line.note[:40]}"


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
