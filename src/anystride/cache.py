"""The write side: store new tokens into a paged cache of any strides.

What an engine must do before it can attend, for every layout that :func:`anystride.flash_attn_varlen_func`
reads: one launch for both halves of a layer, quantisation to fp8 on the way, and not a byte beside the rows
that the slots name. And blocks moved between caches of different layouts, bit by bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anystride import ops, store_plan

__all__ = ["copy_blocks", "gather_blocks", "store_kv", "store_mla"]


def store_kv(
    key: Tensor,
    value: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
    *,
    backend: str | None = None,
) -> None:
    """Store keys and values of new tokens: ``k_cache[slot] = key / k_scale``, and the same for values.

    What vLLM's ``reshape_and_cache_flash`` does, for any strides. Slot ``s`` is token ``s % block_size`` of
    block ``s // block_size``.

    Args:
        key: ``[num_tokens, num_kv_heads, d_qk]``, float16, bfloat16 or float32, any strides. It may have more
            rows than there are slots: those behind are not read.
        value: ``[num_tokens, num_kv_heads, d_v]``, likewise.
        k_cache: ``[num_blocks, block_size, num_kv_heads, d_qk]`` or
            ``[num_pages, blocks_per_page, block_size, num_kv_heads, d_qk]``, as the attention reads it: any
            strides but 0; float16, bfloat16, float32, float8_e4m3fn or float8_e5m2. Written in place.
        v_cache: The same with ``d_v``; its strides and dtype are its own.
        slot_mapping: ``[num_tokens]`` int64 or int32, any stride. A negative slot is skipped. Slots must be
            in the cache, which is not checked on a GPU, and should not repeat: of two tokens in one slot
            either may stay, or, if their stores cross, parts of both.
        k_scale, v_scale: Of an fp8 cache; other caches store rows as they are, whatever the scale. What
            stored values are to be multiplied with when they are read (``k_descale``): a float, a float32
            tensor of one element, or of ``[num_kv_heads]``. Or float32 ``[num_blocks, block_size,
            num_kv_heads]`` (with pages ``[num_pages, blocks_per_page, block_size, num_kv_heads]``), any
            strides but 0, beside the cache or inside its rows: then each row's largest number becomes fp8's
            largest, and its scale is **written** there, for the attention to read it as ``k_scale_cache`` or
            ``v_scale_cache``; 1 for a row of zeros. None: 1.
        backend: None picks the first that can; ``triton`` or ``cpu`` is obeyed or refused.

    Raises:
        InvalidInputError: The call breaks the contract above, on whatever device.
        UnsupportedError: The back end asked for, or every one, cannot run it.

    Notes:
        Numbers are rounded to nearest, ties to even. In fp8, what lies beyond the largest number becomes that
        number; NaN stays NaN. Scales divide in float32. Never synchronises on a GPU; safe in a CUDA graph.
    """
    run = ops.store_kv if ops.is_traced(key) else store_plan.store_kv
    run(key, value, k_cache, v_cache, slot_mapping, k_scale, v_scale, backend)


def store_mla(
    kv_c: Tensor,
    k_pe: Tensor,
    kv_cache: Tensor | tuple[Tensor, Tensor],
    slot_mapping: Tensor,
    scale: float | Tensor | None = None,
    *,
    backend: str | None = None,
) -> None:
    """Store the latent and the rope part of new tokens: MLA's rows.

    What vLLM's ``concat_and_cache_mla`` does, for any strides.

    Args:
        kv_c: ``[num_tokens, kv_lora_rank]`` or ``[num_tokens, 1, kv_lora_rank]``, float16, bfloat16 or
            float32, any strides. It may have more rows than there are slots.
        k_pe: ``[num_tokens, qk_rope_head_dim]`` or ``[num_tokens, 1, qk_rope_head_dim]``, likewise.
        kv_cache: ``[num_blocks, block_size, kv_lora_rank + qk_rope_head_dim]``, the latent part first, or
            with one head, ``[num_blocks, block_size, 1, d]``, or with pages, ``[num_pages, blocks_per_page,
            block_size, 1, d]``. Or two such, ``(latent_cache, rope_cache)``: two buffers, or typed views of
            one, as where a row is fp8, scales and bfloat16 (656 bytes in DeepSeek-V3.2). Any strides but 0.
            Written in place.
        slot_mapping: As in :func:`store_kv`.
        scale: Of the parts that are fp8, as in :func:`store_kv`: a float or a tensor of one element. Or
            float32 ``[num_blocks, block_size, groups]`` (with pages one dimension more): scales of the latent
            part, cut into so many groups of dimensions, are **written** there, for the attention to read
            them as ``v_scale_cache`` of the ``q_v`` form; the rope part must not be fp8.
        backend: As in :func:`store_kv`.

    Raises:
        InvalidInputError, UnsupportedError: As in :func:`store_kv`.

    Notes:
        See :func:`store_kv`.
    """
    latent, rope = kv_cache if isinstance(kv_cache, tuple | list) else (kv_cache, None)
    run = ops.store_mla if ops.is_traced(kv_c) else store_plan.store_mla
    run(kv_c, k_pe, latent, rope, slot_mapping, scale, backend)


def copy_blocks(source: Tensor, target: Tensor, block_mapping: Tensor, *, backend: str | None = None) -> None:
    """Copy blocks, bit by bit: ``target[mapping[i, 1]] = source[mapping[i, 0]]``.

    For prefixes that are shared no longer, swapping, and converting one layout into another, in both
    directions: the two caches may have any strides, and pages of their own.

    Args:
        source: ``[num_blocks, block_size, num_kv_heads, d]`` or ``[num_pages, blocks_per_page, block_size,
            num_kv_heads, d]``, any strides: K of a layer, V, or MLA's rows. One call each.
        target: The same tokens, heads, dimensions and dtype, any strides but 0; it may be ``source`` itself.
            Written in place.
        block_mapping: ``[n, 2]`` int64 or int32, any strides, on the same device. A pair with a negative id
            is skipped. No block may be a target twice, nor a source and a target of one call: what is read is
            then undefined. Ids must be in the caches, which is not checked on a GPU.
        backend: None picks the first that can; ``triton`` or ``cpu`` is obeyed or refused.

    Raises:
        InvalidInputError: The call breaks the contract above, on whatever device.
        UnsupportedError: The back end asked for, or every one, cannot run it.

    Notes:
        Never synchronises on a GPU; safe in a CUDA graph.
    """
    if ops.is_traced(source):
        torch.ops.anystride.copy_blocks(source, target, block_mapping, backend)
    else:
        store_plan.copy_blocks("copy_blocks", source, target, block_mapping, 2, backend)


def gather_blocks(source: Tensor, block_ids: Tensor, target: Tensor, *, backend: str | None = None) -> None:
    """Collect blocks, bit by bit: ``target[i] = source[block_ids[i]]``.

    One request's blocks into a buffer for transfer, in the layout that the other side wants. Back again:
    ``copy_blocks(target, source, torch.stack([torch.arange(n), block_ids], 1))``.

    Args:
        source: As in :func:`copy_blocks`.
        block_ids: ``[n]`` int64 or int32, any stride, on the same device. A negative id is skipped: that
            block of ``target`` stays as it is.
        target: As in :func:`copy_blocks`, of ``n`` blocks or more.
        backend: As in :func:`copy_blocks`.

    Raises:
        InvalidInputError, UnsupportedError: As in :func:`copy_blocks`.

    Notes:
        See :func:`copy_blocks`.
    """
    if ops.is_traced(source):
        torch.ops.anystride.gather_blocks(source, block_ids, target, backend)
    else:
        store_plan.copy_blocks("gather_blocks", source, target, block_ids, 1, backend)
