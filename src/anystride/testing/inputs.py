"""Tensors for a case in a layout: arguments of the entry, and the values behind them.

The values follow from the case and the seed alone, whatever the layout, so that results can be
compared bit by bit across layouts. Where a layout makes elements share an address (V inside K,
expanded heads), the values follow the layout; they can be handed to another layout with
``values=``.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anystride.problem import FP8_DTYPES
from anystride.testing import storage as memory
from anystride.testing.cases import GROUPS, Case
from anystride.testing.recipe import Layout
from anystride.testing.rows import GARBAGE, strided_rows, strided_table
from anystride.testing.scales import place_scales
from anystride.testing.storage import CacheShape, Storage

__all__ = ["Inputs", "Values", "cache_shape", "compatible", "make_inputs"]

SPARE_COLUMNS = 3  # entries of the block table past the longest sequence, filled with garbage


@dataclass(frozen=True)
class Values:
    """The dense values of a cache, the valid tokens of the sequences one after the other.

    Attributes:
        k: ``[total_k, num_kv_heads, d_qk]`` in the cache's dtype; under context parallelism the
            tokens of all ranks.
        v: ``[total_k, num_kv_heads, d_v]``.
    """

    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class Inputs:
    """One call, ready to be made, with what is needed to check it.

    Attributes:
        case: What is asked.
        layout: Where the cache lies.
        storage: The cache, poisoned outside of its valid tokens.
        kwargs: Arguments of ``flash_attn_varlen_func`` by name, ``backend`` apart.
        values: What was filled in.
        scales: Of the valid tokens on this rank, ``[tokens, num_kv_heads or groups]``, by the name of the
            argument in whose view they were filled in.
        lengths: Keys of each sequence on this rank.
        before: A copy of the storage's bytes, None without a guard.
        out_flat: The buffer that ``out`` is a view of, None if ``out`` is not given.
    """

    case: Case
    layout: Layout
    storage: Storage
    kwargs: dict[str, Any]
    values: Values
    scales: dict[str, Tensor]
    lengths: tuple[int, ...]
    before: tuple[Tensor, ...] | None
    out_flat: Tensor | None

    def assert_untouched(self) -> None:
        """Fail if the call wrote to the cache, or around ``out``, or to rows of no sequence."""
        if self.before is None:
            raise ValueError("made with guard=False: there is no copy of the cache to compare with")
        memory.assert_untouched(self.storage, self.before)
        if self.out_flat is None:
            return
        out = self.kwargs["out"]
        owned = torch.zeros(self.out_flat.shape, dtype=torch.bool, device=out.device)
        view = owned.as_strided(out.shape, out.stride(), out.storage_offset())
        view[: self.case.total_q].fill_(True)
        written = (~owned & ~self.out_flat.isnan()).nonzero()
        if written.numel():
            raise AssertionError(
                f"{len(written)} elements around out were written, the first at {int(written[0])}"
            )


def cache_shape(case: Case, rank: int = 0, layers: int = 3, spare_blocks: int = 0) -> CacheShape:
    """The shape of the cache that holds a case: at least two blocks more than are used.

    Args:
        case: What is asked.
        rank: Under context parallelism, whose cache.
        layers: Layers that share the buffer, in the layouts that keep several together.
        spare_blocks: Unused blocks more than that, where there is a block table.
    """
    lengths = _local_lengths(case, rank)
    per_page = case.blocks_per_page
    if case.paged:
        used = sum(-(-length // case.block_size) for length in lengths)
        num_blocks = -(-(used + 2 + used // 8 + spare_blocks) // per_page) * per_page
        block_size = case.block_size
    else:
        num_blocks, block_size = 1, max(1, sum(lengths) + case.slack * case.batch)
    return CacheShape(
        num_blocks,
        block_size,
        case.num_kv_heads,
        case.d_qk,
        case.d_v,
        case.torch_kv_dtype,
        case.form,
        per_page if case.paged else 1,
        case.paged,
        layers,
        case.torch_k_dtype,
    )


def compatible(case: Case, layout: Layout) -> str | None:
    """Why the layout cannot hold the case's cache, or None."""
    return layout.misfit(cache_shape(case))


