"""Merging partial rows on GPUs: the launch of the Triton kernel, one for what takes PyTorch a dozen."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from anystride.kernels.merge import merge_kernel
from anystride.launch import Launch, Pointer, Prepared, device_refusals, run_prepared
from anystride.problem import alignment, bucket
from anystride.work import vector

MOST_DIMS = 512  # of a row in one program


class Facts(NamedTuple):
    """What decides the launch. Strides are in elements."""

    device: torch.device
    dtype: torch.dtype
    sinks: torch.dtype | None
    shape: tuple[int, ...]  # parts, tokens, heads, d_v
    outs_strides: tuple[int, ...]  # part, token, head, dim: 1
    outs_align: int  # bytes
    lses_strides: tuple[int, ...]  # part, head, token: 1
    sinks_stride: int
    out_strides: tuple[int, ...]  # token, head, dim
    out_align: int


def refusals(device: torch.device) -> list[str]:
    """Every reason why the kernel cannot run here."""
    return device_refusals(device)


@lru_cache(maxsize=1024)
def _prepared(facts: Facts) -> Prepared:
    f = facts
    parts, total_q, heads, d_v = f.shape
    tile_d = min(MOST_DIMS, bucket(d_v))
    arguments = (
        Pointer("outs"), *f.outs_strides[:3], Pointer("lses"), *f.lses_strides[:2],
        None if f.sinks is None else Pointer("sinks"), f.sinks_stride,
        Pointer("out"), *f.out_strides, Pointer("lse"), total_q,
    )  # fmt: skip
    constants = {
        "PARTS": parts,
        "D_V": d_v,
        "VECTOR": vector(f.outs_strides[:3], f.outs_align, f.dtype.itemsize),
        "OUT_UNIT": f.out_strides[2] == 1 or d_v == 1,
        "OUT_VECTOR": vector(f.out_strides[:2], f.out_align, f.dtype.itemsize),
        "TILE_PARTS": bucket(parts),
        "TILE_D": tile_d,
    }
    grid = (total_q, heads, -(-d_v // tile_d))
    return Prepared(Launch(merge_kernel, grid, arguments, constants, {"num_warps": 4}))


def run(outs: Tensor, lses: Tensor, s_aux: Tensor | None, out: Tensor, lse: Tensor) -> None:
    """Merge on the device's current stream.

    Args:
        outs: ``[parts, total_q, num_q_heads, d_v]``, the last stride 1.
        lses: ``[parts, num_q_heads, total_q]`` float32, the last stride 1.
        s_aux: ``[num_q_heads]``: sinks.
        out: ``[total_q, num_q_heads, d_v]``: written.
        lse: ``[num_q_heads, total_q]`` float32, packed: written.
    """
    if not out.numel():
        return
    facts = Facts(
        out.device,
        out.dtype,
        None if s_aux is None else s_aux.dtype,
        tuple(outs.shape),
        outs.stride(),
        alignment(outs),
        lses.stride(),
        0 if s_aux is None else s_aux.stride(0),
        out.stride(),
        alignment(out),
    )
    tensors = {"outs": outs, "lses": lses, "sinks": s_aux, "out": out, "lse": lse}
    run_prepared(_prepared(facts), out.device, tensors)
