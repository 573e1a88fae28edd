"""Rows of K and V out of a cache of any strides, packed: what the back end ``cpu`` computes on.

Rows are gathered as they are stored, converted to float32 and multiplied with their scales, if they have any.
Whoever reads the packed rows never meets a stride of the cache. Copies the keys that are asked for, as many
at a time as :class:`Packing` says, never the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from anystride.problem import Call, Problem, scale_rows

__all__ = ["Packing", "Rows", "Spans", "choose_packing", "load", "rows_taken"]

SMALL = 1 << 18  # bytes of packed rows up to which it costs more to take a buffer than what it saves
LARGE_GAP = 1 << 13  # elements between sequences' rows that take as long to copy as to start another copy
LARGE_BLOCK = 1 << 16  # elements in a block's rows from which on blocks are converted one by one

Spans = dict[int, tuple[int, int]]  # of a sequence: its first key, and the end of its keys


class Pages(NamedTuple):
    """A cache of pages of blocks seen as one of blocks, counted in a step that divides pages and blocks."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    per_page: int  # blocks
    block: int  # steps from block to block of a page
    extra: int  # steps that a page is longer than its blocks


class Part(NamedTuple):
    """Rows of K or V, and where they go in scratch."""

    of_v: bool
    d: int  # elements of a row
    at: int  # where the first row begins, in elements
    padding: int  # elements behind each row that must be 0
    pages: Pages | None  # None where a page is one block
    scaled: bool  # whether rows have scales
    scale_pages: Pages | None


@dataclass(frozen=True)
class Packing:
    """How keys and values are packed.

    Attributes:
        heads: KV heads.
        width: Elements of a packed row of K, and of V: the fused kernel wants them equal.
        row: Elements from one packed key to the next.
        v_begins: Where the packed rows of V begin in scratch, in elements; 0 if they are those of K.
        v_at: Where V begins in its packed row.
        parts: What is copied: rows of K, and of V unless they are a part of K's rows.
        keys: Keys that are held at once.
        chunk: Keys that are taken at a time from a sequence that has more: whole blocks, or an equal part of
            a block.
        staged: Whether whole blocks are gathered before they are converted.
        direct: Whether gathered blocks become packed rows by conversion alone, without scratch and scales.
        scratch: Elements of float32 that are needed.
    """

    heads: int
    width: int
    row: int
    v_begins: int
    v_at: int
    parts: tuple[Part, ...]
    keys: int
    chunk: int
    staged: bool
    direct: bool
    scratch: int


Rows = tuple[Tensor, Tensor, int, dict[int, int]]  # see load


