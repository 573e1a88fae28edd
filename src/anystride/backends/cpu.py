"""The back end on CPUs: PyTorch's fused kernel over a bounded, packed share of the keys at a time.

Keys and values come packed and in float32 (``packing.py``), so that a layout cannot change a bit of the
result. Float32 also where the cache is narrower: the fused kernel was measured to be as fast in it as in
bfloat16, and many times faster than in float16 (AVX-512 without AMX, torch 2.13).

On a CPU a small operation costs more to start than to compute. So the sequences of a call are gathered,
converted and stored together, as many as fit into a share; only the fused kernel runs once for each, over
exactly the keys that it has: nothing is padded. A sequence that is longer than a share is merged from its
shares by their lse. Accepts everything in the contract; ``num_splits`` changes nothing here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from anystride import memory
from anystride.packing import Packing, Spans, choose_packing, load, rows_taken
from anystride.problem import Call, Problem

NAME = "cpu"

KEY_BYTES = 4 << 20  # rows of K and V in float32 that are held at once
SCORES = 1 << 20  # scores or biases that are held at once, in elements
QUERIES = 1 << 20  # elements of queries, and of results, that are held at once
FEW_ROWS = 3  # rows of a KV head that are better off as vectors, one by one
TILE_ROWS = 256  # rows of a KV head in a tile: the fused kernel takes 64 at a time from 192 on

NO_KEY = float("-inf")  # the lse of a row that sees none, and the score of a key that is not seen

# What torch.ops.aten's operator and torch.inference_mode() come to, without 2 us and 1 us of their costs.
fused_kernel = torch._scaled_dot_product_flash_attention_for_cpu
InferenceMode = torch._C._InferenceMode


class Tile(NamedTuple):
    """Query tokens of one sequence and the keys that one of them can see."""

    seq: int
    begin: int  # row of q of the first query token
    n: int  # query tokens
    centre: int  # position of the first query token in its sequence
    lo: int  # first key, counted in this cache
    hi: int  # end of the keys
    sees: bool  # whether a token sees a key: lo is below hi


# out [num_kv_heads, vectors, rows, width] and lse [num_kv_heads, vectors, rows], float32
Result = tuple[Tensor, Tensor]
Strides = tuple[int, int, int, int]  # KV head, query head of a group, token, element


@dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
        packing: How keys and values are packed.
        group: Query heads of a KV head.
        as_vectors: Whether the rows of a single query token are no matrix.
        tokens: Query tokens of a tile where a sequence has so many; less than twice as many.
        batch_tokens: Query tokens whose results are held at once.
        q_strides, q_v_strides, out_strides: Of ``[num_kv_heads, group_size, tokens, d]`` views.
        scratch: Packed rows of K and V. All else that is allocated is bounded by the numbers above.
    """

    packing: Packing
    group: int
    as_vectors: bool
    tokens: int
    batch_tokens: int
    q_strides: Strides
    q_v_strides: Strides
    out_strides: Strides
    scratch: tuple[tuple[tuple[int, ...], torch.dtype], ...]


def refusals(problem: Problem) -> list[str]:
    """Every reason why PyTorch on the CPU cannot run the problem."""
    if problem.device.type != "cpu":
        return [f"tensors are on {problem.device}; needs tensors on a CPU"]
    return []


