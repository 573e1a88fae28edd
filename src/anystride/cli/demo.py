"""The demonstration: four caches of real shape, decoded in place and checked, and what a copy would cost.

For each cache every layer is filled, decoded through its strided view, timed and compared with the float64
reference. Beside it stands what a kernel that needs a contiguous cache would pay first: gathering the blocks
in use, measured too. Knows nothing of the terminal: progress and results are handed to the caller.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import anystride
from anystride.testing import Case, Inputs, Storage, canary, fill, find_case, find_layout, make_inputs
from anystride.testing.cases import varied_lengths

__all__ = ["SCENES", "LayerResult", "Scene", "Size", "run_scene", "steps"]


@dataclass(frozen=True)
class Scene:
    """A cache that engines build: a model's attention in a layout.

    Attributes:
        title: For a heading.
        case: Name in the table of cases; its heads, rows and block size are used, not its lengths.
        layout: Name in the catalogue.
        block_size: Tokens, instead of the case's; 0 keeps it.
    """

    title: str
    case: str
    layout: str
    block_size: int = 0


SCENES = (
    Scene("DeepSeek-V3 MLA, all layers of a block together", "deepseek-v3-h16", "M2-cross-layer"),
    Scene("Llama-3 8B, K and V interleaved in each block", "llama-3-8b", "G2-vllm-nhd"),
    Scene(
        "GQA as in Qwen3, hybrid pages padded to a Mamba state", "qwen3-30b-a3b", "G9-hybrid-page-nhd", 528
    ),
    Scene("Llama-3 8B, K and V packed in one row", "llama-3-8b", "G7-packed-lbhnc"),
)


@dataclass(frozen=True)
class Size:
    """How much is decoded.

    Attributes:
        layers: Layers of each cache.
        batch: Sequences; one new token each.
        tokens: Mean length of a sequence.
        repeats: Measurements of each time, of which the median counts.
    """

    layers: int
    batch: int
    tokens: int
    repeats: int

    @staticmethod
    def fitting(device: torch.device) -> Size:
        """What takes seconds, and does not fit into the caches of the processor."""
        return Size(4, 32, 2048, 15) if device.type == "cuda" else Size(4, 8, 1024, 3)


@dataclass(frozen=True)
class LayerResult:
    """One layer: is it right, and what did it take.

    Attributes:
        error: Largest difference from the float64 reference; NaN if there is a NaN in the result.
        bound: Twice the error of plain PyTorch in the dtype of the cache, at least one rounding step.
        untouched: No byte of the cache was written.
        backend: Who ran it.
        relation: How V lies in memory, seen from K.
        seconds: Of the attention, reading the cache in place.
        copied_bytes: What a gather into contiguous memory writes.
        copy_seconds: Of that gather.
    """

    error: float
    bound: float
    untouched: bool
    backend: str
    relation: str
    seconds: float
    copied_bytes: int
    copy_seconds: float

    @property
    def is_right(self) -> bool:
        """Whether the error is within its bound and the cache is as it was."""
        return self.untouched and self.error <= self.bound


def steps(size: Size) -> int:
    """How often ``run_scene`` calls ``advance``."""
    return 2 * size.layers


def run_scene(
    scene: Scene,
    size: Size,
    device: torch.device,
    backend: str | None,
    advance: Callable[[str], None],
) -> Iterator[LayerResult]:
    """Fill the cache of every layer, then decode, check and time one layer after the other.

    Args:
        scene: The cache.
        size: How much of it.
        device: Where.
        backend: Who decodes; None for the automatic choice.
        advance: Called after each step with what was done.
    """
    case = _case(scene, size)
    inputs = make_inputs(case, find_layout(scene.layout), device, layers=size.layers, guard=False)
    layers = _layers(inputs)
    values = []
    for number, storage in enumerate(layers):
        values.append(_fill(inputs, storage, number))
        advance(f"layer {number} filled")
    metadata = anystride.get_scheduler_metadata(
        case.batch, 1, inputs.kwargs["max_seqlen_k"], case.num_q_heads, case.num_kv_heads, case.d_qk,
        inputs.kwargs["seqused_k"], case.torch_dtype, case.d_v, inputs.kwargs["cu_seqlens_q"], causal=True,
    )  # fmt: skip
    clock = _Clock(device, size.repeats)
    shared = canary(inputs.storage) if inputs.storage.others else None
    for number, storage in enumerate(layers):
        call = inputs.kwargs | {"k": storage.k, "v": storage.v, "backend": backend}
        before = shared or canary(storage)
        yield _decode(call | {"scheduler_metadata": metadata}, storage, before, values[number], clock)
        advance(f"layer {number} decoded")


def _case(scene: Scene, size: Size) -> Case:
    """The case with one query token a sequence and lengths of the demonstration's size."""
    case = find_case(scene.case)
    return replace(
        case,
        seqused_k=varied_lengths(size.batch, size.tokens),
        q_lens=(1,) * size.batch,
        block_size=scene.block_size or case.block_size,
        lse=False,
        tags=frozenset({"bench"}),  # values are drawn on the device
    )


