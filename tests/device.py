"""What the tests on a CUDA device share: a checked call of one back end, a captured step, and clocks."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from twins import layouts_of

from anystride import get_scheduler_metadata, plan
from anystride.backends import hopper
from anystride.testing import Case, Inputs, find_case, find_layout, make_inputs
from anystride.testing.judgement import assert_right, attend

__all__ = [
    "DEVICE", "FAULTS", "STEP", "Engine", "OperatorArguments", "Result", "assert_alone_is_the_same",
    "assert_same_bits", "assert_spoilt_gives_nan", "by_tma", "metadata_of", "run", "seconds_of",
]  # fmt: skip

DEVICE = "cuda"
STEP = 64  # keys: the schedule cuts nowhere else
Result = tuple[Tensor, Tensor | None]


def run(inputs: Inputs, backend: str = "triton", **others: Any) -> Result:
    """Make the call and hold it to the law."""
    out, lse = attend(inputs, backend, **others)
    assert_right(inputs, out, lse)
    return out, lse


@contextmanager
def by_tma() -> Iterator[None]:
    """Let ``hopper`` load by TMA whatever it costs, wherever TMA can read the cache."""
    plan._PLANS.clear()  # plans do not know about it
    try:
        with mock.patch.object(hopper, "loads_by_tma", lambda problem, *_: hopper.maps_fit(problem)):
            yield
    finally:
        plan._PLANS.clear()


def assert_same_bits(left: Result, right: Result) -> None:
    """Rows that nobody writes included, which are NaN."""
    for one, other in zip(left, right, strict=True):
        if one is None or other is None:
            assert one is other
        else:
            assert torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def metadata_of(inputs: Inputs, **others: Any) -> Tensor:
    case, kwargs = inputs.case, inputs.kwargs | others
    return get_scheduler_metadata(
        case.batch, kwargs["max_seqlen_q"], kwargs["max_seqlen_k"], case.num_q_heads, case.num_kv_heads,
        case.d_qk, kwargs["seqused_k"], case.torch_dtype, case.d_v, kwargs["cu_seqlens_q"],
        causal=case.causal, window_size=case.window,
    )  # fmt: skip


FAULTS = ("zeroed", "of another batch", "of other heads", "cut short")


def assert_spoilt_gives_nan(inputs: Inputs, fault: str, backend: str) -> None:
    """Metadata of another step give NaN, in every row of ``out`` and ``lse``, and nothing outside of them."""
    metadata = metadata_of(inputs)
    if fault == "zeroed":
        metadata.zero_()
    elif fault == "cut short":
        metadata = metadata[:-16]  # a part is missing, for which others would wait
    else:
        metadata[1 if fault == "of other heads" else 2] += 16
    out, lse = attend(inputs, backend, scheduler_metadata=metadata)
    assert lse is not None
    assert out.isnan().all()
    assert lse.isnan().all()
    inputs.assert_untouched()


def assert_alone_is_the_same(name: str, backend: str) -> None:
    """Under ``batch_invariant`` each sequence has the same bits in a batch and alone."""
    case = replace(find_case(name), seqused_k=(5000, 40, 2049, 65))
    inputs = make_inputs(case, layouts_of(case)[0], DEVICE)
    out, lse = run(inputs, backend)
    assert lse is not None
    kwargs = inputs.kwargs
    starts = kwargs["cu_seqlens_q"]
    for seq, begin in enumerate(itertools.accumulate((0, *case.q_lens[:-1]))):
        rows = slice(begin, begin + case.q_lens[seq])
        alone = attend(
            inputs, backend, q=kwargs["q"][rows], max_seqlen_q=case.q_lens[seq],
            cu_seqlens_q=starts[seq : seq + 2] - starts[seq], seqused_k=kwargs["seqused_k"][seq : seq + 1],
            block_table=kwargs["block_table"][seq : seq + 1],
        )  # fmt: skip
        assert_same_bits(alone, (out[rows], lse[:, rows]))


class Engine:
    """One captured step, and the tensors that an engine overwrites between two replays."""

    def __init__(self, case: Case, layout: str, metadata: str, backend: str = "triton") -> None:
        self.backend = backend
        self.inputs = make_inputs(case, find_layout(layout), DEVICE, out="packed")
        self.kwargs = self.inputs.kwargs
        self.table, self.how = self.kwargs["block_table"].clone(), metadata
        self.shared = metadata_of(self.inputs) if metadata == "copied" else None
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._step()  # compiles
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = self._step()

    def _step(self) -> Result:
        metadata = metadata_of(self.inputs) if self.how == "captured" else self.shared
        return attend(self.inputs, self.backend, scheduler_metadata=metadata)

    def replay(self, lengths: Sequence[int], q_lens: Sequence[int], order: Sequence[int]) -> None:
        """Replay with other lengths, and with the blocks of other sequences, and check the result."""
        kwargs = self.kwargs
        case = replace(self.inputs.case, seqused_k=tuple(lengths), q_lens=tuple(q_lens))
        starts = [0, *itertools.accumulate(q_lens)]
        kwargs["cu_seqlens_q"].copy_(torch.tensor(starts, dtype=torch.int32))
        kwargs["seqused_k"].copy_(torch.tensor(lengths, dtype=torch.int32))
        kwargs["block_table"].copy_(self.table[list(order)])
        if self.shared is not None:
            self.shared.copy_(metadata_of(self.inputs))
        assert self.inputs.out_flat is not None
        self.inputs.out_flat.fill_(float("nan"))
        self.graph.replay()
        now = replace(self.inputs, case=case, lengths=tuple(lengths))
        assert_right(now, *self.result)

    def replay_at_all_lengths(self) -> None:
        """Replay full, nearly empty, padded, empty, and at random."""
        case = self.inputs.case
        most, n = case.seqused_k[0], case.q_lens[0]
        batch = range(case.batch)
        some = [most, *[0] * (case.batch - 1)]
        self.replay([most] * case.batch, [n] * case.batch, batch)
        self.replay([n] * case.batch, [n] * case.batch, batch)
        self.replay([0, most, 0, 65, 64, 0], [n] * case.batch, [3, 1, 0, 2, 5, 4])
        self.replay(some, [n, *[0] * (case.batch - 1)], batch)  # a padded batch
        self.replay([0] * case.batch, [n] * case.batch, batch)
        self.replay([0] * case.batch, [0] * case.batch, batch)
        source = random.Random(0)
        for _ in range(6):
            lengths = [source.randint(0, most) for _ in batch]
            q_lens = [source.randint(0, n) for _ in batch]
            self.replay(lengths, q_lens, source.sample(batch, case.batch))


class OperatorArguments(TorchDispatchMode):
    """Keeps the arguments with which the operator is called."""

    args: tuple[Any, ...]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.anystride.attention.default:
            self.args = args
        return func(*args, **(kwargs or {}))


def seconds_of(step: Callable[[], object]) -> float:
    """Median time on the device of a captured step."""
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    times: list[float] = []
    for _ in range(21):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return sorted(times)[len(times) // 2]
