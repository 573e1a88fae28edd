"""What all adapters share: refusing what has no counterpart here, and batches of rows as one run of rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from anystride import InvalidInputError, UnsupportedError
from anystride.errors import Fault
from anystride.problem import in_words

__all__ = ["LOG2_E", "Refusal", "invalid", "query_starts", "refuse", "rows_in_place"]

LOG2_E = 1.4426950408889634  # log2(x) = LOG2_E * log(x)


class Refusal(NamedTuple):
    """Why an argument of the original is not passed on.

    Attributes:
        neutral: The value that asks for nothing, and is accepted.
        why: What it would ask for, and why that is not to be had here.
        do: What leads out.
    """

    neutral: object
    why: str
    do: str


def refuse(operation: str, refusals: Mapping[str, Refusal], **given: object) -> None:
    """Raise unless each argument has its neutral value.

    Args:
        operation: The function of the original, as the message names it.
        refusals: For each name, when and why it is refused.
        **given: The arguments, by name.

    Raises:
        UnsupportedError: Names every argument that is not neutral, with its reason.
    """
    wanted = [name for name, value in given.items() if _asks(value, refusals[name].neutral)]
    if wanted:
        raise UnsupportedError(
            f"{operation}: {' and '.join(wanted)} cannot be passed on.",
            ", ".join(f"{name} = {_short(given[name])}" for name in wanted),
            {n: [refusals[n].why, f"needs {n} = {refusals[n].neutral!r}"] for n in wanted},
            "; ".join(dict.fromkeys(refusals[name].do for name in wanted)),
        )


def invalid(operation: str, what: str, got: str, needs: str = "", do: str = "") -> InvalidInputError:
    """The error for a call with one fault, to be raised; see :class:`anystride.errors.Fault`."""
    return InvalidInputError(operation, [Fault(what, got, needs, do)])


def _asks(value: object, neutral: object) -> bool:
    return value is not neutral and (isinstance(value, Tensor) or value != neutral)


def _short(value: object) -> str:
    return in_words(value) if isinstance(value, Tensor) else repr(value)


def query_starts(batch: int, query_len: int, device: torch.device) -> Tensor:
    """Where the query tokens of each sequence begin, if all have ``query_len``: ``[batch + 1]`` int32."""
    step = max(query_len, 1)  # without a query token no start is read
    return torch.arange(0, batch * step + 1, step, dtype=torch.int32, device=device)


def rows_in_place(tensor: Tensor) -> Tensor | None:
    """``[batch, n, ...]`` as ``[batch * n, ...]`` in the same memory; None where no strides say that."""
    batch, n = tensor.shape[:2]
    if n == 1:
        return tensor[:, 0]
    if batch == 1:
        return tensor[0]
    return tensor.flatten(0, 1) if tensor.stride(0) == n * tensor.stride(1) else None
