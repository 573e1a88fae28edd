"""GQA, MQA and MHA on Hopper: keys and dimensions on the long side of wgmma, rows on the short one.

Scores are ``K q^T``, ``[64 keys, rows]``, and the accumulator is ``V^T p``, ``[d_v, rows]``: no tensor-core
work is spent on rows that are not there. A producer warpgroup fills a ring of tiles, and one that computes
empties it. Two such programs share a processor where two fit: one multiplies while the other one takes
exponentials.

K and V are two addresses and two sets of strides, whatever lies between them: halves of a buffer, neighbours
in a row, or two allocations.
"""

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
from anystride.kernels.decode import descale
from anystride.kernels.fp8_sm90 import (
    copy_scales,
    factor_of,
    in_operand_order,
    larger,
    largest,
    load_operand,
    powers_of_two,
    scaled,
)
from anystride.kernels.loaders_sm90 import (
    PRODUCERS,
    TILE,
    copy_rows,
    find_blocks,
    find_sequence,
    row_offsets,
    span,
)
from anystride.kernels.parts import is_before, next_unit, part_range, partial_line, share_keys, unit_share
from anystride.kernels.ranges import positions_over_ranks
from anystride.kernels.softmax import LN_2, LOG2_E

# Elements of a row that are copied at a time. Where rows begin off a line of 128 bytes, 256 bytes lie in
# three lines and twice 128 in four.
COLUMNS = gl.constexpr(128)