def choose_config(problem: Problem) -> Config:
    """Cut by what fits into a cache of the processor."""
    p = problem
    packing = choose_packing(p, KEY_BYTES)
    batch_tokens = max(1, QUERIES // (p.num_q_heads * packing.width))
    held = p.num_q_heads if p.softcap or p.has_alibi else p.group_size  # numbers for each key and query token
    keys = packing.chunk if p.batch_invariant else min(2 * packing.chunk, p.max_keys)
    tokens = min(-(-TILE_ROWS // p.group_size), batch_tokens // 2, SCORES // (2 * held * keys))
    return Config(
        packing=packing,
        group=p.group_size,
        as_vectors=p.group_size <= FEW_ROWS and p.softcap == 0,
        tokens=max(1, tokens),
        batch_tokens=batch_tokens,
        q_strides=_strides_by_head(p.q_strides, p.group_size),
        q_v_strides=_strides_by_head(p.q_v_strides, p.group_size),
        out_strides=_strides_by_head(p.out_strides, p.group_size),
        scratch=(((packing.scratch,), torch.float32),) if packing.scratch else (),
    )


def _strides_by_head(strides: tuple[int, int, int], group: int) -> Strides:
    token, head, element = strides
    return group * head, head, token, element


def run(problem: Problem, config: Config, call: Call) -> None:
    """Write ``call.out`` and ``call.lse``."""
    scratch = [memory.allocate(shape, dtype, problem.device) for shape, dtype in config.scratch]
    with InferenceMode(True):
        tiles = _tiles(problem, config, call)
        if tiles and (not tiles[0].sees or not tiles[-1].sees):
            tiles = _clear_ends(call, tiles)
        if len(tiles) > 1:
            for batch in _batches(problem, config, tiles):
                _run_batch(problem, config, call, scratch, batch)
        elif tiles:
            _run_batch(problem, config, call, scratch, tiles)


def _clear_ends(call: Call, tiles: list[Tile]) -> list[Tile]:
    """The tiles without those at both ends that see no key, whose results are written here."""
    begin, end = tiles[0].begin, tiles[-1].begin + tiles[-1].n
    call.out[begin:end].zero_()
    if call.lse is not None:
        call.lse[:, begin:end].fill_(NO_KEY)
    seeing = [i for i, tile in enumerate(tiles) if tile.sees]
    return tiles[seeing[0] : seeing[-1] + 1] if seeing else []


def _tiles(problem: Problem, config: Config, call: Call) -> list[Tile]:
    """Cut each sequence's query tokens into tiles and bound the keys that a tile sees."""
    starts = call.cu_seqlens_q.tolist()
    if call.seqused_k is not None:
        lengths = totals = call.seqused_k.tolist()
    else:
        assert call.cu_seqlens_k is not None  # the checks demand one of the two
        lengths = totals = [end - begin for begin, end in pairwise(call.cu_seqlens_k.tolist())]
    if problem.cp_world_size > 1:
        assert call.cp_tot_seqused_k is not None  # as above
        totals = call.cp_tot_seqused_k.tolist()
    if starts[-1] > problem.total_q:  # else memory would be written that is not out
        raise IndexError(f"cu_seqlens_q ends at {starts[-1]}; q has {problem.total_q} tokens")
    left, right = problem.window_left, problem.window_right
    tiles = []
    for seq, length in enumerate(lengths):
        begin, end = starts[seq], starts[seq + 1]
        centre = totals[seq] - end + begin
        if right >= 0 and centre + right < 0 and begin < end:  # the first tokens see no key
            n = min(-centre - right, end - begin)
            tiles.append(Tile(seq, begin, n, centre, 0, 0, False))
            begin, centre = begin + n, centre + n
        most = end - begin
        if most >= 2 * config.tokens:  # tiles of equal size
            most = -(-most // (most // config.tokens))
        while begin < end:
            n = most if begin + most < end else end - begin
            lo, hi = 0, length
            if left >= 0:
                lo = _on_rank(problem, centre - left)
            if 0 <= right < totals[seq] - centre - n:
                hi = min(hi, _on_rank(problem, centre + n + right))
            tiles.append(Tile(seq, begin, n, centre, lo, hi, lo < hi))
            begin, centre = begin + n, centre + n
    return tiles


def _on_rank(problem: Problem, position: int) -> int:
    """How many of the positions below ``position`` live on this rank."""
    if position <= 0:
        return 0
    if problem.cp_world_size == 1:
        return position
    run = problem.cp_interleave
    turns, rest = divmod(position, run * problem.cp_world_size)
    return turns * run + min(max(rest - problem.cp_rank * run, 0), run)


def _batches(problem: Problem, config: Config, tiles: list[Tile]) -> Iterator[list[Tile]]:
    """Neighbours that are computed together: their keys fit into a share, or are those of one sequence."""
    packing = config.packing
    batch: list[Tile] = []
    tokens = keys = 0
    for tile in tiles:
        own = more = rows_taken(problem, packing, tile.lo, tile.hi)
        if batch:
            last = batch[-1]
            if tile.seq == last.seq:  # the keys of both are one range
                more = rows_taken(problem, packing, max(tile.lo, last.hi), tile.hi)
            fits = keys + more <= packing.keys or (own > packing.keys and tile.seq == batch[0].seq)
            if not fits or tokens + tile.n > config.batch_tokens or problem.batch_invariant:
                yield batch
                batch, tokens, keys, more = [], 0, 0, own
        batch.append(tile)
        tokens, keys = tokens + tile.n, keys + more
    yield batch


def _run_batch(
    problem: Problem, config: Config, call: Call, scratch: list[Tensor], tiles: list[Tile]
) -> None:
    """Attention of some tiles that are neighbours."""
    packing, group = config.packing, config.group
    heads, width, row = packing.heads, packing.width, packing.row
    begin = tiles[0].begin
    count = tiles[-1].begin + tiles[-1].n - begin  # tokens
    q = _queries(problem, config, call, tiles, begin, count)
    results: list[Result | None] = [None] * len(tiles)
    spans: Spans = {}
    for tile in tiles:
        if tile.sees:
            spans[tile.seq] = (spans[tile.seq][0] if tile.seq in spans else tile.lo, tile.hi)
    for share in _shares(problem, packing, spans):
        k_rows, v_rows, v_begins, firsts = load(problem, packing, call, scratch, share)
        # Where every tile has one token, each sees all keys of its range.
        mask = _mask(problem, group, tiles, share) if count > len(tiles) else None
        for i, tile in enumerate(tiles):
            seq, tile_begin, n, _, a, b, _ = tile
            if share is not spans:
                a, b = _overlap(tile, share)
            if a >= b:
                continue
            # All query rows of a KV head are one matrix, for which the keys are read once. A few are better
            # off as vectors: MKL's products of matrices take 4 us longer where it may use threads.
            vectors, rows = (group, 1) if n == 1 and config.as_vectors else (1, n * group)
            own_q = q
            if count > 1 or vectors < group:
                shape, strides = (heads, vectors, rows, width), (count * group * width, width, width, 1)
                own_q = q.as_strided(shape, strides, (tile_begin - begin) * group * width)
            shape, strides, at = (heads, vectors, b - a, width), (width, 0, row, 1), (firsts[seq] + a) * row
            k = v = k_rows.as_strided(shape, strides, at)
            if v_rows is not k_rows or v_begins:
                v = v_rows.as_strided(shape, strides, v_begins + at)
            bias, blind = None, False
            if n > 1 or problem.has_alibi:
                bias, blind = _bias(problem, group, call, tile, a, b, mask)
                if bias is not None and vectors > 1:
                    bias = bias.transpose(1, 2)
            if problem.softcap > 0:
                out, lse = _capped(problem, own_q, k, v, bias, blind)
            else:
                out, lse = fused_kernel(own_q, k, v, attn_mask=bias, scale=problem.softmax_scale)
                if blind and bias is not None:  # the out of such rows is 0, but not their lse
                    lse.masked_fill_(bias.amax(-1) == NO_KEY, NO_KEY)
            earlier = results[i]
            results[i] = (out, lse) if earlier is None else _merge(earlier, (out, lse))
    _store(problem, config, call, tiles, results, begin, count)


def _shares(problem: Problem, packing: Packing, spans: Spans) -> Iterable[Spans]:
    """The keys of a batch, as many at a time as are held at once."""
    if len(spans) == 1:
        ((seq, (lo, hi)),) = spans.items()
        if rows_taken(problem, packing, lo, hi) > packing.keys:
            return ({seq: share} for share in _chunks(problem, packing.chunk, lo, hi))
    return (spans,) if spans else ()


def _chunks(problem: Problem, chunk: int, lo: int, hi: int) -> Iterator[tuple[int, int]]:
    """Ranges of keys of one sequence: from a multiple of ``chunk`` on, or inside of one block."""
    size = problem.block_size
    outer = size if problem.paged and size > chunk else chunk
    for first in range(lo // outer * outer, hi, outer):
        for a in range(first, min(first + outer, hi), chunk):
            b = min(a + chunk, first + outer, hi)
            if b > lo:
                yield max(a, lo), b


def _overlap(tile: Tile, share: Spans) -> tuple[int, int]:
    """The keys of a share that the tile sees; none where the second number is not above the first."""
    first, end = share.get(tile.seq, (0, 0))
    return max(tile.lo, first), min(tile.hi, end)


def _capped(problem: Problem, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, blind: bool) -> Result:
    """Attention with a softcap, which the fused kernel does not know; some rows see no key if ``blind``."""
    cap = problem.softcap
    scores = torch.matmul(q, k.transpose(2, 3)).mul_(problem.softmax_scale / cap).tanh_().mul_(cap)
    if bias is not None:
        scores += bias
    most, weights = scores.amax(-1), torch.softmax(scores, -1)
    lse = most - weights.amax(-1).log_()  # the largest weight is exp(most - lse); logsumexp takes longer
    if blind:
        empty = most == NO_KEY
        weights.masked_fill_(empty[..., None], 0.0)
        lse.masked_fill_(empty, NO_KEY)
    return torch.matmul(weights, v), lse


def _merge(one: Result, other: Result) -> Result:
    """Results over disjoint keys as one; rows that have seen no key stay 0 and -inf."""
    lse = torch.logaddexp(one[1], other[1])
    base = lse.masked_fill(lse == NO_KEY, 0.0)
    out = one[0] * torch.exp(one[1] - base)[..., None]
    return out.addcmul_(other[0], torch.exp(other[1] - base)[..., None]), lse


def _queries(
    problem: Problem, config: Config, call: Call, tiles: list[Tile], begin: int, count: int
) -> Tensor:
    """The queries of ``count`` tokens, ``[num_kv_heads, group_size, count, width]``, float32, by tokens."""
    p, width, group = problem, config.packing.width, config.group
    # A copy always: the fused kernel takes it for granted that the elements of a row are neighbours, and
    # rounds by where the first one lies in a vector.
    shape, strides = (p.num_kv_heads, group, count, width), (count * group * width, width, group * width, 1)
    packed = q = torch.empty_strided(shape, strides)
    if call.q_v is not None:
        q, q_v = packed[..., p.d_v :], packed[..., : p.d_v]
        at = call.q_v.storage_offset() + begin * config.q_v_strides[2]
        q_v.copy_(call.q_v.as_strided(q_v.shape, config.q_v_strides, at))
    elif p.d_qk < width:
        q = packed[..., : p.d_qk]
        packed[..., p.d_qk :] = 0
    at = call.q.storage_offset() + begin * config.q_strides[2]
    q.copy_(call.q.as_strided(q.shape, config.q_strides, at))
    if p.has_q_descale or p.has_k_descale:
        q.mul_(_factor(call.q_descale, tiles) * _factor(call.k_descale, tiles))
    if call.q_v is not None and (p.has_q_descale or p.has_v_descale):
        q_v.mul_(_factor(call.q_descale, tiles) * _factor(call.v_descale, tiles))
    return packed


def _factor(descale: Tensor | float | None, tiles: list[Tile]) -> Tensor | float:
    """What multiplies each KV head and query token: a number, or ``[num_kv_heads, 1, count, 1]``."""
    if not isinstance(descale, Tensor):
        return 1.0 if descale is None else descale
    if descale.numel() == 1:
        return descale.reshape(())
    seqs = torch.tensor([tile.seq for tile in tiles for _ in range(tile.n)])
    return descale.index_select(0, seqs).t()[:, None, :, None]


def _seen(problem: Problem, tile: Tile, token: int) -> tuple[int, int]:
    """First and end of the keys that a token of the tile sees."""
    position, left, right = tile.centre + token, problem.window_left, problem.window_right
    first = _on_rank(problem, position - left) if left >= 0 else 0
    return first, min(tile.hi, _on_rank(problem, position + right + 1)) if right >= 0 else tile.hi


def _hides(problem: Problem, tile: Tile, a: int, b: int) -> bool:
    """Whether a token of the tile does not see all keys from ``a`` to ``b``."""
    return tile.n > 1 and (_seen(problem, tile, 0)[1] < b or _seen(problem, tile, tile.n - 1)[0] > a)


class Mask(NamedTuple):
    """What is added to the scores, by how far a key stands behind a tile's first query token."""

    bias: Tensor  # [n * group_size, distances]: 0, or minus infinity where a key is not seen
    first: int  # the least distance


def _mask(problem: Problem, group: int, tiles: list[Tile], share: Spans) -> Mask | None:
    """One mask for all tiles that need one; None if none does, or where distances are not so simple."""
    p = problem
    if p.cp_world_size > 1:
        return None
    n = first = end = 0
    for tile in tiles:
        a, b = _overlap(tile, share)
        if a < b and _hides(p, tile, a, b):
            n, first, end = max(n, tile.n), min(first, a - tile.centre), max(end, b - tile.centre)
    if n == 0:
        return None
    bias = torch.full((n, end - first), NO_KEY)
    if p.window_right >= 0:
        bias.triu_(p.window_right + 1 - first)
    if p.window_left >= 0:
        past = torch.full((n, end - first), NO_KEY).tril_(-p.window_left - 1 - first)
        bias = past if p.window_right < 0 else bias.add_(past)
    return Mask(bias.repeat_interleave(group, 0) if group > 1 else bias, first)


def _bias(
    problem: Problem, group: int, call: Call, tile: Tile, a: int, b: int, mask: Mask | None
) -> tuple[Tensor | None, bool]:
    """What is added to the scores of keys ``a`` to ``b``: alibi, and minus infinity for keys not seen.

    Returns:
        The bias, ``[num_kv_heads or 1, 1, n * group_size, keys]``, and whether a row may see no key.
    """
    p, bias, blind = problem, None, False
    if _hides(p, tile, a, b):
        if mask is not None:
            shape, strides = (1, 1, tile.n * group, b - a), (0, 0, mask.bias.shape[1], 1)
            bias = mask.bias.as_strided(shape, strides, a - tile.centre - mask.first)
            blind = _seen(p, tile, 0)[1] <= a or _seen(p, tile, tile.n - 1)[0] >= b
        else:
            firsts, ends = zip(*(_seen(p, tile, token) for token in range(tile.n)), strict=True)
            key = torch.arange(a, b)
            hidden = key >= torch.tensor(ends)[:, None]
            if p.window_left >= 0:
                hidden |= key < torch.tensor(firsts)[:, None]
            bias = torch.zeros(tile.n, b - a).masked_fill_(hidden, NO_KEY)
            bias = bias.repeat_interleave(group, 0)[None, None]
            blind = any(max(first, a) >= min(end, b) for first, end in zip(firsts, ends, strict=True))
    if call.alibi_slopes is not None:
        slopes = call.alibi_slopes[tile.seq] if call.alibi_slopes.dim() == 2 else call.alibi_slopes
        away = slopes.float().view(-1, 1, group, 1) * -_distance(p, tile, a, b)
        sloped = away.view(-1, 1, tile.n * group, b - a)
        bias = sloped if bias is None else sloped.add_(bias)
    return bias, blind


def _distance(problem: Problem, tile: Tile, a: int, b: int) -> Tensor:
    """How far each key from ``a`` to ``b`` stands from each query token, ``[n, 1, keys]``."""
    p = problem
    if p.cp_world_size == 1:
        away = torch.arange(a - tile.centre, b - tile.centre)
    else:
        key = torch.arange(a, b)
        turn = key // p.cp_interleave
        away = key + (turn * (p.cp_world_size - 1) + p.cp_rank) * p.cp_interleave - tile.centre
    if tile.n > 1:
        away = away - torch.arange(tile.n)[:, None, None]
    return away.abs_()


def _store(
    problem: Problem, config: Config, call: Call, tiles: list[Tile], results: list[Result | None],
    begin: int, count: int,
) -> None:  # fmt: skip
    """Write the results of ``count`` tokens where they belong, with sinks and scaled."""
    p, heads, group, width = problem, config.packing.heads, config.group, config.packing.width
    with_lse = p.has_lse or p.has_sinks
    outs, lses = [], []
    for i, tile in enumerate(tiles):
        n, result = tile.n, results[i]
        if result is None:  # no key is seen
            outs.append(torch.zeros(heads, group, n, width))
            if with_lse:
                lses.append(torch.full((heads, group, n), NO_KEY))
            continue
        out, lse = result
        is_matrix = n > 1 or not config.as_vectors
        outs.append(out.view(heads, n, group, width).transpose(1, 2) if is_matrix else out)
        if with_lse:
            lses.append(lse.view(heads, n, group).transpose(1, 2) if is_matrix else lse)
    out = outs[0] if len(outs) == 1 else torch.cat(outs, 2)  # [num_kv_heads, group_size, count, width]
    if with_lse:
        lse = lses[0] if len(lses) == 1 else torch.cat(lses, 2)
    if call.s_aux is not None:
        with_sink = torch.logaddexp(lse, call.s_aux.float().view(heads, group, 1))
        out = out * torch.exp(lse - with_sink)[..., None]
        lse = with_sink.masked_fill_(lse == NO_KEY, NO_KEY)
    if call.v_descale is not None:
        out = out * _factor(call.v_descale, tiles)
    if p.d_v < width:
        out = out[..., config.packing.v_at : config.packing.v_at + p.d_v]
    at = call.out.storage_offset() + begin * config.out_strides[2]
    call.out.as_strided(out.shape, config.out_strides, at).copy_(out)
    if call.lse is not None:
        by_head, by_token = call.lse.stride()
        strides, at = (group * by_head, by_head, by_token), call.lse.storage_offset() + begin * by_token
        call.lse.as_strided(lse.shape, strides, at).copy_(lse)