def _layers(inputs: Inputs) -> list[Storage]:
    """Every layer's view: in one buffer if the layout keeps layers together, else in buffers of their own."""
    ours, layout, shape = inputs.storage, inputs.layout, inputs.storage.shape
    if not ours.others:
        device = ours.buffers[0].device
        return [ours, *(layout.build(shape, device) for _ in range(shape.layers - 1))]
    pairs = list(zip(ours.others[::2], ours.others[1::2], strict=True))
    layers = [replace(ours, k_geometry=k, v_geometry=v, others=()) for k, v in pairs]
    layers.insert(shape.layers // 2, ours)
    return layers


def _fill(inputs: Inputs, storage: Storage, number: int) -> tuple[Tensor, Tensor]:
    """Write values of a layer's own through its view; returned dense, ``[total_k, num_kv_heads, d]``."""
    case, device = inputs.case, storage.buffers[0].device
    source = torch.Generator(device).manual_seed(number)

    def normal(d: int) -> Tensor:
        shape = (sum(case.seqused_k), case.num_kv_heads, d)
        return torch.randn(shape, generator=source, device=device).to(case.torch_kv_dtype)

    k = normal(case.d_qk)
    v = k[..., : case.d_v] if case.form == "row" else normal(case.d_v)
    fill(storage, k, v, inputs.kwargs["block_table"], inputs.kwargs["seqused_k"])
    return k, v


def _decode(
    arguments: dict[str, Any],
    storage: Storage,
    before: tuple[Tensor, ...],
    values: tuple[Tensor, Tensor],
    clock: _Clock,
) -> LayerResult:
    told = anystride.explain(**arguments)

    def attend() -> Tensor:
        result = anystride.flash_attn_varlen_func(**arguments)
        assert isinstance(result, Tensor)  # no lse was asked for
        return result

    out = attend()
    untouched = all(map(torch.equal, before, storage.bits()))
    error, bound = _compare(out, arguments, *values)
    views = [storage.k] if told.relation.kind == "v_in_k" else [storage.k, storage.v]
    blocks = _used_blocks(arguments)
    copies = [view.new_empty((len(blocks), *view.shape[1:])) for view in views]

    def gather() -> None:
        for view, copy in zip(views, copies, strict=True):
            torch.index_select(view, 0, blocks, out=copy)

    return LayerResult(
        error=error,
        bound=bound,
        untouched=untouched,
        backend=told.backend or "none",
        relation=told.relation.kind,
        seconds=clock(attend),
        copied_bytes=sum(copy.numel() * copy.itemsize for copy in copies),
        copy_seconds=clock(gather),
    )


def _compare(out: Tensor, arguments: dict[str, Any], k: Tensor, v: Tensor) -> tuple[float, float]:
    """Largest error of ``out``, and the largest that is allowed: twice that of plain PyTorch.

    Both are measured against the float64 reference over the dense values that were written: no stride and no
    table of the cache takes part.
    """
    lengths = arguments["seqused_k"]
    starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0, dtype=torch.int32)])
    dense = arguments | {
        "cu_seqlens_k": starts,
        "seqused_k": None,
        "block_table": None,
        "backend": "reference",
    }
    # Raised to float32, which is exact, so that the float64 answer is not rounded to the dtype of the cache.
    wide = {"q": arguments["q"].float(), "k": k.float(), "v": v.float(), "scheduler_metadata": None}
    right = anystride.flash_attn_varlen_func(**(dense | wide))
    assert isinstance(right, Tensor)
    plain = _plain(arguments["q"], k, v, starts.tolist(), arguments["softmax_scale"])
    one_step = torch.finfo(out.dtype).eps * right.abs().max().item()
    error = (out.float() - right).abs().max().item()  # NaN, which is within no bound, if there is one in out
    return error, max(2 * (plain.float() - right).abs().max().item(), one_step)


def _plain(q: Tensor, k: Tensor, v: Tensor, starts: list[int], scale: float) -> Tensor:
    """The same in plain PyTorch in the dtype of the cache, one sequence after the other."""
    heads = k.shape[1]
    rows = []
    for row, (begin, end) in zip(q, itertools.pairwise(starts), strict=True):
        keys = k[begin:end].transpose(0, 1)  # [num_kv_heads, length, d_qk]
        weighed = v[begin:end].transpose(0, 1)  # [num_kv_heads, length, d_v]
        scores = row.view(heads, -1, row.shape[-1]) @ keys.transpose(1, 2) * scale
        rows.append((scores.softmax(-1) @ weighed).flatten(0, 1))
    return torch.stack(rows)


def _used_blocks(arguments: dict[str, Any]) -> Tensor:
    """Ids of the blocks that hold a valid token."""
    table, block_size = arguments["block_table"], arguments["k"].shape[1]
    needed = (arguments["seqused_k"] + block_size - 1) // block_size
    column = torch.arange(table.shape[1], device=table.device)
    ids: Tensor = table[column < needed[:, None]]
    return ids


class _Clock:
    """Seconds of a piece of work: the median of some runs, each with cold caches."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats
        size = 64 << 20  # bytes; written in between, they push everything else out of a CPU's caches
        if device.type == "cuda":
            size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.zeros(size, dtype=torch.uint8, device=device)

    def __call__(self, work: Callable[[], object]) -> float:
        work()  # what is compiled or allocated once is no part of it
        return statistics.median(self._once(work) for _ in range(self.repeats))

    def _once(self, work: Callable[[], object]) -> float:
        self.flush.zero_()
        if self.device.type != "cuda":
            began = time.perf_counter()
            work()
            return time.perf_counter() - began
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3