@gluon.jit
def produce(
    k_smem, v_smem, k_scales_smem, v_scales_smem, k_full, v_full, empty, walk, lengths, k_ptr, k, v_ptr, v,
    k_scales, v_scales, table, kv_head, out, lse,
    D_QK: gl.constexpr, D_V: gl.constexpr, VECTOR: gl.constexpr, STAGES: gl.constexpr,
    BLOCK_SIZE: gl.constexpr, BLOCKS_PER_PAGE: gl.constexpr,
    GROUP_SIZE: gl.constexpr, TILE_M: gl.constexpr, SCHEDULED: gl.constexpr, FIXED_SPLITS: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, SHARDED: gl.constexpr,
):  # fmt: skip
    """Fill the ring with the tiles of the part."""
    MOST: gl.constexpr = min(COLUMNS, 32 * VECTOR)  # a row's piece is copied by one warp
    LANES: gl.constexpr = min(span(D_QK, MOST), span(D_V, MOST)) // VECTOR
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, VECTOR], [32 // LANES, LANES], [PRODUCERS // 32, 1], [1, 0])
    offs_n = gl.arange(0, TILE, gl.SliceLayout(1, LAYOUT))
    part = gl.program_id(2)
    seq, unit, step, end_seq, end_unit, end_step = part_range(part, walk, SCHEDULED)
    first_seq = seq
    stage = 0
    phase = 1  # what an empty ring has behind it
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
                k_rows = row_offsets(block, positions, k_start, k, VECTOR, BLOCK_SIZE, BLOCKS_PER_PAGE)
                v_rows = row_offsets(block, positions, k_start, v, VECTOR, BLOCK_SIZE, BLOCKS_PER_PAGE)
                mbarrier.wait(empty.index(stage), phase)
                copy_rows(k_smem.index(stage), k_ptr, k_rows, mask, D_QK, LAYOUT, MOST)
                if k_scales[0] is not None:
                    copy_scales(
                        k_scales_smem.index(stage), k_scales, kv_head, 0, block, positions, k_start, mask,
                        BLOCK_SIZE, BLOCKS_PER_PAGE,
                    )  # fmt: skip
                async_copy.mbarrier_arrive(k_full.index(stage), increment_count=False)
                copy_rows(v_smem.index(stage), v_ptr, v_rows, mask, D_V, LAYOUT, MOST)
                if v_scales[0] is not None:
                    copy_scales(
                        v_scales_smem.index(stage), v_scales, kv_head, 0, block, positions, k_start, mask,
                        BLOCK_SIZE, BLOCKS_PER_PAGE,
                    )  # fmt: skip
                async_copy.mbarrier_arrive(v_full.index(stage), increment_count=False)
                stage += 1
                if stage == STAGES:
                    stage = stage * 0
                    phase ^= 1
                # The next tile's block ids are fetched while this one is on its way.
                positions += TILE
                block, mask = find_blocks(
                    positions, first_key, key_end, table_ptr, table[2], BLOCK_SIZE, HAS_LEFT
                )
        seq, unit, step = next_unit(seq, unit, step, units, SCHEDULED)
    if SCHEDULED:
        answer_foreign(walk, lengths, out, lse, kv_head, GROUP_SIZE, D_V)


@gluon.constexpr_function
def piece_width(width):
    """Elements of a row's first piece as registers hold it: a power of two, and at most COLUMNS."""
    return min(1 << (width.bit_length() - 1), COLUMNS.value)


@gluon.jit
def store_queries(
    q_tile, q_ptr, q, q_start, first_row, num_rows, kv_head, D_QK: gl.constexpr, GROUP_SIZE: gl.constexpr,
    TILE_M: gl.constexpr, Q_VECTOR: gl.constexpr, ROW: gl.constexpr,
):  # fmt: skip
    """Bring the queries for an fp8 cache, in the tile's dtype and in the order of its keys.

    Returns:
        What their scores are to be multiplied with, float32 ``[TILE_M]``.
    """
    LEFT: gl.constexpr = piece_width(D_QK)
    RIGHT: gl.constexpr = D_QK - LEFT
    left = load_queries(q_ptr, q, q_start, first_row, num_rows, kv_head, GROUP_SIZE, TILE_M, LEFT, Q_VECTOR)
    right = left
    if RIGHT > 0:
        right = load_queries(
            q_ptr + LEFT, q, q_start, first_row, num_rows, kv_head, GROUP_SIZE, TILE_M, RIGHT, Q_VECTOR
        )
    if q_tile.dtype == left.dtype:
        down = gl.full([TILE_M], 1.0, gl.float32, ROW)
    else:
        most = largest(left)
        if RIGHT > 0:
            most = larger(most, right)
        up, down = powers_of_two(most)
        left = scaled(left, up, q_tile.dtype)
        if RIGHT > 0:
            right = scaled(right, up, q_tile.dtype)
        down = gl.convert_layout(down, ROW)
    q_tile.slice(0, LEFT, dim=1).store(in_operand_order(left))
    if RIGHT > 0:
        q_tile.slice(LEFT, RIGHT, dim=1).store(in_operand_order(right))
    return down


@gluon.jit
def score_fp8(k_tile, q_tile, scores, D_QK: gl.constexpr, LAYOUT: gl.constexpr):
    """Start to score a tile of fp8 keys, in registers.

    Returns:
        ``(scores, keys)``, both in use until the products are waited for.
    """
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, LAYOUT, 2)
    LEFT: gl.constexpr = piece_width(D_QK)
    RIGHT: gl.constexpr = D_QK - LEFT
    keys = load_operand(k_tile.slice(0, LEFT, dim=1), k_tile, LEFT, False, q_tile.dtype)
    keys = gl.convert_layout(in_operand_order(keys), OPERAND, assert_trivial=True)
    scores = warpgroup_mma(
        keys, q_tile.slice(0, LEFT, dim=1).permute((1, 0)), scores, use_acc=False, is_async=True
    )
    if RIGHT > 0:
        left = keys
        keys = load_operand(k_tile.slice(LEFT, RIGHT, dim=1), k_tile, RIGHT, False, q_tile.dtype)
        keys = gl.convert_layout(in_operand_order(keys), OPERAND, assert_trivial=True)
        scores, left = warpgroup_mma_wait(0, deps=[scores, left])
        scores = warpgroup_mma(keys, q_tile.slice(LEFT, RIGHT, dim=1).permute((1, 0)), scores, is_async=True)
    return scores, keys


