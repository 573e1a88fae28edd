"""What a function takes of PyTorch's allocator on the CPU."""

from __future__ import annotations

from collections.abc import Callable

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
    with torch.profiler.profile(profile_memory=True, activities=cpu_only) as trace:
        function()
    assert trace.profiler is not None
    assert trace.profiler.kineto_results is not None
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
