"""What engines do without a kernel for paged caches: gather each sequence, then PyTorch's own attention.

Each sequence's blocks are copied into a contiguous tensor for ``scaled_dot_product_attention``; what that
cannot express (softcap) is two matrix products. It gives no lse. A copy by design: the yardstick on CPUs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from anystride.peers.calls import refuse_but
from anystride.peers.peer import Call, Peer

__all__ = ["GATHERED_SDPA"]


def _gather(cache: Tensor, arguments: dict[str, Any], seq: int, length: int, dtype: torch.dtype) -> Tensor:
    """The rows of a sequence in a new contiguous tensor: ``[length, num_kv_heads, d]`` in the dtype of q."""
    table = arguments.get("block_table")
    if table is None:
        first = int(arguments["cu_seqlens_k"][seq])
        rows = cache[first : first + length]
    elif length == 0:
        rows = cache.flatten(0, -3)[:0]
    else:
        size = cache.shape[-3]
        ids = table[seq, : -(-length // size)]
        if cache.dim() == 5:
            blocks = cache[ids // cache.shape[1], ids % cache.shape[1]]
        elif cache.itemsize == 1:
            blocks = cache.view(torch.uint8).index_select(0, ids).view(cache.dtype)
        else:
            blocks = cache.index_select(0, ids)
        rows = blocks.flatten(0, 1)[:length]
    return rows.to(dtype).contiguous()


def _positions(arguments: dict[str, Any], seq: int, length: int) -> tuple[Tensor, int]:
    """Where the keys stand in the whole sequence, and how long that is."""
    world = arguments.get("cp_world_size", 1)
    if world == 1:
        return torch.arange(length), length
    total, run = int(arguments["cp_tot_seqused_k"][seq]), arguments["cp_interleave"]
    position = torch.arange(total)
    return position[position // run % world == arguments["cp_rank"]], total


def _bias_of(arguments: dict[str, Any], seq: int, n: int, length: int, dtype: torch.dtype) -> Tensor | None:
    """What is added to the scores, ``[n, length]`` or ``[num_q_heads, n, length]``; None if nothing."""
    left, right = arguments.get("window_size", (-1, -1))
    right = 0 if arguments["causal"] else right
    slopes, sinks = arguments.get("alibi_slopes"), arguments.get("s_aux")
    masked = left >= 0 or (right >= 0 and not (n == 1 and right == 0))
    if not masked and slopes is None and sinks is None:
        return None
    position, total = _positions(arguments, seq, length)
    distance = position - torch.arange(total - n, total)[:, None]
    bias = torch.zeros(n, length, dtype=dtype)
    if right >= 0:
        bias.masked_fill_(distance > right, float("-inf"))
    if left >= 0:
        bias.masked_fill_(distance < -left, float("-inf"))
    if slopes is not None:
        slopes = slopes[seq] if slopes.dim() == 2 else slopes
        bias = bias - (slopes[:, None, None] * distance.abs()).to(dtype)
    return bias


def _factor(arguments: dict[str, Any], name: str, seq: int) -> Any:
    """A descale as a float, or ``[num_kv_heads]``."""
    descale = arguments.get(name, 1.0)
    return descale[seq] if isinstance(descale, Tensor) and descale.dim() == 2 else descale


def _per_head(factor: Any, num_q_heads: int) -> Any:
    """A factor of each query head, to multiply ``[tokens, num_q_heads, d]``."""
    if isinstance(factor, Tensor) and factor.dim() == 1:
        return factor.repeat_interleave(num_q_heads // len(factor))[:, None]
    return factor


def _with_descales(q: Tensor, factor: Any) -> Tensor:
    """The query times its factor, in its own dtype."""
    return (
        q if isinstance(factor, float) and factor == 1.0 else (q * _per_head(factor, q.shape[1])).to(q.dtype)
    )


def _attend_one(arguments: dict[str, Any], seq: int, begin: int, end: int, length: int) -> Tensor:
    """``[n, num_q_heads, d_v]`` of one sequence."""
    q, dtype = arguments["q"][begin:end], arguments["q"].dtype
    n, num_q_heads = q.shape[:2]
    k = _gather(arguments["k"], arguments, seq, length, dtype)
    k_view, v_view = arguments["k"], arguments["v"]
    inside = k_view.data_ptr() == v_view.data_ptr() and k_view.stride() == v_view.stride()
    d_v = v_view.shape[-1]
    v = k[..., :d_v] if inside and "q_v" not in arguments else _gather(v_view, arguments, seq, length, dtype)
    q_by, k_by, v_by = (_factor(arguments, f"{name}_descale", seq) for name in "qkv")
    q = _with_descales(q, q_by * k_by)
    if "q_v" in arguments:
        q_v = _with_descales(arguments["q_v"][begin:end], q_by * v_by)
        q, k = torch.cat([q, q_v], -1), torch.cat([k, v], -1)
    bias = _bias_of(arguments, seq, n, length, dtype)
    causal = n == length and n > 1 and arguments["causal"] and "alibi_slopes" not in arguments
    causal = causal and "window_size" not in arguments and "s_aux" not in arguments
    causal = causal and arguments.get("cp_world_size", 1) == 1
    if arguments["softcap"] > 0:
        out = _capped(arguments, q, k, v, bias)
    else:
        sinks = arguments.get("s_aux")
        if sinks is not None:  # one more key, of score 0 and value 0, biased by the sink
            assert bias is not None
            k, v = pad(k, (0, 0, 0, 0, 0, 1)), pad(v, (0, 0, 0, 0, 0, 1))
            column = sinks[:, None, None].expand(-1, n, 1)
            bias = torch.cat([bias.expand(num_q_heads, n, length), column.to(dtype)], -1)
        out = scaled_dot_product_attention(
            q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None],
            attn_mask=None if causal or bias is None else bias.expand(1, 1, -1, -1) if bias.dim() == 2
            else bias[None],
            is_causal=causal, scale=arguments["softmax_scale"], enable_gqa=k.shape[1] != num_q_heads,
        )[0].transpose(0, 1)  # fmt: skip
    return _with_descales(out, v_by)


def _capped(arguments: dict[str, Any], q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Attention with a softcap: PyTorch has no function for it."""
    n, num_q_heads, d = q.shape
    heads = k.shape[1]
    rows = q.unflatten(1, (heads, -1)).permute(1, 2, 0, 3).reshape(heads, -1, d)
    scores = rows @ k.permute(1, 2, 0) * arguments["softmax_scale"]
    cap = arguments["softcap"]
    scores = (torch.tanh(scores / cap) * cap).unflatten(1, (-1, n)).flatten(0, 1)
    if bias is not None:
        scores = scores + bias
    sinks = arguments.get("s_aux")
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype)[:, None, None].expand(-1, n, 1)], -1)
    weights = torch.softmax(scores, -1)[..., : k.shape[0]]
    out = weights.unflatten(0, (heads, -1)).flatten(1, 2) @ v.transpose(0, 1)
    result: Tensor = out.view(num_q_heads, n, -1).transpose(0, 1)
    return result


