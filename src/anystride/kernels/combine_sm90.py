"""Combine the partial results of units that were cut, at the end of the kernel that wrote them.

All parts that share a unit wait for each other, and each puts together some of its rows: no second launch,
and no program that reads what a whole unit left. All programs must run at once, or some would wait for ever:
the launch is a cooperative one (docs/design/0009).

Source: Flash-Decoding; the formula is that of ``anystride.merge``, in base 2.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from anystride.kernels.attention_sm90 import warpgroup_barrier
from anystride.kernels.schedule import ARRIVALS, ROW
from anystride.kernels.softmax import LN_2, LOG2_E, add_sink, normaliser

THREADS = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))  # one element each
VALUES_AT_ONCE = gl.constexpr(8192)  # partial results that a warpgroup holds: 64 registers a thread
FEW = gl.constexpr(16)  # shares of a unit, so few that they are read at once


@gluon.jit
def arrive(counter_ptr, arrivals):
    """Say that a warpgroup has written its results; the last of ``arrivals`` makes the counter 0 again."""
    warpgroup_barrier()
    thread = gl.arange(0, 128, THREADS)
    gl.inline_asm_elementwise(
        """{
        .reg .pred first;
        setp.eq.s32 first, $1, 0;
        @first red.release.gpu.global.inc.u32 [$2], $3;
        mov.u32 $0, 0;
        }""",
        "=r,r,l,r,~{memory}",
        [thread, counter_ptr + thread * 0, thread * 0 + (arrivals - 1)],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def wait_for_all(counter_ptr):
    """Wait until all have arrived: after one's own arrival the counter is 0 only then."""
    thread = gl.arange(0, 128, THREADS)
    gl.inline_asm_elementwise(
        """{
        .reg .pred again;
        .reg .u32 count;
        setp.ne.s32 again, $1, 0;
        @again bra DONE;
        AGAIN:
        ld.acquire.gpu.global.u32 count, [$2];
        setp.ne.u32 again, count, 0;
        @again bra AGAIN;
        DONE:
        mov.u32 $0, 0;
        }""",
        "=r,r,l,~{memory}",
        [thread, counter_ptr + thread * 0],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    warpgroup_barrier()


@gluon.constexpr_function
def lines_and_dims(values, rows, d_v):
    """So many values of a share as lines and dimensions: whole lines, or slices of a power of two of them."""
    dims = min(values, d_v & -d_v)
    return min(values // dims, rows), dims


@gluon.jit
def combine_cut_units(
    W: gl.constexpr, WARPGROUPS: gl.constexpr, is_foreign, walk, sinks, out, lse, partial,
    kv_head, num_kv_heads,
    GROUP_SIZE: gl.constexpr, TILE_M: gl.constexpr, D_V: gl.constexpr,
    SHARES: gl.constexpr, LINES: gl.constexpr, DIMS: gl.constexpr,
    OUT_UNIT: gl.constexpr, OUT_VECTOR: gl.constexpr,
):  # fmt: skip
    """What warpgroup W of the WARPGROUPS of a part that compute does when all of its results are written.

    A part may have a share of two cut units: of the one with which it begins and of the one with which it
    ends. Arrivals depend on nothing but the schedule, so that lengths which do not fit it cannot make a
    program wait for ever. SHARES, LINES, DIMS: what is read at once. The shares are read in their order: the
    bits do not depend on who finished first.
    """
    FEW_TILE: gl.constexpr = lines_and_dims(VALUES_AT_ONCE // FEW, TILE_M, D_V)
    part = gl.program_id(2)
    metadata_ptr = walk[0]
    row_ptr = metadata_ptr + (part + 1) * ROW
    # All at once: each word that waited for another one would cost 0.6 us.
    begin_unit = gl.load(row_ptr + 1)
    end_unit = gl.load(row_ptr + 4)
    end_shares = gl.load(row_ptr + 6)  # 0, unless it begins here
    one_unit = gl.load(row_ptr + 7) != 0
    begin_q_start = gl.load(row_ptr + 8)
    begin_tokens = gl.load(row_ptr + 9)
    begin_slot = gl.load(row_ptr + 11)
    begin_shares = gl.load(row_ptr + 12)
    end_q_start = gl.load(row_ptr + 14)
    end_tokens = gl.load(row_ptr + 15)
    begin_shares = gl.where(is_foreign, 0, begin_shares)
    end_shares = gl.where(is_foreign | one_unit, 0, end_shares)
    begin_part = begin_slot // 2
    arrivals = WARPGROUPS * gl.num_programs(0) * gl.num_programs(1)
    if begin_shares > 1:
        arrive(metadata_ptr + (begin_part + 1) * ROW + ARRIVALS, begin_shares * arrivals)
    if end_shares > 1:
        arrive(row_ptr + ARRIVALS, end_shares * arrivals)
    for nth in range(2):
        first = nth == 0
        num_shares = gl.where(first, begin_shares, end_shares)
        first_slot = gl.where(first, begin_slot, 2 * part + 1)
        unit = gl.where(first, begin_unit, end_unit)
        q_start = gl.where(first, begin_q_start, end_q_start)
        num_tokens = gl.where(first, begin_tokens, end_tokens)
        # Where many parts are expected, tiles are small, to give each of them one; short sequences have few.
        if SHARES > FEW and (num_shares > 1) & (num_shares <= FEW):
            combine_share(
                W, WARPGROUPS, part, first_slot, num_shares, unit, q_start, num_tokens,
                walk, sinks, out, lse, partial, kv_head, num_kv_heads, GROUP_SIZE, TILE_M, D_V,
                FEW, FEW_TILE[0], FEW_TILE[1], OUT_UNIT, OUT_VECTOR,
            )  # fmt: skip
        elif num_shares > 1:
            combine_share(
                W, WARPGROUPS, part, first_slot, num_shares, unit, q_start, num_tokens,
                walk, sinks, out, lse, partial, kv_head, num_kv_heads, GROUP_SIZE, TILE_M, D_V,
                SHARES, LINES, DIMS, OUT_UNIT, OUT_VECTOR,
            )  # fmt: skip


@gluon.jit
def combine_share(
    W: gl.constexpr, WARPGROUPS: gl.constexpr, part, first_slot, num_shares, unit, q_start, num_tokens,
    walk, sinks, out, lse, partial, kv_head, num_kv_heads,
    GROUP_SIZE: gl.constexpr, TILE_M: gl.constexpr, D_V: gl.constexpr,
    SHARES: gl.constexpr, LINES: gl.constexpr, DIMS: gl.constexpr,
    OUT_UNIT: gl.constexpr, OUT_VECTOR: gl.constexpr,
):  # fmt: skip
    """Combine some of the tiles, of LINES rows and DIMS dimensions, of this program's rows of a unit."""
    # Warps lie along dimensions, then lines, and only then shares, whose sum would go through shared memory.
    DIM_LANES: gl.constexpr = min(DIMS // 4, 32)
    DIM_WARPS: gl.constexpr = min(DIMS // (4 * DIM_LANES), 4)
    LINE_WARPS: gl.constexpr = min(LINES, 4 // DIM_WARPS)
    SHARE_WARPS: gl.constexpr = 4 // (DIM_WARPS * LINE_WARPS)
    VALUES: gl.constexpr = gl.BlockedLayout(
        [1, 1, 4], [32 // DIM_LANES, 1, DIM_LANES], [SHARE_WARPS, LINE_WARPS, DIM_WARPS], [2, 1, 0]
    )  # [SHARES, LINES, DIMS]
    RESULT: gl.constexpr = gl.SliceLayout(0, VALUES)  # [LINES, DIMS]
    LINE: gl.constexpr = gl.SliceLayout(1, RESULT)
    WEIGHTS: gl.constexpr = gl.SliceLayout(2, VALUES)  # [SHARES, LINES]
    NUM_SLICES: gl.constexpr = D_V // DIMS
    rows_per_unit = walk[5]
    num_rows = num_tokens * GROUP_SIZE
    first_part = first_slot // 2
    lse_ptr = partial[0] + partial[1].to(gl.int64) * D_V
    tile_row = gl.program_id(0) * TILE_M
    wait_for_all(walk[0] + (first_part + 1) * ROW + ARRIVALS)
    turn = WARPGROUPS * (part - first_part) + W
    num_lines = gl.minimum(TILE_M, num_rows - unit * rows_per_unit - tile_row)
    for item in range(turn, ((num_lines + LINES - 1) // LINES) * NUM_SLICES, WARPGROUPS * num_shares):
        first_line = tile_row + (item // NUM_SLICES) * LINES
        first_dim = (item % NUM_SLICES) * DIMS
        in_unit = first_line + gl.arange(0, LINES, gl.SliceLayout(0, WEIGHTS))
        dims = first_dim + gl.arange(0, DIMS, gl.SliceLayout(0, RESULT))
        top = gl.full([LINES], float("-inf"), gl.float32, LINE)
        weight_sum = gl.zeros([LINES], gl.float32, LINE)
        acc = gl.zeros([LINES, DIMS], gl.float32, RESULT)
        for first in range(0, num_shares, SHARES):
            share = first + gl.arange(0, SHARES, gl.SliceLayout(1, WEIGHTS))
            slot = gl.where(share == 0, first_slot, 2 * (first_part + share))
            first_lines = (slot * num_kv_heads + kv_head).to(gl.int64) * rows_per_unit
            lines = gl.expand_dims(first_lines, 1) + gl.expand_dims(in_unit, 0)
            mask = gl.expand_dims(share < num_shares, 1) & gl.expand_dims(
                unit * rows_per_unit + in_unit < num_rows, 0
            )
            share_lse = gl.load(lse_ptr + lines, mask=mask, other=float("-inf"))
            offsets = lines * D_V
            # A share without keys wrote zeros: its weight is 0.
            ptrs = partial[0] + (gl.expand_dims(offsets, 2) + gl.expand_dims(gl.expand_dims(dims, 0), 0))
            values = gl.load(ptrs, mask=gl.expand_dims(mask, 2), other=0.0)
            new_top = gl.maximum(top, gl.convert_layout(gl.max(share_lse, 0), LINE))
            anchor = gl.where(new_top == float("-inf"), 0.0, new_top)
            shrink = gl.exp2(top - anchor)
            weights = gl.exp2(
                share_lse - gl.expand_dims(gl.convert_layout(anchor, gl.SliceLayout(0, WEIGHTS)), 0)
            )
            acc = acc * gl.expand_dims(shrink, 1) + gl.sum(values * gl.expand_dims(weights, 2), 0)
            weight_sum = weight_sum * shrink + gl.convert_layout(gl.sum(weights, 0), LINE)
            top = new_top
        rows = unit * rows_per_unit + first_line + gl.arange(0, LINES, LINE)
        row_mask = rows < num_rows
        token = (q_start + rows // GROUP_SIZE).to(gl.int64)
        head = (kv_head * GROUP_SIZE + rows % GROUP_SIZE).to(gl.int64)
        if sinks[0] is not None:
            sink = gl.load(sinks[0] + head * sinks[1], mask=row_mask, other=0.0).to(gl.float32) * LOG2_E
            top, shrink, weight_sum = add_sink(top, weight_sum, sink)
            acc = acc * gl.expand_dims(shrink, 1)
        some, weight_sum, inverse = normaliser(weight_sum, 1.0)
        out_rows = gl.multiple_of(token * out[1] + head * out[2], OUT_VECTOR)
        out_dims = dims.to(gl.int64)
        if not OUT_UNIT:
            out_dims = out_dims * out[3]
        ptrs = out[0] + (gl.expand_dims(out_rows, 1) + gl.expand_dims(out_dims, 0))
        result = acc * gl.expand_dims(inverse, 1)
        gl.store(ptrs, result.to(out[0].dtype.element_ty), mask=gl.expand_dims(row_mask, 1))
        if lse[0] is not None and item % NUM_SLICES == 0:
            row_lse = gl.where(some, (top + gl.log2(weight_sum)) * LN_2, float("-inf"))
            gl.store(lse[0] + head * lse[1] + token, row_lse, mask=row_mask)
