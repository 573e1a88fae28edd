"""Merge the partial rows of ranks: the Triton kernel.

The formula is that of ``anystride.merge``, in base 2.
"""

import triton
import triton.language as tl

from anystride.kernels.softmax import LN_2, LOG2_E, add_sink, normaliser

RUNTIME = [
    "stride_part", "stride_token", "stride_head", "stride_lse_part", "stride_lse_head", "stride_sinks",
    "stride_out_token", "stride_out_head", "stride_out_dim", "stride_merged_head",
]  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=["sinks_ptr"])
def merge_kernel(
    outs_ptr, stride_part: tl.int64, stride_token: tl.int64, stride_head: tl.int64,
    lses_ptr, stride_lse_part: tl.int64, stride_lse_head: tl.int64,
    sinks_ptr, stride_sinks,
    out_ptr, stride_out_token: tl.int64, stride_out_head: tl.int64, stride_out_dim: tl.int64,
    lse_ptr, stride_merged_head: tl.int64,
    PARTS: tl.constexpr, D_V: tl.constexpr, VECTOR: tl.constexpr,
    OUT_UNIT: tl.constexpr, OUT_VECTOR: tl.constexpr,
    TILE_PARTS: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """One program: a slice of a row, over all parts. Grid: ``(total_q, heads, slices)``."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    parts = tl.arange(0, TILE_PARTS)
    dims = tl.program_id(2) * TILE_D + tl.arange(0, TILE_D)
    lses = tl.load(
        lses_ptr + parts * stride_lse_part + head * stride_lse_head + token,
        mask=parts < PARTS,
        other=float("-inf"),
    )  # [TILE_PARTS]
    lses *= LOG2_E
    top = tl.max(lses, 0)
    anchor = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp2(lses - anchor)
    # A part that saw no key may hold anything: it is not read.
    rows = tl.multiple_of(parts * stride_part + token * stride_token + head * stride_head, VECTOR)
    values = tl.load(
        outs_ptr + rows[:, None] + dims[None, :],
        mask=(weights > 0)[:, None] & (dims < D_V)[None, :],
        other=0.0,
    )  # [TILE_PARTS, TILE_D]
    acc = tl.sum(values.to(tl.float32) * weights[:, None], 0)
    weight_sum = tl.sum(weights, 0)
    top = anchor
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head * stride_sinks).to(tl.float32) * LOG2_E
        top, shrink, weight_sum = add_sink(top, weight_sum, sink)
        acc *= shrink
    some, weight_sum, inverse = normaliser(weight_sum, 1.0)
    out_row = tl.multiple_of(token * stride_out_token + head * stride_out_head, OUT_VECTOR)
    if OUT_UNIT:
        ptrs = out_ptr + out_row + dims
    else:
        ptrs = out_ptr + out_row + dims.to(tl.int64) * stride_out_dim
    tl.store(ptrs, (acc * inverse).to(out_ptr.dtype.element_ty), mask=dims < D_V)
    if tl.program_id(2) == 0:
        lse = tl.where(some, (top + tl.log2(weight_sum)) * LN_2, float("-inf"))
        tl.store(lse_ptr + head * stride_merged_head + token, lse)