def choose_packing(problem: Problem, most_bytes: int) -> Packing:
    """Pack as many keys as ``most_bytes`` hold, and no more than the call can have."""
    p, size = problem, problem.block_size
    scaled = p.k_scale_groups + p.v_scale_groups > 0
    in_k = p.relation.kind == "v_in_k" and not scaled  # scaled as K, a row is no row of V
    copies = 1 if in_k or p.has_q_v else 2
    width = p.d_qk + p.d_v if p.has_q_v else max(p.d_qk, p.d_v)
    row = p.num_kv_heads * width
    keys = chunk = max(1, most_bytes // (4 * row * copies))
    if p.paged:
        chunk = keys // size * size if size <= keys else -(-size // -(-size // keys))
    if p.batch_invariant:  # a sequence is cut alike whoever its neighbours are
        keys = chunk
    keys = min(keys, p.batch * (p.max_keys + size))
    staged = p.paged and chunk >= size and size * p.num_kv_heads * max(p.d_qk, p.d_v) < LARGE_BLOCK
    small = 4 * copies * keys * row <= SMALL
    direct = small and staged and not scaled and not p.has_q_v and (in_k or p.d_qk == p.d_v)
    v_begins = keys * row if copies == 2 else 0
    # In the q_v form a packed row begins with V: that is where results are looked for.
    k_at = p.d_v if p.has_q_v else 0
    k_padding, v_padding = (width - d if copies == 2 else 0 for d in (p.d_qk, p.d_v))
    k_pages, v_pages = _pages(p, p.k_strides, p.d_qk), _pages(p, p.v_strides, p.d_v)
    k_scales = p.k_scale_groups > 0, _pages(p, p.k_scale_strides, p.k_scale_groups)
    v_scales = p.v_scale_groups > 0, _pages(p, p.v_scale_strides, p.v_scale_groups)
    parts = (
        Part(False, p.d_qk, k_at, k_padding, k_pages, *k_scales),
        Part(True, p.d_v, v_begins, v_padding, v_pages, *v_scales),
    )
    return Packing(
        heads=p.num_kv_heads,
        width=width,
        row=row,
        v_begins=v_begins,
        v_at=p.relation.offset if in_k else 0,
        parts=parts[:1] if in_k else parts,
        keys=keys,
        chunk=chunk,
        staged=staged,
        direct=direct,
        scratch=0 if direct else copies * keys * row,
    )


def _pages(problem: Problem, strides: tuple[int, int, int, int, int], d: int) -> Pages | None:
    per_page = problem.blocks_per_page
    if per_page == 1:
        return None
    page, block, *inner = strides
    step = gcd(page, block) or 1
    page, block = page // step, block // step
    reach = (problem.num_pages - 1) * page + (per_page - 1) * block
    shape = (reach + 1, problem.block_size, problem.num_kv_heads, d)
    return Pages(shape, (step, *inner), per_page, block, page - per_page * block)


def rows_taken(problem: Problem, packing: Packing, lo: int, hi: int) -> int:
    """Packed rows that a range of keys takes: whole blocks where they are staged."""
    if lo >= hi:
        return 0
    if not packing.staged:
        return hi - lo
    size = problem.block_size
    return (-(-hi // size) - lo // size) * size


def load(problem: Problem, packing: Packing, call: Call, scratch: list[Tensor], spans: Spans) -> Rows:
    """Copy keys and values out of the cache.

    Args:
        problem: The facts of the call.
        packing: How they are packed.
        call: Its tensors.
        scratch: One buffer of ``packing.scratch`` elements, unless that is 0.
        spans: The keys, at most ``packing.keys`` rows.

    Returns:
        Tensors with packed rows of K and of V, ``[keys, num_kv_heads, width]``, float32; where those of V
        begin in theirs, in elements; and of each sequence, in which row its key 0 would be.
    """
    if not packing.staged:
        return _load_stretches(problem, packing, call, scratch[0], spans)
    firsts, ids = _block_ids(problem, call, spans)
    if packing.direct:
        k, *v = [_gather(*_blocks(_cache_of(call, part), part.pages, ids)).float() for part in packing.parts]
        return k, v[0] if v else k, 0, firsts
    place, strides = scratch[0], (problem.block_size * packing.row, packing.row, packing.width, 1)
    for part in packing.parts:
        blocks = _gather(*_blocks(_cache_of(call, part), part.pages, ids))
        rows = place.as_strided(blocks.shape, strides, part.at).copy_(blocks)
        if part.scaled:
            _scale(rows, _gather(*_blocks(_scales_of(problem, call, part), part.scale_pages, ids)))
    _clear_padding(packing, place, len(ids) * problem.block_size)
    return place, place, packing.v_begins, firsts


def _clear_padding(packing: Packing, place: Tensor, count: int) -> None:
    for part in packing.parts:
        if part.padding:
            shape = (count, packing.heads, part.padding)
            place.as_strided(shape, (packing.row, packing.width, 1), part.at + part.d).zero_()


def _block_ids(problem: Problem, call: Call, spans: Spans) -> tuple[dict[int, int], Tensor]:
    """In which row key 0 of each sequence would be, and the blocks of them all, one after the other."""
    table, size = call.block_table, problem.block_size
    assert table is not None  # only a paged cache is staged
    by_seq, by_block = problem.table_strides
    origin, blocks = table.storage_offset(), 0
    firsts, runs = {}, []
    for seq, (a, b) in spans.items():
        block = a // size
        n = -(-b // size) - block
        if block + n > table.shape[1]:  # else entries would be read that are another sequence's
            raise IndexError(
                f"sequence {seq} has {b} keys; block_table has {table.shape[1]} blocks of {size}"
            )
        firsts[seq] = (blocks - block) * size
        blocks += n
        runs.append(table.as_strided((n,), (by_block,), origin + seq * by_seq + block * by_block))
    return firsts, torch.cat(runs) if len(runs) > 1 else runs[0]


def _blocks(cache: Tensor, pages: Pages | None, ids: Tensor) -> tuple[Tensor, Tensor]:
    """A cache as ``[num_blocks, block_size, num_kv_heads, d]``, and in which of these blocks the ids lie."""
    if cache.dim() == 4:
        return cache, ids
    if pages is None:
        return cache.squeeze(1), ids
    # No one stride leads from block to block: count in a step that divides both.
    shape, strides, per_page, block, extra = pages
    if block != 1 or extra != 0:
        ids = ids.long()
        ids = ids * block + ids // per_page * extra
    return cache.as_strided(shape, strides), ids


def _cache_of(call: Call, part: Part) -> Tensor:
    return call.v if part.of_v else call.k


def _scales_of(problem: Problem, call: Call, part: Part) -> Tensor:
    """The scales of K or V, ``[..., num_kv_heads, groups]``."""
    scales = scale_rows(call.v_scale_cache if part.of_v else call.k_scale_cache, problem.num_kv_heads)
    assert scales is not None  # the part has some
    return scales


def _scale(rows: Tensor, scales: Tensor) -> None:
    """Multiply packed rows ``[..., d]`` with scales ``[..., groups]``, in place."""
    rows.unflatten(-1, (scales.shape[-1], -1)).mul_(scales[..., None])


def _gather(blocks: Tensor, ids: Tensor) -> Tensor:
    """Whole blocks of ``[num_blocks, block_size, num_kv_heads, d]``, packed."""
    if blocks.itemsize == 1:
        return _wide(blocks.view(torch.uint8).index_select(0, ids).view(blocks.dtype))
    return blocks.index_select(0, ids)


def _wide(rows: Tensor) -> Tensor:
    """The same values, in float32 if PyTorch is slow to convert them."""
    if rows.dtype != torch.float8_e4m3fn:
        return rows
    # PyTorch converts this format one value at a time; a table of its 256 values is five times as fast.
    return _all_e4m3().index_select(0, rows.view(torch.uint8).flatten().int()).view(rows.shape)


@cache
def _all_e4m3() -> Tensor:
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


class Stretch(NamedTuple):
    """Rows of the cache that follow each other."""

    begin: int
    end: int
    block: int  # of a paged cache; -1 without a block table


def _load_stretches(problem: Problem, packing: Packing, call: Call, place: Tensor, spans: Spans) -> Rows:
    """Convert rows where they lie, one stretch after the other."""
    stretches: list[Stretch] = []
    starts = None if call.cu_seqlens_k is None else call.cu_seqlens_k.tolist()
    spare = min(packing.keys - sum(b - a for a, b in spans.values()), LARGE_GAP // packing.row)
    firsts, count = {}, 0
    for seq, (a, b) in spans.items():
        if starts is None:
            stretches += _stretches_of_blocks(problem, call, seq, a, b)
        else:
            begin = starts[seq] + a
            gap = begin - stretches[-1].end if stretches else -1
            if 0 <= gap <= spare:  # copied, too
                begin, spare, count = stretches.pop().begin, spare - gap, count + gap
            stretches.append(Stretch(begin, starts[seq] + b, -1))
        firsts[seq] = count - a
        count += b - a
    strides, at = (packing.row, packing.width, 1), 0
    for begin, end, block in stretches:
        for part in packing.parts:
            stored = _block(problem, _cache_of(call, part), block)[begin:end]
            rows = place.as_strided((end - begin, packing.heads, part.d), strides, part.at + at)
            rows.copy_(_wide(stored))
            if part.scaled:
                _scale(rows, _block(problem, _scales_of(problem, call, part), block)[begin:end])
        at += (end - begin) * packing.row
    _clear_padding(packing, place, count)
    return place, place, packing.v_begins, firsts


def _block(problem: Problem, cache: Tensor, block: int) -> Tensor:
    """The rows of a block, or all rows, of a cache that has none."""
    if block < 0:
        return cache
    return cache[divmod(block, problem.blocks_per_page) if cache.dim() == 5 else block]


def _stretches_of_blocks(problem: Problem, call: Call, seq: int, a: int, b: int) -> Iterator[Stretch]:
    """Keys ``a`` to ``b`` of a sequence, block by block."""
    table, size = call.block_table, problem.block_size
    assert table is not None  # as there are blocks
    ids = table[seq, a // size : -(-b // size)].tolist()
    for start, block in zip(range(a // size * size, b, size), ids, strict=True):
        yield Stretch(max(a - start, 0), min(b - start, size), block)
