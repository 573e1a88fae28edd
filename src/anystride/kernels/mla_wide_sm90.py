"""MLA on Hopper for tiles of 64 rows: two warpgroups that share one output and hand weights to each other.

Each warpgroup scores every second tile of keys and holds one half of the output's dimensions, over all tiles:
the left one scores the even tiles and holds dimensions ``[0, d_v / 2)``, the right one the odd tiles and the
other dimensions. Weights of the own tile come from registers, those of the other's from shared memory, where
the rope piece of the tile was: it is dead once the scores are there. While one warpgroup takes the
exponentials of its tile, the other one keeps the tensor cores busy; and each half of a tile is given back as
soon as it can be, for the next one needs 1.3 us to come.

Weights are relative to a reference of their row, its maximum or somewhat less, which goes from left to right
and back within a pair of tiles. The right warpgroup multiplies the left one's weights as they are, before its
own tile has its say, and scales what comes of it afterwards, if it must. Masked scores and first references
are large negative numbers, not infinite ones: their differences are numbers.

Source: the halves and the two warpgroups are those of FlashMLA's schedule for Hopper,
https://github.com/deepseek-ai/FlashMLA, docs, 2025-04-22; the order within a pair is not.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents

from anystride.kernels.attention_sm90 import (
    PLAIN,
    RUNTIME,
    UNALIGNED,
    answer_foreign,
    in_base_2,
    is_visible,
    load_queries,
    seen_by_all,
    warpgroup_barrier,
    with_own_part,
)
from anystride.kernels.combine_sm90 import combine_cut_units
from anystride.kernels.fp8_sm90 import (
    agree_on_powers,
    factors,
    larger,
    largest_of_boxes,
    narrow_boxes,
    scaled,
)
from anystride.kernels.loaders_sm90 import (
    COLUMNS,
    PRODUCERS,
    TILE,
    barrier,
    boxes_of,
    copy_rows,
    find_blocks,
    find_sequence,
    load_boxes,
    row_offsets,
)
from anystride.kernels.parts import is_before, next_unit, part_range, partial_line, share_keys, unit_share
from anystride.kernels.softmax import LN_2, LOG2_E

ROWS = gl.constexpr(64)  # of a tile: those of a warpgroup's product
MASKED = gl.constexpr(-1.0e33)
NOTHING = gl.constexpr(-1.0e30)  # the reference without keys: above MASKED, whose weight it makes 0
# The halves of the two buffers. Each has one barrier that says that it is free, and two that say that it is
# full: products begin with the first quarter of a tile.
LEFT0, RIGHT0, LEFT1, RIGHT1 = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2), gl.constexpr(3)

SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))  # [ROWS, TILE]
ROW = gl.constexpr(gl.SliceLayout(1, SCORES.value))
KEY = gl.constexpr(gl.SliceLayout(0, SCORES.value))
EACH_WARP = gl.constexpr(gl.BlockedLayout([2], [32], [4], [0]))  # [ROWS], all of them in every warp
SLACK = gl.constexpr(8.0)  # how far, in powers of two, scores may lie above the reference of their row


@gluon.jit
def copy_half(half, ptr, rows, mask, first_full, D_HALF: gl.constexpr, LAYOUT: gl.constexpr):
    """Start to copy rows into a half of a tile; its first quarter is full on its own."""
    copy_rows(half.slice(0, D_HALF // 2, dim=1), ptr, rows, mask, D_HALF // 2, LAYOUT)
    async_copy.mbarrier_arrive(first_full, increment_count=False)
    copy_rows(half.slice(D_HALF // 2, D_HALF // 2, dim=1), ptr + D_HALF // 2, rows, mask, D_HALF // 2, LAYOUT)


@gluon.jit
def copy_pairs(
    pairs, key_begin, key_end, first_key, v_smem, k_smem, full, empty, q_ready, k_ptr, k, v_ptr, v,
    k_start, table_ptr, stride_table_block, D_HALF: gl.constexpr, D_K: gl.constexpr, VECTOR: gl.constexpr,
    BLOCK_SIZE: gl.constexpr, BLOCKS_PER_PAGE: gl.constexpr, ONE_ROW: gl.constexpr, HAS_LEFT: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """Fill the halves with a share's pairs of tiles, row by row; returns the pairs so far."""
    left0 = v_smem.index(0).slice(0, D_HALF, dim=1)
    right0 = v_smem.index(0).slice(D_HALF, D_HALF, dim=1)
    left1 = v_smem.index(1).slice(0, D_HALF, dim=1)
    right1 = v_smem.index(1).slice(D_HALF, D_HALF, dim=1)
    positions0 = key_begin + gl.arange(0, TILE, gl.SliceLayout(1, LAYOUT))
    for _key in range(key_begin, tl.maximum(key_end, key_begin + 1), 2 * TILE):
        phase = (pairs & 1) ^ 1
        positions1 = positions0 + TILE
        block0, mask0 = find_blocks(
            positions0, first_key, key_end, table_ptr, stride_table_block, BLOCK_SIZE, HAS_LEFT
        )
        block1, mask1 = find_blocks(
            positions1, first_key, key_end, table_ptr, stride_table_block, BLOCK_SIZE, HAS_LEFT
        )
        rows0 = row_offsets(block0, positions0, k_start, v, VECTOR, BLOCK_SIZE, BLOCKS_PER_PAGE)
        rows1 = row_offsets(block1, positions1, k_start, v, VECTOR, BLOCK_SIZE, BLOCKS_PER_PAGE)
        mbarrier.wait(empty[LEFT0], phase)
        copy_half(left0, v_ptr, rows0, mask0, full[2 * LEFT0], D_HALF, LAYOUT)
        async_copy.mbarrier_arrive(full[2 * LEFT0 + 1], increment_count=False)
        mbarrier.wait(empty[RIGHT0], phase)
        copy_half(right0, v_ptr + D_HALF, rows0, mask0, full[2 * RIGHT0], D_HALF, LAYOUT)
        if not ONE_ROW:
            rows0 = row_offsets(block0, positions0, k_start, k, VECTOR, BLOCK_SIZE, BLOCKS_PER_PAGE)
        copy_rows(k_smem.index(0), k_ptr, rows0, mask0, D_K, LAYOUT)
        async_copy.mbarrier_arrive(full[2 * RIGHT0 + 1], increment_count=False)
        if pairs == 0:
            mbarrier.wait(q_ready, 0)  # the queries and one tile are wanted first
        mbarrier.wait(empty[RIGHT1], phase)
        copy_half(right1, v_ptr + D_HALF, rows1, mask1, full[2 * RIGHT1], D_HALF, LAYOUT)
        async_copy.mbarrier_arrive(full[2 * RIGHT1 + 1], increment_count=False)
        mbarrier.wait(empty[LEFT1], phase)
        copy_half(left1, v_ptr, rows1, mask1, full[2 * LEFT1], D_HALF, LAYOUT)
        if not ONE_ROW:
            rows1 = row_offsets(block1, positions1, k_start, k, VECTOR, BLOCK_SIZE, BLOCKS_PER_PAGE)
        copy_rows(k_smem.index(1), k_ptr, rows1, mask1, D_K, LAYOUT)
        async_copy.mbarrier_arrive(full[2 * LEFT1 + 1], increment_count=False)
        pairs += 1
        positions0 += 2 * TILE
    return pairs


