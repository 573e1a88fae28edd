"""The back end on CPUs: PyTorch's fused kernel over a bounded, packed share of the keys at a time.

Rows are gathered from the strided cache as they are stored and converted to float32. What follows never
meets a stride of the cache, so a layout cannot change a bit of the result. Float32 also where the cache is
narrower: the fused kernel was measured to be as fast in it as in bfloat16, and many times faster than in
float16 (AVX-512 without AMX, torch 2.13).

Sequences of like lengths are gathered and computed as one padded batch, because on a CPU a small operation
costs more to start than to compute. A sequence that is longer than a share stands alone, and its chunks are
merged by their lse. Accepts everything in the contract; ``num_splits`` changes nothing here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from anystride.problem import Call, Problem, canonical

NAME = "cpu"

KEY_BYTES = 4 << 20  # rows of K and V in float32 that are held at once
SCORES = 1 << 20  # scores or biases that are held at once, in elements
QUERIES = 1 << 20  # elements of queries, and of results, that are held at once
TILE_TOKENS = 144  # few enough to skip keys under a causal mask, many enough for the products
LONE_ROWS = 64  # rows of a KV head from which on a tile is worth a batch of its own
MASK_ELEMENTS = 1 << 16  # elements of a tile below which padding is cleared by one pass over them all
LARGE_BLOCK = 1 << 16  # elements in a block's rows from which on blocks are converted one by one

# Measured costs in microseconds. They decide what is batched, never what is right.
BATCH_COST = 100.0  # a batch, however little it computes
ELEMENT_COST = 6e-4  # to gather, convert and read an element of the cache
PRODUCT_COST = 1.5e-5  # a multiplication and addition

fused_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


class Tile(NamedTuple):
    """Query tokens of one sequence and the keys that one of them can see."""

    seq: int
    begin: int  # row of q of the first query token
    n: int  # query tokens
    centre: int  # position of the first query token in its sequence
    last: int  # position of the sequence's last key
    lo: int  # first key, counted in this cache
    hi: int  # end of the keys


@dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
        parts: 1 if K and V are packed as one row, of which V is a part; else 2.
        width: Elements of a packed row of K, and of V: the fused kernel wants them equal.
        v_at: Where V begins in its packed row.
        staged: Whether whole blocks are gathered before they are converted.
        keys: Keys of a batch, padding included, that fit into scratch.
        chunk: Keys that are taken at a time from a sequence that is longer: whole blocks, or an equal part
            of a block.
        tokens: Query tokens of a tile.
        batch_tokens: Query tokens of a batch, padding included.
        held: Scores or biases for each key and query token.
        key_cost: One key, in units of the cost of a batch.
        product_cost: One key's products with one query token, in the same units.
        scratch: Packed rows of K and V. All else that is allocated is bounded by the numbers above.
    """

    parts: int
    width: int
    v_at: int
    staged: bool
    keys: int
    chunk: int
    tokens: int
    batch_tokens: int
    held: int
    key_cost: float
    product_cost: float
    scratch: tuple[tuple[tuple[int, ...], torch.dtype], ...]


def refusals(problem: Problem) -> list[str]:
    """Every reason why PyTorch on the CPU cannot run the problem."""
    if problem.device.type != "cpu":
        return [f"tensors are on {problem.device}; needs tensors on a CPU"]
    return []


