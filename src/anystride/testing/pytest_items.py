"""Tests of somebody's kernel for pytest: one for each probe, one for each case in each layout.

``pytest_anystride`` has the options, and registers :class:`Kit` when a kernel is named. The trials are made
in a process of their own, one for each kernel and each process of pytest, so that an illegal access fails one
test.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from anystride.testing.child import Child
from anystride.testing.conformance import trials
from anystride.testing.report import Finding, Verdict
from anystride.testing.trial import LeftOut, Trial

__all__ = ["Kit"]

TIMEOUT = 600.0  # seconds for a trial; the first call of a kernel may compile


class Kit:
    """The plugin: adds the tests of every kernel that was named, and ends their processes."""

    def __init__(self, config: pytest.Config) -> None:
        self.children: list[Child] = []
        config.addinivalue_line("markers", "anystride: of a kernel that --anystride-kernel names")
        folder = str(config.invocation_params.dir)  # as python -m pytest does
        if folder not in sys.path:
            sys.path.insert(0, folder)

    @pytest.hookimpl(tryfirst=True)  # before -k and -m choose
    def pytest_collection_modifyitems(self, session: pytest.Session, items: list[pytest.Item]) -> None:
        """Add the tests."""
        for name in dict.fromkeys(session.config.getoption("anystride_kernel")):
            kernel = Kernel.from_parent(session, name=name, nodeid=f"anystride::{name}", kit=self)
            items.extend(session.genitems(kernel))

    def pytest_unconfigure(self) -> None:
        """End the processes."""
        for child in self.children:
            child.close()


class Kernel(pytest.Collector):
    """A kernel that was named, and its process."""

    def __init__(self, *, kit: Kit, **options: Any) -> None:
        super().__init__(**options)
        self.add_marker("anystride")
        self.kit = kit

    def collect(self) -> Iterator[pytest.Item]:
        """Load the kernel, and make a test of each probe and of each case in a layout."""
        option = self.config.getoption
        layouts, peers = option("anystride_layouts"), option("anystride_peers")
        names = None if layouts is None else [word for word in layouts.split(",") if word not in ("", "none")]
        try:
            wanted = trials(layouts=names)
            child = Child(
                self.name, torch.device(option("anystride_device")), TIMEOUT, Path(peers) if peers else None
            )
        except (KeyError, ValueError) as error:
            raise self.CollectError(str(error.args[0])) from None
        self.kit.children.append(child)
        columns: dict[str, list[Trial]] = {}
        for trial in wanted:
            columns.setdefault(trial.probe or f"{trial.case.name}-{trial.layout.name}", []).append(trial)
        for name, column in columns.items():
            yield Column.from_parent(self, name=name, trials=column, child=child)


class Fault(Exception):
    """What is wrong with the kernel, to be shown without a traceback: the fault is not in this file."""


class Column(pytest.Item):
    """A probe, or a case in a layout."""

    def __init__(self, *, trials: list[Trial], child: Child, **options: Any) -> None:
        super().__init__(**options)
        self.trials, self.child = trials, child

    def runtest(self) -> None:
        """Fail if a call was wrong, crashed, or copied the cache; skip if it was refused."""
        if self.child.subject.absent:
            pytest.skip(self.child.subject.absent)
        findings, left_out = [], []
        for trial in self.trials:
            try:
                findings.append(self.child.find(trial))
            except LeftOut as why:
                left_out.append(str(why))
        bad = [Verdict.WRONG, Verdict.CRASHED]
        if not self.config.getoption("anystride_allow_copies"):
            bad.append(Verdict.COPIED)
        if any(finding.verdict in bad for finding in findings):
            raise Fault("\n".join(_lines(findings, bad)))
        refusals = [finding.message for finding in findings if finding.verdict is Verdict.REFUSED]
        if refusals or left_out:
            pytest.skip("; ".join(dict.fromkeys([*refusals, *left_out])))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """Show a fault as it is told."""
        if isinstance(excinfo.value, Fault):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """Where the test is: nowhere in a file."""
        return self.config.rootpath, None, f"{self.child.subject.name}: {self.name}"


def _lines(findings: Iterable[Finding], verdicts: list[Verdict]) -> Iterator[str]:
    for finding in findings:
        if finding.verdict in verdicts:
            yield f"{finding.verdict.value}: {finding.case} in {finding.layout}: {finding.message}"
            if finding.where:
                yield f"  {finding.where}"
