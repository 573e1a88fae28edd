"""The contract's formula written a second time, one query token after the other.

``anystride.reference`` gathers a sequence and works on all of its scores at once. ``second_formula``
shares no code with it: it walks the tables in Python, and takes positions from counting instead of
from arithmetic. In float64 it checks the law; in the storage dtype it is the plain PyTorch of the tolerance.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from anystride.testing.law import dequantised

__all__ = ["second_formula"]


def second_formula(arguments: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Attention with every product, weight and sum rounded to ``dtype``.

    Returns:
        ``out`` ``[total_q, num_q_heads, d_v]`` in ``dtype``, ``lse`` ``[num_q_heads, total_q]`` in float32
        or, if ``dtype`` is that, float64. Rows of no sequence are NaN.
    """
    a = arguments
    wide = torch.promote_types(dtype, torch.float32)
    q, num_q_heads = a["q"], a["q"].shape[1]
    d_qk, d_v, num_kv_heads = q.shape[2], a["v"].shape[-1], a["k"].shape[-2]
    has_q_v = a.get("q_v") is not None
    scale = a.get("softmax_scale")
    if scale is None:
        scale = 1 / (d_qk + d_v * has_q_v) ** 0.5
    out = torch.full((q.shape[0], num_q_heads, d_v), float("nan"), dtype=dtype)
    lse = torch.full((num_q_heads, q.shape[0]), float("nan"), dtype=wide)
    head_of = torch.arange(num_q_heads) // (num_q_heads // num_kv_heads)  # the KV head of a query head
    starts = a["cu_seqlens_q"].tolist()
    for seq, (begin, end) in enumerate(pairwise(starts)):
        k, v = (_rows_of(a, name, seq, dtype) for name in "kv")
        k, v = k[:, head_of], v[:, head_of]  # [length, num_q_heads, d]
        positions, total = _positions_of(a, seq, k.shape[0])
        q_by, k_by, v_by = (_factor_of(a, name, seq)[head_of].to(dtype) for name in "qkv")
        for row in range(begin, end):
            scores = (q[row].to(dtype) * k).sum(-1) * (q_by * k_by)  # [length, num_q_heads]
            if has_q_v:
                scores = scores + (a["q_v"][row].to(dtype) * v).sum(-1) * (q_by * v_by)
            scores = scores * scale
            if a.get("softcap"):
                scores = torch.tanh(scores / a["softcap"]) * a["softcap"]
            own = total - (end - row)  # the query's own position: the last query is the last token
            if a.get("alibi_slopes") is not None:
                slopes = a["alibi_slopes"].to(dtype)
                distance = torch.tensor([abs(own - p) for p in positions], dtype=dtype)
                scores = scores - distance[:, None] * (slopes[seq] if slopes.dim() == 2 else slopes)
            seen = [i for i, p in enumerate(positions) if _is_visible(a, own, p)]
            if not seen:
                out[row], lse[:, row] = 0, float("-inf")
                continue
            logits = scores[seen].to(wide)
            if a.get("s_aux") is not None:
                logits = torch.cat([logits, a["s_aux"].to(dtype).to(wide)[None]])
            top = logits.amax(0)
            total_weight = (logits - top).exp().sum(0)
            weights = ((logits[: len(seen)] - top).exp() / total_weight).to(dtype)
            out[row] = (weights[..., None] * v[seen]).sum(0) * v_by[:, None]
            lse[:, row] = top + total_weight.log()
    return out, lse


def _is_visible(a: dict[str, Any], own: int, position: int) -> bool:
    left, right = a.get("window_size") or (-1, -1)
    if a.get("causal"):
        right = 0
    return (left < 0 or position >= own - left) and (right < 0 or position <= own + right)


def _rows_of(a: dict[str, Any], name: str, seq: int, dtype: torch.dtype) -> Tensor:
    """K or V of a sequence, ``[length, num_kv_heads, d]``, found token by token."""
    cache, scales, table = a[name], a.get(f"{name}_scale_cache"), a.get("block_table")
    if table is None:
        first = int(a["cu_seqlens_k"][seq])
        last = int(a["cu_seqlens_k"][seq + 1])
        if a.get("seqused_k") is not None:
            last = first + int(a["seqused_k"][seq])
        places: list[Any] = list(range(first, last))
    else:
        places, size = [], cache.shape[-3]
        for token in range(int(a["seqused_k"][seq])):
            block, inside = int(table[seq, token // size]), token % size
            page = (block,) if cache.dim() == 4 else (block // cache.shape[1], block % cache.shape[1])
            places.append((*page, inside))
    rows = [dequantised(cache[where], None if scales is None else scales[where], dtype) for where in places]
    return torch.stack(rows) if rows else cache.new_empty(0, *cache.shape[-2:], dtype=dtype)


def _positions_of(a: dict[str, Any], seq: int, length: int) -> tuple[list[int], int]:
    """The place of each key in its whole sequence, and how long that is."""
    world = a.get("cp_world_size", 1)
    if world == 1:
        return list(range(length)), length
    total, run = int(a["cp_tot_seqused_k"][seq]), a.get("cp_interleave", 1)
    mine = [p for p in range(total) if (p // run) % world == a["cp_rank"]]
    assert len(mine) == length, "the test's lengths do not fit its ranks"
    return mine, total


def _factor_of(a: dict[str, Any], name: str, seq: int) -> Tensor:
    """``[num_kv_heads]`` float32."""
    heads, factor = a["k"].shape[-2], a.get(f"{name}_descale")
    if factor is None:
        return torch.ones(heads)
    factor = torch.as_tensor(factor, dtype=torch.float32)
    return factor.reshape(-1).expand(heads) if factor.numel() == 1 else factor[seq]
