"""The conformance kit: hold anybody's paged-attention kernel to the law, in every layout in use.

    from anystride.testing.conformance import check

    report = check("my_package.kernels:decode", device="cuda")
    for finding in report.findings:
        print(finding.probe or finding.layout, finding.case, finding.verdict.value, finding.message)

Two sets of trials are made: the probes (``probes.py``), each of one thing alone, and cases of real models in
every layout of the catalogue that holds them, with NaN wherever no row of K or V lies. What else may be
poisoned has probes of its own, so that no layout is blamed for a NaN in a tail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch

from anystride.testing.cases import Case, find_case
from anystride.testing.child import Child
from anystride.testing.inputs import compatible
from anystride.testing.layouts import LAYOUTS, find_layout
from anystride.testing.probes import PROBES, trials_of
from anystride.testing.recipe import Layout
from anystride.testing.report import Finding, Report
from anystride.testing.subjects import Subject, facts_of, load
from anystride.testing.trial import Kernel, LeftOut, Trial, Trials

__all__ = ["CASES_CHECKED", "check", "trials"]

# One of each family, and the cases of pages of several blocks.
CASES_CHECKED = ("llama-3-8b", "deepseek-v3-h16", "deepseek-v3-q_v", "pages-4x16", "pages-row-2x64")

Progress = Callable[[int, int, Finding], None]


def check(
    kernel: Kernel | str,
    cases: Iterable[Case | str] | None = None,
    layouts: Iterable[Layout | str] | None = None,
    device: torch.device | str = "cpu",
    *,
    probes: Iterable[str] | None = None,
    isolate: bool = True,
    timeout: float = 600.0,
    peers_folder: Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """Hold a kernel to the law.

    Args:
        kernel: A callable with the signature of ``anystride.flash_attn_varlen_func``, called by keywords,
            that returns ``out`` or ``(out, lse)``; or the name of a back end (``triton``), of a peer
            (``flash-mla``), or of a function (``module:function``).
        cases: Of the table of cases, each in every layout that holds it; None for ``CASES_CHECKED``.
        layouts: Of the catalogue; None for all.
        device: Of the tensors.
        probes: Names of columns; None for all.
        isolate: Make the trials in a process of their own, so that a crash or a hang ends one of them.
            Without it, a callable need not be importable by name, and an illegal access ends this process.
        timeout: Seconds after which a call that has not answered counts as crashed. The first call of a
            kernel may compile.
        peers_folder: The folder of peers that are not installed.
        progress: Called after each trial with the number of trials made, of all, and the finding.

    Returns:
        The findings. What could not be tried on this machine is in ``left_out``.

    Raises:
        KeyError: There is no such case, layout, probe or kernel.
        ValueError: The kernel cannot be loaded, or cannot be sent to another process.
    """
    wanted = trials(cases, layouts, probes)
    device = torch.device(device)
    if not isolate:
        subject = load(kernel, peers_folder)
        if subject.kernel is None:
            return _report(subject, *facts_of(device))
        findings, left_out = _made(Trials(subject.kernel, device, subject.prepare).find, wanted, progress)
        return _report(subject, *facts_of(device), findings, left_out)
    child = Child(kernel, device, timeout, peers_folder)
    try:
        if child.subject.absent:
            return _report(child.subject, child.device_name, child.versions)
        findings, left_out = _made(child.find, wanted, progress)
    finally:
        child.close()
    return _report(child.subject, child.device_name, child.versions, findings, left_out)


def trials(
    cases: Iterable[Case | str] | None = None,
    layouts: Iterable[Layout | str] | None = None,
    probes: Iterable[str] | None = None,
) -> list[Trial]:
    """What :func:`check` makes of these arguments, the probes first.

    Raises:
        KeyError: There is no such case, layout or probe.
    """
    by_name = {probe.name: probe for probe in PROBES}
    chosen = list(by_name) if probes is None else list(probes)
    for name in chosen:
        if name not in by_name:
            raise KeyError(f"no probe {name!r}; there are {', '.join(by_name)}")
    return [
        *(trial for name in chosen for trial in trials_of(by_name[name])),
        *_grid(
            [
                find_case(case) if isinstance(case, str) else case
                for case in (CASES_CHECKED if cases is None else cases)
            ],
            list(LAYOUTS.values())
            if layouts is None
            else [find_layout(layout) if isinstance(layout, str) else layout for layout in layouts],
        ),
    ]


def _grid(cases: Sequence[Case], layouts: Sequence[Layout]) -> Iterator[Trial]:
    """Every case in every layout that holds it."""
    for layout in layouts:
        for case in cases:
            if compatible(case, layout) is None:
                yield Trial(case, layout, poisons=frozenset({"gaps"}))


def _made(
    find: Callable[[Trial], Finding], wanted: Sequence[Trial], progress: Progress | None
) -> tuple[list[Finding], list[str]]:
    findings: list[Finding] = []
    left_out: dict[str, None] = {}
    for number, trial in enumerate(wanted, 1):
        try:
            finding = find(trial)
        except LeftOut as why:
            left_out[f"{trial.layout.name}: {why}"] = None
            continue
        findings.append(finding)
        if progress is not None:
            progress(number, len(wanted), finding)
    return findings, list(left_out)


def _report(
    subject: Subject,
    device: str,
    versions: dict[str, str],
    findings: Sequence[Finding] = (),
    left_out: Sequence[str] = (),
) -> Report:
    return Report(
        subject.name, subject.title, subject.version, device, versions, tuple(findings), subject.absent,
        tuple(left_out),
    )  # fmt: skip
