"""The specification: attention over a paged cache in float64, one sequence at a time, nothing clever.

Every other back end is compared with this file. It reads each valid row through the views that the
caller gave, one block at a time, and follows the formulas of the contract line by line. It is meant to be
read; it is never chosen automatically.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anystride.problem import Call, Problem, canonical

__all__ = ["attention"]


def attention(problem: Problem, call: Call) -> tuple[Tensor, Tensor]:
    """Attention of each query token over the visible keys of its sequence.

    For query token ``i`` of ``n`` in a sequence of ``sk`` keys, with ``centre = sk - n + i``::

        s_j = softmax_scale * (q . k_j + q_v . v_j)          # descales multiply their product; of an fp8
                                                             # cache, k_j and v_j are values times scales
        s_j = softcap * tanh(s_j / softcap)                  # if softcap
        s_j = s_j - slope * |centre - j|                     # if alibi
        j is visible if  centre - window_left <= j <= centre + window_right
        lse = log(sum_j exp(s_j) + exp(sink))
        out = sum_j exp(s_j - lse) * v_j * v_descale

    Args:
        problem: The facts of the call.
        call: Its tensors, on any device; ``out`` and ``lse`` are not used.

    Returns:
        ``out`` ``[total_q, num_q_heads, d_v]`` and ``lse`` ``[num_q_heads, total_q]``, both float64 on the
        CPU; the natural logarithm. A row without a visible key has out 0 and lse -inf. Rows that
        belong to no sequence are NaN in both: they are not the function's to define.
    """
    call = canonical(problem, call)
    shape = (problem.total_q, problem.num_q_heads)
    out = torch.full((*shape, problem.d_v), float("nan"), dtype=torch.float64)
    lse = torch.full((shape[1], shape[0]), float("nan"), dtype=torch.float64)
    starts = call.cu_seqlens_q.tolist()
    for seq in range(problem.batch):
        begin, end = starts[seq], starts[seq + 1]
        if end == begin:
            continue
        length = _length(call, seq)
        k = _rows(problem, call, call.k, seq, length)  # [length, num_kv_heads, d_qk]
        v = _rows(problem, call, call.v, seq, length)  # [length, num_kv_heads, d_v]
        if call.k_scale_cache is not None:
            k = _scaled(k, _rows(problem, call, call.k_scale_cache, seq, length))
        if call.v_scale_cache is not None:
            v = _scaled(v, _rows(problem, call, call.v_scale_cache, seq, length))
        out[begin:end], lse[:, begin:end] = _one_sequence(problem, call, seq, begin, end, k, v)
    return out, lse


def _length(call: Call, seq: int) -> int:
    """Keys of the sequence in this cache (under context parallelism: on this rank)."""
    if call.seqused_k is not None:
        return int(call.seqused_k[seq])
    assert call.cu_seqlens_k is not None  # the checks demand one of the two
    return int(call.cu_seqlens_k[seq + 1]) - int(call.cu_seqlens_k[seq])


def _rows(problem: Problem, call: Call, cache: Tensor, seq: int, length: int) -> Tensor:
    """The valid rows of one sequence, ``[length, num_kv_heads, d]``, float64 on the CPU."""
    if call.block_table is None:
        assert call.cu_seqlens_k is not None
        begin = int(call.cu_seqlens_k[seq])
        return cache[begin : begin + length].cpu().double()
    pieces = [torch.empty((0, *cache.shape[3:]), dtype=torch.float64)]
    for first in range(0, length, problem.block_size):
        block = int(call.block_table[seq, first // problem.block_size])
        page, sub = divmod(block, problem.blocks_per_page)
        used = min(problem.block_size, length - first)
        pieces.append(cache[page, sub, :used].cpu().double())
    return torch.cat(pieces)


def _scaled(rows: Tensor, scales: Tensor) -> Tensor:
    """Rows ``[length, num_kv_heads, d]`` with a scale for each of ``groups`` equal runs of dimensions."""
    groups = scales.shape[-1]
    return rows * scales.repeat_interleave(rows.shape[-1] // groups, -1)


def _descale(descale: Tensor | float | None, seq: int, heads: int) -> Tensor:
    """``[num_kv_heads]`` float64."""
    if isinstance(descale, Tensor):
        return descale[seq].cpu().double()
    return torch.full((heads,), 1.0 if descale is None else descale, dtype=torch.float64)


def _one_sequence(
    problem: Problem, call: Call, seq: int, begin: int, end: int, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    n, length, heads, group = end - begin, k.shape[0], problem.num_kv_heads, problem.group_size
    q_scale = _descale(call.q_descale, seq, heads)
    k_scale = _descale(call.k_descale, seq, heads)
    v_scale = _descale(call.v_descale, seq, heads)

    def scores_with(query: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
        query = query[begin:end].cpu().double().reshape(n, heads, group, query.shape[-1])
        dots = torch.einsum("nhgd,jhd->hgnj", query, rows)
        return dots * (q_scale * scale)[:, None, None, None]

    scores = scores_with(call.q, k, k_scale)
    if call.q_v is not None:
        scores = scores + scores_with(call.q_v, v, v_scale)
    scores = scores * problem.softmax_scale  # [num_kv_heads, group_size, n, length]
    if problem.softcap > 0:
        scores = problem.softcap * torch.tanh(scores / problem.softcap)

    j = torch.arange(length)
    total = length
    if problem.cp_world_size > 1:
        assert call.cp_tot_seqused_k is not None
        total = int(call.cp_tot_seqused_k[seq])
        turn, inside = j // problem.cp_interleave, j % problem.cp_interleave
        j = (turn * problem.cp_world_size + problem.cp_rank) * problem.cp_interleave + inside
    centre = (total - n + torch.arange(n))[:, None]
    if call.alibi_slopes is not None:
        slopes = call.alibi_slopes[seq].cpu().double().reshape(heads, group, 1, 1)
        scores = scores - slopes * (centre - j).abs()
    visible = torch.ones(n, length, dtype=torch.bool)
    if problem.window_right >= 0:
        visible &= j <= centre + problem.window_right
    if problem.window_left >= 0:
        visible &= j >= centre - problem.window_left
    scores = scores.masked_fill(~visible, float("-inf"))

    empty = ~visible.any(-1)  # [n]
    logits = scores
    if call.s_aux is not None:
        sink = call.s_aux.cpu().double().reshape(heads, group, 1, 1).expand(heads, group, n, 1)
        logits = torch.cat([scores, sink], dim=-1)
    lse = torch.logsumexp(logits, -1) if logits.shape[-1] else scores.new_full((heads, group, n), 0.0)
    lse = lse.masked_fill(empty, float("-inf"))  # [num_kv_heads, group_size, n]
    weights = torch.exp(scores - lse.masked_fill(empty, 0.0)[..., None])
    v = v.masked_fill(~visible.any(0)[:, None, None], 0.0)  # 0 x NaN is NaN: hidden values may be anything
    out = torch.einsum("hgnj,jhd->nhgd", weights, v) * v_scale[None, :, None, None]
    return out.reshape(n, heads * group, -1), lse.reshape(heads * group, n)
