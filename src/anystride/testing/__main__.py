"""The kit on a bare machine: ``python -m anystride.testing KERNEL... --json FILE``; needs torch alone.

``anystride check --from FILE`` shows the same reports elsewhere, in a terminal and as a page.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from anystride.testing.choice import exit_code, kernels_asked_for, words
from anystride.testing.conformance import check
from anystride.testing.report import Finding, Report, Verdict, save_reports

__all__ = ["main"]

EVERY = 10.0  # seconds between two lines that say how far it is


def main(arguments: list[str] | None = None) -> int:
    """Check kernels, print a line for each fault and each kernel, store the reports.

    Args:
        arguments: Of the command line; None: those of the process.

    Returns:
        The exit code: 0, 1 if a call was wrong or crashed, 2 if there was nothing to call.
    """
    parser = argparse.ArgumentParser(prog="python -m anystride.testing", description=__doc__)
    parser.add_argument(
        "kernels", nargs="*", metavar="KERNEL", help="a back end, a peer, module:function, all"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cases", default="", help="names, with commas between them; none for no case")
    parser.add_argument("--layouts", default="", help="names, with commas between them; none for no layout")
    parser.add_argument("--probes", default="", help="names, with commas between them; none for no probe")
    parser.add_argument("--json", type=Path, help="where the reports go, after each kernel anew")
    parser.add_argument("--peers", type=Path, help="the folder of peers that are not installed")
    parser.add_argument("--no-isolation", action="store_true", help="call kernels in this process")
    given = parser.parse_args(arguments)
    try:
        kernels = kernels_asked_for(given.kernels, torch.device(given.device).type)
    except ValueError as error:
        parser.error(str(error))
    reports: list[Report] = []
    for kernel in kernels:
        report = check(
            kernel,
            words(given.cases),
            words(given.layouts),
            given.device,
            probes=words(given.probes),
            isolate=not given.no_isolation,
            progress=_Lines(kernel),
            peers_folder=given.peers,
        )
        reports.append(report)
        _say(f"{kernel}: {_sum(report)}")
        if given.json:
            save_reports(given.json, reports)
    return exit_code(reports)


class _Lines:
    """Prints how far a kernel is, every few seconds, and at once what is wrong or has crashed."""

    def __init__(self, kernel: str) -> None:
        self.kernel = kernel
        self.told = time.monotonic()

    def __call__(self, done: int, total: int, finding: Finding) -> None:
        what = f"{finding.case} in {finding.layout}"
        if finding.verdict in (Verdict.WRONG, Verdict.CRASHED):
            why = " ".join(filter(None, (finding.message, finding.where)))
            _say(f"{self.kernel}: {finding.verdict.value}: {finding.probe} {what}: {why}")
        elif time.monotonic() - self.told > EVERY:
            self.told = time.monotonic()
            _say(f"{self.kernel}: {done} of {total}: {what}")


def _sum(report: Report) -> str:
    if report.absent:
        return f"absent: {report.absent}"
    counts = {verdict: sum(f.verdict is verdict for f in report.findings) for verdict in reversed(Verdict)}
    told = [f"{count} {verdict.value}" for verdict, count in counts.items() if count] or ["no call"]
    return ", ".join((*told, *(f"not tried: {why}" for why in report.left_out)))


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
