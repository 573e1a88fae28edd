"""Combine the partial results of units that were cut: the second launch of a split call.

Source: Flash-Decoding; the formula is that of ``anystride.merge``, in base 2.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from anystride.kernels.ranges import nominal_steps, num_units, sequence_facts
from anystride.kernels.schedule import ROW, costs, is_foreign, part_at
from anystride.kernels.softmax import LN_2, LOG2_E, add_sink, normaliser

RUNTIME = [
    "stride_out_token", "stride_out_head", "stride_out_dim", "stride_lse_head",
    "stride_cu_q", "stride_cu_k", "stride_seqused", "stride_sinks",
    "batch", "window_left", "window_right", "overhead",
    "units_per_seq", "splits_per_unit", "steps_per_split", "rows_per_unit", "num_kv_heads",
    "partial_lines", "num_tiles", "num_parts",
]  # fmt: skip
UNALIGNED = ["cu_seqlens_q_ptr", "cu_seqlens_k_ptr", "seqused_k_ptr", "sinks_ptr", "metadata_ptr"]


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=UNALIGNED)
def combine_kernel(
    partial_ptr, partial_lines,
    metadata_ptr,
    cu_seqlens_q_ptr, stride_cu_q,
    cu_seqlens_k_ptr, stride_cu_k,
    seqused_k_ptr, stride_seqused,
    sinks_ptr, stride_sinks,
    out_ptr, stride_out_token: tl.int64, stride_out_head: tl.int64, stride_out_dim: tl.int64,
    lse_ptr, stride_lse_head: tl.int64,
    batch, window_left, window_right,
    units_per_seq, splits_per_unit, steps_per_split, rows_per_unit, num_kv_heads, overhead, num_tiles,
    num_parts,
    GROUP_SIZE: tl.constexpr,
    DIMS_V: tl.constexpr,
    WINDOWED: tl.constexpr,
    SCHEDULED: tl.constexpr, BY_UNIT: tl.constexpr, FIXED_SPLITS: tl.constexpr,
    OVERLAP: tl.constexpr,  # launched while the decode kernel runs
    NARROW: tl.constexpr,  # the partial results are fewer than 2^31 elements
    OUT_UNIT: tl.constexpr, OUT_VECTOR: tl.constexpr,
    TILE_SEQ: tl.constexpr, TILE_SPLITS: tl.constexpr, TILE_M: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """One program: some of the tiles of one unit, over all of the unit's splits.

    A tile is a few rows and a slice of their dimensions. Grid: ``(programs for a unit, num_kv_heads, units or
    parts)``. A scheduled unit is found from the part in which it begins, or, BY_UNIT, which wants few units,
    from its place on the axis of cost. Units that were not cut end at once. The splits are read in their
    order, so the bits do not depend on who finished first.
    """
    kv_head = tl.program_id(1)
    index = tl.program_id(2)
    if OVERLAP:
        # One program waits whatever it finds to do. The grid may not end before the decode kernel has: what
        # comes next in a graph waits for this grid only.
        if (tl.program_id(0) == 0) & (kv_head == 0) & (index == 0):
            gdc_wait()
    if SCHEDULED:
        if is_foreign(metadata_ptr, rows_per_unit, batch, num_parts):
            return  # the decode kernel has answered with NaN
    if SCHEDULED and not BY_UNIT:
        row = metadata_ptr + (index + 1) * ROW
        num_splits = tl.load(row + 6)
        if num_splits < 2:
            return
        seq = tl.load(row + 3)
        unit = tl.load(row + 4)
        first_slot = 2 * index + 1 - tl.load(row + 7)
        later_slot = 2 * index
        slot_step = 2
        q_start = tl.load(cu_seqlens_q_ptr + seq * stride_cu_q)
        num_tokens = tl.load(cu_seqlens_q_ptr + (seq + 1) * stride_cu_q) - q_start
    else:
        seq = index // units_per_seq
        unit = index % units_per_seq
        lengths = (
            cu_seqlens_q_ptr, stride_cu_q, cu_seqlens_k_ptr, stride_cu_k, seqused_k_ptr, stride_seqused,
            None, 0,
        )  # fmt: skip
        q_start, num_tokens, length, _total = sequence_facts(seq, *lengths)
        steps = nominal_steps(
            num_tokens, length, GROUP_SIZE, rows_per_unit, window_left, window_right, WINDOWED
        )
        if SCHEDULED:
            before = tl.zeros([], tl.int64)
            total = tl.zeros([], tl.int64)
            for first in range(0, batch, TILE_SEQ):
                seqs = first + tl.arange(0, TILE_SEQ)
                cost = costs(
                    seqs, batch, lengths, GROUP_SIZE, rows_per_unit, window_left, window_right, overhead,
                    WINDOWED,
                )  # fmt: skip
                before += tl.sum(tl.where(seqs < seq, cost, 0), 0)
                total += tl.sum(cost, 0)
            used_parts = tl.load(metadata_ptr + 3).to(tl.int64)
            begin = before + unit.to(tl.int64) * (steps + overhead)
            first_part = part_at(begin, total, used_parts)
            num_splits = part_at(begin + steps - 1, total, used_parts) - first_part + 1
            row = metadata_ptr + (first_part + 1) * ROW
            begun = (tl.load(row) == seq) & (tl.load(row + 1) == unit)
            later_slot = 2 * first_part
            first_slot = later_slot + 1 - begun.to(tl.int32)
            slot_step = 2
        else:
            size = steps_per_split
            if not FIXED_SPLITS:
                size = (steps + splits_per_unit - 1) // splits_per_unit
            num_splits = (steps + size - 1) // size
            first_slot = index * splits_per_unit
            later_slot = first_slot
            slot_step = 1
        if (num_splits < 2) | (unit >= num_units(num_tokens, GROUP_SIZE, rows_per_unit)):
            return

    if OVERLAP:
        gdc_wait()  # for the decode kernel; what was read so far is older than it
    partial_lse_ptr = partial_ptr + partial_lines.to(tl.int64) * DIMS_V
    NUM_SLICES: tl.constexpr = (DIMS_V + TILE_D - 1) // TILE_D
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        in_unit = (tile // NUM_SLICES) * TILE_M + tl.arange(0, TILE_M)  # [TILE_M]
        dims = (tile % NUM_SLICES) * TILE_D + tl.arange(0, TILE_D)
        rows = unit * rows_per_unit + in_unit
        row_mask = (rows < num_tokens * GROUP_SIZE) & (in_unit < rows_per_unit)
        dim_mask = dims < DIMS_V
        top = tl.full([TILE_M], float("-inf"), tl.float32)
        weight_sum = tl.zeros([TILE_M], tl.float32)
        acc = tl.zeros([TILE_M, TILE_D], tl.float32)
        for first in tl.range(0, num_splits, TILE_SPLITS, num_stages=1):
            split = first + tl.arange(0, TILE_SPLITS)  # [TILE_SPLITS]
            slot = tl.where(split == 0, first_slot, later_slot + split * slot_step)
            first_line = (slot * num_kv_heads + kv_head) * rows_per_unit
            if not NARROW:
                first_line = first_line.to(tl.int64)
            lines = first_line[:, None] + in_unit[None, :]  # [TILE_SPLITS, TILE_M]
            mask = (split < num_splits)[:, None] & row_mask[None, :]
            lse = tl.load(partial_lse_ptr + lines, mask=mask, other=float("-inf"))
            # A share without keys wrote zeros: its weight is 0.
            values = tl.load(
                partial_ptr + lines[:, :, None] * DIMS_V + dims[None, None, :],
                mask=mask[:, :, None] & dim_mask[None, None, :],
                other=0.0,
            )  # [TILE_SPLITS, TILE_M, TILE_D]
            new_top = tl.maximum(top, tl.max(lse, 0))
            anchor = tl.where(new_top == float("-inf"), 0.0, new_top)
            shrink = tl.exp2(top - anchor)
            weights = tl.exp2(lse - anchor[None, :])
            acc = acc * shrink[:, None] + tl.sum(values * weights[:, :, None], 0)
            weight_sum = weight_sum * shrink + tl.sum(weights, 0)
            top = new_top

        token = rows // GROUP_SIZE
        head = kv_head * GROUP_SIZE + rows % GROUP_SIZE
        if sinks_ptr is not None:
            sink = tl.load(sinks_ptr + head * stride_sinks, mask=row_mask, other=0.0).to(tl.float32) * LOG2_E
            top, shrink, weight_sum = add_sink(top, weight_sum, sink)
            acc = acc * shrink[:, None]
        some, weight_sum, inverse = normaliser(weight_sum, 1.0)
        q_token = (q_start + token).to(tl.int64)
        out_rows = q_token * stride_out_token + head.to(tl.int64) * stride_out_head
        ptrs = out_ptr + tl.multiple_of(out_rows, OUT_VECTOR)[:, None]
        if OUT_UNIT:
            ptrs += dims[None, :]
        else:
            ptrs += dims[None, :].to(tl.int64) * stride_out_dim
        mask = row_mask[:, None] & dim_mask[None, :]
        tl.store(ptrs, (acc * inverse[:, None]).to(out_ptr.dtype.element_ty), mask=mask)
        if lse_ptr is not None and tile % NUM_SLICES == 0:
            lse = tl.where(some, (top + tl.log2(weight_sum)) * LN_2, float("-inf"))
            tl.store(lse_ptr + head.to(tl.int64) * stride_lse_head + q_token, lse, mask=row_mask)