def make_inputs(
    case: Case,
    layout: Layout,
    device: torch.device | str = "cpu",
    seed: int = 0,
    *,
    rank: int = 0,
    layers: int = 3,
    spare_blocks: int = 0,
    values: Values | None = None,
    rows: str = "packed",
    table: str = "packed",
    out: str | None = None,
    guard: bool = True,
) -> Inputs:
    """Build the cache of a case in a layout, fill it, and make the arguments of a call.

    Args:
        case: What is asked.
        layout: Where the cache lies.
        device: Where the tensors lie. Values are drawn on the CPU, so that they are the same
            everywhere; those of a ``bench`` case are drawn on the device, which is faster.
        seed: Of the values, and of the order of the blocks.
        rank: Under context parallelism, whose call. All ranks draw the same values.
        layers: Layers that share the buffer, in the layouts that keep several together.
        spare_blocks: Unused blocks more than the few that there are anyway.
        values: From another layout's inputs, instead of drawing.
        rows: Strides of q and q_v, a key of ``ROW_RECIPES``.
        table: Strides of the block table, a key of ``TABLE_RECIPES``.
        out: Strides of a given ``out``, a key of ``ROW_RECIPES``; None leaves it out.
        guard: Keep a copy of the cache, for ``assert_untouched``. A benchmark has no room for it.

    Returns:
        The call. ``return_softmax_lse`` is the case's ``lse``; ``softmax_scale`` is always given.

    Raises:
        ValueError: The layout cannot hold the case, or cannot hold ``values``.
    """
    shape = cache_shape(case, rank, layers, spare_blocks)
    cache = layout.build(shape, device)
    entropy = zlib.crc32(f"{case.name} {seed}".encode())  # PyTorch's CPU generator takes 32 bits of it
    source = torch.Generator(device if "bench" in case.tags else "cpu").manual_seed(entropy)

    def normal(*size: int, dtype: torch.dtype = case.torch_dtype) -> Tensor:
        drawn = torch.randn(size, generator=source, device=source.device)
        return drawn.to(dtype).to(device)

    kwargs = _query_arguments(case, device, normal, rows)
    kwargs |= _feature_arguments(case, device, normal)
    lengths = _local_lengths(case, rank)
    scales = {
        name: _share(case, normal(*size, dtype=torch.float32).abs().add(0.25), rank)
        for name, size in _scale_sizes(case).items()
    }
    if values is None:
        total = sum(case.seqused_k)
        k = normal(total, case.num_kv_heads, case.d_qk, dtype=case.torch_k_dtype)
        if case.form == "row":
            v = k[..., : case.d_v]
        else:
            v = normal(total, case.num_kv_heads, case.d_v, dtype=shape.dtype)
        values = Values(*memory.resolve_aliases(cache, k, v))

    kwargs |= _cache_arguments(case, shape, lengths, device, entropy, table)
    where = (
        kwargs.get("block_table"),
        torch.tensor(lengths, dtype=torch.int32, device=device),
        kwargs.get("cu_seqlens_k"),
    )
    memory.fill(cache, _share(case, values.k, rank), _share(case, values.v, rank), *where)
    for name, of_rows in scales.items():
        groups = 1 if case.scale_caches == "rows" else GROUPS
        # What is timed is what engines do: scales beside the cache lie packed.
        recipe = "packed" if "bench" in case.tags else ""
        view = place_scales(cache, layout, name == "v_scale_cache", groups, recipe)
        view[memory.slots(shape, *where)] = of_rows
        if not case.paged:
            view = view[0, 0]
        elif shape.blocks_per_page == 1:
            view = view[:, 0]
        kwargs[name] = view
    if case.cp is not None:
        kwargs |= {
            "cp_world_size": case.cp.world_size,
            "cp_rank": rank,
            "cp_interleave": case.cp.interleave,
            "cp_tot_seqused_k": torch.tensor(case.seqused_k, dtype=torch.int32, device=device),
        }
    out_flat = None
    if out is not None:
        size = (case.total_q + case.padded_q, case.num_q_heads, case.d_v)
        out_flat, kwargs["out"] = strided_rows(size, case.torch_dtype, device, out)
    kwargs |= {"k": cache.k, "v": cache.v}
    before = memory.canary(cache) if guard else None
    return Inputs(case, layout, cache, kwargs, values, scales, lengths, before, out_flat)


def _ints(numbers: list[int] | tuple[int, ...], device: torch.device | str) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=device)


def _starts(lengths: tuple[int, ...], device: torch.device | str) -> Tensor:
    """Cumulative sums, with a 0 in front: ``[batch + 1]`` int32."""
    return _ints([0, *itertools.accumulate(lengths)], device)


def _on_rank(case: Case, length: int, rank: int) -> Tensor:
    """Which of the first ``length`` positions of a sequence live on the rank: ``[length]`` bool."""
    if case.cp is None:
        return torch.ones(length, dtype=torch.bool)
    return torch.arange(length) // case.cp.interleave % case.cp.world_size == rank


def _local_lengths(case: Case, rank: int) -> tuple[int, ...]:
    return tuple(int(_on_rank(case, length, rank).sum()) for length in case.seqused_k)


