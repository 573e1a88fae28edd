"""MLA on Hopper for up to 32 rows: keys and dimensions on the long side of wgmma, rows on the short one.

Scores are ``K q^T``, ``[64 keys, rows]``, and the accumulator is ``V^T p``, ``[d_v, rows]``: no tensor-core
work is spent on rows that are not there. Two consumer warpgroups take the tiles of 64 keys in turn, each with
a buffer, a maximum, a sum and an accumulator of its own; they meet at the beginning and at the end of a unit
only. A producer warpgroup fills the buffers.

A tile has two pieces in shared memory: the latent, which is V and a part of K, and the rope piece, which is
K's alone. Where they lie in the cache, in one row or in two buffers, is a matter of pointers and strides.
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
    with_own_part,
)
from anystride.kernels.combine_sm90 import combine_cut_units
from anystride.kernels.loaders_sm90 import (
    COLUMNS,
    PRODUCERS,
    TILE,
    barrier,
    copy_rows,
    find_blocks,
    find_sequence,
    row_offsets,
)
from anystride.kernels.parts import is_before, next_unit, part_range, partial_line, share_keys, unit_share
from anystride.kernels.softmax import LN_2, LOG2_E

PLAIN_2D = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))


@gluon.jit
def produce(
    v_smem, k_smem, full, empty, walk, lengths, k_ptr, k, v_ptr, v, table, kv_head, out, lse,
    D_V: gl.constexpr, D_K: gl.constexpr, VECTOR: gl.constexpr,
    BLOCK_SIZE: gl.constexpr, BLOCKS_PER_PAGE: gl.constexpr, ONE_ROW: gl.constexpr,
    GROUP_SIZE: gl.constexpr, TILE_M: gl.constexpr, SCHEDULED: gl.constexpr, FIXED_SPLITS: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, SHARDED: gl.constexpr,
):  # fmt: skip
    """Fill the two buffers in turn with the tiles of the part."""
    LANES: gl.constexpr = min(D_K, COLUMNS) // VECTOR
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, VECTOR], [32 // LANES, LANES], [PRODUCERS // 32, 1], [1, 0])
    offs_n = gl.arange(0, TILE, gl.SliceLayout(1, LAYOUT))
    part = gl.program_id(2)
    seq, unit, step, end_seq, end_unit, end_step = part_range(part, walk, SCHEDULED)
    first_seq = seq
    tiles = 0
    while is_before(seq, unit, step, end_seq, end_unit, end_step):
        _start, num_tokens, length, total, units, _row, step, stop_step, _whole, exists = unit_share(
            seq, unit, step, end_seq, end_unit, end_step, first_seq, part, walk, lengths, gl.program_id(0),
            GROUP_SIZE, TILE_M, SCHEDULED, FIXED_SPLITS, HAS_LEFT, HAS_RIGHT, SHARDED,
        )  # fmt: skip
        if exists:
            first_key, key_begin, key_end = share_keys(
                unit, step, stop_step, num_tokens, length, total, walk,
                GROUP_SIZE, HAS_LEFT, HAS_RIGHT, SHARDED,
            )  # fmt: skip
            k_start, table_ptr = find_sequence(seq, lengths, table, BLOCK_SIZE)
            positions = key_begin + offs_n
            block, mask = find_blocks(
                positions, first_key, key_end, table_ptr, table[2], BLOCK_SIZE, HAS_LEFT
            )
            for _key in range(key_begin, key_end, TILE):
                v_rows = row_offsets(block, positions, k_start, v, VECTOR, BLOCK_SIZE, BLOCKS_PER_PAGE)
                k_rows = v_rows
                if not ONE_ROW:
                    k_rows = row_offsets(block, positions, k_start, k, VECTOR, BLOCK_SIZE, BLOCKS_PER_PAGE)
                buffer = tiles & 1
                mbarrier.wait(empty.index(buffer), ((tiles >> 1) & 1) ^ 1)
                copy_rows(v_smem.index(buffer), v_ptr, v_rows, mask, D_V, LAYOUT)
                copy_rows(k_smem.index(buffer), k_ptr, k_rows, mask, D_K, LAYOUT)
                async_copy.mbarrier_arrive(full.index(buffer), increment_count=False)
                tiles += 1
                # The next tile's block ids are fetched while this one is on its way.
                positions += TILE
                block, mask = find_blocks(
                    positions, first_key, key_end, table_ptr, table[2], BLOCK_SIZE, HAS_LEFT
                )
        seq, unit, step = next_unit(seq, unit, step, units, SCHEDULED)
    if SCHEDULED:
        answer_foreign(walk, lengths, out, lse, kv_head, GROUP_SIZE, D_V)


@gluon.jit
def weigh(
    scores, row_max, prob_sum, p_smem, key, score_scale, softcap, before, first_row, all_begin, all_end,
    first_key, key_end, walk, cp_rank, LAYOUT: gl.constexpr, GROUP_SIZE: gl.constexpr, HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr, HAS_SOFTCAP: gl.constexpr, CP_WORLD_SIZE: gl.constexpr,
    CP_INTERLEAVE: gl.constexpr,
):  # fmt: skip
    """Weights of a tile's keys into ``p_smem``, from their scores, and what becomes of maxima and sums.

    ``before``: the position of the sequence's first query token.
    """
    TILE_M: gl.constexpr = scores.shape[1]
    scores = in_base_2(scores, score_scale, softcap, HAS_SOFTCAP)
    if CP_WORLD_SIZE > 1 or (key < all_begin) | (key + TILE > all_end):
        offs_m = gl.arange(0, TILE_M, gl.SliceLayout(0, LAYOUT))
        offs_n = gl.arange(0, TILE, gl.SliceLayout(1, LAYOUT))
        centre = before + (first_row + offs_m) // GROUP_SIZE
        visible = is_visible(
            gl.expand_dims(key + offs_n, 1), gl.expand_dims(centre - walk[6], 0),
            gl.expand_dims(centre + walk[7], 0), first_key, key_end, cp_rank,
            HAS_LEFT, HAS_RIGHT, CP_WORLD_SIZE, CP_INTERLEAVE,
        )  # fmt: skip
        scores = gl.where(visible, scores, float("-inf"))
    new_max = gl.maximum(row_max, gl.max(scores, 0))
    anchor = gl.where(new_max == float("-inf"), 0.0, new_max)
    shrink = gl.exp2(row_max - anchor)
    probs = gl.exp2(scores - gl.expand_dims(anchor, 0))  # [TILE, TILE_M]
    p_smem.store(probs.to(p_smem.dtype))
    return new_max, prob_sum * gl.expand_dims(shrink, 0) + probs, shrink


@gluon.jit
def finish(
    W: gl.constexpr, accs, row_max, prob_sum, factor, own_stats, other_stats, given, taken, own_done,
    other_done, turn, zero, q_start, first_row, num_rows, whole, first_line, kv_head, sinks, out, lse,
    partial, PIECES: gl.constexpr, GROUP_SIZE: gl.constexpr, OUT_UNIT: gl.constexpr,
    EARLY: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Write a unit's results, times ``factor`` unless that is None.

    Both warpgroups have a result over their own tiles, in PIECES along its dimensions. Each gives the other
    a half of them in ``given``, and finishes the others: warpgroup 0 the first half.
    """
    ROW: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    D: gl.constexpr = accs[0].shape[0]
    TILE_M: gl.constexpr = accs[0].shape[1]
    HALF: gl.constexpr = (PIECES + 1) // 2
    OWN: gl.constexpr = 0 if W == 0 else HALF  # the first of those to finish
    OWNED: gl.constexpr = HALF if W == 0 else PIECES - HALF
    offs_m = gl.arange(0, TILE_M, ROW)
    rows = first_row + zero + offs_m  # [TILE_M]
    row_mask = rows < num_rows
    head = kv_head * GROUP_SIZE + rows % GROUP_SIZE
    row_sum = gl.sum(prob_sum, 0)
    own_stats.index(0).store(row_max)
    own_stats.index(1).store(row_sum)
    if W == 1 or EARLY:
        for i in gl.static_range(PIECES - OWNED):
            given[i].store(accs[HALF - OWN + i])
        mbarrier.arrive(own_done, count=1)
    mbarrier.wait(other_done, turn & 1)
    other_max = other_stats.index(0).load(ROW)
    other_sum = other_stats.index(1).load(ROW)
    top = gl.maximum(row_max, other_max)
    if sinks[0] is not None:
        sink = gl.load(sinks[0] + head * sinks[1], mask=row_mask, other=0.0).to(gl.float32)
        sink = gl.where(whole, sink * LOG2_E, float("-inf"))  # else the combine kernel adds it
        top = gl.maximum(top, sink)
    anchor = gl.where(top == float("-inf"), 0.0, top)
    own_weight = gl.exp2(row_max - anchor)
    other_weight = gl.exp2(other_max - anchor)
    row_sum = row_sum * own_weight + other_sum * other_weight
    some = row_sum > 0  # a row without keys stays empty, whatever its sink
    if sinks[0] is not None:
        row_sum += gl.exp2(sink - anchor)
    row_sum = gl.where(some, row_sum, 1.0)
    inverse = gl.where(some, 1.0 / row_sum, 0.0)

    if factor is not None:
        inverse *= factor
    partial_ptr = partial[0] + first_line * (PIECES * D)
    token = (q_start + rows // GROUP_SIZE).to(gl.int64)
    out_rows = token * out[1] + head.to(gl.int64) * out[2]
    if W == 0:
        row_lse = gl.where(some, anchor + gl.log2(row_sum), float("-inf"))
        if whole:
            if lse[0] is not None:
                ptrs = lse[0] + head.to(gl.int64) * lse[1] + token
                gl.store(ptrs, row_lse * LN_2, mask=row_mask)
        else:
            behind = partial[1].to(gl.int64) * (PIECES * D)
            gl.store(partial[0] + behind + first_line + offs_m, row_lse)
    results = ()
    for i in gl.static_range(OWNED):
        acc = accs[OWN + i] * gl.expand_dims(own_weight, 0)
        results = results + (acc + taken[i].load(LAYOUT) * gl.expand_dims(other_weight, 0),)
    if W == 0 and not EARLY:  # one place for both halves: it was free only now
        for i in gl.static_range(PIECES - OWNED):
            given[i].store(accs[HALF + i])
        mbarrier.arrive(own_done, count=1)
    if whole:
        for i in gl.static_range(OWNED):
            offsets = ((OWN + i) * D + zero + gl.arange(0, D, gl.SliceLayout(1, LAYOUT))).to(gl.int64)
            if not OUT_UNIT:
                offsets = offsets * out[3]
            places = gl.expand_dims(offsets, 1) + gl.expand_dims(out_rows, 0)
            result = (results[i] * gl.expand_dims(inverse, 0)).to(out[0].dtype.element_ty)
            gl.store(out[0] + places, result, mask=gl.expand_dims(row_mask, 0))
    else:
        for i in gl.static_range(OWNED):
            dims = (OWN + i) * D + zero + gl.arange(0, D, gl.SliceLayout(1, LAYOUT))
            lines = gl.expand_dims(dims, 1) + gl.expand_dims(offs_m * (PIECES * D), 0)
            gl.store(partial_ptr + lines, results[i] * gl.expand_dims(inverse, 0))


@gluon.jit
def consume(
    W: gl.constexpr, q_v_smem, q_k_smem, v_smem, k_smem, p_smem, own_stats, other_stats, given, taken,
    full, empty, q_ready, own_done, other_done, walk, lengths, q_k_ptr, q_k, q_v_ptr, q_v,
    sinks, out, lse, partial, softmax_scale, softcap, cp_rank, kv_head, num_kv_heads,
    D_V0: gl.constexpr, D_V1: gl.constexpr, D_K: gl.constexpr, Q_VECTOR: gl.constexpr,
    GROUP_SIZE: gl.constexpr, TILE_M: gl.constexpr, SCHEDULED: gl.constexpr, FIXED_SPLITS: gl.constexpr,
    SHARES: gl.constexpr, LINES: gl.constexpr, DIMS: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, HAS_SOFTCAP: gl.constexpr,
    CP_WORLD_SIZE: gl.constexpr, CP_INTERLEAVE: gl.constexpr,
    OUT_UNIT: gl.constexpr, OUT_VECTOR: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """Warpgroup W of the two: every second tile of the part, and a half of each result.

    ``zero`` is 0, which the compiler does not know. An index that it knows would make it form all descriptors
    of all products ahead of the loops, and all addresses of the results ahead of the walk, and spill them.
    """
    SHARDED: gl.constexpr = CP_WORLD_SIZE > 1
    # Scores and accumulators have one layout, [keys or dimensions, rows]: what belongs to rows fits both.
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_M, 16])
    ROW: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    tile_in_unit = gl.program_id(0)
    part = gl.program_id(2)
    seq, unit, step, end_seq, end_unit, end_step = part_range(part, walk, SCHEDULED)
    first_seq = seq
    first_unit = unit
    tiles = 0  # of both warpgroups
    own_tiles = 0
    turn = 0  # units
    while is_before(seq, unit, step, end_seq, end_unit, end_step):
        q_start, num_tokens, length, total, units, first_row, step, stop_step, whole, exists = unit_share(
            seq, unit, step, end_seq, end_unit, end_step, first_seq, part, walk, lengths, tile_in_unit,
            GROUP_SIZE, TILE_M, SCHEDULED, FIXED_SPLITS, HAS_LEFT, HAS_RIGHT, SHARDED,
        )  # fmt: skip
        if exists:
            first_key, key_begin, key_end = share_keys(
                unit, step, stop_step, num_tokens, length, total, walk,
                GROUP_SIZE, HAS_LEFT, HAS_RIGHT, SHARDED,
            )  # fmt: skip
            num_rows = num_tokens * GROUP_SIZE
            # Each warpgroup brings a half of the queries.
            q_tile = q_v_smem.index(0)
            if W == 0:
                queries = load_queries(
                    q_v_ptr, q_v, q_start, first_row, num_rows, kv_head, GROUP_SIZE, TILE_M, D_V0, Q_VECTOR
                )
                q_tile.slice(0, D_V0, dim=1).store(queries)
            else:
                rope = load_queries(
                    q_k_ptr, q_k, q_start, first_row, num_rows, kv_head, GROUP_SIZE, TILE_M, D_K, Q_VECTOR
                )
                if D_V1 > 0:
                    queries = load_queries(
                        q_v_ptr + D_V0, q_v, q_start, first_row, num_rows, kv_head, GROUP_SIZE, TILE_M,
                        D_V1, Q_VECTOR,
                    )  # fmt: skip
                    q_tile.slice(D_V0, D_V1, dim=1).store(queries)
                q_k_smem.index(0).store(rope)
            fence_async_shared()
            mbarrier.arrive(q_ready, count=1)

            all_begin, all_end = seen_by_all(
                first_row, num_rows, num_tokens, total, first_key, key_end, walk,
                GROUP_SIZE, TILE_M, HAS_LEFT, HAS_RIGHT,
            )  # fmt: skip
            acc0 = gl.zeros([D_V0, TILE_M], gl.float32, LAYOUT)
            if D_V1 > 0:
                acc1 = gl.zeros([D_V1, TILE_M], gl.float32, LAYOUT)
            row_max = gl.full([TILE_M], float("-inf"), gl.float32, ROW)
            prob_sum = gl.zeros([TILE, TILE_M], gl.float32, LAYOUT)  # summed over keys at the end only
            mbarrier.wait(q_ready, turn & 1)
            num_tiles = tl.maximum(key_end - key_begin + TILE - 1, 0) // TILE
            for i in range((W + tiles) & 1, num_tiles, 2):
                zero = own_tiles >> 30
                v_tile = v_smem.index(W + zero)
                k_tile = k_smem.index(W + zero)
                mbarrier.wait(full.index(W), own_tiles & 1)
                fence_async_shared()
                scores = gl.zeros([TILE, TILE_M], gl.float32, LAYOUT)
                scores = warpgroup_mma(
                    v_tile, q_v_smem.index(zero).permute((1, 0)), scores, use_acc=False, is_async=True
                )
                scores = warpgroup_mma(k_tile, q_k_smem.index(zero).permute((1, 0)), scores, is_async=True)
                scores = warpgroup_mma_wait(0, deps=[scores])
                row_max, prob_sum, shrink = weigh(
                    scores, row_max, prob_sum, p_smem, key_begin + i * TILE, softmax_scale, softcap,
                    total - num_tokens, first_row + zero, all_begin, all_end, first_key, key_end, walk,
                    cp_rank, LAYOUT, GROUP_SIZE, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, CP_WORLD_SIZE,
                    CP_INTERLEAVE,
                )  # fmt: skip
                fence_async_shared()
                acc0 = acc0 * gl.expand_dims(shrink, 0)
                v_half = v_tile.slice(0, D_V0, dim=1).permute((1, 0))
                acc0 = warpgroup_mma(v_half, p_smem, acc0, is_async=True)
                if D_V1 > 0:
                    acc1 = acc1 * gl.expand_dims(shrink, 0)
                    v_half = v_tile.slice(D_V0, D_V1, dim=1).permute((1, 0))
                    acc1 = warpgroup_mma(v_half, p_smem, acc1, is_async=True)
                    acc0, acc1 = warpgroup_mma_wait(0, deps=[acc0, acc1])
                else:
                    acc0 = warpgroup_mma_wait(0, deps=[acc0])
                mbarrier.arrive(empty.index(W), count=1)
                own_tiles += 1
            tiles += num_tiles

            if D_V1 > 0:
                accs = (acc0, acc1)
            else:
                accs = (acc0,)
            first_line = partial_line(
                seq, unit, first_seq, first_unit, part, kv_head, num_kv_heads, walk[5], tile_in_unit,
                TILE_M, SCHEDULED,
            )  # fmt: skip
            finish(
                W, accs, row_max, prob_sum, None, own_stats, other_stats, (given,), (taken,), own_done,
                other_done, turn, own_tiles >> 30, q_start, first_row, num_rows, whole, first_line, kv_head,
                sinks, out, lse, partial, (D_V0 + D_V1) // D_V0, GROUP_SIZE, OUT_UNIT, EARLY, LAYOUT,
            )  # fmt: skip
            turn += 1
        seq, unit, step = next_unit(seq, unit, step, units, SCHEDULED)
    if SHARES > 0:
        combine_cut_units(
            W, 2, end_seq < 0, walk, sinks, out, lse, partial, kv_head, num_kv_heads,
            GROUP_SIZE, TILE_M, D_V0 + D_V1, SHARES, LINES, DIMS, OUT_UNIT, OUT_VECTOR,
        )  # fmt: skip


