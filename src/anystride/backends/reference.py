"""The back end ``reference``: the float64 specification as something that can be called."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from anystride.problem import Call, Problem
from anystride.reference import attention

NAME = "reference"


@dataclass(frozen=True)
class Config:
    """Nothing to choose."""


def refusals(problem: Problem) -> list[str]:
    """Runs everything, everywhere, slowly; reads values on the host, so not while a graph is captured."""
    if problem.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return ["a CUDA graph is being captured; the reference reads lengths and tables on the host"]
    return []


def choose_config(problem: Problem) -> Config:
    """The one configuration."""
    return Config()


@torch.no_grad()
def run(problem: Problem, config: Config, call: Call) -> None:
    """Write the float64 results, rounded once to the dtypes of ``out`` and ``lse``."""
    out, lse = attention(problem, call)
    starts = call.cu_seqlens_q.tolist()
    for begin, end in pairwise(starts):
        call.out[begin:end].copy_(out[begin:end])
        if call.lse is not None:
            call.lse[:, begin:end].copy_(lse[:, begin:end])
