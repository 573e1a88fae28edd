"""What a function takes of PyTorch's allocator on the CPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

__all__ = ["peak_bytes"]


def peak_bytes(function: Callable[[], object]) -> int:
    """Most bytes that the allocator had handed out at once during a call, its results included.

    Args:
        function: Called once, without arguments.

    Returns:
        Bytes. What libraries allocate by themselves is not in it.
    """
    cpu_only = [torch.profiler.ProfilerActivity.CPU]
    with _quiet(), torch.profiler.profile(profile_memory=True, activities=cpu_only) as trace:
        function()
    assert trace.profiler is not None
    assert trace.profiler.kineto_results is not None
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@contextmanager
def _quiet() -> Iterator[None]:
    """Lose what is written to standard error: PyTorch 2.13 tells there when its profiler starts."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
