"""FlashAttention-3's ``flash_attn_with_kvcache`` and ``get_scheduler_metadata`` (``flash_attn_interface``).

    from anystride.adapters.flash_attn import flash_attn_with_kvcache, get_scheduler_metadata

The original runs on sm_90, and wants a last stride of 1 and certain combinations of dimensions. Here any
strides and dimensions go. Rotary embedding, left padding and chunks are not here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import anystride
from anystride import flash_attn_varlen_func
from anystride.adapters.translation import Refusal, invalid, query_starts, refuse
from anystride.cache import store_kv

__all__ = ["flash_attn_with_kvcache", "get_scheduler_metadata"]

OPERATION = "flash_attn_with_kvcache"

_ROTATE = "asks for a rotary embedding, and rows are stored and read here as they are"
_ROTATE_FIRST = "rotate q and k before the call"
_LEFTPAD = Refusal(
    None, "asks to skip the first tokens of a sequence, and a sequence begins here at its first block",
    "begin page_table at the first token that counts, and count cache_seqlens from there",
)  # fmt: skip
_RAGGED = Refusal(
    None, "asks to append as many tokens to each sequence as it says, and all get the same number here",
    "anystride.cache.store_kv(k, v, k_cache, v_cache, slot_mapping), then leave k and v out",
)  # fmt: skip
_CHUNK = Refusal(
    0, "asks for attention within chunks, and windows here slide with the query",
    "window_size=(left, right)",
)  # fmt: skip
REFUSED = {
    "rotary_cos": Refusal(None, _ROTATE, _ROTATE_FIRST),
    "rotary_sin": Refusal(None, _ROTATE, _ROTATE_FIRST),
    "rotary_seqlens": Refusal(None, _ROTATE, _ROTATE_FIRST),
    "cache_leftpad": _LEFTPAD,
    "cu_seqlens_k_new": _RAGGED,
    "attention_chunk": _CHUNK,
}
QUANTISED = {
    "k": Refusal(
        None,
        "has another dtype than the cache, and this call has no scale to quantise it with",
        "anystride.cache.store_kv(k, v, k_cache, v_cache, slots, k_scale, v_scale), then leave k and v out",
    )
}
METADATA_REFUSED = {
    "cu_seqlens_k_new": _RAGGED,
    "cache_leftpad": _LEFTPAD,
    "attention_chunk": _CHUNK,
}


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over a cache, after new rows were appended to it if there are any.

    Args:
        q: ``[batch, seqlen_q, num_q_heads, d_qk]``, or with ``cu_seqlens_q`` ``[total_q, num_q_heads,
            d_qk]``. Any strides; copied if ``seqlen_q`` is above 1 and its tokens do not lie at one distance.
        k_cache: With ``page_table`` ``[num_blocks, page_block_size, num_kv_heads, d_qk]`` (or 5-D, pages of
            several blocks), without it ``[batch_cache, seqlen_cache, num_kv_heads, d_qk]``. Any strides,
            never copied.
        v_cache: The same with ``d_v``, strides of its own.
        k: ``[batch, seqlen_new, num_kv_heads, d_qk]``: written into ``k_cache`` behind ``cache_seqlens``
            before anything is read; the cache must have room. Not into an fp8 cache, see below.
        v: The same with ``d_v``; given if ``k`` is.
        qv: ``[batch, seqlen_q, num_q_heads, d_v]``, or ``[total_q, num_q_heads, d_v]``: adds ``qv . v`` to
            the scores.
        rotary_cos, rotary_sin, rotary_seqlens: Refused unless None: rotate before the call.
        cache_seqlens: ``[batch]`` int32, or one int: tokens in the cache, before ``k`` is appended. None: the
            cache is full.
        cache_batch_idx: ``[batch]`` int32: which rows of a cache without ``page_table`` to use.
        cache_leftpad: Refused unless None.
        page_table: ``[batch, max_num_blocks_per_seq]`` int32, any strides.
        cu_seqlens_q: ``[batch + 1]`` int32: where each sequence's query tokens begin; needs ``max_seqlen_q``.
        cu_seqlens_k_new: Refused unless None.
        max_seqlen_q: Upper bound on the query tokens of a sequence.
        q_descale, k_descale, v_descale: As in :func:`anystride.flash_attn_varlen_func`.
        softmax_scale: Default ``(d_qk + d_v if qv) ** -0.5``.
        causal: Mask keys after the query's own position, aligned to the bottom right.
        window_size: ``(left, right)``, inclusive, -1 for unbounded.
        attention_chunk: Refused unless 0.
        softcap: ``softcap * tanh(s / softcap)`` on the scaled scores; 0 for none.
        rotary_interleaved: Without effect: there is no rotary embedding.
        scheduler_metadata: From :func:`get_scheduler_metadata` of this module.
        num_splits: 0: chosen here; 1: a sequence in one piece; n: in n pieces.
        pack_gqa, sm_margin: Ignored: how the original's kernel is tuned.
        return_softmax_lse: Also return ``lse``.

    Returns:
        ``out`` in the shape of ``q`` with ``d_v``. With ``return_softmax_lse`` also ``lse`` float32, natural
        logarithm, ``[batch, num_q_heads, seqlen_q]``, or ``[num_q_heads, total_q]`` with ``cu_seqlens_q``. A
        row that sees no key has out 0 and lse -inf. (FlashAttention-2 gives +inf.)

    Raises:
        UnsupportedError: For what has no counterpart here, and for ``k`` with an fp8 cache: rows are
            quantised when they are stored, by a scale that this call has no argument for.
        InvalidInputError: As :func:`anystride.flash_attn_varlen_func`.
    """
    refuse(
        OPERATION,
        REFUSED,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        rotary_seqlens=rotary_seqlens,
        cache_leftpad=cache_leftpad,
        cu_seqlens_k_new=cu_seqlens_k_new,
        attention_chunk=attention_chunk,
    )
    ragged = cu_seqlens_q is not None
    if q.dim() != (3 if ragged else 4) or (ragged and max_seqlen_q is None):
        raise invalid(
            OPERATION,
            "q must be a batch, or rows with cu_seqlens_q and max_seqlen_q.",
            f"q {list(q.shape)}, {'a' if ragged else 'no'} cu_seqlens_q, max_seqlen_q = {max_seqlen_q}",
            "[batch, seqlen_q, num_q_heads, d_qk], or [total_q, num_q_heads, d_qk] and both",
        )
    if cu_seqlens_q is None:
        batch, query_len = q.shape[:2]
        rows, rows_v = q.flatten(0, 1), None if qv is None else qv.flatten(0, 1)
        starts = query_starts(batch, query_len, q.device)
    else:
        batch, query_len = cu_seqlens_q.shape[0] - 1, max_seqlen_q or 0
        rows, rows_v, starts = q, qv, cu_seqlens_q
    table = page_table
    if table is None:  # each sequence of the cache is one block
        table = _own_blocks(k_cache, batch, cache_batch_idx, q.device)
    longest = table.shape[1] * k_cache.shape[-3]
    if not isinstance(cache_seqlens, Tensor):
        cache_seqlens = torch.full(
            (batch,), longest if cache_seqlens is None else cache_seqlens, dtype=torch.int32, device=q.device
        )
    if k is not None or v is not None:
        cache_seqlens = _append(k, v, k_cache, v_cache, table, cache_seqlens)
    result = flash_attn_varlen_func(
        rows,
        k_cache,
        v_cache,
        query_len,
        starts,
        longest,
        seqused_k=cache_seqlens,
        q_v=rows_v,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        block_table=table,
        return_softmax_lse=return_softmax_lse,
        scheduler_metadata=scheduler_metadata,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        num_splits=num_splits,
    )
    if cu_seqlens_q is not None:
        return result
    if not isinstance(result, tuple):
        whole: Tensor = result.unflatten(0, (batch, query_len))
        return whole
    out, lse = result
    return out.unflatten(0, (batch, query_len)), lse.unflatten(1, (batch, query_len)).transpose(0, 1)


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: Tensor,
    qkv_dtype: torch.dtype = torch.bfloat16,
    headdim_v: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    attention_chunk: int = 0,
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> Tensor:
    """Share out the work of a step, once for all of its layers.

    Args:
        batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, qkv_dtype, headdim_v: As
            in :func:`anystride.get_scheduler_metadata`.
        cache_seqlens: ``[batch]`` int32: tokens in the cache before new ones are appended.
        cu_seqlens_q: ``[batch + 1]`` int32; None where every sequence has ``max_seqlen_q`` query tokens.
        cu_seqlens_k_new, cache_leftpad: Refused unless None.
        page_size, has_softcap, pack_gqa, num_splits: Accepted; they change nothing in a schedule.
        max_seqlen_k_new: Tokens that the calls append to each sequence.
        causal, window_size: As in the calls.
        attention_chunk: Refused unless 0.
        sm_margin: Processors to leave free.

    Returns:
        int32, for ``scheduler_metadata`` of the calls.

    Raises:
        UnsupportedError: For what has no counterpart here.
        InvalidInputError: As :func:`anystride.get_scheduler_metadata`.
    """
    refuse(
        "get_scheduler_metadata",
        METADATA_REFUSED,
        cu_seqlens_k_new=cu_seqlens_k_new,
        cache_leftpad=cache_leftpad,
        attention_chunk=attention_chunk,
    )
    lengths = cache_seqlens + max_seqlen_k_new if max_seqlen_k_new else cache_seqlens
    return anystride.get_scheduler_metadata(
        batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, lengths, qkv_dtype,
        headdim_v, cu_seqlens_q, causal=causal, window_size=window_size, sm_margin=sm_margin,
    )  # fmt: skip