@gluon.jit
def consume(
    q_smem, k_smem, v_smem, k_scales_smem, v_scales_smem, wide_v_smem, p_smem,
    k_full, v_full, empty, walk, lengths, q_ptr, q, q_descale, k_descale, v_descale,
    alibi, sinks, out, lse, partial, softmax_scale, softcap, cp_rank, kv_head, num_kv_heads,
    D_QK: gl.constexpr, D_V: gl.constexpr, Q_VECTOR: gl.constexpr, STAGES: gl.constexpr,
    GROUP_SIZE: gl.constexpr, TILE_M: gl.constexpr, SCHEDULED: gl.constexpr, FIXED_SPLITS: gl.constexpr,
    SHARES: gl.constexpr, LINES: gl.constexpr, DIMS: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, HAS_SOFTCAP: gl.constexpr,
    CP_WORLD_SIZE: gl.constexpr, CP_INTERLEAVE: gl.constexpr,
    OUT_UNIT: gl.constexpr, OUT_VECTOR: gl.constexpr,
    K_SCALED: gl.constexpr, V_SCALED: gl.constexpr,
):  # fmt: skip
    """The tiles of the part, one after the other, and the results of its units.

    ``zero`` is 0, which the compiler does not know. An index that it knows would make it form all descriptors
    of all products ahead of the loops, and all addresses of the results ahead of the walk, and spill them.
    """
    SHARDED: gl.constexpr = CP_WORLD_SIZE > 1
    FP8: gl.constexpr = k_smem.dtype.primitive_bitwidth == 8
    # Products are made of pieces that are powers of two: 96 is 64 and 32, 192 is 128 and 64.
    K_SIZE: gl.constexpr = k_smem.shape[2]
    D_K0: gl.constexpr = K_SIZE if D_QK == K_SIZE else K_SIZE // 2
    D_K1: gl.constexpr = D_QK - D_K0
    V_SIZE: gl.constexpr = v_smem.shape[2]
    # Scores and the accumulator have one layout, [keys or dimensions, rows]: what belongs to rows fits both.
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_M, 16])
    ROW: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    KEY: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    PIECE: gl.constexpr = D_QK & -D_QK  # of a query
    # An accumulator of 128 registers a thread, or of 64 beside keys that are converted in registers.
    FULL: gl.constexpr = V_SIZE * TILE_M > (4096 if FP8 else 8192)
    tile_in_unit = gl.program_id(0)
    part = gl.program_id(2)
    offs_m = gl.arange(0, TILE_M, ROW)
    offs_n = gl.arange(0, TILE, KEY)
    seq, unit, step, end_seq, end_unit, end_step = part_range(part, walk, SCHEDULED)
    first_seq = seq
    first_unit = unit
    stage = 0
    phase = 0
    tiles = 0
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
            if FP8:
                down = store_queries(
                    q_smem.index(0), q_ptr, q, q_start, first_row, num_rows, kv_head, D_QK, GROUP_SIZE,
                    TILE_M, Q_VECTOR, ROW,
                )  # fmt: skip
            for i in gl.static_range(0 if FP8 else D_QK // PIECE):
                queries = load_queries(
                    q_ptr + i * PIECE, q, q_start, first_row, num_rows, kv_head, GROUP_SIZE, TILE_M, PIECE,
                    Q_VECTOR,
                )  # fmt: skip
                q_smem.index(0).slice(i * PIECE, PIECE, dim=1).store(queries)
            rows = first_row + offs_m
            row_mask = rows < num_rows
            head = kv_head * GROUP_SIZE + rows % GROUP_SIZE
            if alibi[0] is not None:
                slope_ptrs = alibi[0] + (seq.to(gl.int64) * alibi[1] + head.to(gl.int64) * alibi[2])
                slope = gl.load(slope_ptrs, mask=row_mask, other=0.0).to(gl.float32) * LOG2_E
            all_begin, all_end = seen_by_all(
                first_row, num_rows, num_tokens, total, first_key, key_end, walk,
                GROUP_SIZE, TILE_M, HAS_LEFT, HAS_RIGHT,
            )  # fmt: skip
            score_scale = softmax_scale
            if FP8:
                score_scale *= descale(q_descale[0], q_descale[1], q_descale[2], seq, kv_head)
                score_scale *= factor_of(k_descale, seq, kv_head)
                score_scale = gl.expand_dims(down, 0) * score_scale  # [1, TILE_M]
            acc = gl.zeros([V_SIZE, TILE_M], gl.float32, LAYOUT)
            row_max = gl.full([TILE_M], float("-inf"), gl.float32, ROW)
            row_sum = gl.zeros([TILE_M], gl.float32, ROW)
            if not FULL:
                prob_sum = gl.zeros([TILE, TILE_M], gl.float32, LAYOUT)  # summed over keys at the end only
            for key in range(key_begin, key_end, TILE):
                zero = tiles >> 30
                q_tile = q_smem.index(zero)
                k_tile = k_smem.index(stage)
                mbarrier.wait(k_full.index(stage), phase)
                scores = gl.zeros([TILE, TILE_M], gl.float32, LAYOUT)
                if FP8:
                    if K_SCALED:
                        k_scale = k_scales_smem.index(stage).load(KEY)
                    scores, keys = score_fp8(k_tile, q_tile, scores, D_QK, LAYOUT)
                else:
                    fence_async_shared()
                    scores = warpgroup_mma(
                        k_tile.slice(0, D_K0, dim=1), q_tile.slice(0, D_K0, dim=1).permute((1, 0)), scores,
                        use_acc=False, is_async=True,
                    )  # fmt: skip
                if not FP8 and D_K1 > 0:
                    scores = warpgroup_mma(
                        k_tile.slice(D_K0, D_K1, dim=1), q_tile.slice(D_K0, D_K1, dim=1).permute((1, 0)),
                        scores, is_async=True,
                    )  # fmt: skip
                v_tile = v_smem.index(stage)
                if FP8:  # while products are under way
                    v_tile = wide_v_smem.index(zero)
                    mbarrier.wait(v_full.index(stage), phase)
                    PART: gl.constexpr = min(V_SIZE, COLUMNS)
                    for i in gl.static_range(V_SIZE // PART):
                        values = load_operand(
                            v_smem.index(stage).slice(i * PART, PART, dim=1), v_scales_smem.index(stage),
                            PART, V_SCALED, v_tile.dtype,
                        )  # fmt: skip
                        v_tile.slice(i * PART, PART, dim=1).store(values)
                    mbarrier.arrive(empty.index(stage), count=1)
                    scores, keys = warpgroup_mma_wait(0, deps=[scores, keys])
                else:
                    scores = warpgroup_mma_wait(0, deps=[scores])
                if K_SCALED:
                    scores *= gl.expand_dims(k_scale, 1)
                scores = in_base_2(scores, score_scale, softcap, HAS_SOFTCAP)
                if alibi[0] is not None:
                    centre = total - num_tokens + (first_row + zero + offs_m) // GROUP_SIZE
                    where = positions_over_ranks(key + offs_n, cp_rank, CP_WORLD_SIZE, CP_INTERLEAVE)
                    apart = gl.expand_dims(centre, 0) - gl.expand_dims(where, 1)
                    scores -= gl.expand_dims(slope, 0) * gl.abs(apart).to(gl.float32)
                if SHARDED or (key < all_begin) | (key + TILE > all_end):
                    centre = total - num_tokens + (first_row + zero + offs_m) // GROUP_SIZE
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
                if FULL:
                    row_sum = row_sum * shrink + gl.sum(probs, 0)
                else:
                    prob_sum = prob_sum * gl.expand_dims(shrink, 0) + probs
                row_max = new_max
                p_smem.store(probs.to(p_smem.dtype))
                acc = acc * gl.expand_dims(shrink, 0)
                if not FP8:
                    mbarrier.wait(v_full.index(stage), phase)
                fence_async_shared()
                acc = warpgroup_mma(v_tile.permute((1, 0)), p_smem, acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=[acc])
                if not FP8:
                    mbarrier.arrive(empty.index(stage), count=1)
                tiles += 1
                stage += 1
                if stage == STAGES:
                    stage = stage * 0
                    phase ^= 1

            zero = tiles >> 30
            rows = first_row + zero + offs_m  # [TILE_M]
            row_mask = rows < num_rows
            head = (kv_head * GROUP_SIZE + rows % GROUP_SIZE).to(gl.int64)
            if not FULL:
                row_sum = gl.sum(prob_sum, 0)
            some = row_sum > 0  # a row without keys stays empty, whatever its sink
            anchor = gl.where(row_max == float("-inf"), 0.0, row_max)
            if sinks[0] is not None:
                sink = gl.load(sinks[0] + head * sinks[1], mask=row_mask, other=0.0).to(gl.float32)
                sink = gl.where(whole, sink * LOG2_E, float("-inf"))  # else who combines adds it
                top = gl.maximum(row_max, sink)
                anchor = gl.where(top == float("-inf"), 0.0, top)
                shrink = gl.exp2(row_max - anchor)
                row_sum = row_sum * shrink + gl.exp2(sink - anchor)
                acc = acc * gl.expand_dims(shrink, 0)
            row_sum = gl.where(some, row_sum, 1.0)
            inverse = gl.where(some, 1.0 / row_sum, 0.0)
            if FP8:
                inverse *= factor_of(v_descale, seq, kv_head)
            row_lse = gl.where(some, anchor + gl.log2(row_sum), float("-inf"))
            result = acc * gl.expand_dims(inverse, 0)
            token = (q_start + rows // GROUP_SIZE).to(gl.int64)
            dims = zero + gl.arange(0, V_SIZE, KEY)
            dim_mask = gl.expand_dims(dims < D_V, 1)
            if whole:
                if lse[0] is not None:
                    gl.store(lse[0] + head * lse[1] + token, row_lse * LN_2, mask=row_mask)
                offsets = dims.to(gl.int64)
                if not OUT_UNIT:
                    offsets = offsets * out[3]
                out_rows = token * out[1] + head * out[2]
                out_ptrs = out[0] + (gl.expand_dims(offsets, 1) + gl.expand_dims(out_rows, 0))
                mask = gl.expand_dims(row_mask, 0) & dim_mask
                gl.store(out_ptrs, result.to(out[0].dtype.element_ty), mask=mask)
            else:
                first_line = partial_line(
                    seq, unit, first_seq, first_unit, part, kv_head, num_kv_heads, walk[5], tile_in_unit,
                    TILE_M, SCHEDULED,
                )  # fmt: skip
                gl.store(partial[0] + partial[1].to(gl.int64) * D_V + first_line + offs_m, row_lse)
                partial_ptrs = partial[0] + first_line * D_V
                partial_ptrs += gl.expand_dims(dims, 1) + gl.expand_dims(offs_m * D_V, 0)
                gl.store(partial_ptrs, result, mask=dim_mask)
        seq, unit, step = next_unit(seq, unit, step, units, SCHEDULED)
    if SHARES > 0:
        combine_cut_units(
            0, 1, end_seq < 0, walk, sinks, out, lse, partial, kv_head, num_kv_heads,
            GROUP_SIZE, TILE_M, D_V, SHARES, LINES, DIMS, OUT_UNIT, OUT_VECTOR,
        )  # fmt: skip


@gluon.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=UNALIGNED)
def gqa_kernel(
    q_ptr, stride_q_token, stride_q_head,
    k_ptr, stride_k_page, stride_k_block, stride_k_token, stride_k_head,
    v_ptr, stride_v_page, stride_v_block, stride_v_token, stride_v_head,
    block_table_ptr, stride_table_seq, stride_table_block,
    cu_seqlens_q_ptr, stride_cu_q,
    cu_seqlens_k_ptr, stride_cu_k,
    seqused_k_ptr, stride_seqused,
    cp_tot_ptr, stride_cp_tot,
    k_scale_cache_ptr, stride_k_scale_page, stride_k_scale_block, stride_k_scale_token,
    stride_k_scale_head, stride_k_scale_group,
    alibi_ptr, stride_alibi_seq, stride_alibi_head,
    sinks_ptr, stride_sinks,
    q_descale_ptr, stride_q_descale_seq, stride_q_descale_head,
    k_descale_ptr, stride_k_descale_seq, stride_k_descale_head,
    v_descale_ptr, stride_v_descale_seq, stride_v_descale_head,
    v_scale_cache_ptr, stride_v_scale_page, stride_v_scale_block, stride_v_scale_token,
    stride_v_scale_head, stride_v_scale_group,
    metadata_ptr,
    out_ptr, stride_out_token, stride_out_head, stride_out_dim,
    lse_ptr, stride_lse_head,
    partial_ptr, partial_lines,
    softmax_scale: gl.float32, softcap: gl.float32, k_factor: gl.float32, v_factor: gl.float32,
    batch, window_left, window_right, cp_rank,
    units_per_seq, splits_per_unit, steps_per_split, rows_per_unit,
    GROUP_SIZE: gl.constexpr,
    BLOCK_SIZE: gl.constexpr, BLOCKS_PER_PAGE: gl.constexpr,  # BLOCK_SIZE 0: no block table
    D_QK: gl.constexpr, D_V: gl.constexpr,
    K_SIZE: gl.constexpr, V_SIZE: gl.constexpr,  # the powers of two that hold them
    VECTOR: gl.constexpr, Q_VECTOR: gl.constexpr,  # elements that every row of the cache, of q is aligned to
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, HAS_SOFTCAP: gl.constexpr,
    CP_WORLD_SIZE: gl.constexpr, CP_INTERLEAVE: gl.constexpr,
    OUT_UNIT: gl.constexpr, OUT_VECTOR: gl.constexpr,
    SCHEDULED: gl.constexpr, FIXED_SPLITS: gl.constexpr,
    SEQUENCES: gl.constexpr,  # at most, of which each program finds its part itself; 0: the schedule has it
    SHARES: gl.constexpr, LINES: gl.constexpr, DIMS: gl.constexpr,  # combined at once; 0: not here
    TILE_M: gl.constexpr, STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,  # the producer's are what is left
):  # fmt: skip
    """Attention of the rows of each unit over its keys, for one part.

    Grid: ``(row tiles of a unit, num_kv_heads, parts)``, four warps. Parts and partial results are as those
    of ``decode_kernel``: ``[slots, num_kv_heads, rows_per_unit, D_V]``, then the lse.
    """
    gdc_launch_dependents()
    SHARDED: gl.constexpr = CP_WORLD_SIZE > 1
    kv_dtype: gl.constexpr = k_ptr.dtype.element_ty
    FP8: gl.constexpr = kv_dtype.primitive_bitwidth == 8
    dtype: gl.constexpr = gl.float16 if FP8 and v_scale_cache_ptr is None else q_ptr.dtype.element_ty
    K_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, K_SIZE], kv_dtype)
    V_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, V_SIZE], kv_dtype)
    WIDE_K: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE_M, K_SIZE], dtype)
    WIDE_V: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, V_SIZE], dtype)
    PROBS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, TILE_M], dtype)
    q_smem = gl.allocate_shared_memory(dtype, [1, TILE_M, K_SIZE], WIDE_K)
    k_smem = gl.allocate_shared_memory(kv_dtype, [STAGES, TILE, K_SIZE], K_LAYOUT)
    v_smem = gl.allocate_shared_memory(kv_dtype, [STAGES, TILE, V_SIZE], V_LAYOUT)
    wide_v_smem = v_smem  # where the values lie that are multiplied
    if FP8:
        wide_v_smem = gl.allocate_shared_memory(dtype, [1, TILE, V_SIZE], WIDE_V)
    k_scales_smem = k_smem  # nobody looks at those that are not there
    v_scales_smem = v_smem
    if k_scale_cache_ptr is not None:
        k_scales_smem = gl.allocate_shared_memory(gl.float32, [STAGES, TILE], PLAIN)
    if v_scale_cache_ptr is not None:
        v_scales_smem = gl.allocate_shared_memory(gl.float32, [STAGES, TILE], PLAIN)
    p_smem = gl.allocate_shared_memory(dtype, [TILE, TILE_M], PROBS)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=PRODUCERS)
        mbarrier.init(v_full.index(i), count=PRODUCERS)
        mbarrier.init(empty.index(i), count=1)

    kv_head = gl.program_id(1)
    # A base off 16 bytes: Triton knows nothing of it unless it is told.
    BYTES: gl.constexpr = VECTOR * kv_dtype.primitive_bitwidth // 8
    k_base = gl.multiple_of(k_ptr + kv_head.to(gl.int64) * stride_k_head, BYTES)
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
    q = (stride_q_token, stride_q_head)
    alibi = (alibi_ptr, stride_alibi_seq, stride_alibi_head)
    sinks = (sinks_ptr, stride_sinks)
    q_descale = (q_descale_ptr, stride_q_descale_seq, stride_q_descale_head)
    k_descale = (k_descale_ptr, stride_k_descale_seq, stride_k_descale_head, k_factor)
    v_descale = (v_descale_ptr, stride_v_descale_seq, stride_v_descale_head, v_factor)
    k_scales = (
        k_scale_cache_ptr, stride_k_scale_page, stride_k_scale_block, stride_k_scale_token,
        stride_k_scale_head, stride_k_scale_group,
    )  # fmt: skip
    v_scales = (
        v_scale_cache_ptr, stride_v_scale_page, stride_v_scale_block, stride_v_scale_token,
        stride_v_scale_head, stride_v_scale_group,
    )  # fmt: skip
    out = (out_ptr, stride_out_token, stride_out_head, stride_out_dim)
    lse = (lse_ptr, stride_lse_head)
    partial = (partial_ptr, partial_lines)
    if SEQUENCES > 0:
        walk = with_own_part(walk, lengths, GROUP_SIZE, HAS_LEFT and HAS_RIGHT and not SHARDED, SEQUENCES)
    gl.warp_specialize([
        (produce, (
            k_smem, v_smem, k_scales_smem, v_scales_smem, k_full, v_full, empty, walk, lengths,
            k_base, k, v_base, v, k_scales, v_scales, table, kv_head, out, lse, D_QK, D_V, VECTOR, STAGES,
            BLOCK_SIZE, BLOCKS_PER_PAGE,
            GROUP_SIZE, TILE_M, SCHEDULED, FIXED_SPLITS, HAS_LEFT, HAS_RIGHT, SHARDED,
        )),
        (consume, (
            q_smem, k_smem, v_smem, k_scales_smem, v_scales_smem, wide_v_smem, p_smem,
            k_full, v_full, empty, walk, lengths, q_ptr, q, q_descale, k_descale, v_descale,
            alibi, sinks, out, lse, partial, softmax_scale, softcap, cp_rank, kv_head, gl.num_programs(1),
            D_QK, D_V, Q_VECTOR, STAGES, GROUP_SIZE, TILE_M, SCHEDULED, FIXED_SPLITS, SHARES, LINES, DIMS,
            HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, CP_WORLD_SIZE, CP_INTERLEAVE, OUT_UNIT, OUT_VECTOR,
            k_scale_cache_ptr is not None, v_scale_cache_ptr is not None,
        )),
    ], [4], [CONSUMER_REGISTERS])  # fmt: skip
