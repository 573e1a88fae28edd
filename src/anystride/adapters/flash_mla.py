"""FlashMLA's dense decode, ``flash_mla.get_mla_metadata`` and ``flash_mla.flash_mla_with_kvcache``.

    from anystride.adapters.flash_mla import flash_mla_with_kvcache, get_mla_metadata

The original takes pages of 64 tokens and rows of 576 with values of 512, on sm_90. Here any block size,
dimensions and strides go, on every device that anystride runs on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anystride import flash_attn_varlen_func, get_scheduler_metadata
from anystride.adapters.translation import Refusal, invalid, query_starts, refuse, rows_in_place

__all__ = ["FlashMLASchedMeta", "flash_mla_with_kvcache", "get_mla_metadata"]

OPERATION = "flash_mla_with_kvcache"

_SPARSE = "asks for attention over chosen tokens, and every token of a sequence is attended to here"
_DENSE = "leave it out: dense attention over block_table and cache_seqlens"
REFUSED = {
    "num_splits": Refusal(
        None, "is a leftover of the old interface, and must be None in the original", _DENSE
    ),
    "indices": Refusal(None, _SPARSE, _DENSE),
    "attn_sink": Refusal(
        None,
        "is a sink that the returned lse leaves out, for sparse attention only; here lse counts sinks in",
        "anystride.flash_attn_varlen_func(..., s_aux=attn_sink)",
    ),
    "extra_k_cache": Refusal(None, _SPARSE, _DENSE),
    "extra_indices_in_kvcache": Refusal(None, _SPARSE, _DENSE),
    "topk_length": Refusal(None, _SPARSE, _DENSE),
    "extra_topk_length": Refusal(None, _SPARSE, _DENSE),
}
ROWS_OF_656_BYTES = {
    "is_fp8_kvcache": Refusal(
        False,
        "describes rows of fp8, scales and bfloat16, and k_cache is no tensor of fp8",
        "anystride.flash_attn_varlen_func(q_rope, rope, latent, ..., q_v=q_latent, v_scale_cache=scales), "
        "with typed views of the row",
    )
}


@dataclass
class FlashMLASchedMeta:
    """What the layers of a step share: made empty, filled in by the first call.

    As in the original, it serves calls of the same shapes and of the same *values* of ``cache_seqlens``, one
    after the other: make a new one each step.

    Attributes:
        facts: The shapes of the first call, to which later ones are held; None before it.
        starts: ``[batch + 1]`` int32: where each sequence's rows of ``q`` begin.
        schedule: From :func:`anystride.get_scheduler_metadata`.
    """

    facts: tuple[object, ...] | None = None
    starts: Tensor | None = None
    schedule: Tensor | None = None


def get_mla_metadata(*args: object, **kwargs: object) -> tuple[FlashMLASchedMeta, None]:
    """Make what the layers of a step share; all arguments are ignored, as in the original.

    Args:
        *args: Of the old interface: ``cache_seqlens, num_q_tokens_per_head_k, num_heads_k``.
        **kwargs: The same by name.

    Returns:
        An empty :class:`FlashMLASchedMeta`, and None, where the old interface had ``num_splits``.
    """
    return FlashMLASchedMeta(), None


def flash_mla_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: FlashMLASchedMeta,
    num_splits: None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: Tensor | None = None,
    attn_sink: Tensor | None = None,
    extra_k_cache: Tensor | None = None,
    extra_indices_in_kvcache: Tensor | None = None,
    topk_length: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Decode over a paged cache of MLA rows, of which the first ``head_dim_v`` elements are the values.

    Args:
        q: ``[batch, seq_len_q, num_heads_q, head_dim]``, float16, bfloat16 or float32, any strides; copied if
            ``seq_len_q`` is above 1 and its tokens do not lie at one distance.
        k_cache: ``[num_blocks, page_block_size, num_heads_k, head_dim]``, dtype of ``q`` or fp8, any strides,
            never copied; or ``[num_pages, blocks_per_page, page_block_size, num_heads_k, head_dim]``.
        block_table: ``[batch, max_num_blocks_per_seq]`` int32. Must be given: attention is dense.
        cache_seqlens: ``[batch]`` int32: tokens in the cache, new ones included. Must be given.
        head_dim_v: Elements of a row that are the value.
        tile_scheduler_metadata: From :func:`get_mla_metadata`, of this module.
        num_splits: Refused unless None.
        softmax_scale: Default ``head_dim ** -0.5``.
        causal: Mask keys after the query's own position, aligned to the bottom right.
        is_fp8_kvcache: True is refused unless ``k_cache`` has an fp8 dtype; its numbers are then taken as
            they are.
        indices, attn_sink, extra_k_cache, extra_indices_in_kvcache, topk_length, extra_topk_length: Of sparse
            attention: refused unless None.
        out: ``[batch, seq_len_q, num_heads_q, head_dim_v]`` in the dtype of ``q``: written and returned.

    Returns:
        ``out`` ``[batch, seq_len_q, num_heads_q, head_dim_v]``, and ``lse`` float32 ``[batch, num_heads_q,
        seq_len_q]``, natural logarithm. A row that sees no key has out 0 and lse **+inf**.

    Raises:
        UnsupportedError: For sparse attention, and what else has no counterpart here.
        InvalidInputError: For a ``tile_scheduler_metadata`` of other shapes, and all that
            :func:`anystride.flash_attn_varlen_func` raises it for.
    """
    refuse(
        OPERATION,
        REFUSED,
        num_splits=num_splits,
        indices=indices,
        attn_sink=attn_sink,
        extra_k_cache=extra_k_cache,
        extra_indices_in_kvcache=extra_indices_in_kvcache,
        topk_length=topk_length,
        extra_topk_length=extra_topk_length,
    )
    if is_fp8_kvcache and k_cache.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
        refuse(OPERATION, ROWS_OF_656_BYTES, is_fp8_kvcache=is_fp8_kvcache)
    if block_table is None or cache_seqlens is None:
        raise invalid(
            OPERATION,
            "dense attention needs block_table and cache_seqlens.",
            f"block_table is {type(block_table).__name__}, cache_seqlens is {type(cache_seqlens).__name__}",
        )
    if q.dim() != 4:
        raise invalid(
            OPERATION,
            "q must have 4 dimensions.",
            f"q {list(q.shape)}",
            "[batch, seq_len_q, num_heads_q, head_dim]",
            "q = q.unsqueeze(1)      (one query token a sequence)" if q.dim() == 3 else "",
        )
    batch, query_len, num_heads = q.shape[:3]
    longest = block_table.shape[1] * k_cache.shape[-3]
    shared = _share(tile_scheduler_metadata, q, k_cache, cache_seqlens, head_dim_v, longest, causal)
    place = None if out is None else rows_in_place(out)
    rows, lse = flash_attn_varlen_func(
        q.flatten(0, 1),
        k_cache,
        k_cache[..., :head_dim_v],
        query_len,
        shared.starts,  # type: ignore[arg-type]  # filled in by _share
        longest,
        seqused_k=cache_seqlens,
        softmax_scale=softmax_scale,
        causal=causal,
        block_table=block_table,
        return_softmax_lse=True,
        out=place,
        scheduler_metadata=shared.schedule,
    )
    if out is None:
        out = rows.unflatten(0, (batch, query_len))
    elif place is None:
        out.copy_(rows.unflatten(0, (batch, query_len)))
    lse.nan_to_num_(nan=float("nan"), posinf=float("inf"), neginf=float("inf"))
    return out, lse.view(num_heads, batch, query_len).transpose(0, 1)