def _own_blocks(k_cache: Tensor, batch: int, cache_batch_idx: Tensor | None, device: torch.device) -> Tensor:
    """The block table of a cache that keeps each sequence in one piece: ``[batch, 1]``."""
    if cache_batch_idx is not None:
        return cache_batch_idx[:, None]
    if k_cache.shape[0] < batch:
        raise invalid(
            OPERATION,
            "a cache without page_table must have a row for each sequence.",
            f"k_cache {list(k_cache.shape)}, batch = {batch}",
            do="page_table=..., or cache_batch_idx=...",
        )
    return torch.arange(batch, dtype=torch.int32, device=device)[:, None]


def _append(
    k: Tensor | None, v: Tensor | None, k_cache: Tensor, v_cache: Tensor, table: Tensor, lengths: Tensor
) -> Tensor:
    """Store new rows behind those of the cache; returns the new lengths."""
    if k is None or v is None or k.dim() != 4 or v.dim() != 4:
        raise invalid(
            OPERATION,
            "k and v are appended together.",
            f"k {None if k is None else list(k.shape)}, v {None if v is None else list(v.shape)}",
            "[batch, seqlen_new, num_kv_heads, d] of both",
        )
    if k_cache.dtype != k.dtype or v_cache.dtype != v.dtype:
        refuse(OPERATION, QUANTISED, k=k)
    block_size = k_cache.shape[-3]
    position = lengths.long()[:, None] + torch.arange(k.shape[1], device=k.device)  # [batch, seqlen_new]
    block = table.gather(1, position // block_size).long()
    slots = block * block_size + position % block_size
    store_kv(k.flatten(0, 1), v.flatten(0, 1), k_cache, v_cache, slots.flatten())
    return lengths + k.shape[1]
