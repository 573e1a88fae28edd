"""vLLM's Triton kernels that write a cache, through their launchers.

Source: vllm/v1/attention/ops/triton_reshape_and_cache_flash.py. They take no part in conformance: they are
what our own stores are timed beside.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anystride.peers.peer import Refused
from anystride.peers.vllm_triton import KVQuantMode, load_file

__all__ = ["vllm_store"]


def vllm_store(
    key: Tensor, value: Tensor, caches: tuple[Tensor, ...], slots: Tensor, scale: Any, folder: Path | None
) -> Callable[[], Any]:
    """A call that writes K and V with heads, or MLA's row as one.

    MLA's row goes to the kernel for rows of K|V with a head of each width.

    Args:
        key: ``[tokens, heads, d]``.
        value: ``[tokens, heads, d]``.
        caches: K and V, ``[num_blocks, block_size, num_kv_heads, d]`` each, or the one of MLA's rows.
        slots: ``[tokens]`` int64.
        scale: None, of the whole cache, or a pair of float32 ``[num_blocks, block_size, num_kv_heads]`` to be
            written.
        folder: Of the peers that are not installed.

    Raises:
        Absent: vLLM's file is not there.
        Refused: The kernels take no such scales or strides.
    """
    store = load_file(folder, "triton_reshape_and_cache_flash")
    if isinstance(scale, tuple):
        run, more = store.triton_reshape_and_cache_flash_per_token_head_quant, KVQuantMode.FP8_PER_TOKEN_HEAD
        return lambda: run(key, value, *caches, *scale, slots, more)
    if isinstance(scale, Tensor) and scale.dim():
        raise Refused("one scale for the whole cache only")
    dtype = "auto" if caches[0].itemsize > 1 else "fp8"
    one = torch.as_tensor(1.0 if scale is None else scale, dtype=torch.float32, device=key.device)
    if len(caches) == 1:
        run = store.triton_reshape_and_cache_flash_diffkv
    elif caches[0].stride() == caches[1].stride():
        run = store.triton_reshape_and_cache_flash
    else:
        raise Refused("K and V of the same strides only")
    return lambda: run(key, value, *caches, slots, dtype, one, one)
