"""Combine partial results of one row: the one formula that serves splits and ranks alike."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["merge"]


def merge(outs: Tensor, lses: Tensor, s_aux: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Merge partial attention results over disjoint sets of keys.

    With weights ``w_r = exp(lse_r - lse)``, ``lse = log(sum_r exp(lse_r) + exp(sink))``::

        out = sum_r w_r * out_r

    Args:
        outs: ``[parts, total_q, num_q_heads, d_v]``, any float dtype, any strides: each part's normalised
            output.
        lses: ``[parts, num_q_heads, total_q]``, natural logarithm; ``-inf`` where a part saw no key. The
            part's output is then ignored, whatever it holds.
        s_aux: ``[num_q_heads]``: sinks, one more logit of the merged row. Only for parts that were
            computed without sinks (context parallelism).

    Returns:
        ``out`` ``[total_q, num_q_heads, d_v]`` in the dtype of ``outs``, and ``lse``
        ``[num_q_heads, total_q]`` in that of ``lses``. Rows that no part saw a key of have out 0 and lse
        -inf.

    Source: Flash-Decoding (split-KV), https://pytorch.org/blog/flash-decoding/.
    """
    wide = torch.promote_types(lses.dtype, torch.float32)
    parts = lses.to(wide)
    top = parts.amax(0)
    empty = top == float("-inf")
    if s_aux is not None:  # a sink far above the parts must not overflow
        top = torch.maximum(top, s_aux.to(wide)[:, None])
    top = top.masked_fill(empty, 0.0)
    total = torch.exp(parts - top).sum(0)  # [num_q_heads, total_q]
    if s_aux is not None:
        total = total + torch.exp(s_aux.to(wide)[:, None] - top)
    lse = torch.where(empty, float("-inf"), top + torch.log(total))
    weights = torch.exp(parts - torch.where(empty, 0.0, lse))  # [parts, num_q_heads, total_q]
    weights = weights.transpose(1, 2)[..., None]
    seen = outs.to(wide).masked_fill(weights == 0, 0.0)
    out = (seen * weights).sum(0)
    return out.to(outs.dtype), lse.to(lses.dtype)
