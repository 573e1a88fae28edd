"""What all tests share: which of them this machine can run, and poison in every fresh buffer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from anystride import memory

LARGE = 8 << 30  # bytes that must be free for a test that is marked large


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def pytest_configure(config: pytest.Config) -> None:
    # Tests name their back end; what the shell asks for must not change what they test.
    os.environ.pop("ANYSTRIDE_BACKEND", None)
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
    if config.option.markexpr == "gpu" and not torch.cuda.is_available():
        raise pytest.UsageError("-m gpu was asked for, and there is no CUDA device: nothing would be tested")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if item.get_closest_marker("large"):
        on_gpu = item.get_closest_marker("gpu") is not None
        free = torch.cuda.mem_get_info()[0] if on_gpu else _free_memory()
        if free < LARGE:
            pytest.skip(f"needs {LARGE >> 30} GB of free memory, {free >> 30} GB are")
    if item.get_closest_marker("slow") and not item.config.getoption("--slow"):
        pytest.skip("runs for minutes; --slow was not given")


def _free_memory() -> int:
    """Bytes that a process can still take without swapping."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("MemAvailable:"))
    return int(line.split()[1]) << 10


@pytest.fixture(autouse=True, scope="session")
def _poisoned_allocations() -> Iterator[None]:
    """Results and scratch begin as NaN, or as numbers that no kernel would write."""
    fresh, kept = memory.allocate, memory.kept_scratch

    def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        buffer = fresh(shape, dtype, device)
        return buffer.fill_(float("nan") if dtype.is_floating_point else -0x5EAF00D)

    def poisoned_again(device: torch.device, stream: int, values: int, words: int) -> memory.Scratch:
        from anystride.kernels.schedule import ARRIVALS, WORDS_PER_PART  # needs Triton

        scratch = kept(device, stream, values, words)
        scratch.partial.fill_(float("nan"))
        # But for the counters, which are zeros between calls.
        rows = scratch.schedule.view(scratch.schedule.numel() // WORDS_PER_PART, WORDS_PER_PART)
        rows[:, : ARRIVALS.value].fill_(-0x5EAF00D)
        return scratch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "allocate", poisoned)
        patch.setattr(memory, "kept_scratch", poisoned_again)
        yield
