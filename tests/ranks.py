"""A few processes with gloo among them, which run one job after the other: starting them costs seconds.

    with Ranks(4) as ranks:
        results = ranks.run(job, 2, argument)     # job(group, argument) on ranks 0 and 1

A job is a function of a module, and gets the group of as many ranks as were asked for. What it raises is
raised here; a rank that does not answer in time ends them all.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from anystride import memory

__all__ = ["Ranks"]

PATIENCE = 60.0  # seconds that a job may take


class Ranks:
    """Processes that wait for jobs.

    Args:
        count: Processes.
    """

    def __init__(self, count: int) -> None:
        self.folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(count):
            here, there = context.Pipe()
            place = (Path(self.folder.name) / "store").as_uri()
            process = context.Process(target=_serve, args=(rank, count, place, there), daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.terminate()
            process.join()
        self.folder.cleanup()

    def run(self, job: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
        """What the job returns on each of the first ``world_size`` ranks."""
        for pipe in self.pipes[:world_size]:
            pipe.send((job, world_size, arguments))
        results, errors = [], []
        for rank, pipe in enumerate(self.pipes[:world_size]):
            if not pipe.poll(PATIENCE):
                self.__exit__()
                raise TimeoutError(f"rank {rank} of {world_size} did not answer: {job.__name__}{arguments}")
            error, result = pipe.recv()
            if error is not None:
                errors.append(f"rank {rank}: {error}")
            else:
                results.append(torch.load(io.BytesIO(result)))
        if errors:
            raise AssertionError("\n".join(errors))
        return results


def _serve(rank: int, count: int, place: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")  # as pytest does in its own process
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # the name of a machine may resolve to nothing
    patience = timedelta(seconds=PATIENCE / 2)
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=count, timeout=patience)
    groups = {size: dist.new_group(list(range(size)), timeout=patience) for size in range(1, count + 1)}
    fresh = memory.allocate

    def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        buffer = fresh(shape, dtype, device)
        return buffer.fill_(float("nan")) if dtype.is_floating_point else buffer.fill_(-0x5EAF00D)

    memory.allocate = poisoned
    while True:
        try:
            job, world_size, arguments = pipe.recv()
        except EOFError:
            return
        try:
            buffer = io.BytesIO()
            torch.save(job(groups[world_size], *arguments), buffer)  # tensors by value, not by handle
            pipe.send((None, buffer.getvalue()))
        except Exception:
            pipe.send((traceback.format_exc(), None))