@gluon.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=UNALIGNED)
def mla_narrow_kernel(
    q_ptr, stride_q_token, stride_q_head,
    q_v_ptr, stride_q_v_token, stride_q_v_head,
    k_ptr, stride_k_page, stride_k_block, stride_k_token, stride_k_head,
    v_ptr, stride_v_page, stride_v_block, stride_v_token, stride_v_head,
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
    TILE_M: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,  # the producer's are what is left
):  # fmt: skip
    """Attention of the rows of each unit over its keys, for one part.

    Grid: ``(row tiles of a unit, num_kv_heads, parts)``, four warps. Parts and partial results are as those
    of ``decode_kernel``: ``[slots, num_kv_heads, rows_per_unit, D_V]``, then the lse.
    """
    gdc_launch_dependents()
    SHARDED: gl.constexpr = CP_WORLD_SIZE > 1
    D_V0: gl.constexpr = min(D_V, 256)
    D_V1: gl.constexpr = D_V - D_V0
    EARLY: gl.constexpr = TILE_M <= 16  # there is room to exchange both halves at once
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    LATENT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, D_V], dtype)
    ROPE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, D_K], dtype)
    PROBS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, TILE_M], dtype)
    q_v_smem = gl.allocate_shared_memory(dtype, [1, TILE_M, D_V], LATENT)
    q_k_smem = gl.allocate_shared_memory(dtype, [1, TILE_M, D_K], ROPE)
    v_smem = gl.allocate_shared_memory(dtype, [2, TILE, D_V], LATENT)
    k_smem = gl.allocate_shared_memory(dtype, [2, TILE, D_K], ROPE)
    p_smem0 = gl.allocate_shared_memory(dtype, [TILE, TILE_M], PROBS)
    p_smem1 = gl.allocate_shared_memory(dtype, [TILE, TILE_M], PROBS)
    stats0 = gl.allocate_shared_memory(gl.float32, [2, TILE_M], PLAIN)
    stats1 = gl.allocate_shared_memory(gl.float32, [2, TILE_M], PLAIN)
    half0 = gl.allocate_shared_memory(gl.float32, [D_V0, TILE_M], PLAIN_2D)
    half1 = half0
    if EARLY and D_V1 > 0:
        half1 = gl.allocate_shared_memory(gl.float32, [D_V1, TILE_M], PLAIN_2D)
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(full.index(i), count=PRODUCERS)
        mbarrier.init(empty.index(i), count=1)
    q_ready = barrier(2)
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
    sinks = (sinks_ptr, stride_sinks)
    out = (out_ptr, stride_out_token, stride_out_head, stride_out_dim)
    lse = (lse_ptr, stride_lse_head)
    partial = (partial_ptr, partial_lines)
    if SEQUENCES > 0:
        walk = with_own_part(walk, lengths, GROUP_SIZE, HAS_LEFT and HAS_RIGHT and not SHARDED, SEQUENCES)
    gl.warp_specialize([
        (produce, (
            v_smem, k_smem, full, empty, walk, lengths, k_base, k, v_base, v, table, kv_head, out, lse,
            D_V, D_K, VECTOR, BLOCK_SIZE, BLOCKS_PER_PAGE, V_AT >= 0,
            GROUP_SIZE, TILE_M, SCHEDULED, FIXED_SPLITS, HAS_LEFT, HAS_RIGHT, SHARDED,
        )),
        (consume, (
            0, q_v_smem, q_k_smem, v_smem, k_smem, p_smem0, stats0, stats1, half1, half0,
            full, empty, q_ready, done0, done1, walk, lengths, q_ptr + K_AT, rope, latent_ptr, latent,
            sinks, out, lse, partial, softmax_scale, softcap, cp_rank, kv_head, gl.num_programs(1),
            D_V0, D_V1, D_K, Q_VECTOR, GROUP_SIZE, TILE_M, SCHEDULED, FIXED_SPLITS,
            SHARES, LINES, DIMS, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, CP_WORLD_SIZE, CP_INTERLEAVE,
            OUT_UNIT, OUT_VECTOR, EARLY,
        )),
        (consume, (
            1, q_v_smem, q_k_smem, v_smem, k_smem, p_smem1, stats1, stats0, half0, half1,
            full, empty, q_ready, done1, done0, walk, lengths, q_ptr + K_AT, rope, latent_ptr, latent,
            sinks, out, lse, partial, softmax_scale, softcap, cp_rank, kv_head, gl.num_programs(1),
            D_V0, D_V1, D_K, Q_VECTOR, GROUP_SIZE, TILE_M, SCHEDULED, FIXED_SPLITS,
            SHARES, LINES, DIMS, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, CP_WORLD_SIZE, CP_INTERLEAVE,
            OUT_UNIT, OUT_VECTOR, EARLY,
        )),
    ], [4, 4], [CONSUMER_REGISTERS, CONSUMER_REGISTERS])  # fmt: skip