@gluon.jit
def load_half(
    block, key, first_key, key_end, half, rope, boxes, first_box, rope_boxes, first_full, last_full,
    k_ptr, k, v_ptr, v, k_map, v_map, k_start, table_ptr, stride_table_block, kv_head,
    AT: gl.constexpr, WITH_ROPE: gl.constexpr,
    D_HALF: gl.constexpr, D_K: gl.constexpr, VECTOR: gl.constexpr,
    BLOCK_SIZE: gl.constexpr, BLOCKS_PER_PAGE: gl.constexpr, K_AT: gl.constexpr, V_AT: gl.constexpr,
    HAS_LEFT: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Start to fill one half of a tile, from dimension AT on, and its rope piece if it goes with it."""
    if is_whole(key, first_key, key_end):
        QUARTER: gl.constexpr = D_HALF // 2
        mbarrier.expect(first_full, TILE * QUARTER * 2)
        load_boxes(
            boxes, first_box, v_map, V_AT + AT, block, key, k_start, kv_head, first_full,
            QUARTER, BLOCK_SIZE, BLOCKS_PER_PAGE,
        )  # fmt: skip
        mbarrier.arrive(first_full, count=PRODUCERS - 1)
        mbarrier.expect(last_full, TILE * (QUARTER + D_K * WITH_ROPE) * 2)
        load_boxes(
            boxes, first_box + QUARTER // COLUMNS, v_map, V_AT + AT + QUARTER, block, key, k_start, kv_head,
            last_full, QUARTER, BLOCK_SIZE, BLOCKS_PER_PAGE,
        )  # fmt: skip
        if WITH_ROPE:
            load_boxes(
                rope_boxes, first_box // (2 * D_HALF // COLUMNS), k_map, K_AT, block, key, k_start, kv_head,
                last_full, D_K, BLOCK_SIZE, BLOCKS_PER_PAGE,
            )  # fmt: skip
        mbarrier.arrive(last_full, count=PRODUCERS - 1)
    else:
        positions = key + gl.arange(0, TILE, gl.SliceLayout(1, LAYOUT))
        ids, mask = find_blocks(
            positions, first_key, key_end, table_ptr, stride_table_block, BLOCK_SIZE, HAS_LEFT
        )
        rows = row_offsets(ids, positions, k_start, v, VECTOR, BLOCK_SIZE, BLOCKS_PER_PAGE)
        copy_rows(half, v_ptr + AT, rows, mask, D_HALF, LAYOUT)
        if WITH_ROPE:
            rows = row_offsets(ids, positions, k_start, k, VECTOR, BLOCK_SIZE, BLOCKS_PER_PAGE)
            copy_rows(rope, k_ptr, rows, mask, D_K, LAYOUT)
        # What comes by TMA needs no fence; so that the consumers have none, it is here for what does not.
        async_copy.commit_group()
        async_copy.wait_group(0)
        fence_async_shared()
        mbarrier.arrive(first_full, count=PRODUCERS)
        mbarrier.arrive(last_full, count=PRODUCERS)


@gluon.jit
def is_whole(key, first_key, key_end):
    """Whether all keys of a tile are there."""
    return (key >= first_key) & (key + TILE <= key_end)


@gluon.jit
def block_of(key, first_key, key_end, table_ptr, stride_table_block, BLOCK_SIZE: gl.constexpr):
    """The id of the block in which a tile lies, if all of its keys are there."""
    block = key
    if BLOCK_SIZE > 0:
        entry = (key // BLOCK_SIZE).to(gl.int64)
        block = gl.load(
            table_ptr + entry * stride_table_block, mask=is_whole(key, first_key, key_end), other=0
        )
    return block


@gluon.jit
def load_pairs(
    pairs, key_begin, key_end, first_key, v_smem, k_smem, full, empty, q_ready, k_ptr, k, v_ptr, v,
    k_map, v_map, k_start, table_ptr, stride_table_block, kv_head,
    D_HALF: gl.constexpr, D_K: gl.constexpr, VECTOR: gl.constexpr,
    BLOCK_SIZE: gl.constexpr, BLOCKS_PER_PAGE: gl.constexpr, K_AT: gl.constexpr, V_AT: gl.constexpr,
    HAS_LEFT: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """As ``copy_pairs``, but whole tiles come by TMA."""
    HALF: gl.constexpr = D_HALF // COLUMNS  # boxes
    v_boxes = boxes_of(v_smem, 4 * HALF)
    k_boxes = boxes_of(k_smem, 2)
    rope0 = k_smem.index(0)
    rope1 = k_smem.index(1)
    left0 = v_smem.index(0).slice(0, D_HALF, dim=1)
    right0 = v_smem.index(0).slice(D_HALF, D_HALF, dim=1)
    left1 = v_smem.index(1).slice(0, D_HALF, dim=1)
    right1 = v_smem.index(1).slice(D_HALF, D_HALF, dim=1)
    for key0 in range(key_begin, tl.maximum(key_end, key_begin + 1), 2 * TILE):
        phase = (pairs & 1) ^ 1
        key1 = key0 + TILE
        block0 = block_of(key0, first_key, key_end, table_ptr, stride_table_block, BLOCK_SIZE)
        block1 = block_of(key1, first_key, key_end, table_ptr, stride_table_block, BLOCK_SIZE)
        mbarrier.wait(empty[LEFT0], phase)
        load_half(
            block0, key0, first_key, key_end, left0, rope0, v_boxes, 0, k_boxes,
            full[2 * LEFT0], full[2 * LEFT0 + 1], k_ptr, k, v_ptr, v, k_map, v_map, k_start, table_ptr,
            stride_table_block, kv_head,
            0, False, D_HALF, D_K, VECTOR, BLOCK_SIZE, BLOCKS_PER_PAGE, K_AT, V_AT, HAS_LEFT, LAYOUT,
        )  # fmt: skip
        mbarrier.wait(empty[RIGHT0], phase)
        load_half(
            block0, key0, first_key, key_end, right0, rope0, v_boxes, HALF, k_boxes,
            full[2 * RIGHT0], full[2 * RIGHT0 + 1], k_ptr, k, v_ptr, v, k_map, v_map, k_start, table_ptr,
            stride_table_block, kv_head,
            D_HALF, True, D_HALF, D_K, VECTOR, BLOCK_SIZE, BLOCKS_PER_PAGE, K_AT, V_AT, HAS_LEFT, LAYOUT,
        )  # fmt: skip
        if pairs == 0:
            mbarrier.wait(q_ready, 0)  # the queries and one tile are wanted first
        mbarrier.wait(empty[RIGHT1], phase)
        load_half(
            block1, key1, first_key, key_end, right1, rope1, v_boxes, 3 * HALF, k_boxes,
            full[2 * RIGHT1], full[2 * RIGHT1 + 1], k_ptr, k, v_ptr, v, k_map, v_map, k_start, table_ptr,
            stride_table_block, kv_head,
            D_HALF, False, D_HALF, D_K, VECTOR, BLOCK_SIZE, BLOCKS_PER_PAGE, K_AT, V_AT, HAS_LEFT, LAYOUT,
        )  # fmt: skip
        mbarrier.wait(empty[LEFT1], phase)
        load_half(
            block1, key1, first_key, key_end, left1, rope1, v_boxes, 2 * HALF, k_boxes,
            full[2 * LEFT1], full[2 * LEFT1 + 1], k_ptr, k, v_ptr, v, k_map, v_map, k_start, table_ptr,
            stride_table_block, kv_head,
            0, True, D_HALF, D_K, VECTOR, BLOCK_SIZE, BLOCKS_PER_PAGE, K_AT, V_AT, HAS_LEFT, LAYOUT,
        )  # fmt: skip
        pairs += 1
    return pairs


@gluon.jit
def produce(
    v_smem, k_smem, full, empty, q_ready, walk, lengths, k_ptr, k, v_ptr, v, maps, table, kv_head, out, lse,
    D_HALF: gl.constexpr, D_K: gl.constexpr, VECTOR: gl.constexpr,
    BLOCK_SIZE: gl.constexpr, BLOCKS_PER_PAGE: gl.constexpr, K_AT: gl.constexpr, V_AT: gl.constexpr,
    GROUP_SIZE: gl.constexpr, SCHEDULED: gl.constexpr, FIXED_SPLITS: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, SHARDED: gl.constexpr, BY_TMA: gl.constexpr,
):  # fmt: skip
    """Fill the halves of the two buffers, in the order in which they become free."""
    LANES: gl.constexpr = min(D_K, COLUMNS) // VECTOR
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, VECTOR], [32 // LANES, LANES], [PRODUCERS // 32, 1], [1, 0])
    part = gl.program_id(2)
    seq, unit, step, end_seq, end_unit, end_step = part_range(part, walk, SCHEDULED)
    first_seq = seq
    pairs = 0
    while is_before(seq, unit, step, end_seq, end_unit, end_step):
        _start, num_tokens, length, total, units, _row, step, stop_step, _whole, exists = unit_share(
            seq, unit, step, end_seq, end_unit, end_step, first_seq, part, walk, lengths, gl.program_id(0),
            GROUP_SIZE, ROWS, SCHEDULED, FIXED_SPLITS, HAS_LEFT, HAS_RIGHT, SHARDED,
        )  # fmt: skip
        if exists:
            first_key, key_begin, key_end = share_keys(
                unit, step, stop_step, num_tokens, length, total, walk,
                GROUP_SIZE, HAS_LEFT, HAS_RIGHT, SHARDED,
            )  # fmt: skip
            k_start, table_ptr = find_sequence(seq, lengths, table, BLOCK_SIZE)
            if BY_TMA:
                pairs = load_pairs(
                    pairs, key_begin, key_end, first_key, v_smem, k_smem, full, empty, q_ready,
                    k_ptr, k, v_ptr, v, maps[0], maps[1], k_start, table_ptr, table[2], kv_head,
                    D_HALF, D_K, VECTOR, BLOCK_SIZE, BLOCKS_PER_PAGE, K_AT, max(V_AT, 0), HAS_LEFT, LAYOUT,
                )  # fmt: skip
            else:
                pairs = copy_pairs(
                    pairs, key_begin, key_end, first_key, v_smem, k_smem, full, empty, q_ready,
                    k_ptr, k, v_ptr, v, k_start, table_ptr, table[2],
                    D_HALF, D_K, VECTOR, BLOCK_SIZE, BLOCKS_PER_PAGE, V_AT >= 0, HAS_LEFT, LAYOUT,
                )  # fmt: skip
        seq, unit, step = next_unit(seq, unit, step, units, SCHEDULED)
    if SCHEDULED:
        answer_foreign(walk, lengths, out, lse, kv_head, GROUP_SIZE, 2 * D_HALF)


@gluon.jit
def keep_limits(
    limits_smem, first_row, first_centre, walk, GROUP_SIZE: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """Put the first and the last position that each row sees into shared memory: few tiles ask for them."""
    centre = first_centre + (first_row + gl.arange(0, ROWS, ROW)) // GROUP_SIZE
    if HAS_LEFT:
        limits_smem.index(0).store(centre - walk[6])
    if HAS_RIGHT:
        limits_smem.index(1).store(centre + walk[7])


@gluon.jit
def mask_scores(
    scores, limits_smem, key, all_begin, all_end, first_key, key_end,
    softmax_scale, softcap, cp_rank, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr, CP_WORLD_SIZE: gl.constexpr, CP_INTERLEAVE: gl.constexpr,
):  # fmt: skip
    """The scores of a tile in base 2, ``[ROWS, TILE]``: those that a row does not see are MASKED."""
    scores = in_base_2(scores, softmax_scale, softcap, HAS_SOFTCAP)
    if CP_WORLD_SIZE > 1 or (key < all_begin) | (key + TILE > all_end):
        positions = gl.expand_dims(key + gl.arange(0, TILE, KEY), 0)
        first = positions
        last = positions
        if HAS_LEFT:
            first = gl.expand_dims(limits_smem.index(0).load(ROW), 1)
        if HAS_RIGHT:
            last = gl.expand_dims(limits_smem.index(1).load(ROW), 1)
        visible = is_visible(
            positions, first, last, first_key, key_end, cp_rank, HAS_LEFT, HAS_RIGHT,
            CP_WORLD_SIZE, CP_INTERLEAVE,
        )  # fmt: skip
        scores = gl.where(visible, scores, MASKED)
    return scores


@gluon.jit
def next_reference(reference, scores):
    """What weights are relative to from now on: a new maximum only where it lies far above the old one.

    Weights are at most ``2 ** SLACK``, and accumulators need hardly ever be scaled after the first tiles.
    Source: FlashAttention-4's conditional rescaling, https://github.com/Dao-AILab/flash-attention.
    """
    top = gl.max(scores, 1)
    return gl.where(top > reference + SLACK, top, reference)


@gluon.jit
def has_changed(known, reference_smem):
    """``(whether any row has a reference that is not known, the references)``: each warp asks for itself."""
    new = reference_smem.load(EACH_WARP)
    return gl.max((new != known).to(gl.int32), 0) > 0, new


@gluon.jit
def rescale(acc, row_sum, old, new, ACC_ROW: gl.constexpr):
    """What has been summed relative to old references, relative to new ones."""
    shrink = gl.exp2(old - new)
    return acc * gl.expand_dims(gl.convert_layout(shrink, ACC_ROW), 1), row_sum * shrink


@gluon.jit
def wait_full(bar, phase, BY_TMA: gl.constexpr):
    """Wait for a half of a tile; wgmma sees what TMA wrote, and what threads wrote behind a fence."""
    mbarrier.wait(bar, phase)
    if not BY_TMA:
        fence_async_shared()


@gluon.jit
def score_half(
    q_v, v_tile, scores, first_full, last_full, phase, AT: gl.constexpr, D_HALF: gl.constexpr,
    USE_ACC: gl.constexpr, BY_TMA: gl.constexpr,
):  # fmt: skip
    """Start the products of one half of the latent, each quarter of it as soon as it is there."""
    QUARTER: gl.constexpr = D_HALF // 2
    wait_full(first_full, phase, BY_TMA)
    keys = v_tile.slice(AT, QUARTER, dim=1).permute((1, 0))
    scores = warpgroup_mma(q_v.slice(AT, QUARTER, dim=1), keys, scores, use_acc=USE_ACC, is_async=True)
    wait_full(last_full, phase, BY_TMA)
    keys = v_tile.slice(AT + QUARTER, QUARTER, dim=1).permute((1, 0))
    return warpgroup_mma(q_v.slice(AT + QUARTER, QUARTER, dim=1), keys, scores, is_async=True)


@gluon.jit
def finish(
    q_half, acc, reference, row_sum, scale, other_sum, whole, q_start, first_row, num_rows, kv_head,
    first_line, sinks, out, lse, partial, first_dim, zero, GROUP_SIZE: gl.constexpr, D_HALF: gl.constexpr,
    IS_LEFT: gl.constexpr, OUT_UNIT: gl.constexpr, OUT_VECTOR: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Normalise one half of a unit's dimensions and write it: to ``out``, or to the partial results."""
    D_V: gl.constexpr = 2 * D_HALF
    offs_m = zero + gl.arange(0, ROWS, ROW)
    rows = first_row + offs_m
    row_mask = rows < num_rows
    head = kv_head * GROUP_SIZE + rows % GROUP_SIZE
    token = (q_start + rows // GROUP_SIZE).to(gl.int64)
    row_sum += other_sum
    some = row_sum > 0  # a row without keys stays empty, whatever its sink
    anchor = reference
    if sinks[0] is not None:
        sink = gl.load(sinks[0] + head * sinks[1], mask=row_mask, other=0.0).to(gl.float32)
        sink = gl.where(whole, sink * LOG2_E, MASKED)  # else the combine kernel adds it
        anchor = gl.maximum(reference, sink)
        row_sum = row_sum * gl.exp2(reference - anchor) + gl.exp2(sink - anchor)
    row_sum = gl.where(some, row_sum, 1.0)
    inverse = gl.where(some, gl.exp2(reference - anchor) / row_sum, 0.0)
    if scale is not None:
        inverse *= scale
    if IS_LEFT:
        row_lse = gl.where(some, anchor + gl.log2(row_sum), float("-inf"))
        if whole:
            if lse[0] is not None:
                gl.store(lse[0] + head.to(gl.int64) * lse[1] + token, row_lse * LN_2, mask=row_mask)
        else:
            gl.store(partial[0] + partial[1].to(gl.int64) * D_V + first_line + offs_m, row_lse)
    result = acc * gl.expand_dims(gl.convert_layout(inverse, gl.SliceLayout(1, LAYOUT)), 1)
    if whole:
        # By way of shared memory, where the queries were: rows are written 16 bytes a thread.
        dtype: gl.constexpr = out[0].dtype.element_ty
        q_half.store(result.to(dtype).to(q_half.dtype, bitcast=True))
        LANES: gl.constexpr = min(D_HALF // 8, 32)
        STORE: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [4, 1], [1, 0])
        out_rows = first_row + zero + gl.arange(0, ROWS, gl.SliceLayout(1, STORE))
        out_head = (kv_head * GROUP_SIZE + out_rows % GROUP_SIZE).to(gl.int64)
        out_token = (q_start + out_rows // GROUP_SIZE).to(gl.int64)
        row_offsets = gl.multiple_of(out_token * out[1] + out_head * out[2], OUT_VECTOR)
        offsets = (first_dim + gl.arange(0, D_HALF, gl.SliceLayout(0, STORE))).to(gl.int64)
        if not OUT_UNIT:
            offsets = offsets * out[3]
        ptrs = out[0] + (gl.expand_dims(row_offsets, 1) + gl.expand_dims(offsets, 0))
        values = q_half.load(STORE).to(dtype, bitcast=True)
        gl.store(ptrs, values, mask=gl.expand_dims(out_rows < num_rows, 1))
    else:
        acc_dims = first_dim + zero + gl.arange(0, D_HALF, gl.SliceLayout(0, LAYOUT))
        acc_m = zero + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
        piece_ptr = partial[0] + first_line * D_V
        gl.store(piece_ptr + (gl.expand_dims(acc_m * D_V, 1) + gl.expand_dims(acc_dims, 0)), result)


@gluon.jit
def consume_left(
    q_v_smem, q_k_smem, v_smem, k_smem, limits_smem, reference0_smem, reference1_smem,
    own_sum_smem, other_sum_smem,
    maxima_smem, full, empty, q_seen, q_ready, p0_ready, p1_ready, own_done, other_done,
    walk, lengths, q_v_ptr, q_v, q_k_ptr, q_k, q_descale, k_descale, v_descale,
    sinks, out, lse, partial,
    softmax_scale, softcap, cp_rank, kv_head, num_kv_heads,
    D_HALF: gl.constexpr, D_K: gl.constexpr, Q_VECTOR: gl.constexpr, GROUP_SIZE: gl.constexpr,
    SCHEDULED: gl.constexpr, FIXED_SPLITS: gl.constexpr,
    SHARES: gl.constexpr, LINES: gl.constexpr, DIMS: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, HAS_SOFTCAP: gl.constexpr,
    CP_WORLD_SIZE: gl.constexpr, CP_INTERLEAVE: gl.constexpr,
    OUT_UNIT: gl.constexpr, OUT_VECTOR: gl.constexpr, BY_TMA: gl.constexpr,
    FP8: gl.constexpr = False, ONE_ROW: gl.constexpr = True, NARROWED: gl.constexpr = False,
):  # fmt: skip
    """The warpgroup of the even tiles and of the left half of the output.

    ``zero`` is 0, which the compiler does not know: see ``mla_narrow_sm90.consume``.
    """
    SHARDED: gl.constexpr = CP_WORLD_SIZE > 1
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D_HALF, 16])
    ACC_ROW: gl.constexpr = gl.SliceLayout(1, ACC)
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    dtype: gl.constexpr = v_smem.dtype
    part = gl.program_id(2)
    seq, unit, step, end_seq, end_unit, end_step = part_range(part, walk, SCHEDULED)
    first_seq = seq
    first_unit = unit
    pairs = 0
    turn = 0  # units
    while is_before(seq, unit, step, end_seq, end_unit, end_step):
        q_start, num_tokens, length, total, units, first_row, step, stop_step, whole, exists = unit_share(
            seq, unit, step, end_seq, end_unit, end_step, first_seq, part, walk, lengths, gl.program_id(0),
            GROUP_SIZE, ROWS, SCHEDULED, FIXED_SPLITS, HAS_LEFT, HAS_RIGHT, SHARDED,
        )  # fmt: skip
        if exists:
            first_key, key_begin, key_end = share_keys(
                unit, step, stop_step, num_tokens, length, total, walk,
                GROUP_SIZE, HAS_LEFT, HAS_RIGHT, SHARDED,
            )  # fmt: skip
            num_rows = num_tokens * GROUP_SIZE
            score_scale = softmax_scale
            results_scale = None
            if FP8:
                score_scale, rope_scale, results_scale = factors(
                    score_scale, q_descale, k_descale, v_descale, seq, kv_head, ONE_ROW
                )
                warpgroup_barrier()  # or the compiler would ask for the factors behind the queries
            queries = load_queries(
                q_v_ptr, q_v, q_start, first_row, num_rows, kv_head, GROUP_SIZE, ROWS, D_HALF, Q_VECTOR
            )
            # Those that are narrowed are narrowed where they lie.
            q_v_smem.index(0).slice(0, D_HALF, dim=1).store(queries.to(dtype, bitcast=True))
            if NARROWED:
                most = largest_of_boxes(q_v_smem, 0, D_HALF // COLUMNS, q_v_ptr.dtype.element_ty)
                up, down = agree_on_powers(0, most, maxima_smem, q_seen, turn, ROW)
                narrow_boxes(q_v_smem, 0, D_HALF // COLUMNS, up, q_v_ptr.dtype.element_ty)
                score_scale = gl.expand_dims(down, 1) * score_scale  # [ROWS, 1]
            fence_async_shared()
            mbarrier.arrive(q_ready, count=1)
            all_begin, all_end = seen_by_all(
                first_row, num_rows, num_tokens, total, first_key, key_end, walk,
                GROUP_SIZE, ROWS, HAS_LEFT, HAS_RIGHT,
            )  # fmt: skip
            keep_limits(limits_smem, first_row, total - num_tokens, walk, GROUP_SIZE, HAS_LEFT, HAS_RIGHT)
            acc = gl.zeros([ROWS, D_HALF], gl.float32, ACC)
            row_sum = gl.zeros([ROWS], gl.float32, ROW)
            reference = gl.full([ROWS], NOTHING, gl.float32, ROW)
            known = gl.full([ROWS], NOTHING, gl.float32, EACH_WARP)  # the same once more
            mbarrier.wait(q_ready, turn & 1)
            zero = pairs >> 30
            v_tile = v_smem.index(zero)
            scores = gl.zeros([ROWS, TILE], gl.float32, SCORES)
            scores = score_half(
                q_v_smem.index(zero), v_tile, scores, full[2 * LEFT0], full[2 * LEFT0 + 1],
                pairs & 1, 0, D_HALF, False, BY_TMA,
            )  # fmt: skip
            scores = score_half(
                q_v_smem.index(zero), v_tile, scores, full[2 * RIGHT0], full[2 * RIGHT0 + 1],
                pairs & 1, D_HALF, D_HALF, True, BY_TMA,
            )  # fmt: skip
            rope = k_smem.index(zero).permute((1, 0))
            scores = warpgroup_mma(q_k_smem.index(zero), rope, scores, is_async=True)
            scores = warpgroup_mma_wait(0, deps=[scores])
            num_pairs = tl.maximum((key_end - key_begin + 2 * TILE - 1) // (2 * TILE), 1)
            for i in range(num_pairs):
                phase = pairs & 1
                zero = pairs >> 30
                v_tile0 = v_smem.index(zero)
                v_tile1 = v_smem.index(1 + zero)
                p0_smem = k_smem.index(zero)
                p1_smem = k_smem.index(1 + zero)
                scores = mask_scores(
                    scores, limits_smem, key_begin + i * 2 * TILE, all_begin, all_end, first_key, key_end,
                    score_scale, softcap, cp_rank, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP,
                    CP_WORLD_SIZE, CP_INTERLEAVE,
                )  # fmt: skip
                reference0 = next_reference(reference, scores)
                reference0_smem.store(reference0)
                weights = gl.exp2(scores - gl.expand_dims(reference0, 1))
                rounded = weights.to(dtype)
                sums = gl.sum(weights, 1)
                p0_smem.store(rounded)
                fence_async_shared()
                mbarrier.arrive(p0_ready, count=1)
                changed, known = has_changed(known, reference0_smem)
                if changed:
                    acc, row_sum = rescale(acc, row_sum, reference, reference0, ACC_ROW)
                row_sum += sums
                own = gl.convert_layout(rounded, WEIGHTS)
                acc = warpgroup_mma(own, v_tile0.slice(0, D_HALF, dim=1), acc, is_async=True)
                acc, own = warpgroup_mma_wait(0, deps=[acc, own])
                mbarrier.arrive(empty[LEFT0], count=1)
                mbarrier.wait(p1_ready, phase)
                reference = reference1_smem.load(ROW)
                changed, known = has_changed(known, reference1_smem)
                if changed:
                    acc, row_sum = rescale(acc, row_sum, reference0, reference, ACC_ROW)
                acc = warpgroup_mma(p1_smem, v_tile1.slice(0, D_HALF, dim=1), acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=[acc])
                mbarrier.arrive(empty[LEFT1], count=1)
                pairs += 1
                if i + 1 < num_pairs:
                    scores = gl.zeros([ROWS, TILE], gl.float32, SCORES)
                    scores = score_half(
                        q_v_smem.index(zero), v_tile0, scores, full[2 * LEFT0], full[2 * LEFT0 + 1],
                        phase ^ 1, 0, D_HALF, False, BY_TMA,
                    )  # fmt: skip
                    scores = score_half(
                        q_v_smem.index(zero), v_tile0, scores, full[2 * RIGHT0], full[2 * RIGHT0 + 1],
                        phase ^ 1, D_HALF, D_HALF, True, BY_TMA,
                    )  # fmt: skip
                    rope = p0_smem.permute((1, 0))
                    scores = warpgroup_mma(q_k_smem.index(zero), rope, scores, is_async=True)
                    scores = warpgroup_mma_wait(0, deps=[scores])
            own_sum_smem.store(row_sum)
            mbarrier.arrive(own_done, count=1)
            mbarrier.wait(other_done, turn & 1)
            first_line = partial_line(
                seq, unit, first_seq, first_unit, part, kv_head, num_kv_heads, walk[5], gl.program_id(0),
                ROWS, SCHEDULED,
            )  # fmt: skip
            finish(
                q_v_smem.index(0).slice(0, D_HALF, dim=1), acc, reference, row_sum, results_scale,
                other_sum_smem.load(ROW), whole, q_start, first_row, num_rows, kv_head, first_line,
                sinks, out, lse, partial, 0, gl.multiple_of(pairs >> 30, 16), GROUP_SIZE,
                D_HALF, True, OUT_UNIT, OUT_VECTOR, ACC,
            )  # fmt: skip
            turn += 1
        seq, unit, step = next_unit(seq, unit, step, units, SCHEDULED)
    if SHARES > 0:
        combine_cut_units(
            0, 2, end_seq < 0, walk, sinks, out, lse, partial, kv_head, num_kv_heads,
            GROUP_SIZE, ROWS, 2 * D_HALF, SHARES, LINES, DIMS, OUT_UNIT, OUT_VECTOR,
        )  # fmt: skip


@gluon.jit
def consume_right(
    q_v_smem, q_k_smem, v_smem, k_smem, limits_smem, reference0_smem, reference1_smem,
    own_sum_smem, other_sum_smem,
    maxima_smem, full, empty, q_seen, q_ready, p0_ready, p1_ready, own_done, other_done,
    walk, lengths, q_v_ptr, q_v, q_k_ptr, q_k, q_descale, k_descale, v_descale,
    sinks, out, lse, partial,
    softmax_scale, softcap, cp_rank, kv_head, num_kv_heads,
    D_HALF: gl.constexpr, D_K: gl.constexpr, Q_VECTOR: gl.constexpr, GROUP_SIZE: gl.constexpr,
    SCHEDULED: gl.constexpr, FIXED_SPLITS: gl.constexpr,
    SHARES: gl.constexpr, LINES: gl.constexpr, DIMS: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, HAS_SOFTCAP: gl.constexpr,
    CP_WORLD_SIZE: gl.constexpr, CP_INTERLEAVE: gl.constexpr,
    OUT_UNIT: gl.constexpr, OUT_VECTOR: gl.constexpr, BY_TMA: gl.constexpr,
    FP8: gl.constexpr = False, ONE_ROW: gl.constexpr = True, NARROWED: gl.constexpr = False,
):  # fmt: skip
    """The warpgroup of the odd tiles and of the right half of the output."""
    SHARDED: gl.constexpr = CP_WORLD_SIZE > 1
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D_HALF, 16])
    ACC_ROW: gl.constexpr = gl.SliceLayout(1, ACC)
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    dtype: gl.constexpr = v_smem.dtype
    part = gl.program_id(2)
    seq, unit, step, end_seq, end_unit, end_step = part_range(part, walk, SCHEDULED)
    first_seq = seq
    first_unit = unit
    pairs = 0
    turn = 0  # units
    while is_before(seq, unit, step, end_seq, end_unit, end_step):
        q_start, num_tokens, length, total, units, first_row, step, stop_step, whole, exists = unit_share(
            seq, unit, step, end_seq, end_unit, end_step, first_seq, part, walk, lengths, gl.program_id(0),
            GROUP_SIZE, ROWS, SCHEDULED, FIXED_SPLITS, HAS_LEFT, HAS_RIGHT, SHARDED,
        )  # fmt: skip
        if exists:
            first_key, key_begin, key_end = share_keys(
                unit, step, stop_step, num_tokens, length, total, walk,
                GROUP_SIZE, HAS_LEFT, HAS_RIGHT, SHARDED,
            )  # fmt: skip
            num_rows = num_tokens * GROUP_SIZE
            score_scale = softmax_scale
            results_scale = None
            if FP8:
                score_scale, rope_scale, results_scale = factors(
                    score_scale, q_descale, k_descale, v_descale, seq, kv_head, ONE_ROW
                )
                warpgroup_barrier()  # or the compiler would ask for the factors behind the queries
            queries = load_queries(
                q_v_ptr + D_HALF, q_v, q_start, first_row, num_rows, kv_head, GROUP_SIZE, ROWS, D_HALF,
                Q_VECTOR,
            )  # fmt: skip
            rope = load_queries(
                q_k_ptr, q_k, q_start, first_row, num_rows, kv_head, GROUP_SIZE, ROWS, D_K, Q_VECTOR
            )
            q_v_smem.index(0).slice(D_HALF, D_HALF, dim=1).store(queries.to(dtype, bitcast=True))
            if not ONE_ROW:  # once more rounded, but for a factor of 1 or another power of two
                rope = rope.to(gl.float32) * rope_scale
                if not NARROWED:
                    rope = rope.to(dtype)
            if NARROWED:
                BOXES: gl.constexpr = D_HALF // COLUMNS
                most = largest_of_boxes(q_v_smem, BOXES, BOXES, q_v_ptr.dtype.element_ty)
                up, down = agree_on_powers(1, larger(most, rope), maxima_smem, q_seen, turn, ROW)
                narrow_boxes(q_v_smem, BOXES, BOXES, up, q_v_ptr.dtype.element_ty)
                rope = scaled(rope, up, dtype)
                score_scale = gl.expand_dims(down, 1) * score_scale  # [ROWS, 1]
            q_k_smem.index(0).store(rope)
            fence_async_shared()
            mbarrier.arrive(q_ready, count=1)
            all_begin, all_end = seen_by_all(
                first_row, num_rows, num_tokens, total, first_key, key_end, walk,
                GROUP_SIZE, ROWS, HAS_LEFT, HAS_RIGHT,
            )  # fmt: skip
            keep_limits(limits_smem, first_row, total - num_tokens, walk, GROUP_SIZE, HAS_LEFT, HAS_RIGHT)
            acc = gl.zeros([ROWS, D_HALF], gl.float32, ACC)
            row_sum = gl.zeros([ROWS], gl.float32, ROW)
            reference = gl.full([ROWS], NOTHING, gl.float32, ROW)
            known = gl.full([ROWS], NOTHING, gl.float32, EACH_WARP)  # the same once more
            mbarrier.wait(q_ready, turn & 1)
            num_pairs = tl.maximum((key_end - key_begin + 2 * TILE - 1) // (2 * TILE), 1)
            for i in range(num_pairs):
                phase = pairs & 1
                zero = pairs >> 30
                v_tile0 = v_smem.index(zero)
                v_tile1 = v_smem.index(1 + zero)
                p0_smem = k_smem.index(zero)
                p1_smem = k_smem.index(1 + zero)
                scores = gl.zeros([ROWS, TILE], gl.float32, SCORES)
                scores = score_half(
                    q_v_smem.index(zero), v_tile1, scores, full[2 * RIGHT1], full[2 * RIGHT1 + 1],
                    phase, D_HALF, D_HALF, False, BY_TMA,
                )  # fmt: skip
                scores = score_half(
                    q_v_smem.index(zero), v_tile1, scores, full[2 * LEFT1], full[2 * LEFT1 + 1],
                    phase, 0, D_HALF, True, BY_TMA,
                )  # fmt: skip
                scores = warpgroup_mma(q_k_smem.index(zero), p1_smem.permute((1, 0)), scores, is_async=True)
                scores = warpgroup_mma_wait(0, deps=[scores])
                mbarrier.wait(p0_ready, phase)
                reference0 = reference0_smem.load(ROW)
                changed, known = has_changed(known, reference0_smem)
                if changed:
                    acc, row_sum = rescale(acc, row_sum, reference, reference0, ACC_ROW)
                # The left one's weights are multiplied while exponentials are taken here.
                flying = warpgroup_mma(p0_smem, v_tile0.slice(D_HALF, D_HALF, dim=1), acc, is_async=True)
                scores = mask_scores(
                    scores, limits_smem, key_begin + (i * 2 + 1) * TILE, all_begin, all_end, first_key,
                    key_end, score_scale, softcap, cp_rank, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP,
                    CP_WORLD_SIZE, CP_INTERLEAVE,
                )  # fmt: skip
                reference = next_reference(reference0, scores)
                reference1_smem.store(reference)
                weights = gl.exp2(scores - gl.expand_dims(reference, 1))
                rounded = weights.to(dtype)
                p1_smem.store(rounded)
                fence_async_shared()
                mbarrier.arrive(p1_ready, count=1)
                changed, known = has_changed(known, reference1_smem)
                sums = gl.sum(weights, 1)
                own = gl.convert_layout(rounded, WEIGHTS)
                acc = warpgroup_mma_wait(0, deps=[flying])
                mbarrier.arrive(empty[RIGHT0], count=1)
                if changed:
                    acc, row_sum = rescale(acc, row_sum, reference0, reference, ACC_ROW)
                row_sum += sums
                acc = warpgroup_mma(own, v_tile1.slice(D_HALF, D_HALF, dim=1), acc, is_async=True)
                acc, own = warpgroup_mma_wait(0, deps=[acc, own])
                mbarrier.arrive(empty[RIGHT1], count=1)
                pairs += 1
            own_sum_smem.store(row_sum)
            mbarrier.arrive(own_done, count=1)
            mbarrier.wait(other_done, turn & 1)
            first_line = partial_line(
                seq, unit, first_seq, first_unit, part, kv_head, num_kv_heads, walk[5], gl.program_id(0),
                ROWS, SCHEDULED,
            )  # fmt: skip
            finish(
                q_v_smem.index(0).slice(D_HALF, D_HALF, dim=1), acc, reference, row_sum, results_scale,
                other_sum_smem.load(ROW), whole, q_start, first_row, num_rows, kv_head, first_line,
                sinks, out, lse, partial, D_HALF, gl.multiple_of(pairs >> 30, 16), GROUP_SIZE,
                D_HALF, False, OUT_UNIT, OUT_VECTOR, ACC,
            )  # fmt: skip
            turn += 1
        seq, unit, step = next_unit(seq, unit, step, units, SCHEDULED)
    if SHARES > 0:
        combine_cut_units(
            1, 2, end_seq < 0, walk, sinks, out, lse, partial, kv_head, num_kv_heads,
            GROUP_SIZE, ROWS, 2 * D_HALF, SHARES, LINES, DIMS, OUT_UNIT, OUT_VECTOR,
        )  # fmt: skip


@gluon.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=UNALIGNED)
def mla_wide_kernel(
    q_ptr, stride_q_token, stride_q_head,
    q_v_ptr, stride_q_v_token, stride_q_v_head,
    k_ptr, stride_k_page, stride_k_block, stride_k_token, stride_k_head,
    v_ptr, stride_v_page, stride_v_block, stride_v_token, stride_v_head,
    k_map, v_map,  # tensor maps of the cache; None without TMA, and of V where it lies in K's rows
    block_table_ptr, stride_table_seq, stride_table_block,
    cu_seqlens_q_ptr, stride_cu_q,
    cu_seqlens_k_ptr, stride_cu_k,
    seqused_k_ptr, stride_seqused,
    cp_tot_ptr, stride_cp_tot,
    sinks_ptr, stride_sinks,
    metadata_ptr,
    out_ptr, stride_out_token, stride_out_head, stride_out_dim,
    lse_ptr, stride_lse_head,
    partial_ptr, partial_lines,
    softmax_scale: gl.float32, softcap: gl.float32,
    batch, window_left, window_right, cp_rank,
    units_per_seq, splits_per_unit, steps_per_split, rows_per_unit,
    GROUP_SIZE: gl.constexpr,
    BLOCK_SIZE: gl.constexpr, BLOCKS_PER_PAGE: gl.constexpr,  # BLOCK_SIZE 0: no block table
    D_V: gl.constexpr, D_K: gl.constexpr,  # of the latent, of the rope piece
    K_AT: gl.constexpr,  # where the rope piece begins in K's row
    V_AT: gl.constexpr,  # where V does; -1: its queries are q_v
    VECTOR: gl.constexpr, Q_VECTOR: gl.constexpr,  # elements that every row of the cache, of q is aligned to
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, HAS_SOFTCAP: gl.constexpr,
    CP_WORLD_SIZE: gl.constexpr, CP_INTERLEAVE: gl.constexpr,
    OUT_UNIT: gl.constexpr, OUT_VECTOR: gl.constexpr,
    SCHEDULED: gl.constexpr, FIXED_SPLITS: gl.constexpr,
    SEQUENCES: gl.constexpr,  # at most, of which each program finds its part itself; 0: the schedule has it
    SHARES: gl.constexpr, LINES: gl.constexpr, DIMS: gl.constexpr,  # combined at once; 0: not here
    BY_TMA: gl.constexpr,  # whole tiles come through the tensor maps
    CONSUMER_REGISTERS: gl.constexpr,  # the producer's are what is left
):  # fmt: skip
    """Attention of the rows of each unit over its keys, for one part.

    Grid: ``(row tiles of a unit, num_kv_heads, parts)``, four warps. Parts and partial results are as those
    of ``decode_kernel``: ``[slots, num_kv_heads, rows_per_unit, D_V]``, then the lse.
    """
    gdc_launch_dependents()
    SHARDED: gl.constexpr = CP_WORLD_SIZE > 1
    D_HALF: gl.constexpr = D_V // 2
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    LATENT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, D_V], dtype)
    ROPE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, D_K], dtype)
    q_v_smem = gl.allocate_shared_memory(dtype, [1, ROWS, D_V], LATENT)
    q_k_smem = gl.allocate_shared_memory(dtype, [1, ROWS, D_K], ROPE)
    v_smem = gl.allocate_shared_memory(dtype, [2, TILE, D_V], LATENT)
    k_smem = gl.allocate_shared_memory(dtype, [2, TILE, D_K], ROPE)
    limits0_smem = gl.allocate_shared_memory(gl.int32, [2, ROWS], PLAIN)
    limits1_smem = gl.allocate_shared_memory(gl.int32, [2, ROWS], PLAIN)
    reference0_smem = gl.allocate_shared_memory(gl.float32, [ROWS], PLAIN)
    reference1_smem = gl.allocate_shared_memory(gl.float32, [ROWS], PLAIN)
    sum0_smem = gl.allocate_shared_memory(gl.float32, [ROWS], PLAIN)
    sum1_smem = gl.allocate_shared_memory(gl.float32, [ROWS], PLAIN)
    full = (
        barrier(PRODUCERS), barrier(PRODUCERS), barrier(PRODUCERS), barrier(PRODUCERS),
        barrier(PRODUCERS), barrier(PRODUCERS), barrier(PRODUCERS), barrier(PRODUCERS),
    )  # fmt: skip
    empty = (barrier(1), barrier(1), barrier(1), barrier(1))
    q_ready = barrier(2)
    p0_ready = barrier(1)
    p1_ready = barrier(1)
    done0 = barrier(1)
    done1 = barrier(1)

    kv_head = gl.program_id(1)
    latent_ptr = q_v_ptr
    latent = (stride_q_v_token, stride_q_v_head)
    if V_AT >= 0:
        latent_ptr = q_ptr + V_AT
        latent = (stride_q_token, stride_q_head)
    rope = (stride_q_token, stride_q_head)
    # A base off 16 bytes: Triton knows nothing of it unless it is told.
    BYTES: gl.constexpr = VECTOR * dtype.primitive_bitwidth // 8
    k_base = gl.multiple_of(k_ptr + (kv_head.to(gl.int64) * stride_k_head + K_AT), BYTES)
    v_base = gl.multiple_of(v_ptr + kv_head.to(gl.int64) * stride_v_head, BYTES)
    k = (stride_k_page, stride_k_block, stride_k_token)
    v = (stride_v_page, stride_v_block, stride_v_token)
    table = (block_table_ptr, stride_table_seq, stride_table_block)
    walk = (
        metadata_ptr, batch, units_per_seq, splits_per_unit, steps_per_split, rows_per_unit,
        window_left, window_right, None,
    )  # fmt: skip
    lengths = (
        cu_seqlens_q_ptr, stride_cu_q, cu_seqlens_k_ptr, stride_cu_k, seqused_k_ptr, stride_seqused,
        cp_tot_ptr, stride_cp_tot,
    )  # fmt: skip
    maps = (k_map, v_map)
    if V_AT >= 0:
        maps = (k_map, k_map)
    sinks = (sinks_ptr, stride_sinks)
    out = (out_ptr, stride_out_token, stride_out_head, stride_out_dim)
    lse = (lse_ptr, stride_lse_head)
    partial = (partial_ptr, partial_lines)
    if SEQUENCES > 0:
        walk = with_own_part(walk, lengths, GROUP_SIZE, HAS_LEFT and HAS_RIGHT and not SHARDED, SEQUENCES)
    # The left warpgroup has more values under way at once, and needs a little more.
    none = reference0_smem  # no maxima of queries, nor a barrier for them: nobody looks at them
    gl.warp_specialize([
        (produce, (
            v_smem, k_smem, full, empty, q_ready, walk, lengths, k_base, k, v_base, v, maps, table, kv_head,
            out, lse, D_HALF, D_K, VECTOR, BLOCK_SIZE, BLOCKS_PER_PAGE, K_AT, V_AT,
            GROUP_SIZE, SCHEDULED, FIXED_SPLITS, HAS_LEFT, HAS_RIGHT, SHARDED, BY_TMA,
        )),
        (consume_left, (
            q_v_smem, q_k_smem, v_smem, k_smem, limits0_smem, reference0_smem, reference1_smem,
            sum0_smem, sum1_smem,
            none, full, empty, q_ready, q_ready, p0_ready, p1_ready, done0, done1,
            walk, lengths, latent_ptr, latent, q_ptr + K_AT, rope, None, None, None,
            sinks, out, lse, partial,
            softmax_scale, softcap, cp_rank, kv_head, gl.num_programs(1),
            D_HALF, D_K, Q_VECTOR, GROUP_SIZE, SCHEDULED, FIXED_SPLITS, SHARES, LINES, DIMS,
            HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, CP_WORLD_SIZE, CP_INTERLEAVE, OUT_UNIT, OUT_VECTOR, BY_TMA,
        )),
        (consume_right, (
            q_v_smem, q_k_smem, v_smem, k_smem, limits1_smem, reference0_smem, reference1_smem,
            sum1_smem, sum0_smem,
            none, full, empty, q_ready, q_ready, p0_ready, p1_ready, done1, done0,
            walk, lengths, latent_ptr, latent, q_ptr + K_AT, rope, None, None, None,
            sinks, out, lse, partial,
            softmax_scale, softcap, cp_rank, kv_head, gl.num_programs(1),
            D_HALF, D_K, Q_VECTOR, GROUP_SIZE, SCHEDULED, FIXED_SPLITS, SHARES, LINES, DIMS,
            HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, CP_WORLD_SIZE, CP_INTERLEAVE, OUT_UNIT, OUT_VECTOR, BY_TMA,
        )),
    ], [4, 4], [CONSUMER_REGISTERS + 8, CONSUMER_REGISTERS - 8])  # fmt: skip
