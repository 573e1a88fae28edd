"""Count what Triton's JIT compiles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

__all__ = ["compilations"]


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Yields the kernels that are compiled, or taken from the cache on disk, as it happens."""
    import triton  # not where this is imported: a torch for the CPU comes without it

    compiled: list[str] = []

    def note(*args: Any, repr: str, **facts: Any) -> None:
        compiled.append(repr)

    with mock.patch.object(triton.knobs.runtime, "jit_post_compile_hook", note):
        yield compiled
