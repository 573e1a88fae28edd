"""MLA on Hopper for up to 32 rows of queries over an fp8 cache.

As ``mla_narrow_sm90.py``, but for what becomes of a tile. The producer fills rings with pieces, 64 keys of
128 dimensions as they are stored. Two consumer warpgroups take the tiles in turn. Each loads a piece so that
what a thread converts is, in its registers, the operand with which the piece is scored, and writes it into a
16-bit tile of its own, from which values are multiplied. It does so while products with the values of its
last tile are under way: a piece takes the place of one that has been multiplied. Each piece of a tile has a
ring, barriers, 16-bit rooms and an accumulator of its own: of two in one allocation the compiler knows no
better than to have a barrier between them.

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
    warpgroup_barrier,
    with_own_part,
)
from anystride.kernels.combine_sm90 import combine_cut_units
from anystride.kernels.decode import descale
from anystride.kernels.fp8_sm90 import (
    agree_on_powers,
    converted,
    copy_scales,
    factor_of,
    in_operand_order,
    larger,
    largest,
    operand_layout,
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
CONSUMERS = gl.constexpr(128)  # threads that read a piece


@gluon.constexpr_function
def slots_of(slots, pieces, i):
    """Of so many slots for a tile's pieces, those of its i-th."""
    return slots // pieces + (i < slots % pieces)


@gluon.jit
def buffers(dtype: gl.constexpr, COUNT: gl.constexpr, WIDTH: gl.constexpr):
    """Room for COUNT pieces of so many columns."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, WIDTH], dtype)
    return gl.allocate_shared_memory(dtype, [COUNT, TILE, WIDTH], LAYOUT)


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT new mbarriers."""
    made = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(made.index(i), count=ARRIVALS)
    return made