def _share(
    shared: FlashMLASchedMeta,
    q: Tensor,
    k_cache: Tensor,
    cache_seqlens: Tensor,
    head_dim_v: int,
    longest: int,
    causal: bool,
) -> FlashMLASchedMeta:
    """Fill in what the first call makes, or hold a later call to it."""
    if not isinstance(shared, FlashMLASchedMeta):
        raise invalid(
            OPERATION,
            "tile_scheduler_metadata must come from this module's get_mla_metadata.",
            type(shared).__name__,
            do="from anystride.adapters.flash_mla import get_mla_metadata",
        )
    facts = (q.shape, q.dtype, k_cache.shape[-3:], head_dim_v, causal)
    if shared.facts is None:
        batch, query_len, num_heads, head_dim = q.shape
        shared.starts = query_starts(batch, query_len, q.device)
        shared.schedule = get_scheduler_metadata(
            batch, query_len, longest, num_heads, k_cache.shape[-2], head_dim, cache_seqlens, q.dtype,
            head_dim_v, shared.starts, causal=causal,
        )  # fmt: skip
        shared.facts = facts
    if shared.facts != facts:
        raise invalid(
            OPERATION,
            "tile_scheduler_metadata serves calls of the same shapes only.",
            f"q, dtype, pages, head_dim_v, causal = {_told(facts)}",
            f"{_told(shared.facts)}, those of the first call",
            "tile_scheduler_metadata, _ = get_mla_metadata()",
        )
    return shared


def _told(facts: tuple[object, ...]) -> str:
    return ", ".join(str(list(x) if isinstance(x, torch.Size) else x) for x in facts)
