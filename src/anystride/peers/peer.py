"""What a peer is: a name, a way to load it, and a way to make a call of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

__all__ = ["Absent", "Call", "Peer", "Refused"]

# One call: ``out`` [total_q, num_q_heads, d_v] and ``lse`` [num_q_heads, total_q] in natural logarithms,
# -inf for a row that sees no key; ``lse`` is None where the peer has none or it was not asked for.
Call = Callable[[], tuple[Tensor, Tensor | None]]


class Absent(Exception):
    """The peer is not installed here; the message says what is missing, and how to get it."""


class Refused(Exception):
    """The peer does not take this call, by its own check or by its documentation."""


@dataclass(frozen=True)
class Peer:
    """A kernel of another project.

    Attributes:
        name: As it is given on the command line: ``flash-mla``.
        title: As it stands in tables: ``FlashMLA``.
        about: What it is, which of its entry points is called, and where that is documented.
        load: Takes the folder of peers that are not installed, or None; makes the kernel callable and
            returns its version. Raises ``Absent``.
        prepare: Takes the arguments of ``flash_attn_varlen_func`` by name, without ``backend``; raises
            ``Refused``. Nothing of what it does belongs to a layer of a model: what a step's layers share.
        crashes_off_16_bytes: Whether it loses the device where rows of K or V begin at no multiple of 16
            bytes, as the scripts in docs/repro show. The kit calls it all the same, in a process of its own.
    """

    name: str
    title: str
    about: str
    load: Callable[[Path | None], str]
    prepare: Callable[[dict[str, Any]], Call]
    crashes_off_16_bytes: bool = False

    def kernel(self, **kwargs: Any) -> Tensor | tuple[Tensor, Tensor | None]:
        """Make one call: ``flash_attn_varlen_func`` of this peer. Raises ``Refused``.

        Where the peer takes no ``out``, a given one gets a copy of the rows that belong to a sequence.
        """
        out, lse = self.prepare(kwargs)()
        given = kwargs.get("out")
        if given is not None and given.data_ptr() != out.data_ptr():
            rows = int(kwargs["cu_seqlens_q"][-1])
            given[:rows].copy_(out[:rows])
            out = given
        return (out, lse) if kwargs.get("return_softmax_lse") else out
