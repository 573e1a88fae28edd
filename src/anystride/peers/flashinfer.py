"""FlashInfer's wrappers: for MLA, for queries of any count over a paged cache, and for decoding.

Source: the docstrings of ``BatchMLAPagedAttentionWrapper``, ``BatchPrefillWithPagedKVCacheWrapper`` and
``BatchDecodeWithPagedKVCacheWrapper`` (flashinfer 0.6). ``plan`` is called once and shared by the layers of a
step. Log-sum-exps are to base 2 there.
"""

from __future__ import annotations

import functools
import importlib
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anystride.peers.calls import blocks_in_use, demand, four_dims, query_counts, refuse_but, whole
from anystride.peers.folder import load_wheels
from anystride.peers.peer import Absent, Call, Peer

__all__ = ["FLASHINFER_DECODE", "FLASHINFER_FA2", "FLASHINFER_FA3"]

WORKSPACE_BYTES = 512 << 20


def _load(_folder: Path | None) -> str:
    load_wheels(_folder, "flashinfer")
    try:
        for module in ("flashinfer.mla", "flashinfer.prefill", "flashinfer.decode"):
            importlib.import_module(module)
    except ImportError as error:
        raise Absent(str(error)) from None
    return str(importlib.import_module("flashinfer").__version__)


@functools.cache
def _workspace(device: torch.device) -> Tensor:
    """What the user reserves for the wrappers, once."""
    return torch.empty(WORKSPACE_BYTES, dtype=torch.int8, device=device)


def _natural(lse: Tensor, total: int) -> Tensor:
    """``[num_q_heads, total_q]`` in natural logarithms, of ``[tokens, num_q_heads]`` to base 2."""
    return whole(lse * math.log(2), total).t()


def _mla(kwargs: dict[str, Any], backend: str) -> Call:
    refuse_but(kwargs, "q_v")
    q, q_v = kwargs["q"], kwargs.get("q_v")
    k, v = four_dims(kwargs["k"], "k"), four_dims(kwargs["v"], "v")
    latent = v.shape[3]
    demand({"one KV head": k.shape[2] == 1})
    if q_v is None:
        demand({"V is the first part of K's row": v.data_ptr() == k.data_ptr() and v.stride() == k.stride()})
        q_v, q, k = q[..., :latent], q[..., latent:], k[..., latent:]
    lengths, block, rows = kwargs["seqused_k"], k.shape[1], int(kwargs["cu_seqlens_q"][-1])
    starts, ids = blocks_in_use(kwargs["block_table"], lengths, block)
    wrapper = importlib.import_module("flashinfer.mla").BatchMLAPagedAttentionWrapper(
        _workspace(q.device), backend=backend
    )
    wrapper.plan(
        kwargs["cu_seqlens_q"], starts, ids, lengths, q.shape[1], latent, q.shape[2], block,
        bool(kwargs.get("causal", False)), kwargs["softmax_scale"], q.dtype, k.dtype,
    )  # fmt: skip
    q_v, q, wants_lse = q_v[:rows], q[:rows], bool(kwargs.get("return_softmax_lse"))
    total = kwargs["q"].shape[0]

    def run() -> tuple[Tensor, Tensor | None]:
        result = wrapper.run(q_v, q, v[:, :, 0], k[:, :, 0], return_lse=wants_lse)
        out, lse = result if wants_lse else (result, None)
        return whole(out, total), None if lse is None else _natural(lse, total)

    return run


