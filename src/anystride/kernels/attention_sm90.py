"""The pieces of attention that Hopper's kernels share: arguments, queries, scores, masks.

Masks come as two tensors that broadcast, one of key positions and one of rows, so that a kernel may have its
keys on either side.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from anystride.kernels.ranges import positions_over_ranks
from anystride.kernels.schedule import is_foreign, own_part
from anystride.kernels.softmax import LOG2_E, tanh

# Triton 3.7 gave it a new name.
warpgroup_barrier = getattr(gl, "barrier", None) or gl.thread_barrier
PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))

# Arguments that may change from call to call without a new compilation.
RUNTIME = [
    "stride_q_token", "stride_q_head", "stride_q_v_token", "stride_q_v_head",
    "stride_k_page", "stride_k_block", "stride_k_token", "stride_k_head",
    "stride_v_page", "stride_v_block", "stride_v_token", "stride_v_head",
    "stride_table_seq", "stride_table_block",
    "stride_cu_q", "stride_cu_k", "stride_seqused", "stride_cp_tot",
    "stride_alibi_seq", "stride_alibi_head", "stride_sinks",
    "stride_q_descale_seq", "stride_q_descale_head",
    "stride_k_descale_seq", "stride_k_descale_head",
    "stride_v_descale_seq", "stride_v_descale_head",
    "stride_k_scale_page", "stride_k_scale_block", "stride_k_scale_token", "stride_k_scale_head",
    "stride_k_scale_group",
    "stride_v_scale_page", "stride_v_scale_block", "stride_v_scale_token", "stride_v_scale_head",
    "stride_v_scale_group",
    "stride_out_token", "stride_out_head", "stride_out_dim", "stride_lse_head",
    "batch", "window_left", "window_right", "cp_rank",
    "units_per_seq", "splits_per_unit", "steps_per_split", "rows_per_unit", "partial_lines",
]  # fmt: skip
UNALIGNED = [
    "block_table_ptr", "cu_seqlens_q_ptr", "cu_seqlens_k_ptr", "seqused_k_ptr", "cp_tot_ptr", "alibi_ptr",
    "sinks_ptr", "q_descale_ptr", "k_descale_ptr", "v_descale_ptr",
    "k_scale_cache_ptr", "v_scale_cache_ptr", "metadata_ptr",
]  # fmt: skip


@gluon.jit
def load_queries(
    ptr, strides, q_start, first_row, num_rows, kv_head, GROUP_SIZE: gl.constexpr, ROWS: gl.constexpr,
    WIDTH: gl.constexpr, VECTOR: gl.constexpr,
):  # fmt: skip
    """WIDTH dimensions of the queries of ROWS rows; rows that are none are zeros.

    A row lies in eight threads, the same for all widths: fewer threads would not ask for whole lines of
    memory, more of them have more rows each, whose addresses are code that is fetched for one use.
    """
    MOST: gl.constexpr = min(VECTOR, WIDTH // 8)
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, MOST], [4, 8], [4, 1], [1, 0])
    rows = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    token = (q_start + rows // GROUP_SIZE).to(gl.int64)
    head = (kv_head * GROUP_SIZE + rows % GROUP_SIZE).to(gl.int64)
    offsets = gl.multiple_of(token * strides[0] + head * strides[1], VECTOR)
    columns = gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
    ptrs = ptr + (gl.expand_dims(offsets, 1) + gl.expand_dims(columns, 0))
    return gl.load(ptrs, mask=gl.expand_dims(rows < num_rows, 1), other=0.0)


@gluon.jit
def in_base_2(scores, softmax_scale, softcap, HAS_SOFTCAP: gl.constexpr):
    """Scores scaled, capped, and times log2(e)."""
    if HAS_SOFTCAP:
        scores = tanh(scores * (softmax_scale / softcap)) * (softcap * LOG2_E)
    else:
        scores = scores * (softmax_scale * LOG2_E)
    return scores


@gluon.jit
def seen_by_all(
    first_row, num_rows, num_tokens, total, first_key, key_end, walk,
    GROUP_SIZE: gl.constexpr, ROWS: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """Begin and end of the keys that all rows of a tile see: a tile of keys within them needs no mask."""
    begin = first_key
    end = key_end
    if HAS_RIGHT:
        end = tl.minimum(end, total - num_tokens + first_row // GROUP_SIZE + walk[7] + 1)
    if HAS_LEFT:
        last_row = tl.minimum(first_row + ROWS, num_rows) - 1
        begin = tl.maximum(begin, total - num_tokens + last_row // GROUP_SIZE - walk[6])
    return begin, end


@gluon.jit
def is_visible(
    positions, first, last, first_key, key_end, cp_rank, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
    CP_WORLD_SIZE: gl.constexpr, CP_INTERLEAVE: gl.constexpr,
):  # fmt: skip
    """Whether rows that see positions ``first`` to ``last`` of a sequence see the keys at ``positions``."""
    visible = positions < key_end
    if HAS_LEFT:
        visible = visible & (positions >= first_key)
    where = positions_over_ranks(positions, cp_rank, CP_WORLD_SIZE, CP_INTERLEAVE)
    if HAS_RIGHT:
        visible = visible & (where <= last)
    if HAS_LEFT:
        visible = visible & (where >= first)
    return visible


@gluon.jit
def with_own_part(walk, lengths, GROUP_SIZE: gl.constexpr, WINDOWED: gl.constexpr, SEQUENCES: gl.constexpr):
    """``walk`` with the part that this program finds itself: no kernel need run before this one."""
    own = own_part(gl.program_id(2), gl.num_programs(2), walk, lengths, GROUP_SIZE, WINDOWED, SEQUENCES)
    warpgroup_barrier()  # its row is written, for all warps
    return walk[0], walk[1], walk[2], walk[3], walk[4], walk[5], walk[6], walk[7], own


@gluon.jit
def answer_foreign(
    walk, lengths, out, lse, kv_head, GROUP_SIZE: gl.constexpr, D_V: gl.constexpr,
):  # fmt: skip
    """The answer to a schedule that was made for another call: NaN in every row, by all parts together."""
    num_parts = gl.num_programs(2)
    if walk[8] is None:
        if is_foreign(walk[0], walk[5], walk[1], num_parts):
            fill_nan(
                out, lse, lengths[0], lengths[1], walk[1], kv_head, gl.program_id(2), num_parts, GROUP_SIZE,
                D_V,
            )  # fmt: skip


@gluon.jit
def fill_nan(
    out, lse, cu_seqlens_q_ptr, stride_cu_q, batch, kv_head, part, num_parts,
    GROUP_SIZE: gl.constexpr, D_V: gl.constexpr,
):  # fmt: skip
    """NaN in the rows of every ``num_parts``-th sequence from ``part`` on."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    SLICE: gl.constexpr = D_V & -D_V
    dims = gl.arange(0, SLICE, LAYOUT).to(gl.int64)
    nan = gl.full([SLICE], float("nan"), gl.float32, LAYOUT)
    for seq in range(part, batch, num_parts):
        q_start = gl.load(cu_seqlens_q_ptr + seq * stride_cu_q)
        num_rows = (gl.load(cu_seqlens_q_ptr + (seq + 1) * stride_cu_q) - q_start) * GROUP_SIZE
        for row in range(num_rows):
            token = (q_start + row // GROUP_SIZE).to(gl.int64)
            head = (kv_head * GROUP_SIZE + row % GROUP_SIZE).to(gl.int64)
            for first in gl.static_range(0, D_V, SLICE):
                ptrs = out[0] + (token * out[1] + head * out[2] + (first + dims) * out[3])
                gl.store(ptrs, nan.to(out[0].dtype.element_ty))
            if lse[0] is not None:
                gl.store(lse[0] + head * lse[1] + token, float("nan"))
