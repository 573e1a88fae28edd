"""CUTLASS MLA decode, as vLLM (``vllm._custom_ops``) and SGLang (``sgl_kernel``) call it.

    from anystride.adapters.cutlass_mla import sm100_cutlass_mla_decode       # vLLM
    from anystride.adapters.cutlass_mla import cutlass_mla_decode             # SGLang

The original runs on sm_100, takes up to 128 heads, rows of 512 + 64 in packed pages that divide 128 tokens,
and a workspace. Here any dimensions, page size and strides go, and no workspace is needed.
"""

from __future__ import annotations

from torch import Tensor

from anystride import flash_attn_varlen_func
from anystride.adapters.translation import invalid, query_starts

__all__ = [
    "cutlass_mla_decode",
    "cutlass_mla_get_workspace_size",
    "sm100_cutlass_mla_decode",
    "sm100_cutlass_mla_get_workspace_size",
]


def sm100_cutlass_mla_get_workspace_size(
    max_seq_len: int, num_batches: int, sm_count: int, num_kv_splits: int
) -> int:
    """Bytes of workspace that a call needs: none.

    Args:
        max_seq_len, num_batches, sm_count, num_kv_splits: Of the original; ignored.

    Returns:
        0.
    """
    return 0


def cutlass_mla_get_workspace_size(
    max_seq_len: int, num_batches: int, sm_count: int = 0, num_kv_splits: int = 1
) -> int:
    """Bytes of workspace that a call needs: none.

    Args:
        max_seq_len, num_batches, sm_count, num_kv_splits: Of the original; ignored.

    Returns:
        0.
    """
    return 0


def sm100_cutlass_mla_decode(
    out: Tensor,
    lse: Tensor,
    q_nope: Tensor,
    q_pe: Tensor,
    kv_c_and_k_pe_cache: Tensor,
    seq_lens: Tensor,
    page_table: Tensor,
    workspace: Tensor,
    scale: float,
    num_kv_splits: int,
) -> Tensor:
    """Decode one token of each sequence over a paged cache of MLA rows, latent part first; vLLM's shape.

    Args:
        out: ``[batch, heads, kv_lora_rank]``, any strides: written. It may have more heads than the queries,
            as in vLLM, which pads to 128: those behind are left as they are. Another dtype than that of
            ``q_nope`` is converted to.
        lse: ``[batch, heads]``, any float dtype: written, natural logarithm, -inf for an empty sequence. With
            no elements (``torch.Tensor()``) it is not wanted.
        q_nope: ``[batch, num_q_heads, kv_lora_rank]``, the absorbed query, any strides.
        q_pe: ``[batch, num_q_heads, qk_rope_head_dim]``, any strides.
        kv_c_and_k_pe_cache: ``[num_blocks, page_size, kv_lora_rank + qk_rope_head_dim]``, or with pages of
            several blocks ``[num_pages, blocks_per_page, page_size, ...]``; any strides, never copied.
        seq_lens: ``[batch]`` int32: tokens in the cache, the new one included.
        page_table: ``[batch, max_pages]`` int32, any strides; any number of columns.
        workspace: Ignored.
        scale: Of the scores, by the dimension before absorption.
        num_kv_splits: Ignored: how work is shared out is chosen here, and changes no result but by rounding.

    Returns:
        ``out``. The original does not say what a row of an empty sequence holds; here it is 0.

    Raises:
        InvalidInputError, UnsupportedError: As :func:`anystride.flash_attn_varlen_func`.
    """
    num_heads = q_nope.shape[1]
    wants_lse = lse.numel() > 0
    short_out = out.dim() != 3 or out.shape[1] < num_heads
    short_lse = wants_lse and (lse.dim() != 2 or lse.shape[1] < num_heads)
    if short_out or short_lse:
        raise invalid(
            "sm100_cutlass_mla_decode",
            "out and lse must have a place for every query head.",
            f"out {list(out.shape)}, lse {list(lse.shape)}",
            f"[{q_nope.shape[0]}, {num_heads} or more, {q_nope.shape[2]}] and [{q_nope.shape[0]}, the same], "
            "or an lse without elements",
        )
    place = out[:, :num_heads]
    written = place if out.dtype == q_nope.dtype else None
    result, result_lse = _decode(
        q_nope, q_pe, kv_c_and_k_pe_cache, seq_lens, page_table, scale, written, wants_lse
    )
    if written is None:
        place.copy_(result)
    if wants_lse:
        assert result_lse is not None  # it was asked for
        lse[:, :num_heads].copy_(result_lse.t())
    return out


def cutlass_mla_decode(
    q_nope: Tensor,
    q_pe: Tensor,
    kv_c_and_k_pe_cache: Tensor,
    seq_lens: Tensor,
    page_table: Tensor,
    workspace: Tensor,
    sm_scale: float,
    num_kv_splits: int = 1,
) -> Tensor:
    """Decode one token of each sequence over a paged cache of MLA rows, latent part first; SGLang's shape.

    Args:
        q_nope, q_pe, kv_c_and_k_pe_cache, seq_lens, page_table, workspace, num_kv_splits: As in
            :func:`sm100_cutlass_mla_decode`.
        sm_scale: Of the scores, by the dimension before absorption.

    Returns:
        ``[batch, num_q_heads, kv_lora_rank]`` in the dtype of ``q_nope``; 0 for an empty sequence.

    Raises:
        InvalidInputError, UnsupportedError: As :func:`anystride.flash_attn_varlen_func`.
    """
    return _decode(q_nope, q_pe, kv_c_and_k_pe_cache, seq_lens, page_table, sm_scale, None, False)[0]


def _decode(
    q_nope: Tensor,
    q_pe: Tensor,
    cache: Tensor,
    seq_lens: Tensor,
    page_table: Tensor,
    scale: float,
    out: Tensor | None,
    wants_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """The call in the ``q_v`` form: the two parts of the query need not be put together."""
    rank = q_nope.shape[-1]
    rows = cache.unsqueeze(-2)  # one KV head
    result = flash_attn_varlen_func(
        q_pe,
        rows[..., rank:],
        rows[..., :rank],
        1,
        query_starts(q_pe.shape[0], 1, q_pe.device),
        page_table.shape[1] * cache.shape[-2],
        seqused_k=seq_lens,
        q_v=q_nope,
        softmax_scale=scale,
        block_table=page_table,
        return_softmax_lse=wants_lse,
        out=out,
    )
    return result if isinstance(result, tuple) else (result, None)
