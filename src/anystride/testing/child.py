"""A process that makes trials, and may crash: an illegal access ends one trial, and not the run."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from anystride.testing.report import Finding, Verdict
from anystride.testing.subjects import Subject, demand_name, facts_of, load
from anystride.testing.trial import Kernel, LeftOut, Trial, Trials

__all__ = ["Child"]


@dataclass(frozen=True)
class Failed:
    """The kernel could not be loaded."""

    text: str


def _serve(pipe: Connection, kernel: Kernel | str, device: str, peers: Path | None) -> None:
    """Load the kernel, say what it is, and answer every trial with a finding or a ``LeftOut``."""
    try:
        subject = load(kernel, peers)
        pipe.send((replace(subject, kernel=None, prepare=None), facts_of(torch.device(device))))
    except Exception:
        pipe.send(Failed(traceback.format_exc()))
        return
    if subject.absent:
        return
    assert subject.kernel is not None
    trials = Trials(subject.kernel, torch.device(device), subject.prepare)
    while (trial := pipe.recv()) is not None:
        try:
            answer: Finding | LeftOut = trials.find(trial)
        except LeftOut as why:
            answer = why
        pipe.send(answer)
        if isinstance(answer, Finding) and answer.verdict is Verdict.CRASHED:
            return  # the device is lost to this process


class Child:
    """A process for trials of one kernel; a new one takes over when it dies.

    Args:
        kernel: Importable by name, or a name.
        device: Of the tensors.
        timeout: Seconds after which a call that has not answered counts as crashed.
        peers: The folder of peers that are not installed.

    Raises:
        KeyError: No back end and no peer has this name.
        ValueError: The kernel cannot be loaded, or cannot be sent to another process.
    """

    def __init__(
        self, kernel: Kernel | str, device: torch.device, timeout: float, peers: Path | None
    ) -> None:
        demand_name(kernel)
        self._arguments = (kernel, str(device), peers)
        self._timeout = timeout
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, *self._arguments), daemon=True)
        lives_in_main = getattr(self._arguments[0], "__module__", "") == "__main__"
        try:
            with nullcontext() if lives_in_main else _without_main():
                self._process.start()
        except (AttributeError, TypeError) as error:  # what pickle says of a function without a name
            raise ValueError(
                f"the kernel cannot be sent to another process: {error}\n"
                "  do     define it at the top of a module, or pass isolate=False"
            ) from None
        other.close()
        answer = self._answer()
        if isinstance(answer, str):
            raise ValueError(f"the process that loads the kernel {answer}")
        if isinstance(answer, Failed):
            raise ValueError(f"the kernel cannot be loaded:\n{answer.text}")
        self.subject: Subject
        self.device_name: str
        self.versions: dict[str, str]
        self.subject, (self.device_name, self.versions) = answer

    def _answer(self) -> Any:
        """What the process says; a sentence about its end if it says nothing."""
        if not self._pipe.poll(self._timeout):
            self._process.kill()
            self._process.join()
            return f"gave no answer within {self._timeout:g} s"
        try:
            return self._pipe.recv()
        except (EOFError, ConnectionError):  # the second, where it died before it read what it was sent
            self._process.join()
            code = self._process.exitcode or 0
            return f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"

    def find(self, trial: Trial) -> Finding:
        """Have the trial made. Raises ``LeftOut``."""
        if not self._process.is_alive():
            self._pipe.close()
            self._start()
        with suppress(ConnectionError):  # it died just now, which the answer tells
            self._pipe.send(trial)
        answer = self._answer()
        if isinstance(answer, LeftOut):
            raise answer
        if isinstance(answer, Finding):
            if answer.verdict is Verdict.CRASHED:
                self._process.join()
            return answer
        return Finding(
            trial.case.name, trial.layout.name, Verdict.CRASHED, trial.probe, f"the process {answer}"
        )

    def close(self) -> None:
        """End the process."""
        if self._process.is_alive():
            with suppress(ConnectionError):
                self._pipe.send(None)
            self._process.join(10)
            self._process.kill()
        self._pipe.close()


@contextmanager
def _without_main() -> Iterator[None]:
    """Hide the program that runs: a process that is spawned would run it once more, or miss its file."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
