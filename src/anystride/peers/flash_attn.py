"""FlashAttention-3, as vLLM ships it.

Source: ``flash_attn_varlen_func`` of vLLM (vllm/vllm_flash_attn/flash_attn_interface.py): paged K and V,
query counts that differ, windows, softcap, sinks, fp8 with descales, ``q_v``; MLA is called in its ``q_v``
form, with the rope part as q and k and the latent part as q_v and v, as vLLM's back end for MLA does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anystride.peers.calls import demand, four_dims, refuse_but
from anystride.peers.folder import VLLM_VERSION, load_library
from anystride.peers.peer import Call, Peer

__all__ = ["FLASH_ATTN_3"]


def _load(folder: Path | None) -> str:
    if not hasattr(torch.ops._vllm_fa3_C, "fwd"):
        load_library(folder, "_vllm_fa3_C.abi3.so.xz")
    return f"of vLLM {VLLM_VERSION}"


def _descale(kwargs: dict[str, Any], name: str, heads: int) -> Tensor | None:
    """``[batch, num_kv_heads]`` float32, as FA3 wants its scales."""
    factor = kwargs.get(f"{name}_descale")
    if factor is None:
        return None
    batch, device = kwargs["cu_seqlens_q"].shape[0] - 1, kwargs["q"].device
    return torch.as_tensor(factor, dtype=torch.float32, device=device).expand(batch, heads)


def _prepare(kwargs: dict[str, Any]) -> Call:
    refuse_but(
        kwargs, "q_v", "window_size", "softcap", "s_aux", "q_descale", "k_descale", "v_descale",
        "cp_world_size", "num_splits", "block_table",
    )  # fmt: skip
    q, q_v, table = kwargs["q"], kwargs.get("q_v"), kwargs.get("block_table")
    k, v = kwargs["k"], kwargs["v"]
    if table is not None:
        k, v = four_dims(k, "k"), four_dims(v, "v")
    if q_v is None and k.shape[-1] > 256:  # MLA in one row: the two parts are views of it
        latent = v.shape[-1]
        demand({"head dimensions up to 256, or MLA's row": v.data_ptr() == k.data_ptr()})
        q_v, q, k = q[..., :latent], q[..., latent:], k[..., latent:]
    longest, tokens = kwargs["max_seqlen_k"], kwargs["max_seqlen_q"]
    causal = bool(kwargs.get("causal", False))
    left, right = kwargs.get("window_size") or (-1, -1)
    lengths, starts_k = kwargs.get("seqused_k"), kwargs.get("cu_seqlens_k")
    heads, kv_heads = q.shape[1], k.shape[-2]
    splits = kwargs.get("num_splits", 0)
    metadata = None
    if table is not None:
        metadata = torch.ops._vllm_fa3_C.get_scheduler_metadata(
            kwargs["cu_seqlens_q"].shape[0] - 1, tokens, longest, heads, kv_heads, q.shape[-1], v.shape[-1],
            q.dtype, lengths, kwargs["cu_seqlens_q"], None, None, None, None, k.shape[1], 0, causal,
            left, right, False, splits, None, 0,
        )  # fmt: skip
    scales = [_descale(kwargs, name, kv_heads) for name in "qkv"]

    def run() -> tuple[Tensor, Tensor | None]:
        out, lse, _accumulated, _lse = torch.ops._vllm_fa3_C.fwd(
            q, k, v, None, None, q_v, kwargs.get("out"), kwargs["cu_seqlens_q"], starts_k, None, None,
            lengths, tokens, longest, table, None, None, None, None, None,
            *scales, kwargs["softmax_scale"], causal, left, right, kwargs.get("softcap", 0.0), True, metadata,
            splits, None, 0, kwargs.get("s_aux"), kwargs.get("cp_world_size", 1), kwargs.get("cp_rank", 0),
            kwargs.get("cp_tot_seqused_k"),
        )  # fmt: skip
        return out, lse if kwargs.get("return_softmax_lse") else None

    return run


FLASH_ATTN_3 = Peer(
    "flash-attn-3", "FlashAttention-3", "fwd, what flash_attn_varlen_func calls", _load, _prepare,
    crashes_off_16_bytes=True,
)  # fmt: skip
