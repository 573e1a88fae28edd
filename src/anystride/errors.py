"""The exception tree, and the one way in which a message is laid out.

::

    AnystrideError
    ├── InvalidInputError(ValueError)            the call is wrong on every device
    └── UnsupportedError(NotImplementedError)    the call is valid, but no backend here can run it

A message says what is wrong in its first line, then, a line each, what was got, what is needed and
what to do. All faults of a call are listed, not the first alone.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["AnystrideError", "Fault", "InvalidInputError", "UnsupportedError"]


class Fault(NamedTuple):
    """One thing that is wrong with a call.

    Attributes:
        what: A full sentence: what is wrong, with the caller's own argument names.
        got: What was passed: shape, strides, dtype, device.
        needs: What is needed instead, or "".
        do: A line of code that leads out, or "".
    """

    what: str
    got: str
    needs: str = ""
    do: str = ""

    def lines(self) -> list[str]:
        """The sentence, then the parts that were given, aligned."""
        rows = (("got", self.got), ("needs", self.needs), ("do", self.do))
        return [self.what, *(f"  {name:<7}{text}" for name, text in rows if text)]


class AnystrideError(Exception):
    """Everything that anystride raises on purpose."""


class InvalidInputError(AnystrideError, ValueError):
    """The call breaks the contract: it is wrong on every device.

    Attributes:
        faults: Every fault that was found, in the order of the arguments.
    """

    def __init__(self, operation: str, faults: list[Fault]) -> None:
        self.faults = tuple(faults)
        first, *rest = self.faults
        text = [f"{operation}: {first.what}", *first.lines()[1:]]
        for fault in rest:
            text += [f"also: {fault.what}", *fault.lines()[1:]]
        super().__init__("\n".join(text))


class UnsupportedError(AnystrideError, NotImplementedError):
    """The call is valid, but no backend here, or not the one that was asked for, can run it.

    Attributes:
        refusals: For each backend that was asked, every reason why it cannot run the call. From
            ``anystride.adapters``: for each argument of the original that cannot be passed on.
    """

    def __init__(self, first_line: str, call: str, refusals: dict[str, list[str]], do: str) -> None:
        self.refusals = refusals
        width = max([len(name) for name in refusals] + [4]) + 2
        text = [first_line, f"  {'call':<{width}}{call}"]
        for name, reasons in refusals.items():
            for index, reason in enumerate(reasons):
                text.append(f"  {name if index == 0 else '':<{width}}{reason}")
        if do:
            text.append(f"  {'do':<{width}}{do}")
        super().__init__("\n".join(text))
