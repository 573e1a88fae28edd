"""The clock: device time by events with a cold L2 cache, host time apart, ceilings of the same process.

On a CPU it is the wall clock, and caches are as the call before left them. ``docs/benchmarking.md`` says why
events and no graphs, and what that costs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

__all__ = ["Clock", "Spread"]

FLUSH_BYTES = 256 << 20  # several times the L2 cache
ROUND_SECONDS = 0.03  # of device time, of one kernel's turn
FEWEST, MOST = 5, 200  # samples in a turn
ROUNDS = 3
HOST_CALLS = 100  # in a row: fewer than a device queues
HOST_SECONDS = 0.2  # of device time, for the calls in a row
AHEAD_CYCLES = 200_000  # that a device waits before a call, about 0.1 ms: the host enqueues meanwhile
SHORT_SECONDS = 3e-4  # of a call: longer ones, and the flush before them, give the host time enough

Call = Callable[[], Any]


class Spread(NamedTuple):
    """Quartiles of many samples, in microseconds."""

    q1: float
    median: float
    q3: float
    samples: int

    @classmethod
    def of(cls, samples: list[float]) -> Spread:
        """Of these, in microseconds."""
        q1, median, q3 = torch.tensor(samples, dtype=torch.float64).quantile(
            torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
        )
        return cls(float(q1), float(median), float(q3), len(samples))


class Clock:
    """Times calls on one device.

    Args:
        device: Where they run.
        hot: Leave the L2 cache of a GPU as the call before left it.
        rounds: Turns of each kernel; one more comes first and does not count.
    """

    def __init__(self, device: torch.device, hot: bool = False, rounds: int = ROUNDS) -> None:
        self.device = device
        self.rounds = rounds
        self._is_cuda = device.type == "cuda"
        self.is_cold = self._is_cuda and not hot
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device) if self.is_cold else None

    def turn(self, call: Call) -> list[float]:
        """Microseconds of each of many calls, one after the other."""
        return self._on_device(call) if self._is_cuda else self._on_host(call)

    def turns(self, calls: dict[str, Call]) -> dict[str, Spread]:
        """The spread of each of several calls, which take turns, so that heat and clocks are shared."""
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for nth in range(self.rounds + 1):
            for name, call in calls.items():
                some = self.turn(call)
                if nth:  # a device that was idle is cool, and runs whoever comes first at a higher clock
                    samples[name] += some
        return {name: Spread.of(some) for name, some in samples.items()}

    def _on_device(self, call: Call) -> list[float]:
        call()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize(self.device)
        seconds = start.elapsed_time(stop) / 1e3
        count, waits = self._count(seconds), self._flush is None or seconds < SHORT_SECONDS
        pairs = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(count)]
        for begin, end in pairs:
            if waits:
                torch.cuda._sleep(AHEAD_CYCLES)
            if self._flush is not None:
                self._flush.zero_()
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize(self.device)
        return [1e3 * begin.elapsed_time(end) for begin, end in pairs]

    def _on_host(self, call: Call) -> list[float]:
        call()
        samples: list[float] = []
        spent = 0.0
        # By the time that passes, not by a first call's: a machine that is shared stops whoever runs.
        while len(samples) < FEWEST or (spent < ROUND_SECONDS and len(samples) < MOST):
            begin = time.perf_counter()
            call()
            seconds = time.perf_counter() - begin
            samples.append(1e6 * seconds)
            spent += seconds
        return samples

    def _count(self, seconds: float) -> int:
        return max(FEWEST, min(MOST, int(ROUND_SECONDS / max(seconds, 1e-7))))

    def host(self, call: Call, device_us: float) -> float | None:
        """Microseconds that the host takes for a call: the median of calls in a row; None on a CPU.

        Args:
            call: Has been made before.
            device_us: What the device takes for it: of long calls fewer are made.
        """
        if not self._is_cuda:
            return None
        count = max(FEWEST, min(HOST_CALLS, int(HOST_SECONDS / (1e-6 * max(device_us, 1e-3)))))
        torch.cuda.synchronize(self.device)
        samples = []
        for _ in range(count):
            begin = time.perf_counter()
            call()
            samples.append(1e6 * (time.perf_counter() - begin))
        torch.cuda.synchronize(self.device)
        return Spread.of(samples).median

    def ceilings(self) -> dict[str, float]:
        """What the machine can do, measured now.

        Returns:
            ``read`` and ``copy`` in bytes a second (a copy's are read and written), ``product`` in bf16 (on a
            CPU float32) operations a second.
        """
        size, n = ((1 << 32), 8192) if self._is_cuda else ((1 << 28), 1024)
        dtype = torch.bfloat16 if self._is_cuda else torch.float32
        data = torch.empty(size // 8, dtype=torch.int64, device=self.device).random_()
        half, rest = data.chunk(2)
        a, b = torch.randn(2, n, n, device=self.device).to(dtype)
        spreads = self.turns({"read": data.max, "copy": lambda: rest.copy_(half), "product": lambda: a @ b})
        work = {"read": size, "copy": size, "product": 2 * n**3}
        return {name: work[name] / (1e-6 * spread.median) for name, spread in spreads.items()}