def _pages(kwargs: dict[str, Any], block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where each sequence's pages begin, the ids of all, and how full the last of each is."""
    lengths = kwargs["seqused_k"]
    last = torch.where(lengths > 0, (lengths - 1) % block + 1, 0).int()
    return *blocks_in_use(kwargs["block_table"], lengths, block), last


def _features(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``plan`` of both wrappers for K and V of their own."""
    left, right = kwargs.get("window_size") or (-1, -1)
    demand({"no keys after the query's own (window_right 0)": right in (-1, 0) or bool(kwargs.get("causal"))})
    dtypes = {"q_data_type": kwargs["q"].dtype, "kv_data_type": kwargs["k"].dtype}
    return {
        "sm_scale": kwargs["softmax_scale"], "window_left": left,
        "logits_soft_cap": kwargs.get("softcap") or None, **dtypes,
    }  # fmt: skip


def _scales(kwargs: dict[str, Any]) -> dict[str, Any]:
    given = {f"{name}_scale": kwargs.get(f"{name}_descale") for name in "qkv"}
    scales = {name: scale for name, scale in given.items() if scale is not None}
    numbers = all(not isinstance(scale, Tensor) or scale.numel() == 1 for scale in scales.values())
    demand({"one scale for a whole cache": numbers})
    return {name: float(scale) for name, scale in scales.items()}


def _paged(kwargs: dict[str, Any], backend: str) -> Call:
    refuse_but(kwargs, "window_size", "softcap", "q_descale", "k_descale", "v_descale", "s_aux")
    q, k, v = kwargs["q"], four_dims(kwargs["k"], "k"), four_dims(kwargs["v"], "v")
    block, rows = k.shape[1], int(kwargs["cu_seqlens_q"][-1])
    module = importlib.import_module("flashinfer.prefill")
    wrapper = module.BatchPrefillWithPagedKVCacheWrapper(_workspace(q.device), "NHD", backend=backend)
    wrapper.plan(
        kwargs["cu_seqlens_q"], *_pages(kwargs, block), q.shape[1], k.shape[2], q.shape[2], block,
        head_dim_vo=v.shape[3], causal=bool(kwargs.get("causal", False)), **_features(kwargs),
    )  # fmt: skip
    return _run(kwargs, wrapper, q[:rows], (k, v))


def _decode(kwargs: dict[str, Any]) -> Call:
    refuse_but(kwargs, "window_size", "softcap", "q_descale", "k_descale", "v_descale", "s_aux")
    q, k, v = kwargs["q"], four_dims(kwargs["k"], "k"), four_dims(kwargs["v"], "v")
    demand(
        {
            "one query token of each sequence": set(query_counts(kwargs)) == {1},
            "K and V of one head dimension": k.shape[3] == v.shape[3],
        }
    )
    block, rows = k.shape[1], int(kwargs["cu_seqlens_q"][-1])
    module = importlib.import_module("flashinfer.decode")
    wrapper = module.BatchDecodeWithPagedKVCacheWrapper(_workspace(q.device), "NHD", use_tensor_cores=True)
    wrapper.plan(*_pages(kwargs, block), q.shape[1], k.shape[2], q.shape[2], block, **_features(kwargs))
    return _run(kwargs, wrapper, q[:rows], (k, v))


def _run(kwargs: dict[str, Any], wrapper: Any, q: Tensor, cache: tuple[Tensor, Tensor]) -> Call:
    more: dict[str, Any] = _scales(kwargs)
    if kwargs.get("s_aux") is not None:
        more["sinks"] = kwargs["s_aux"].float()
    total, wants_lse = kwargs["q"].shape[0], bool(kwargs.get("return_softmax_lse"))

    def run() -> tuple[Tensor, Tensor | None]:
        result = wrapper.run(q, cache, return_lse=wants_lse, **more)
        out, lse = result if wants_lse else (result, None)
        return whole(out, total), None if lse is None else _natural(lse, total)

    return run


def _by_family(kwargs: dict[str, Any], backend: str) -> Call:
    """MLA goes to the wrapper for MLA, everything else to the one for paged caches."""
    is_mla = kwargs.get("q_v") is not None or kwargs["k"].shape[-1] > kwargs["v"].shape[-1] >= 256
    return _mla(kwargs, backend) if is_mla else _paged(kwargs, backend)


WRAPPERS = "BatchMLAPagedAttentionWrapper and BatchPrefillWithPagedKVCacheWrapper"
FLASHINFER_FA2 = Peer(
    "flashinfer-fa2", "FlashInfer fa2", f"{WRAPPERS}, backend fa2", _load,
    functools.partial(_by_family, backend="fa2"), crashes_off_16_bytes=True,
)  # fmt: skip
FLASHINFER_FA3 = Peer(
    "flashinfer-fa3", "FlashInfer fa3", f"{WRAPPERS}, backend fa3", _load,
    functools.partial(_by_family, backend="fa3"), crashes_off_16_bytes=True,
)  # fmt: skip
FLASHINFER_DECODE = Peer(
    "flashinfer-decode",
    "FlashInfer decode",
    "BatchDecodeWithPagedKVCacheWrapper with tensor cores",
    _load,
    _decode,
    crashes_off_16_bytes=True,
)