def _share(case: Case, values: Tensor, rank: int) -> Tensor:
    """The rank's tokens of ``[total_k, ...]`` values."""
    if case.cp is None:
        return values
    mine = torch.cat([_on_rank(case, length, rank) for length in case.seqused_k])
    bits = values.view(memory.BITS[values.itemsize])
    return bits[mine.to(values.device)].view(values.dtype)


def _scale_sizes(case: Case) -> dict[str, tuple[int, int]]:
    """Tokens, over all ranks, and scales of a token, of the scale caches that the case has."""
    if not case.scale_caches:
        return {}
    size = (sum(case.seqused_k), case.num_kv_heads if case.scale_caches == "rows" else GROUPS)
    dtypes = {"k_scale_cache": case.torch_k_dtype, "v_scale_cache": case.torch_kv_dtype}
    return {name: size for name, dtype in dtypes.items() if dtype in FP8_DTYPES}


def _query_arguments(
    case: Case, device: torch.device | str, normal: Callable[..., Tensor], rows: str
) -> dict[str, Any]:
    """Queries, NaN in the rows of no sequence, and where each sequence's rows begin."""
    arguments: dict[str, Any] = {
        "max_seqlen_q": max(case.q_lens),
        "cu_seqlens_q": _starts(case.q_lens, device),
    }
    for name, d in (("q", case.d_qk), ("q_v", case.d_v))[: 2 if case.form == "q_v" else 1]:
        size = (case.total_q + case.padded_q, case.num_q_heads, d)
        _, view = strided_rows(size, case.torch_dtype, device, rows)
        view[: case.total_q].copy_(normal(case.total_q, case.num_q_heads, d))
        arguments[name] = view
    return arguments


def _feature_arguments(
    case: Case, device: torch.device | str, normal: Callable[..., Tensor]
) -> dict[str, Any]:
    """Everything that is neither q nor the cache."""
    arguments: dict[str, Any] = {
        "softmax_scale": case.scale,
        "causal": case.causal,
        "softcap": case.softcap,
        "return_softmax_lse": case.lse,
        "num_splits": case.num_splits,
        "batch_invariant": case.batch_invariant,
    }
    if case.window != (-1, -1):
        arguments["window_size"] = case.window
    if case.alibi:
        size = (case.batch,) * (case.alibi == "batch") + (case.num_q_heads,)
        arguments["alibi_slopes"] = normal(*size, dtype=torch.float32).abs() / 8
    if case.sinks:
        arguments["s_aux"] = normal(case.num_q_heads)
    heads = (case.batch, case.num_kv_heads)
    for name, factor in (("q_descale", 0.75), ("k_descale", 0.5), ("v_descale", 1.5)):
        scalar = torch.tensor(factor, dtype=torch.float32, device=device)
        if case.descales == "floats":
            arguments[name] = factor
        elif case.descales == "scalar":
            arguments[name] = scalar
        elif case.descales == "expanded":
            arguments[name] = scalar.expand(heads)
        elif case.descales == "per_head":
            arguments[name] = scalar * (1 + normal(*heads, dtype=torch.float32).abs() / 2)
    return arguments


def _cache_arguments(
    case: Case,
    shape: CacheShape,
    lengths: tuple[int, ...],
    device: torch.device | str,
    entropy: int,
    table: str,
) -> dict[str, Any]:
    """Lengths, and either a block table or where each sequence begins in the cache."""
    arguments: dict[str, Any] = {"max_seqlen_k": max(1, *lengths)}
    if not case.paged:
        ranges = tuple(length + case.slack for length in lengths)
        arguments["cu_seqlens_k"] = _starts(ranges, device)
        if case.slack:
            arguments["seqused_k"] = _ints(lengths, device)
        return arguments
    arguments["seqused_k"] = _ints(lengths, device)
    needed = [-(-length // shape.block_size) for length in lengths]
    # Block 0 is never used, as in most engines; the last one always, for the sake of large offsets.
    order = torch.randperm(shape.num_blocks - 1, generator=torch.Generator().manual_seed(entropy)).add(1)
    used = order[: sum(needed)]
    if used.numel() and shape.num_blocks - 1 not in used:
        used[used.numel() // 2] = shape.num_blocks - 1
    width = max(needed) + SPARE_COLUMNS
    dense = torch.tensor(GARBAGE).repeat(case.batch, width)[:, :width].to(torch.int32)
    begin = 0
    for row, count in zip(dense, needed, strict=True):
        row[:count] = used[begin : begin + count]
        begin += count
    arguments["block_table"] = strided_table(dense.to(device), table)
    return arguments
