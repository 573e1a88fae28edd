"""vLLM's Triton decode kernel, ``vllm.v1.attention.ops.triton_decode_attention.decode_attention_fwd``.

    from anystride.adapters.vllm_triton import decode_attention_fwd

The original takes a last stride of 1 for granted and gives NaN for an empty sequence. Here any strides go,
and an empty sequence has out 0 and lse -inf.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anystride import flash_attn_varlen_func
from anystride.adapters.translation import invalid, query_starts

__all__ = ["decode_attention_fwd"]

OPERATION = "decode_attention_fwd"


def decode_attention_fwd(
    q: Tensor,
    k_buffer: Tensor,
    v_buffer: Tensor,
    o: Tensor,
    lse: Tensor,
    req_to_token: Tensor,
    b_seq_len: Tensor,
    attn_logits: Tensor,
    num_kv_splits: int,
    sm_scale: float,
    page_size: int = 1,
    logit_cap: float = 0.0,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    is_mla: bool = False,
) -> None:
    """Decode one token of each sequence over a paged cache.

    Args:
        q: ``[batch, num_q_heads, d_qk]``, any strides.
        k_buffer: ``[num_pages, page_size, num_kv_heads, d_qk]``, any strides; or ``[num_pages * page_size,
            num_kv_heads, d_qk]``. Dtype of ``q``, or fp8. Never copied.
        v_buffer: The same with ``d_v``, strides of its own; for MLA a view of the first part of the rows.
        o: ``[batch, num_q_heads, d_v]``, any strides, any float dtype: written.
        lse: ``[batch, num_q_heads]``, any strides, any float dtype: written, natural logarithm.
        req_to_token: ``[batch, max_pages]`` int32, any strides: the page of each ``page_size`` tokens.
        b_seq_len: ``[batch]`` int32: tokens in the cache, the new one included.
        attn_logits: Ignored: scratch of the original.
        num_kv_splits: 1 keeps each sequence in one piece, for the sake of batch invariance; with any other
            number the work is shared out as is best here.
        sm_scale: Of the scores.
        page_size: Tokens of a page, as in the shape of ``k_buffer`` if that has pages.
        logit_cap: ``logit_cap * tanh(s / logit_cap)`` on the scaled scores; 0 for none.
        k_scale: Factor of an fp8 ``k_buffer``, float32 tensor of one element; None: 1. Without effect on
            other dtypes, as in the original.
        v_scale: The same of ``v_buffer``; with ``is_mla`` the factor is ``k_scale``, as in the original.
        is_mla: Whether V lies in K's rows. Used for the scale alone: what lies where is seen from strides.

    Raises:
        InvalidInputError, UnsupportedError: As :func:`anystride.flash_attn_varlen_func`.
    """
    k, v = (_paged(name, b, page_size) for name, b in (("k_buffer", k_buffer), ("v_buffer", v_buffer)))
    if is_mla:
        v_scale = k_scale
    written = o if o.dtype == q.dtype else None
    result, result_lse = flash_attn_varlen_func(
        q,
        k,
        v,
        1,
        query_starts(q.shape[0], 1, q.device),
        req_to_token.shape[1] * page_size,
        seqused_k=b_seq_len,
        softmax_scale=sm_scale,
        softcap=logit_cap,
        block_table=req_to_token,
        return_softmax_lse=True,
        out=written,
        k_descale=k_scale if _is_fp8(k) else None,
        v_descale=v_scale if _is_fp8(v) else None,
        num_splits=1 if num_kv_splits == 1 else 0,
    )
    if written is None:
        o.copy_(result)
    lse.copy_(result_lse.t())


def _paged(name: str, buffer: Tensor, page_size: int) -> Tensor:
    """The buffer with a dimension of pages: a view."""
    if buffer.dim() == 3:
        if page_size < 1 or buffer.shape[0] % page_size:
            raise invalid(
                OPERATION,
                f"{name} must hold whole pages.",
                f"{name} {list(buffer.shape)}, page_size = {page_size}",
                do=f"{name} = {name}[: {name}.shape[0] // page_size * page_size]",
            )
        pages: Tensor = buffer.unflatten(0, (-1, page_size))
        return pages
    if buffer.shape[-3] != page_size:
        raise invalid(
            OPERATION,
            f"page_size must be that of {name}.",
            f"page_size = {page_size}, {name} {list(buffer.shape)}",
            do=f"page_size={name}.shape[-3]",
        )
    return buffer


def _is_fp8(cache: Tensor) -> bool:
    return cache.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