def choose_config(problem: Problem) -> Config:
    """Cut by what fits into a cache of the processor."""
    p = problem
    in_k = p.relation.kind == "v_in_k"
    width = p.d_qk + p.d_v if p.has_q_v else max(p.d_qk, p.d_v)
    parts = 1 if in_k or p.has_q_v else 2
    row = p.num_kv_heads * width * parts  # elements of a key
    # Nothing here depends on the batch: a sequence is cut alike whoever its neighbours are.
    size = p.block_size
    most = chunk = max(1, KEY_BYTES // (4 * row))
    if p.paged:
        chunk = most // size * size if size <= most else -(-size // -(-size // most))
    batch_tokens = max(1, QUERIES // (p.num_q_heads * width))
    held = p.num_q_heads if p.softcap or p.has_alibi else p.group_size
    keys = min(chunk if p.batch_invariant else max(most, chunk), p.batch * (p.max_keys + size))
    return Config(
        parts=parts,
        width=width,
        v_at=p.relation.offset if in_k else 0,
        staged=p.paged and chunk >= size and size * p.num_kv_heads * max(p.d_qk, p.d_v) < LARGE_BLOCK,
        keys=keys,
        chunk=chunk,
        tokens=min(TILE_TOKENS, batch_tokens, max(1, SCORES // (held * chunk))),
        batch_tokens=batch_tokens,
        held=held,
        key_cost=row * ELEMENT_COST / BATCH_COST,
        product_cost=2 * p.num_q_heads * width * PRODUCT_COST / BATCH_COST,
        scratch=(((keys * row,), torch.float32),),
    )


def run(problem: Problem, config: Config, call: Call, scratch: list[Tensor]) -> None:
    """Write ``call.out`` and ``call.lse``."""
    with torch.inference_mode():
        if problem.blocks_per_page > 1 or problem.has_alibi or _has_descales(problem):
            call = canonical(problem, call)
        tiles = _tiles(problem, config, call)
        for batch in _batches(problem, config, [tile for tile in tiles if tile.lo < tile.hi]):
            _run_batch(problem, config, call, scratch[0], batch)
        for tile in tiles:
            if tile.lo >= tile.hi:
                call.out[tile.begin : tile.begin + tile.n] = 0
                if call.lse is not None:
                    call.lse[:, tile.begin : tile.begin + tile.n] = float("-inf")


def _has_descales(problem: Problem) -> bool:
    return problem.has_q_descale or problem.has_k_descale or problem.has_v_descale


def _tiles(problem: Problem, config: Config, call: Call) -> list[Tile]:
    """Cut each sequence's query tokens into tiles and bound the keys that a tile sees."""
    starts = call.cu_seqlens_q.tolist()
    if call.seqused_k is not None:
        lengths = call.seqused_k.tolist()
    else:
        assert call.cu_seqlens_k is not None  # the checks demand one of the two
        lengths = call.cu_seqlens_k.diff().tolist()
    left, right, totals = problem.window_left, problem.window_right, lengths
    if problem.cp_world_size > 1:
        assert call.cp_tot_seqused_k is not None  # as above
        left, right, totals = -1, -1, call.cp_tot_seqused_k.tolist()
    tiles = []
    for seq, (length, total) in enumerate(zip(lengths, totals, strict=True)):
        start, end = starts[seq], starts[seq + 1]
        if start == end:
            continue
        step = -(-(end - start) // -(-(end - start) // config.tokens))  # tiles of equal size
        for begin in range(start, end, step):
            n = min(step, end - begin)
            centre = total - end + begin
            lo = max(0, centre - left) if left >= 0 else 0
            hi = min(length, centre + n + right) if right >= 0 else length
            tiles.append(Tile(seq, begin, n, centre, total - 1, lo, hi))
    return tiles


def _batches(problem: Problem, config: Config, tiles: list[Tile]) -> Iterator[list[Tile]]:
    """Batch tiles of like sizes, as long as padding costs less than one more batch."""
    if problem.batch_invariant or len(tiles) <= 1:
        yield from ([tile] for tile in tiles)
        return
    size = problem.block_size if config.staged else 1

    def cost(count: int, n: int, keys: int) -> float:
        return count * keys * (config.key_cost + n * config.product_cost)

    batch: list[Tile] = []
    n = keys = 0
    for tile in sorted(tiles, key=lambda tile: (tile.n, tile.hi - tile.lo), reverse=True):
        own = -(-tile.hi // size) * size - tile.lo // size * size  # whole blocks
        if batch and n * problem.group_size < LONE_ROWS:
            count, longest = len(batch) + 1, max(keys, own)
            more = cost(count, n, longest) - cost(count - 1, n, keys)
            if (
                more <= 1 + cost(1, tile.n, own)
                and count * longest <= config.keys
                and count * n <= config.batch_tokens
                and count * n * config.held * longest <= SCORES
            ):
                batch.append(tile)
                keys = longest
                continue
        if batch:
            yield sorted(batch, key=lambda tile: tile.begin)
        batch, n, keys = [tile], tile.n, own
    yield sorted(batch, key=lambda tile: tile.begin)


def _chunks(problem: Problem, config: Config, lo: int, hi: int) -> Iterator[tuple[int, int]]:
    """Ranges of keys of one sequence: from a multiple of ``chunk`` on, or inside of one block."""
    size, chunk = problem.block_size, config.chunk
    outer = size if problem.paged and size > chunk else chunk
    for first in range(lo // outer * outer, hi, outer):
        for a in range(first, min(first + outer, hi), chunk):
            b = min(a + chunk, first + outer, hi)
            if b > lo:
                yield max(a, lo), b


def _run_batch(problem: Problem, config: Config, call: Call, place: Tensor, tiles: list[Tile]) -> None:
    """Attention of some tiles, padded to the longest of them."""
    group, count, n = problem.group_size, len(tiles), max(tile.n for tile in tiles)
    tokens = _token_rows(tiles, n)
    q, scale = _queries(problem, config, call, tiles, tokens)  # [count, n, heads, group, width]
    # All rows of a KV head are one matrix: the keys are read once for all of them.
    q = q.transpose(1, 2).flatten(2, 3)
    shares: list[list[tuple[int, int]]]
    if count == 1:
        shares = [[share] for share in _chunks(problem, config, tiles[0].lo, tiles[0].hi)]
    else:
        size = problem.block_size if config.staged else 1  # staged blocks are whole
        shares = [[(tile.lo // size * size, tile.hi) for tile in tiles]]
    result = None
    for ranges in shares:
        k, v, padding = _load(problem, config, call, place, tiles, ranges)
        bias, empty = _bias(problem, call, tiles, ranges, n, k.shape[2], padding)
        if problem.softcap > 0:
            out, lse = _capped(problem.softcap, q, k, v, bias, scale)
        else:
            out, lse = fused_kernel(q, k, v, 0.0, False, attn_mask=bias, scale=scale)
        if empty is not None:  # the fused kernel gives them 0
            lse.masked_fill_(empty, float("-inf"))
        result = (out, lse) if result is None else _merge(*result, out, lse)
    assert result is not None  # a tile has keys
    out, lse = (part.unflatten(2, (n, group)) for part in result)
    _store(problem, config, call, tiles, tokens, out.transpose(1, 2), lse.permute(1, 3, 0, 2))


def _capped(
    softcap: float, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse`` with a softcap, which the fused kernel does not know."""
    scores = torch.matmul(q, k.transpose(2, 3)).mul_(scale / softcap).tanh_().mul_(softcap)
    if bias is not None:
        scores += bias
    lse = torch.logsumexp(scores, -1)
    scores -= lse.masked_fill(lse == float("-inf"), 0.0)[..., None]
    return torch.matmul(scores.exp_(), v), lse


def _merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Results over disjoint keys as one; rows that have seen no key stay 0 and -inf."""
    both = torch.logaddexp(lse, other_lse)
    base = both.masked_fill(both == float("-inf"), 0.0)
    out = out * torch.exp(lse - base)[..., None]
    return out.addcmul_(other, torch.exp(other_lse - base)[..., None]), both


def _factor(descale: Tensor | float | None, tiles: list[Tile]) -> Tensor | float:
    """A number, or a factor for each tile and KV head, ``[tiles, 1, num_kv_heads, 1, 1]``."""
    if isinstance(descale, Tensor):
        return descale[[tile.seq for tile in tiles]][:, None, :, None, None]
    return 1.0 if descale is None else descale


def _token_rows(tiles: list[Tile], n: int) -> slice | Tensor:
    """Rows of q of the tiles' tokens, each padded to ``n`` with its last: a slice if they are one."""
    first = tiles[0].begin
    if all(tile.n == n and tile.begin == first + i * n for i, tile in enumerate(tiles)):
        return slice(first, first + len(tiles) * n)
    return torch.tensor([tile.begin + min(i, tile.n - 1) for tile in tiles for i in range(n)])


def _queries(
    problem: Problem, config: Config, call: Call, tiles: list[Tile], tokens: slice | Tensor
) -> tuple[Tensor, float]:
    """The tiles' queries as K lies, ``[tiles, n, num_kv_heads, group_size, width]``, and their scale."""

    def rows(source: Tensor) -> Tensor:
        taken = source[tokens] if isinstance(tokens, slice) else source.index_select(0, tokens)
        shape = (len(tiles), -1, problem.num_kv_heads, problem.group_size, source.shape[2])
        # A copy always: the fused kernel takes it for granted that the elements of a row are neighbours, and
        # rounds by where the first one lies in a vector.
        packed = taken.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        return packed.view(shape)

    q, scale = rows(call.q), problem.softmax_scale
    if problem.has_q_descale or problem.has_k_descale:
        q = q * (_factor(call.q_descale, tiles) * _factor(call.k_descale, tiles))
    if call.q_v is not None:
        q_v = rows(call.q_v)
        if problem.has_q_descale or problem.has_v_descale:
            q_v = q_v * (_factor(call.q_descale, tiles) * _factor(call.v_descale, tiles))
        return torch.cat([q_v, q], -1), scale
    if q.shape[-1] < config.width:
        q = torch.nn.functional.pad(q, (0, config.width - q.shape[-1]))
    return q, scale


def _seen(problem: Problem, tile: Tile, n: int, a: int, b: int) -> list[tuple[int, int]]:
    """First and end of the keys of ``a`` to ``b`` that each query token of the tile sees, counted from ``a``.

    One entry for all tokens if they see the same; else ``n``, the tile's last for its padding.
    """
    left, right = problem.window_left, problem.window_right
    if (left < 0 and right < 0) or (n == 1 and problem.cp_world_size == 1):
        return [(max(tile.lo - a, 0), min(tile.hi, b) - a)]
    seen = []
    for position in range(tile.centre, tile.centre + tile.n):
        first = position - left if left >= 0 else 0
        end = position + right + 1 if right >= 0 else tile.last + 1
        if problem.cp_world_size > 1:
            first, end = _on_rank(problem, first), _on_rank(problem, end)
        seen.append((max(first - a, 0), min(end, b) - a))
    return seen + seen[-1:] * (n - tile.n)


def _on_rank(problem: Problem, position: int) -> int:
    """How many of the positions below ``position`` live on this rank."""
    run = problem.cp_interleave
    turns, rest = divmod(max(position, 0), run * problem.cp_world_size)
    return turns * run + min(max(rest - problem.cp_rank * run, 0), run)


def _bias(
    problem: Problem, call: Call, tiles: list[Tile], ranges: Sequence[tuple[int, int]], n: int, keys: int,
    padding: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """What is added to the scores: alibi, and minus infinity where a key is not seen or is padding.

    Returns:
        The bias, ``[tiles, num_kv_heads or 1, n * group_size or 1, keys]``, and which rows see no key,
        ``[tiles, 1, n * group_size]``; None where there are none.
    """
    p, count, group = problem, len(tiles), problem.group_size
    bias = empty = None
    end = tiles[0].centre + p.window_right + 1 - ranges[0][0]  # of the keys that the first token sees
    if (
        count == 1
        and n > 1
        and p.window_right >= 0
        and p.window_left < 0
        and p.cp_world_size == 1
        and end > 0
    ):
        if end < keys:  # one long causal tile: in few steps
            bias = torch.full((n, keys), float("-inf")).triu_(end).view(1, 1, n, 1, keys)
    else:
        seen = [pair for tile, (a, b) in zip(tiles, ranges, strict=True) for pair in _seen(p, tile, n, a, b)]
        firsts, ends = zip(*seen, strict=True)
        if max(firsts) > 0 or min(ends) < keys:
            if padding is not None and len(seen) == count:
                hidden = padding
            else:
                hidden = torch.arange(keys) >= torch.tensor(ends)[:, None]
            if max(firsts) > 0:
                hidden = hidden | (torch.arange(keys) < torch.tensor(firsts)[:, None])
            bias = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf")).view(count, 1, -1, 1, keys)
            sees_none = [first >= end for first, end in seen]
            if any(sees_none):
                empty = torch.tensor(sees_none).view(count, 1, -1, 1).expand(count, 1, n, group).flatten(2)
    if p.has_alibi:
        assert call.alibi_slopes is not None  # as has_alibi says
        slopes = call.alibi_slopes[[t.seq for t in tiles]].float().view(count, p.num_kv_heads, 1, group, 1)
        away = slopes * -_distance(p, tiles, ranges, n, keys).abs_()
        bias = away if bias is None else bias + away
    if bias is not None:
        bias = bias.expand(-1, -1, -1, group, -1).flatten(2, 3) if bias.shape[2] > 1 else bias.flatten(2, 3)
    return bias, empty


def _distance(
    problem: Problem, tiles: list[Tile], ranges: Sequence[tuple[int, int]], n: int, keys: int
) -> Tensor:
    """How far each key stands from each query token, ``[tiles, 1, n, 1, keys]``."""
    p = problem
    key = torch.tensor([a for a, _ in ranges])[:, None] + torch.arange(keys)
    if p.cp_world_size > 1:
        turn = key // p.cp_interleave * p.cp_world_size + p.cp_rank
        key = turn * p.cp_interleave + key % p.cp_interleave
    centre = torch.tensor([t.centre for t in tiles])[:, None] + torch.arange(n)
    return key[:, None, None, None] - centre[:, None, :, None, None]


def _load(
    problem: Problem, config: Config, call: Call, place: Tensor, tiles: list[Tile],
    ranges: Sequence[tuple[int, int]],
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """The keys and values of each tile's range, float32, ``[tiles, num_kv_heads, keys, width]``.

    Padding is zeros: a weight there is 0, but 0 times NaN is NaN.

    Returns:
        K, V (K itself where V is a part of its row), and which keys are padding, ``[tiles, keys]`` bool; None
        where none is.
    """
    p, count, size = problem, len(tiles), problem.block_size
    keys = max(b - a for a, b in ranges)
    if config.staged:  # whole blocks
        blocks = [(a // size, -(-b // size)) for a, b in ranges]
        keys = size * max(end - first for first, end in blocks)
    shape = (config.parts, count, keys, p.num_kv_heads, config.width)
    packed = place[: config.parts * count * keys * p.num_kv_heads * config.width].view(shape)
    parts = [(call.k, packed[0])]
    if p.has_q_v:
        parts = [(call.v, packed[0, ..., : p.d_v]), (call.k, packed[0, ..., p.d_v :])]
    elif config.parts == 2:
        parts.append((call.v, packed[1]))
        if p.d_qk != p.d_v:
            parts = [(cache, part[..., : cache.shape[-1]]) for cache, part in parts]
            packed[int(p.d_qk > p.d_v), ..., min(p.d_qk, p.d_v) :] = 0
    if config.staged:
        ids = _block_ids(call, tiles, blocks, p.num_pages * p.blocks_per_page)
        for cache, part in parts:
            part.copy_(_gather(cache, ids).view(part.shape))
    else:
        for i, (tile, (a, b)) in enumerate(zip(tiles, ranges, strict=True)):
            for at, where in _pieces(problem, call, tile.seq, a, b):
                for cache, part in parts:
                    rows = cache[where]
                    part[i, at : at + len(rows)] = _wide(rows)
    padding = None
    if count == 1 and config.staged:
        skip = ranges[0][0] - size * blocks[0][0]
        packed = packed[:, :, skip : skip + ranges[0][1] - ranges[0][0]]
    elif any(b - a < keys for a, b in ranges):
        padding = torch.arange(keys) >= torch.tensor([b - a for a, b in ranges])[:, None]
        if packed.numel() < count * MASK_ELEMENTS:
            keep = padding.int().sub_(1)  # all bits, or none
            packed.view(torch.int32).bitwise_and_(keep[:, :, None, None])
        else:
            for i, (a, b) in enumerate(ranges):
                packed[:, i, b - a :] = 0
    packed = packed.transpose(2, 3)
    return packed[0], packed[-1], padding


def _block_ids(call: Call, tiles: list[Tile], blocks: list[tuple[int, int]], num_blocks: int) -> Tensor:
    """Ids of the tiles' blocks, ``[tiles * most]``, each tile padded to the most that one has."""
    table = call.block_table
    assert table is not None  # only a paged cache is staged
    if len(tiles) == 1:
        return table[tiles[0].seq, blocks[0][0] : blocks[0][1]]
    most = max(end - first for first, end in blocks)
    if all(first == 0 for first, _ in blocks):
        table = table[:, :most]
        if len(tiles) < len(table) or any(tile.seq != i for i, tile in enumerate(tiles)):
            table = table.index_select(0, torch.tensor([tile.seq for tile in tiles]))
        # Entries past a sequence's end may hold anything: they are made ids, and what those hold is padding.
        return table.clamp(0, num_blocks - 1).reshape(-1)
    ids: list[int] = []
    for tile, (first, end) in zip(tiles, blocks, strict=True):
        own = table[tile.seq, first:end].tolist()
        ids += own + own[:1] * (most - len(own))
    return torch.tensor(ids)


def _gather(cache: Tensor, ids: Tensor) -> Tensor:
    """Whole blocks, ``[ids, block_size, num_kv_heads, d]``, packed.

    Args:
        cache: ``[num_blocks, block_size, num_kv_heads, d]``, or 5-D, of pages of blocks.
        ids: ``[ids]``, int32 or int64.
    """
    if cache.dim() == 5:  # no one stride leads from block to block: count in a step that divides both
        pages, per_page = cache.shape[:2]
        page, block = 0 if pages == 1 else cache.stride(0), cache.stride(1)
        step = gcd(page, block) or 1
        number = ((pages - 1) * page + (per_page - 1) * block) // step + 1
        cache = cache.as_strided((number, *cache.shape[2:]), (step, *cache.stride()[2:]))
        which = ids.long() // per_page
        ids = which * (page // step) + (ids - which * per_page) * (block // step)
    if cache.itemsize == 1:
        return _wide(cache.view(torch.uint8).index_select(0, ids).view(cache.dtype))
    return cache.index_select(0, ids)


def _wide(rows: Tensor) -> Tensor:
    """The same values, in float32 if PyTorch is slow to convert them."""
    if rows.dtype != torch.float8_e4m3fn:
        return rows
    # PyTorch converts this format one value at a time; a table of its 256 values is five times as fast.
    return _all_e4m3().index_select(0, rows.view(torch.uint8).flatten().int()).view(rows.shape)


@cache
def _all_e4m3() -> Tensor:
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def _pieces(
    problem: Problem, call: Call, seq: int, a: int, b: int
) -> Iterator[tuple[int, tuple[int | slice, ...]]]:
    """Where rows ``a`` to ``b`` of a sequence lie, block by block: how far from ``a``, and an index."""
    if call.block_table is None:
        assert call.cu_seqlens_k is not None  # the checks demand one of the two
        first = int(call.cu_seqlens_k[seq])
        yield 0, (slice(first + a, first + b),)
        return
    size = problem.block_size
    ids = call.block_table[seq, a // size : -(-b // size)].tolist()
    for start, block in zip(range(a // size * size, b, size), ids, strict=True):
        page = divmod(block, problem.blocks_per_page) if call.k.dim() == 5 else (block,)
        begin = max(a, start)
        yield begin - a, (*page, slice(begin - start, min(b - start, size)))


def _store(
    problem: Problem, config: Config, call: Call, tiles: list[Tile], tokens: slice | Tensor,
    out: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    """Add sinks, scale, and write the results where they belong.

    Args:
        problem: The facts of the call.
        config: How it is run.
        call: Its tensors.
        tiles: Whose results these are.
        tokens: Rows of q of the padded tiles.
        out: ``[tiles, n, num_kv_heads, group_size, width]``.
        lse: ``[num_kv_heads, group_size, tiles, n]``.
    """
    if call.s_aux is not None:
        sink = call.s_aux.float().view(problem.num_kv_heads, problem.group_size, 1, 1)
        with_sink = torch.logaddexp(lse, sink)
        out = out * torch.exp(lse - with_sink).permute(2, 3, 0, 1)[..., None]
        lse = with_sink.masked_fill_(lse == float("-inf"), float("-inf"))
    if call.v_descale is not None:
        out = out * _factor(call.v_descale, tiles)
    out = out.flatten(2, 3).flatten(0, 1)[..., config.v_at : config.v_at + problem.d_v]
    if isinstance(tokens, slice):
        call.out[tokens] = out
        if call.lse is not None:
            call.lse[:, tokens] = lse.flatten(2, 3).flatten(0, 1)
        return
    n = len(tokens) // len(tiles)
    if any(tile.n < n for tile in tiles):  # leave out the padding
        real = torch.tensor([i * n + token for i, tile in enumerate(tiles) for token in range(tile.n)])
        tokens, out = tokens[real], out.index_select(0, real)
    call.out.index_copy_(0, tokens, out.to(problem.dtype))
    if call.lse is not None:
        lse = lse.flatten(2, 3).flatten(0, 1)
        call.lse.index_copy_(1, tokens, lse if lse.shape[1] == len(tokens) else lse.index_select(1, real))
