"""MLA on Hopper for up to 32 rows of queries over an fp8 cache.

As ``mla_narrow_sm90.py``, but for what becomes of a tile. The producer fills a ring with pieces, 64 keys of
128 dimensions as they are stored. Two consumer warpgroups take the tiles in turn. Each loads a piece so that
what a thread converts is, in its registers, the operand with which the piece is scored, and writes it into a
16-bit tile of its own, from which values are multiplied. It does so while products with the values of its
last tile are under way: a piece takes the place of one that has been multiplied.

Products are made in float16, which holds every fp8 number, and bfloat16 queries are brought into its range by
powers of two. With scales for rows, or a rope piece that is not fp8, they are made in the queries' dtype.
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
    load_operand,
    powers_of_two,
    scaled,
)
from anystride.kernels.loaders_sm90 import (
    PRODUCERS,
    TILE,
    barrier,
    copy_rows,
    find_blocks,
    find_sequence,
    reinterpret,
    row_offsets,
)
from anystride.kernels.mla_narrow_sm90 import PLAIN_2D, finish, weigh
from anystride.kernels.parts import is_before, next_unit, part_range, partial_line, share_keys, unit_share

COLUMNS = gl.constexpr(128)  # of a piece: a swizzled line of 128 bytes


@gluon.jit
def produce(
    ring, k_smem, scales_smem, full, empty, k_full, k_empty, walk, lengths, k_ptr, k, v_ptr, v, scales, table,
    kv_head, out, lse,
    D_V: gl.constexpr, D_K: gl.constexpr, VECTOR: gl.constexpr, K_VECTOR: gl.constexpr,
    BLOCK_SIZE: gl.constexpr, BLOCKS_PER_PAGE: gl.constexpr, ONE_ROW: gl.constexpr, MIXED: gl.constexpr,
    GROUPS: gl.constexpr,
    GROUP_SIZE: gl.constexpr, TILE_M: gl.constexpr, SCHEDULED: gl.constexpr, FIXED_SPLITS: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, SHARDED: gl.constexpr,
):  # fmt: skip
    """Fill the ring with the pieces of an fp8 cache's tiles, in order: the latent's, then the rope piece.

    MIXED: the rope piece is not fp8, and goes straight to where it is multiplied.
    """
    PIECE: gl.constexpr = min(D_V, COLUMNS)
    LANES: gl.constexpr = PIECE // VECTOR
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, VECTOR], [32 // LANES, LANES], [PRODUCERS // 32, 1], [1, 0])
    K_LANES: gl.constexpr = D_K // K_VECTOR
    K_LAYOUT: gl.constexpr = gl.BlockedLayout(
        [1, K_VECTOR], [32 // K_LANES, K_LANES], [PRODUCERS // 32, 1], [1, 0]
    )
    K_ROW: gl.constexpr = gl.SliceLayout(1, K_LAYOUT)
    SLOTS: gl.constexpr = ring.shape[0]
    offs_n = gl.arange(0, TILE, gl.SliceLayout(1, LAYOUT))
    part = gl.program_id(2)
    seq, unit, step, end_seq, end_unit, end_step = part_range(part, walk, SCHEDULED)
    first_seq = seq
    tiles = 0
    slot = 0
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
                v_rows = row_offsets(block, positions, k_start, v, VECTOR, BLOCK_SIZE, BLOCKS_PER_PAGE)
                for i in gl.static_range(D_V // PIECE):
                    mbarrier.wait(empty.index(slot), phase)
                    if i == 0:
                        for group in gl.static_range(GROUPS):
                            # Four tiles' worth: the ring holds less.
                            copy_scales(
                                scales_smem.index((tiles & 3) * GROUPS + group), scales, kv_head, group,
                                block, positions, k_start, mask, BLOCK_SIZE, BLOCKS_PER_PAGE,
                            )  # fmt: skip
                    piece = ring.index(slot).slice(0, PIECE, dim=1)
                    copy_rows(piece, v_ptr + i * PIECE, v_rows, mask, PIECE, LAYOUT, PIECE)
                    async_copy.mbarrier_arrive(full.index(slot), increment_count=False)
                    slot += 1
                    if slot == SLOTS:
                        slot = slot * 0
                        phase ^= 1
                if MIXED:
                    k_rows = row_offsets(
                        gl.convert_layout(block, K_ROW), gl.convert_layout(positions, K_ROW), k_start, k,
                        K_VECTOR, BLOCK_SIZE, BLOCKS_PER_PAGE,
                    )  # fmt: skip
                    k_mask = gl.convert_layout(mask, K_ROW)
                    buffer = tiles & 1
                    mbarrier.wait(k_empty.index(buffer), ((tiles >> 1) & 1) ^ 1)
                    copy_rows(k_smem.index(buffer), k_ptr, k_rows, k_mask, D_K, K_LAYOUT)
                    async_copy.mbarrier_arrive(k_full.index(buffer), increment_count=False)
                else:
                    k_rows = v_rows
                    if not ONE_ROW:
                        k_rows = row_offsets(
                            block, positions, k_start, k, VECTOR, BLOCK_SIZE, BLOCKS_PER_PAGE
                        )
                    mbarrier.wait(empty.index(slot), phase)
                    copy_rows(ring.index(slot).slice(0, D_K, dim=1), k_ptr, k_rows, mask, D_K, LAYOUT)
                    async_copy.mbarrier_arrive(full.index(slot), increment_count=False)
                    slot += 1
                    if slot == SLOTS:
                        slot = slot * 0
                        phase ^= 1
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
def score_tile(
    tile, ring, v_tile, k_tile, q_v_tile, q_k_tile, scales_smem, full, empty, k_full, acc0, acc1,
    D_V0: gl.constexpr, D_V1: gl.constexpr, D_K: gl.constexpr, TILE_M: gl.constexpr, LAYOUT: gl.constexpr,
    MIXED: gl.constexpr, GROUPS: gl.constexpr, ONE_ROW: gl.constexpr,
):  # fmt: skip
    """Convert the part's ``tile``-th tile, piece by piece as they come, and start to score it.

    A piece takes the place of one that products with the tile before it read, whose results are ``acc0`` and
    ``acc1``: as soon as they are done.

    Returns:
        ``(scores, scores of the rope piece if they are not a part of those, acc0, acc1)``, all complete.
    """
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, LAYOUT, 2)
    PIECE: gl.constexpr = min(D_V0 + D_V1, COLUMNS)
    PIECES: gl.constexpr = (D_V0 + D_V1) // PIECE
    ALL: gl.constexpr = PIECES + (0 if MIXED else 1)  # of a tile in the ring
    SLOTS: gl.constexpr = ring.shape[0]
    dtype: gl.constexpr = v_tile.dtype
    scores = gl.zeros([TILE, TILE_M], gl.float32, LAYOUT)
    rope_scores = gl.zeros([TILE, TILE_M], gl.float32, LAYOUT)
    acc0 = warpgroup_mma_wait(1 if D_V1 > 0 else 0, deps=[acc0])
    for i in gl.static_range(PIECES):
        piece = tile * ALL + i
        slot = piece % SLOTS
        mbarrier.wait(full.index(slot), (piece // SLOTS) & 1)
        scales = scales_smem
        if GROUPS > 0:
            scales = scales_smem.index((tile & 3) * GROUPS + i * GROUPS // PIECES)
        keys = load_operand(ring.index(slot).slice(0, PIECE, dim=1), scales, PIECE, GROUPS > 0, dtype)
        mbarrier.arrive(empty.index(slot), count=1)
        v_tile.slice(i * PIECE, PIECE, dim=1).store(keys)
        keys = gl.convert_layout(in_operand_order(keys), OPERAND, assert_trivial=True)
        scores = warpgroup_mma(
            keys, q_v_tile.slice(i * PIECE, PIECE, dim=1).permute((1, 0)), scores, use_acc=i > 0,
            is_async=True,
        )  # fmt: skip
        if i == 0:
            earlier = keys
        if TILE_M > 16:  # no registers for two
            scores, acc1, keys = warpgroup_mma_wait(0, deps=[scores, acc1, keys])
        elif i > 0:  # the products before this one's are done, those with the tile before among them
            scores, acc1, earlier = warpgroup_mma_wait(1, deps=[scores, acc1, earlier])
        earlier = keys
    if MIXED:
        mbarrier.wait(k_full, (tile >> 1) & 1)
        fence_async_shared()
        rope_scores = warpgroup_mma(
            k_tile, q_k_tile.permute((1, 0)), rope_scores, use_acc=False, is_async=True
        )
        scores, rope_scores, acc1, earlier = warpgroup_mma_wait(0, deps=[scores, rope_scores, acc1, earlier])
    else:
        piece = tile * ALL + PIECES
        slot = piece % SLOTS
        mbarrier.wait(full.index(slot), (piece // SLOTS) & 1)
        keys = load_operand(ring.index(slot).slice(0, D_K, dim=1), scales_smem, D_K, False, dtype)
        mbarrier.arrive(empty.index(slot), count=1)
        keys = gl.convert_layout(in_operand_order(keys), OPERAND, assert_trivial=True)
        if ONE_ROW:
            scores = warpgroup_mma(keys, q_k_tile.permute((1, 0)), scores, is_async=True)
            scores, acc1, earlier, keys = warpgroup_mma_wait(0, deps=[scores, acc1, earlier, keys])
        else:  # it has a factor of its own
            rope_scores = warpgroup_mma(
                keys, q_k_tile.permute((1, 0)), rope_scores, use_acc=False, is_async=True
            )
            scores, rope_scores, acc1, earlier, keys = warpgroup_mma_wait(
                0, deps=[scores, rope_scores, acc1, earlier, keys]
            )
    return scores, rope_scores, acc0, acc1


@gluon.jit
def consume(
    W: gl.constexpr, q_v_smem, q_k_smem, v_smem, k_smem, p_smem, own_stats, other_stats, given, taken,
    ring, scales_smem, k_full, k_empty,
    full, empty, q_ready, own_done, other_done, walk, lengths, q_k_ptr, q_k, q_v_ptr, q_v,
    q_descale, k_descale, v_descale, sinks, out, lse, partial, softmax_scale, softcap, cp_rank, kv_head,
    num_kv_heads,
    D_V0: gl.constexpr, D_V1: gl.constexpr, D_K: gl.constexpr, Q_VECTOR: gl.constexpr,
    GROUP_SIZE: gl.constexpr, TILE_M: gl.constexpr, SCHEDULED: gl.constexpr, FIXED_SPLITS: gl.constexpr,
    SHARES: gl.constexpr, LINES: gl.constexpr, DIMS: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, HAS_SOFTCAP: gl.constexpr,
    CP_WORLD_SIZE: gl.constexpr, CP_INTERLEAVE: gl.constexpr,
    OUT_UNIT: gl.constexpr, OUT_VECTOR: gl.constexpr,
    MIXED: gl.constexpr, GROUPS: gl.constexpr, ONE_ROW: gl.constexpr, NARROWED: gl.constexpr,
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
    turns = 0
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
            score_scale = softmax_scale
            score_scale *= descale(q_descale[0], q_descale[1], q_descale[2], seq, kv_head)
            k_factor = factor_of(k_descale, seq, kv_head)
            v_factor = factor_of(v_descale, seq, kv_head)
            if ONE_ROW:
                score_scale *= k_factor
            # Each warpgroup brings a half of the queries.
            q_tile = q_v_smem.index(0)
            if NARROWED:  # bfloat16 has numbers that float16 has not: rows are brought into its range
                # All loads first: what follows waits for them.
                left = load_queries(
                    q_v_ptr, q_v, q_start, first_row, num_rows, kv_head, GROUP_SIZE, TILE_M, D_V0,
                    min(Q_VECTOR, D_V0 // 32),
                )  # fmt: skip
                rope = load_queries(
                    q_k_ptr, q_k, q_start, first_row, num_rows, kv_head, GROUP_SIZE, TILE_M, D_K,
                    min(Q_VECTOR, D_K // 32),
                )  # fmt: skip
                if D_V1 > 0:
                    right = load_queries(
                        q_v_ptr + D_V0, q_v, q_start, first_row, num_rows, kv_head, GROUP_SIZE, TILE_M,
                        D_V1, min(Q_VECTOR, D_V1 // 32),
                    )  # fmt: skip
                    up, down = powers_of_two(left, rope, right)
                else:
                    up, down = powers_of_two(left, rope, rope)
                if W == 0:
                    left = scaled(left, up, q_tile.dtype)
                    q_tile.slice(0, D_V0, dim=1).store(in_operand_order(left))
                else:
                    if D_V1 > 0:
                        right = scaled(right, up, q_tile.dtype)
                        q_tile.slice(D_V0, D_V1, dim=1).store(in_operand_order(right))
                    rope = scaled(rope, up, q_tile.dtype)
                    q_k_smem.index(0).store(in_operand_order(rope))
                score_scale = gl.expand_dims(gl.convert_layout(down, ROW), 0) * score_scale  # [1, TILE_M]
            elif W == 0:
                queries = load_queries(
                    q_v_ptr, q_v, q_start, first_row, num_rows, kv_head, GROUP_SIZE, TILE_M, D_V0, Q_VECTOR
                )
                q_tile.slice(0, D_V0, dim=1).store(in_operand_order(queries))
            else:
                rope = load_queries(
                    q_k_ptr, q_k, q_start, first_row, num_rows, kv_head, GROUP_SIZE, TILE_M, D_K, Q_VECTOR
                )
                if D_V1 > 0:
                    queries = load_queries(
                        q_v_ptr + D_V0, q_v, q_start, first_row, num_rows, kv_head, GROUP_SIZE, TILE_M,
                        D_V1, Q_VECTOR,
                    )  # fmt: skip
                    q_tile.slice(D_V0, D_V1, dim=1).store(in_operand_order(queries))
                if not MIXED:
                    rope = in_operand_order(rope)
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
            else:
                acc1 = acc0  # none, and nobody looks at it
            row_max = gl.full([TILE_M], float("-inf"), gl.float32, ROW)
            prob_sum = gl.zeros([TILE, TILE_M], gl.float32, LAYOUT)  # summed over keys at the end only
            mbarrier.wait(q_ready, turn & 1)
            num_tiles = tl.maximum(key_end - key_begin + TILE - 1, 0) // TILE
            first = (W + tiles) & 1
            # A tile is scored behind the products with the one before it, the first behind those with none:
            # the first of its own products then begin anew.
            scores = gl.zeros([TILE, TILE_M], gl.float32, LAYOUT)
            rope_scores = gl.zeros([TILE, TILE_M], gl.float32, LAYOUT)
            for i in range(first - 2, num_tiles, 2):
                zero = turns >> 30
                v_tile = v_smem.index(W + zero)
                k_tile = k_smem.index(W + zero)
                shrink = row_max
                if i >= first:
                    if MIXED:
                        mbarrier.arrive(k_empty.index(W), count=1)
                    if not ONE_ROW:
                        scores = scores * v_factor + rope_scores * k_factor
                    row_max, prob_sum, shrink = weigh(
                        scores, row_max, prob_sum, p_smem, key_begin + i * TILE, score_scale, softcap,
                        total - num_tokens, first_row + zero, all_begin, all_end, first_key, key_end, walk,
                        cp_rank, LAYOUT, GROUP_SIZE, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, CP_WORLD_SIZE,
                        CP_INTERLEAVE,
                    )  # fmt: skip
                fence_async_shared()
                acc0 = acc0 * gl.expand_dims(shrink, 0)
                v_half = v_tile.slice(0, D_V0, dim=1).permute((1, 0))
                acc0 = warpgroup_mma(v_half, p_smem, acc0, use_acc=i > first, is_async=True)
                if D_V1 > 0:
                    acc1 = acc1 * gl.expand_dims(shrink, 0)
                    v_half = v_tile.slice(D_V0, D_V1, dim=1).permute((1, 0))
                    acc1 = warpgroup_mma(v_half, p_smem, acc1, use_acc=i > first, is_async=True)
                if i + 2 < num_tiles:
                    scores, rope_scores, done0, done1 = score_tile(
                        tiles + i + 2, ring, v_tile, k_tile, q_v_smem.index(zero), q_k_smem.index(zero),
                        scales_smem, full, empty, k_full.index(W), acc0, acc1, D_V0, D_V1, D_K, TILE_M,
                        LAYOUT, MIXED, GROUPS, ONE_ROW,
                    )  # fmt: skip
                else:
                    done0, done1 = warpgroup_mma_wait(0, deps=[acc0, acc1])
                acc0, acc1 = done0, done1
                turns += 1
            tiles += num_tiles
            acc0 = gl.where(first < num_tiles, acc0, 0.0)  # without a tile, the products of none stand there
            if D_V1 > 0:
                acc1 = gl.where(first < num_tiles, acc1, 0.0)
            first_line = partial_line(
                seq, unit, first_seq, first_unit, part, kv_head, num_kv_heads, walk[5], tile_in_unit,
                TILE_M, SCHEDULED,
            )  # fmt: skip
            finish(
                W, acc0, acc1, row_max, prob_sum, v_factor, own_stats, other_stats, given, taken, own_done,
                other_done, turn, turns >> 30, q_start, first_row, num_rows, whole, first_line, kv_head,
                sinks, out, lse, partial, D_V0, D_V1, GROUP_SIZE, OUT_UNIT, True, LAYOUT,
            )  # fmt: skip
            turn += 1
        seq, unit, step = next_unit(seq, unit, step, units, SCHEDULED)
    if SHARES > 0:
        combine_cut_units(
            W, 2, end_seq < 0, walk, sinks, out, lse, partial, kv_head, num_kv_heads,
            GROUP_SIZE, TILE_M, D_V0 + D_V1, SHARES, LINES, DIMS, OUT_UNIT, OUT_VECTOR,
        )  # fmt: skip


@gluon.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=UNALIGNED)
def mla_narrow_fp8_kernel(
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
    D_V: gl.constexpr, D_K: gl.constexpr,  # of the latent, of the rope piece
    K_AT: gl.constexpr,  # where the rope piece begins in K's row
    V_AT: gl.constexpr,  # where V does; -1: its queries are q_v
    VECTOR: gl.constexpr, K_VECTOR: gl.constexpr,  # elements that every row of V, of K is aligned to
    Q_VECTOR: gl.constexpr,  # the same of q
    GROUPS: gl.constexpr, SLOTS: gl.constexpr,  # scales of a row, 0 without; pieces in the ring
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
    v_dtype: gl.constexpr = v_ptr.dtype.element_ty
    MIXED: gl.constexpr = k_ptr.dtype.element_ty.primitive_bitwidth > 8
    # float16: one conversion for two elements, where bfloat16 needs four instructions.
    NARROWED: gl.constexpr = GROUPS == 0 and not MIXED and q_ptr.dtype.element_ty == gl.bfloat16
    dtype: gl.constexpr = gl.float16 if NARROWED else q_ptr.dtype.element_ty
    LATENT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, D_V], dtype)
    ROPE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, D_K], dtype)
    PROBS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, TILE_M], dtype)
    q_v_smem = gl.allocate_shared_memory(dtype, [1, TILE_M, D_V], LATENT)
    q_k_smem = gl.allocate_shared_memory(dtype, [1, TILE_M, D_K], ROPE)
    v_smem = gl.allocate_shared_memory(dtype, [2, TILE, D_V], LATENT)
    k_smem = v_smem  # an fp8 rope piece goes from the ring to registers
    RING: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, COLUMNS], v_dtype)
    ring = gl.allocate_shared_memory(v_dtype, [SLOTS, TILE, COLUMNS], RING)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(full.index(i), count=PRODUCERS)
        mbarrier.init(empty.index(i), count=1)
    k_full = full  # nobody waits for those of the rope piece where they are not
    k_empty = empty
    if MIXED:
        k_smem = gl.allocate_shared_memory(dtype, [2, TILE, D_K], ROPE)
        k_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        k_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(2):
            mbarrier.init(k_full.index(i), count=PRODUCERS)
            mbarrier.init(k_empty.index(i), count=1)
    p_smem0 = gl.allocate_shared_memory(dtype, [TILE, TILE_M], PROBS)
    p_smem1 = gl.allocate_shared_memory(dtype, [TILE, TILE_M], PROBS)
    stats0 = gl.allocate_shared_memory(gl.float32, [2, TILE_M], PLAIN)
    stats1 = gl.allocate_shared_memory(gl.float32, [2, TILE_M], PLAIN)
    # Each warpgroup's tile is its own, and free when a unit ends: the halves are exchanged there.
    halves = reinterpret(v_smem, gl.float32, [TILE * D_V // (D_V0 * TILE_M), D_V0, TILE_M], PLAIN_2D)
    half1 = halves.index(0)
    half0 = halves.index(TILE * D_V // (2 * D_V0 * TILE_M))
    scales_smem = stats0
    if GROUPS > 0:
        scales_smem = gl.allocate_shared_memory(gl.float32, [4 * GROUPS, TILE], PLAIN)
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
    K_BYTES: gl.constexpr = K_VECTOR * k_ptr.dtype.element_ty.primitive_bitwidth // 8
    V_BYTES: gl.constexpr = VECTOR * v_dtype.primitive_bitwidth // 8
    k_base = gl.multiple_of(k_ptr + (kv_head.to(gl.int64) * stride_k_head + K_AT), K_BYTES)
    v_base = gl.multiple_of(v_ptr + kv_head.to(gl.int64) * stride_v_head, V_BYTES)
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
    q_descale = (q_descale_ptr, stride_q_descale_seq, stride_q_descale_head)
    k_descale = (k_descale_ptr, stride_k_descale_seq, stride_k_descale_head, k_factor)
    v_descale = (v_descale_ptr, stride_v_descale_seq, stride_v_descale_head, v_factor)
    scales = (
        v_scale_cache_ptr, stride_v_scale_page, stride_v_scale_block, stride_v_scale_token,
        stride_v_scale_head, stride_v_scale_group,
    )  # fmt: skip
    sinks = (sinks_ptr, stride_sinks)
    out = (out_ptr, stride_out_token, stride_out_head, stride_out_dim)
    lse = (lse_ptr, stride_lse_head)
    partial = (partial_ptr, partial_lines)
    if SEQUENCES > 0:
        walk = with_own_part(walk, lengths, GROUP_SIZE, HAS_LEFT and HAS_RIGHT and not SHARDED, SEQUENCES)
    gl.warp_specialize([
        (produce, (
            ring, k_smem, scales_smem, full, empty, k_full, k_empty, walk, lengths, k_base, k, v_base, v,
            scales, table, kv_head, out, lse, D_V, D_K, VECTOR, K_VECTOR, BLOCK_SIZE, BLOCKS_PER_PAGE,
            V_AT >= 0, MIXED, GROUPS, GROUP_SIZE, TILE_M, SCHEDULED, FIXED_SPLITS, HAS_LEFT, HAS_RIGHT,
            SHARDED,
        )),
        (consume, (
            0, q_v_smem, q_k_smem, v_smem, k_smem, p_smem0, stats0, stats1, half1, half0,
            ring, scales_smem, k_full, k_empty,
            full, empty, q_ready, done0, done1, walk, lengths, q_ptr + K_AT, rope, latent_ptr, latent,
            q_descale, k_descale, v_descale,
            sinks, out, lse, partial, softmax_scale, softcap, cp_rank, kv_head, gl.num_programs(1),
            D_V0, D_V1, D_K, Q_VECTOR, GROUP_SIZE, TILE_M, SCHEDULED, FIXED_SPLITS,
            SHARES, LINES, DIMS, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, CP_WORLD_SIZE, CP_INTERLEAVE,
            OUT_UNIT, OUT_VECTOR, MIXED, GROUPS, V_AT >= 0, NARROWED,
        )),
        (consume, (
            1, q_v_smem, q_k_smem, v_smem, k_smem, p_smem1, stats1, stats0, half0, half1,
            ring, scales_smem, k_full, k_empty,
            full, empty, q_ready, done1, done0, walk, lengths, q_ptr + K_AT, rope, latent_ptr, latent,
            q_descale, k_descale, v_descale,
            sinks, out, lse, partial, softmax_scale, softcap, cp_rank, kv_head, gl.num_programs(1),
            D_V0, D_V1, D_K, Q_VECTOR, GROUP_SIZE, TILE_M, SCHEDULED, FIXED_SPLITS,
            SHARES, LINES, DIMS, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, CP_WORLD_SIZE, CP_INTERLEAVE,
            OUT_UNIT, OUT_VECTOR, MIXED, GROUPS, V_AT >= 0, NARROWED,
        )),
    ], [4, 4], [CONSUMER_REGISTERS, CONSUMER_REGISTERS])  # fmt: skip