def _attend(arguments: dict[str, Any]) -> Tensor:
    """Attention of all sequences, each gathered and computed on its own."""
    q, v = arguments["q"], arguments["v"]
    out: Tensor = q.new_empty(*q.shape[:2], v.shape[-1])
    starts = arguments["cu_seqlens_q"].tolist()
    used = arguments.get("seqused_k")
    lengths = (arguments["cu_seqlens_k"].diff() if used is None else used).tolist()
    for seq, length in enumerate(lengths):
        begin, end = starts[seq], starts[seq + 1]
        if begin == end:
            continue
        if length == 0:
            out[begin:end] = 0
        else:
            out[begin:end] = _attend_one(arguments, seq, begin, end, length)
    return out


def _load(_folder: Path | None) -> str:
    return torch.__version__


def _prepare(kwargs: dict[str, Any]) -> Call:
    refuse_but(
        kwargs, "q_v", "alibi_slopes", "s_aux", "q_descale", "k_descale", "v_descale", "window_size",
        "softcap", "cp_world_size", "batch_invariant", "block_table", "num_splits",
    )  # fmt: skip
    return lambda: (_attend(kwargs), None)


GATHERED_SDPA = Peer(
    "gathered-sdpa",
    "gather and SDPA",
    "each sequence copied, then scaled_dot_product_attention",
    _load,
    _prepare,
)