@gluon.jit
def wait_for_slot(tile, ring, empty):
    """The slot of a tile's piece, as soon as it is free."""
    SLOTS: gl.constexpr = ring.shape[0]
    mbarrier.wait(empty.index(tile % SLOTS), ((tile // SLOTS) & 1) ^ 1)
    return tile % SLOTS


@gluon.jit
def produce(
    rings, scales_smem, full, empty, walk, lengths, k_ptr, k, v_ptr, v, scales, table, kv_head, out, lse,
    D_V: gl.constexpr, D_K: gl.constexpr, VECTOR: gl.constexpr, K_VECTOR: gl.constexpr,
    BLOCK_SIZE: gl.constexpr, BLOCKS_PER_PAGE: gl.constexpr, ONE_ROW: gl.constexpr, MIXED: gl.constexpr,
    GROUPS: gl.constexpr,
    GROUP_SIZE: gl.constexpr, TILE_M: gl.constexpr, SCHEDULED: gl.constexpr, FIXED_SPLITS: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, SHARDED: gl.constexpr,
):  # fmt: skip
    """Fill the rings with the pieces of tiles, the latent's, then the rope piece: each has a ring of its own.

    MIXED: the rope piece is not fp8, and its ring is where it is multiplied.
    """
    PIECE: gl.constexpr = min(D_V, COLUMNS)
    LANES: gl.constexpr = PIECE // VECTOR
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, VECTOR], [32 // LANES, LANES], [PRODUCERS // 32, 1], [1, 0])
    K_LANES: gl.constexpr = D_K // K_VECTOR
    K_LAYOUT: gl.constexpr = gl.BlockedLayout(
        [1, K_VECTOR], [32 // K_LANES, K_LANES], [PRODUCERS // 32, 1], [1, 0]
    )
    K_ROW: gl.constexpr = gl.SliceLayout(1, K_LAYOUT)
    PIECES: gl.constexpr = D_V // PIECE
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
                for i in gl.static_range(PIECES):
                    slot = wait_for_slot(tiles, rings[i], empty[i])
                    if i == 0:
                        for group in gl.static_range(GROUPS):
                            # Four tiles' worth: the rings hold less.
                            copy_scales(
                                scales_smem.index((tiles & 3) * GROUPS + group), scales, kv_head, group,
                                block, positions, k_start, mask, BLOCK_SIZE, BLOCKS_PER_PAGE,
                            )  # fmt: skip
                    copy_rows(rings[i].index(slot), v_ptr + i * PIECE, v_rows, mask, PIECE, LAYOUT, PIECE)
                    async_copy.mbarrier_arrive(full[i].index(slot), increment_count=False)
                slot = wait_for_slot(tiles, rings[PIECES], empty[PIECES])
                if MIXED:
                    k_rows = row_offsets(
                        gl.convert_layout(block, K_ROW), gl.convert_layout(positions, K_ROW), k_start, k,
                        K_VECTOR, BLOCK_SIZE, BLOCKS_PER_PAGE,
                    )  # fmt: skip
                    k_mask = gl.convert_layout(mask, K_ROW)
                    copy_rows(rings[PIECES].index(slot), k_ptr, k_rows, k_mask, D_K, K_LAYOUT)
                else:
                    k_rows = v_rows
                    if not ONE_ROW:
                        k_rows = row_offsets(
                            block, positions, k_start, k, VECTOR, BLOCK_SIZE, BLOCKS_PER_PAGE
                        )
                    copy_rows(rings[PIECES].index(slot), k_ptr, k_rows, mask, D_K, LAYOUT)
                async_copy.mbarrier_arrive(full[PIECES].index(slot), increment_count=False)
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
def load_piece(
    tile, rings, scales_smem, full,
    I: gl.constexpr, WIDTH: gl.constexpr, PIECES: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """A tile's I-th piece as it is stored, as soon as it is there, and its rows' scales."""
    SLOTS: gl.constexpr = rings[I].shape[0]
    LAYOUT: gl.constexpr = operand_layout(WIDTH)
    slot = tile % SLOTS
    mbarrier.wait(full[I].index(slot), (tile // SLOTS) & 1)
    values = rings[I].index(slot).load(LAYOUT)
    scales = values  # none, and nobody looks at them
    if GROUPS > 0 and I < PIECES:
        row = (tile & 3) * GROUPS + I * GROUPS // PIECES
        scales = scales_smem.index(row).load(gl.SliceLayout(1, LAYOUT))
    return values, scales


@gluon.jit
def completed(OUTSTANDING: gl.constexpr, results, COUNT: gl.constexpr):
    """COUNT results of products, but for the last OUTSTANDING of which all are waited for."""
    if COUNT == 1:
        return (warpgroup_mma_wait(OUTSTANDING, deps=results),)
    else:
        return warpgroup_mma_wait(OUTSTANDING, deps=results)


@gluon.jit
def score_tile(
    tile, rings, v_pieces, buffer, q_v_tile, q_k_tile, scales_smem, full, empty, accs,
    PIECES: gl.constexpr, PIECE: gl.constexpr, D_K: gl.constexpr, TILE_M: gl.constexpr, LAYOUT: gl.constexpr,
    MIXED: gl.constexpr, GROUPS: gl.constexpr, ONE_ROW: gl.constexpr,
):  # fmt: skip
    """Convert the part's ``tile``-th tile, piece by piece as they come, and score it.

    A piece takes the place of one that products with the tile before it read, whose results are ``accs``: as
    soon as those are done, a half of them at a time.

    Returns:
        ``(scores, scores of the rope piece if they are not a part of those, accs)``, all complete.
    """
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, LAYOUT, 2)
    ALL: gl.constexpr = PIECES + (0 if MIXED else 1)  # to be converted
    HALF: gl.constexpr = (PIECES + 1) // 2
    TWO: gl.constexpr = TILE_M <= 16  # pieces that are multiplied at once: registers decide
    AHEAD: gl.constexpr = TWO and GROUPS == 0 and not MIXED  # and whether one more is loaded
    dtype: gl.constexpr = v_pieces[0].dtype
    scores = gl.zeros([TILE, TILE_M], gl.float32, LAYOUT)
    rope_scores = gl.zeros([TILE, TILE_M], gl.float32, LAYOUT)
    values, scales = load_piece(tile, rings, scales_smem, full, 0, PIECE, PIECES, GROUPS)
    for i in gl.static_range(PIECES):
        if AHEAD and i + 1 < ALL:
            next_values, next_scales = load_piece(
                tile, rings, scales_smem, full, i + 1, PIECE if i + 1 < PIECES else D_K, PIECES, GROUPS
            )
        keys = converted(values, scales, GROUPS > 0, dtype)
        # By each thread, which has its numbers: no barrier.
        async_copy.mbarrier_arrive(empty[i].index(tile % rings[i].shape[0]), increment_count=False)
        if i == 0:
            if TWO:
                done = completed(PIECES - HALF, accs[:HALF], HALF)
            else:
                done = completed(0, accs, PIECES)
            warpgroup_barrier()
        elif i == HALF and TWO:
            done = done + completed(1, accs[HALF:], PIECES - HALF)
            warpgroup_barrier()
        v_pieces[i].index(buffer).store(keys)
        keys = gl.convert_layout(in_operand_order(keys), OPERAND, assert_trivial=True)
        scores = warpgroup_mma(
            keys, q_v_tile.slice(i * PIECE, PIECE, dim=1).permute((1, 0)), scores, use_acc=i > 0,
            is_async=True,
        )  # fmt: skip
        if i == 0:
            earlier = keys
        if not TWO:
            scores, keys = warpgroup_mma_wait(0, deps=[scores, keys])
        elif i > 0:  # the products before this one's are done, those with the tile before among them
            scores, earlier = warpgroup_mma_wait(1, deps=[scores, earlier])
        earlier = keys
        if i + 1 < ALL:
            if AHEAD:
                values, scales = next_values, next_scales
            else:
                values, scales = load_piece(
                    tile, rings, scales_smem, full, i + 1, PIECE if i + 1 < PIECES else D_K, PIECES, GROUPS
                )
    slot = tile % rings[PIECES].shape[0]
    if MIXED:
        mbarrier.wait(full[PIECES].index(slot), (tile // rings[PIECES].shape[0]) & 1)
        fence_async_shared()
        rope_scores = warpgroup_mma(
            rings[PIECES].index(slot), q_k_tile.permute((1, 0)), rope_scores, use_acc=False, is_async=True
        )
        scores, rope_scores, earlier = warpgroup_mma_wait(0, deps=[scores, rope_scores, earlier])
        async_copy.mbarrier_arrive(empty[PIECES].index(slot), increment_count=False)
    else:
        keys = converted(values, scales, False, dtype)
        async_copy.mbarrier_arrive(empty[PIECES].index(slot), increment_count=False)
        keys = gl.convert_layout(in_operand_order(keys), OPERAND, assert_trivial=True)
        if ONE_ROW:
            scores = warpgroup_mma(keys, q_k_tile.permute((1, 0)), scores, is_async=True)
            scores, earlier, keys = warpgroup_mma_wait(0, deps=[scores, earlier, keys])
        else:  # it has a factor of its own
            rope_scores = warpgroup_mma(
                keys, q_k_tile.permute((1, 0)), rope_scores, use_acc=False, is_async=True
            )
            scores, rope_scores, earlier, keys = warpgroup_mma_wait(
                0, deps=[scores, rope_scores, earlier, keys]
            )
    return scores, rope_scores, done


@gluon.jit
def consume(
    W: gl.constexpr, q_v_smem, q_k_smem, v_pieces, p_smem, own_stats, other_stats, given, taken,
    rings, scales_smem, maxima_smem, full, empty, q_seen, q_ready, own_done, other_done, walk, lengths,
    q_k_ptr, q_k, q_v_ptr, q_v,
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
    PIECE: gl.constexpr = min(D_V0 + D_V1, COLUMNS)
    PIECES: gl.constexpr = (D_V0 + D_V1) // PIECE
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
            warpgroup_barrier()  # or the compiler would ask for the factors behind the queries
            # Each warpgroup brings a half of the queries.
            q_tile = q_v_smem.index(0)
            # bfloat16 has numbers that float16 has not: rows are brought into its range.
            if W == 0:
                left = load_queries(
                    q_v_ptr, q_v, q_start, first_row, num_rows, kv_head, GROUP_SIZE, TILE_M, D_V0, Q_VECTOR
                )
                if NARROWED:
                    up, down = agree_on_powers(W, largest(left), maxima_smem, q_seen, turn, ROW)
                    left = scaled(left, up, q_tile.dtype)
                q_tile.slice(0, D_V0, dim=1).store(in_operand_order(left))
            else:
                rope = load_queries(
                    q_k_ptr, q_k, q_start, first_row, num_rows, kv_head, GROUP_SIZE, TILE_M, D_K, Q_VECTOR
                )
                if D_V1 > 0:
                    right = load_queries(
                        q_v_ptr + D_V0, q_v, q_start, first_row, num_rows, kv_head, GROUP_SIZE, TILE_M,
                        D_V1, Q_VECTOR,
                    )  # fmt: skip
                if NARROWED:
                    most = largest(rope)
                    if D_V1 > 0:
                        most = larger(most, right)
                    up, down = agree_on_powers(W, most, maxima_smem, q_seen, turn, ROW)
                    rope = scaled(rope, up, q_tile.dtype)
                    if D_V1 > 0:
                        right = scaled(right, up, q_tile.dtype)
                if D_V1 > 0:
                    q_tile.slice(D_V0, D_V1, dim=1).store(in_operand_order(right))
                if not MIXED:
                    rope = in_operand_order(rope)
                q_k_smem.index(0).store(rope)
            if NARROWED:
                score_scale = gl.expand_dims(down, 0) * score_scale  # [1, TILE_M]
            fence_async_shared()
            mbarrier.arrive(q_ready, count=1)

            all_begin, all_end = seen_by_all(
                first_row, num_rows, num_tokens, total, first_key, key_end, walk,
                GROUP_SIZE, TILE_M, HAS_LEFT, HAS_RIGHT,
            )  # fmt: skip
            accs = ()
            for _j in gl.static_range(PIECES):
                accs = accs + (gl.zeros([PIECE, TILE_M], gl.float32, LAYOUT),)
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
                shrink = row_max
                if i >= first:
                    if not ONE_ROW:
                        scores = scores * v_factor + rope_scores * k_factor
                    row_max, prob_sum, shrink = weigh(
                        scores, row_max, prob_sum, p_smem, key_begin + i * TILE, score_scale, softcap,
                        total - num_tokens, first_row + zero, all_begin, all_end, first_key, key_end, walk,
                        cp_rank, LAYOUT, GROUP_SIZE, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, CP_WORLD_SIZE,
                        CP_INTERLEAVE,
                    )  # fmt: skip
                fence_async_shared()
                products = ()
                for j in gl.static_range(PIECES):
                    acc = accs[j] * gl.expand_dims(shrink, 0)
                    v_piece = v_pieces[j].index(W + zero).permute((1, 0))
                    acc = warpgroup_mma(v_piece, p_smem, acc, use_acc=i > first, is_async=True)
                    products = products + (acc,)
                if i + 2 < num_tiles:
                    scores, rope_scores, accs = score_tile(
                        tiles + i + 2, rings, v_pieces, W + zero, q_v_smem.index(zero),
                        q_k_smem.index(zero), scales_smem, full, empty, products,
                        PIECES, PIECE, D_K, TILE_M, LAYOUT, MIXED, GROUPS, ONE_ROW,
                    )  # fmt: skip
                else:
                    accs = completed(0, products, PIECES)
                turns += 1
            tiles += num_tiles
            results = ()
            for j in gl.static_range(PIECES):  # without a tile, the products of none stand there
                results = results + (gl.where(first < num_tiles, accs[j], 0.0),)
            first_line = partial_line(
                seq, unit, first_seq, first_unit, part, kv_head, num_kv_heads, walk[5], tile_in_unit,
                TILE_M, SCHEDULED,
            )  # fmt: skip
            finish(
                W, results, row_max, prob_sum, v_factor, own_stats, other_stats, given, taken, own_done,
                other_done, turn, turns >> 30, q_start, first_row, num_rows, whole, first_line, kv_head,
                sinks, out, lse, partial, PIECES, GROUP_SIZE, OUT_UNIT, True, LAYOUT,
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
    PIECE: gl.constexpr = min(D_V, COLUMNS)
    PIECES: gl.constexpr = D_V // PIECE
    v_pieces = ()
    rings = ()
    full = ()
    empty = ()
    for i in gl.static_range(PIECES):
        v_pieces = v_pieces + (buffers(dtype, 2, PIECE),)
        rings = rings + (buffers(v_dtype, slots_of(SLOTS, PIECES, i), PIECE),)
        full = full + (barriers(slots_of(SLOTS, PIECES, i), PRODUCERS),)
        empty = empty + (barriers(slots_of(SLOTS, PIECES, i), CONSUMERS),)
    ROPES: gl.constexpr = slots_of(SLOTS, PIECES, 0)
    rings = rings + (buffers(k_ptr.dtype.element_ty, ROPES, D_K),)
    full = full + (barriers(ROPES, PRODUCERS),)
    empty = empty + (barriers(ROPES, CONSUMERS),)
    p_smem0 = gl.allocate_shared_memory(dtype, [TILE, TILE_M], PROBS)
    p_smem1 = gl.allocate_shared_memory(dtype, [TILE, TILE_M], PROBS)
    stats0 = gl.allocate_shared_memory(gl.float32, [2, TILE_M], PLAIN)
    stats1 = gl.allocate_shared_memory(gl.float32, [2, TILE_M], PLAIN)
    # Each warpgroup's tile is its own, and free when a unit ends: the halves are exchanged there.
    BUFFERS: gl.constexpr = TILE // TILE_M  # of float32 in a piece's two of 16 bits
    given0 = ()
    given1 = ()
    for i in gl.static_range(PIECES):
        results = reinterpret(v_pieces[i], gl.float32, [BUFFERS, PIECE, TILE_M], PLAIN_2D)
        if i < (PIECES + 1) // 2:
            given1 = given1 + (results.index(BUFFERS // 2),)
        else:
            given0 = given0 + (results.index(0),)
    scales_smem = stats0
    if GROUPS > 0:
        scales_smem = gl.allocate_shared_memory(gl.float32, [4 * GROUPS, TILE], PLAIN)
    maxima_smem = gl.allocate_shared_memory(gl.float32, [2, TILE_M], PLAIN)
    q_seen = barrier(2)
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
            rings, scales_smem, full, empty, walk, lengths, k_base, k, v_base, v,
            scales, table, kv_head, out, lse, D_V, D_K, VECTOR, K_VECTOR, BLOCK_SIZE, BLOCKS_PER_PAGE,
            V_AT >= 0, MIXED, GROUPS, GROUP_SIZE, TILE_M, SCHEDULED, FIXED_SPLITS, HAS_LEFT, HAS_RIGHT,
            SHARDED,
        )),
        (consume, (
            0, q_v_smem, q_k_smem, v_pieces, p_smem0, stats0, stats1, given0, given1,
            rings, scales_smem, maxima_smem, full, empty, q_seen, q_ready, done0, done1, walk, lengths,
            q_ptr + K_AT, rope, latent_ptr, latent,
            q_descale, k_descale, v_descale,
            sinks, out, lse, partial, softmax_scale, softcap, cp_rank, kv_head, gl.num_programs(1),
            D_V0, D_V1, D_K, Q_VECTOR, GROUP_SIZE, TILE_M, SCHEDULED, FIXED_SPLITS,
            SHARES, LINES, DIMS, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, CP_WORLD_SIZE, CP_INTERLEAVE,
            OUT_UNIT, OUT_VECTOR, MIXED, GROUPS, V_AT >= 0, NARROWED,
        )),
        (consume, (
            1, q_v_smem, q_k_smem, v_pieces, p_smem1, stats1, stats0, given1, given0,
            rings, scales_smem, maxima_smem, full, empty, q_seen, q_ready, done1, done0, walk, lengths,
            q_ptr + K_AT, rope, latent_ptr, latent,
            q_descale, k_descale, v_descale,
            sinks, out, lse, partial, softmax_scale, softcap, cp_rank, kv_head, gl.num_programs(1),
            D_V0, D_V1, D_K, Q_VECTOR, GROUP_SIZE, TILE_M, SCHEDULED, FIXED_SPLITS,
            SHARES, LINES, DIMS, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, CP_WORLD_SIZE, CP_INTERLEAVE,
            OUT_UNIT, OUT_VECTOR, MIXED, GROUPS, V_AT >= 0, NARROWED,
        )),
    ], [4, 4], [CONSUMER_REGISTERS, CONSUMER_REGISTERS])  # fmt: skip
