"""MLA on Hopper for 64 rows a tile over an fp8 cache: as ``mla_wide_sm90.py``, but the producer converts.

Queries and two 16-bit tiles leave no room for tiles as they are stored. The producer loads quarters of these
to its registers, 64 keys of 128 bytes, as words of four numbers, and writes them into the halves as 16-bit
numbers; two quarters are on their way while it converts, or waits for a half to become free, those of the
next tile among them. The consumers fence what it writes, as nothing of theirs is on its way.

Products are made in float16, which holds every fp8 number, and queries in bfloat16 are brought into its range
by powers of two; with scales for rows, or where the rope piece is not fp8, in the dtype of the queries.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.language.extra.cuda import gdc_launch_dependents

from anystride.kernels.attention_sm90 import PLAIN, RUNTIME, UNALIGNED, answer_foreign, with_own_part
from anystride.kernels.loaders_sm90 import (
    COLUMNS,
    PRODUCERS,
    TILE,
    barrier,
    find_blocks,
    find_sequence,
    reinterpret,
    row_offsets,
)
from anystride.kernels.mla_wide_sm90 import LEFT0, LEFT1, RIGHT0, RIGHT1, ROWS, consume_left, consume_right
from anystride.kernels.parts import is_before, next_unit, part_range, share_keys, unit_share

QUARTERS = gl.constexpr(4)  # of a tile's latent part: a consumer waits for each
WORDS = gl.constexpr(COLUMNS.value // 2)  # of two numbers, in a row of a box
LAYOUT = gl.constexpr(gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0]))  # words of 64 keys
ROW = gl.constexpr(gl.SliceLayout(1, LAYOUT.value))
BOXES = gl.constexpr(gl.NVMMASharedLayout(128, 32, rank=2))


@gluon.constexpr_function
def conversion(source, target, scaled):
    """Instructions that make a word of four fp8 numbers, times a scale if it is, two words of two numbers."""
    kind = "e4m3x2" if source == gl.float8e4nv else "e5m2x2"
    if target == gl.float16 and not scaled:
        return f"""{{
            .reg .b16 a, b;
            mov.b32 {{a, b}}, $2;
            cvt.rn.f16x2.{kind} $0, a;
            cvt.rn.f16x2.{kind} $1, b;
        }}"""
    pair = "f16x2" if target == gl.float16 else "bf16x2"
    times = "".join(f"mul.f32 x{i}, x{i}, $3;" for i in range(4)) if scaled else ""
    return f"""{{
            .reg .b16 a, b, h0, h1, h2, h3;
            .reg .b32 low, high;
            .reg .f32 x0, x1, x2, x3;
            mov.b32 {{a, b}}, $2;
            cvt.rn.f16x2.{kind} low, a;
            cvt.rn.f16x2.{kind} high, b;
            mov.b32 {{h0, h1}}, low;
            mov.b32 {{h2, h3}}, high;
            cvt.f32.f16 x0, h0;
            cvt.f32.f16 x1, h1;
            cvt.f32.f16 x2, h2;
            cvt.f32.f16 x3, h3;
            {times}
            cvt.rn.{pair}.f32 $0, x1, x0;
            cvt.rn.{pair}.f32 $1, x3, x2;
        }}"""


@gluon.jit
def load_words(starts, mask, AT: gl.constexpr, COUNT: gl.constexpr):
    """COUNT words of rows from the AT-th on; those of rows that are masked are zeros."""
    columns = AT + gl.arange(0, COUNT, gl.SliceLayout(0, LAYOUT))
    return gl.load(
        gl.expand_dims(starts, 1) + gl.expand_dims(columns, 0), mask=gl.expand_dims(mask, 1), other=0
    )


@gluon.jit
def load_quarter(
    starts, scale_starts, mask, scales,
    I: gl.constexpr, T: gl.constexpr, D_V: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """The I-th quarter of tile T of a pair, and its rows' scales if they have any.

    Tile 0 comes from left to right, of tile 1 the right half first.
    """
    QUARTER: gl.constexpr = (I + 2 * T) % QUARTERS
    COUNT: gl.constexpr = D_V // QUARTERS // 4
    words = load_words(starts, mask, QUARTER * COUNT, COUNT)
    if GROUPS == 0:
        return (words,)
    else:
        GROUP: gl.constexpr = QUARTER * GROUPS // QUARTERS
        if GROUP > 0:
            scale_starts += gl.to_tensor(GROUP).to(gl.int64) * scales[5]
        return words, gl.load(scale_starts, mask=mask, other=0.0)


@gluon.jit
def store_words(boxes, words, scale, SCALED: gl.constexpr, source: gl.constexpr, target: gl.constexpr):
    """Columns of a tile, times their rows' scales if SCALED, in 16 bits, into their boxes."""
    ASM: gl.constexpr = conversion(source, target, SCALED)
    if SCALED:
        low, high = gl.inline_asm_elementwise(
            ASM, "=r,=r,r,f", [words, gl.expand_dims(scale, 1)], dtype=(gl.int32, gl.int32), is_pure=True,
            pack=1,
        )  # fmt: skip
    else:
        low, high = gl.inline_asm_elementwise(
            ASM, "=r,=r,r", [words], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
        )
    # In one store: the compiler would have a barrier between two into one allocation.
    EACH: gl.constexpr = boxes.shape[0] // TILE
    rows = gl.join(low, high).reshape([TILE, EACH, WORDS]).permute((1, 0, 2))
    boxes.store(rows.reshape([EACH * TILE, WORDS]))


@gluon.jit
def store_quarter(
    v_boxes, half, I: gl.constexpr, T: gl.constexpr, GROUPS: gl.constexpr, source: gl.constexpr,
    target: gl.constexpr,
):  # fmt: skip
    """Store the I-th quarter of tile T of a pair, of which ``half`` holds two."""
    boxes = v_boxes.index(T * QUARTERS + (I + 2 * T) % QUARTERS)
    if GROUPS > 0:
        store_words(boxes, half[I % 2 * 2], half[I % 2 * 2 + 1], True, source, target)
    else:
        store_words(boxes, half[I % 2], half[I % 2], False, source, target)


@gluon.jit
def find_starts(
    positions, block, k_start, v_ptr, v, scales, kv_head,
    VECTOR: gl.constexpr, BLOCK_SIZE: gl.constexpr, BLOCKS_PER_PAGE: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """Where rows of V begin, as words, and where their scales do."""
    rows = row_offsets(block, positions, k_start, v, VECTOR, BLOCK_SIZE, BLOCKS_PER_PAGE)
    starts = (v_ptr + rows).to(gl.pointer_type(gl.int32), bitcast=True)
    scale_starts = starts  # none, and nobody looks at them
    if GROUPS > 0:
        rows = row_offsets(block, positions, k_start, scales[1:4], 1, BLOCK_SIZE, BLOCKS_PER_PAGE)
        scale_starts = scales[0] + (rows + kv_head.to(gl.int64) * scales[4])
    return starts, scale_starts


@gluon.jit
def prefetch(starts, mask, AT: gl.constexpr, BYTES: gl.constexpr):
    """Bring BYTES of rows, from the AT-th word on, into L2: a lane asks for every fourth line of one."""
    lines = gl.arange(0, 16, gl.SliceLayout(0, LAYOUT))  # of these words each lane has four
    line = (lines % 4) * 4 + lines // 4
    wanted = (gl.expand_dims(line, 0) * 128 < BYTES) & gl.expand_dims(mask, 1)
    gl.inline_asm_elementwise(
        """{
        .reg .pred wanted;
        setp.ne.s32 wanted, $2, 0;
        @wanted prefetch.global.L2 [$1];
        mov.u32 $0, 0;
        }""",
        "=r,l,r,~{memory}",
        [gl.expand_dims(starts, 1) + (AT + gl.expand_dims(line, 0) * 32), wanted.to(gl.int32)],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def fill_tile(
    pairs, queue, positions, block, mask, starts, scale_starts, next_block, next_mask,
    v_boxes, k_boxes, full, empty, k_ptr, k, v_ptr, v, scales, k_start, first_key, key_end,
    table_ptr, stride_table_block, kv_head,
    T: gl.constexpr, D_V: gl.constexpr, D_K: gl.constexpr, dtype: gl.constexpr,
    VECTOR: gl.constexpr, K_VECTOR: gl.constexpr, BLOCK_SIZE: gl.constexpr, BLOCKS_PER_PAGE: gl.constexpr,
    K_AT: gl.constexpr, V_AT: gl.constexpr, GROUPS: gl.constexpr, HAS_LEFT: gl.constexpr,
):  # fmt: skip
    """Fill tile T of a pair, and start to load the next one: a quarter is asked for when one is stored.

    ``queue`` holds the first half of this tile. The ids of the next one's blocks are there; those of the one
    behind it are asked for. A wait for one load is a wait for all that are on their way: the rope piece is
    stored, and the ids are used, where a quarter has been waited for.

    Returns:
        What the next tile takes.
    """
    FIRST: gl.constexpr = LEFT0 if T == 0 else RIGHT1
    SECOND: gl.constexpr = RIGHT0 if T == 0 else LEFT1
    fp8: gl.constexpr = v_ptr.dtype.element_ty
    K_BYTES: gl.constexpr = k_ptr.dtype.element_ty.primitive_bitwidth // 8
    phase = (pairs & 1) ^ 1
    mbarrier.wait(empty[FIRST], phase)
    store_quarter(v_boxes, queue, 0, T, GROUPS, fp8, dtype)
    mbarrier.arrive(full[2 * FIRST], count=PRODUCERS)
    later = load_quarter(starts, scale_starts, mask, scales, 2, T, D_V, GROUPS)
    if V_AT >= 0:
        rope = load_words(starts, mask, (K_AT - V_AT) // 4, COLUMNS // 4)
    else:
        rows = row_offsets(block, positions, k_start, k, K_VECTOR, BLOCK_SIZE, BLOCKS_PER_PAGE)
        k_starts = (k_ptr + rows).to(gl.pointer_type(gl.int32), bitcast=True)
        rope = load_words(k_starts, mask, 0, COLUMNS // 4 * K_BYTES)
    store_quarter(v_boxes, queue, 1, T, GROUPS, fp8, dtype)
    mbarrier.arrive(full[2 * FIRST + 1], count=PRODUCERS)
    queue = later + load_quarter(starts, scale_starts, mask, scales, 3, T, D_V, GROUPS)
    later_block, later_mask = find_blocks(
        positions + 2 * TILE, first_key, key_end, table_ptr, stride_table_block, BLOCK_SIZE, HAS_LEFT
    )
    positions += TILE
    starts, scale_starts = find_starts(
        positions, next_block, k_start, v_ptr, v, scales, kv_head, VECTOR, BLOCK_SIZE, BLOCKS_PER_PAGE, GROUPS
    )
    mbarrier.wait(empty[SECOND], phase)
    store_quarter(v_boxes, queue, 2, T, GROUPS, fp8, dtype)
    mbarrier.arrive(full[2 * SECOND], count=PRODUCERS)
    if K_BYTES > 1:
        k_boxes.index(T).store(rope)
    else:
        store_words(k_boxes.index(T), rope, rope, False, fp8, dtype)
    later = load_quarter(starts, scale_starts, next_mask, scales, 0, 1 - T, D_V, GROUPS)
    store_quarter(v_boxes, queue, 3, T, GROUPS, fp8, dtype)
    mbarrier.arrive(full[2 * SECOND + 1], count=PRODUCERS)
    queue = later + load_quarter(starts, scale_starts, next_mask, scales, 1, 1 - T, D_V, GROUPS)
    # Too little fits into registers to hide all of memory's latency.
    ahead, _scales = find_starts(
        positions + TILE, later_block, k_start, v_ptr, v, scales, kv_head,
        VECTOR, BLOCK_SIZE, BLOCKS_PER_PAGE, 0,
    )  # fmt: skip
    ROPE: gl.constexpr = D_K if V_AT >= 0 else 0
    prefetch(ahead, later_mask, -ROPE // 4 if V_AT > 0 else 0, D_V + ROPE)
    return queue, positions, next_block, next_mask, starts, scale_starts, later_block, later_mask


@gluon.jit
def fill_pairs(
    pairs, key_begin, key_end, first_key, v_smem, k_smem, full, empty, q_ready, k_ptr, k, v_ptr, v, scales,
    k_start, table_ptr, stride_table_block, kv_head,
    D_V: gl.constexpr, D_K: gl.constexpr, VECTOR: gl.constexpr, K_VECTOR: gl.constexpr,
    BLOCK_SIZE: gl.constexpr, BLOCKS_PER_PAGE: gl.constexpr, K_AT: gl.constexpr, V_AT: gl.constexpr,
    GROUPS: gl.constexpr, HAS_LEFT: gl.constexpr,
):  # fmt: skip
    """Fill the halves with a share's pairs of tiles; returns the pairs so far."""
    dtype: gl.constexpr = v_smem.dtype
    # The boxes that make up tiles, those of a quarter together.
    v_boxes = reinterpret(v_smem, gl.int32, [2 * QUARTERS, D_V // QUARTERS // COLUMNS * TILE, WORDS], BOXES)
    k_boxes = reinterpret(k_smem, gl.int32, [2, TILE, WORDS], BOXES)
    positions = key_begin + gl.arange(0, TILE, ROW)
    block, mask = find_blocks(
        positions, first_key, key_end, table_ptr, stride_table_block, BLOCK_SIZE, HAS_LEFT
    )
    next_block, next_mask = find_blocks(
        positions + TILE, first_key, key_end, table_ptr, stride_table_block, BLOCK_SIZE, HAS_LEFT
    )
    starts, scale_starts = find_starts(
        positions, block, k_start, v_ptr, v, scales, kv_head,
        VECTOR, BLOCK_SIZE, BLOCKS_PER_PAGE, GROUPS,
    )  # fmt: skip
    queue = load_quarter(starts, scale_starts, mask, scales, 0, 0, D_V, GROUPS)
    queue = queue + load_quarter(starts, scale_starts, mask, scales, 1, 0, D_V, GROUPS)
    for _key in range(key_begin, tl.maximum(key_end, key_begin + 1), 2 * TILE):
        queue, positions, block, mask, starts, scale_starts, next_block, next_mask = fill_tile(
            pairs, queue, positions, block, mask, starts, scale_starts, next_block, next_mask,
            v_boxes, k_boxes, full, empty, k_ptr, k, v_ptr, v, scales, k_start, first_key, key_end,
            table_ptr, stride_table_block, kv_head, 0, D_V, D_K, dtype, VECTOR, K_VECTOR,
            BLOCK_SIZE, BLOCKS_PER_PAGE, K_AT, V_AT, GROUPS, HAS_LEFT,
        )  # fmt: skip
        if pairs == 0:
            mbarrier.wait(q_ready, 0)  # the queries and one tile are wanted first
        queue, positions, block, mask, starts, scale_starts, next_block, next_mask = fill_tile(
            pairs, queue, positions, block, mask, starts, scale_starts, next_block, next_mask,
            v_boxes, k_boxes, full, empty, k_ptr, k, v_ptr, v, scales, k_start, first_key, key_end,
            table_ptr, stride_table_block, kv_head, 1, D_V, D_K, dtype, VECTOR, K_VECTOR,
            BLOCK_SIZE, BLOCKS_PER_PAGE, K_AT, V_AT, GROUPS, HAS_LEFT,
        )  # fmt: skip
        pairs += 1
    return pairs


@gluon.jit
def produce(
    v_smem, k_smem, full, empty, q_ready, walk, lengths, k_ptr, k, v_ptr, v, scales, table, kv_head, out, lse,
    D_V: gl.constexpr, D_K: gl.constexpr, VECTOR: gl.constexpr, K_VECTOR: gl.constexpr,
    BLOCK_SIZE: gl.constexpr, BLOCKS_PER_PAGE: gl.constexpr, K_AT: gl.constexpr, V_AT: gl.constexpr,
    GROUPS: gl.constexpr, GROUP_SIZE: gl.constexpr, SCHEDULED: gl.constexpr, FIXED_SPLITS: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, SHARDED: gl.constexpr,
):  # fmt: skip
    """Fill the halves of the two buffers, in the order in which they become free."""
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
            pairs = fill_pairs(
                pairs, key_begin, key_end, first_key, v_smem, k_smem, full, empty, q_ready,
                k_ptr, k, v_ptr, v, scales, k_start, table_ptr, table[2], kv_head,
                D_V, D_K, VECTOR, K_VECTOR, BLOCK_SIZE, BLOCKS_PER_PAGE, K_AT, V_AT, GROUPS, HAS_LEFT,
            )  # fmt: skip
        seq, unit, step = next_unit(seq, unit, step, units, SCHEDULED)
    if SCHEDULED:
        answer_foreign(walk, lengths, out, lse, kv_head, GROUP_SIZE, D_V)


@gluon.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=UNALIGNED)
def mla_wide_fp8_kernel(
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
    GROUPS: gl.constexpr,  # scales of a row, 0 without
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, HAS_SOFTCAP: gl.constexpr,
    CP_WORLD_SIZE: gl.constexpr, CP_INTERLEAVE: gl.constexpr,
    OUT_UNIT: gl.constexpr, OUT_VECTOR: gl.constexpr,
    SCHEDULED: gl.constexpr, FIXED_SPLITS: gl.constexpr,
    SEQUENCES: gl.constexpr,  # at most, of which each program finds its part itself; 0: the schedule has it
    SHARES: gl.constexpr, LINES: gl.constexpr, DIMS: gl.constexpr,  # combined at once; 0: not here
    CONSUMER_REGISTERS: gl.constexpr,  # the producer's are what is left
):  # fmt: skip
    """Attention of the rows of each unit over its keys, for one part.

    Grid: ``(row tiles of a unit, num_kv_heads, parts)``, four warps. Parts and partial results are as those
    of ``decode_kernel``: ``[slots, num_kv_heads, rows_per_unit, D_V]``, then the lse.
    """
    gdc_launch_dependents()
    SHARDED: gl.constexpr = CP_WORLD_SIZE > 1
    D_HALF: gl.constexpr = D_V // 2
    v_dtype: gl.constexpr = v_ptr.dtype.element_ty
    MIXED: gl.constexpr = k_ptr.dtype.element_ty.primitive_bitwidth > 8
    # float16: one conversion for two elements, where bfloat16 needs four instructions.
    NARROWED: gl.constexpr = GROUPS == 0 and not MIXED and q_ptr.dtype.element_ty == gl.bfloat16
    dtype: gl.constexpr = gl.float16 if NARROWED else q_ptr.dtype.element_ty
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
    maxima_smem = gl.allocate_shared_memory(gl.float32, [2, ROWS], PLAIN)
    full = (
        barrier(PRODUCERS), barrier(PRODUCERS), barrier(PRODUCERS), barrier(PRODUCERS),
        barrier(PRODUCERS), barrier(PRODUCERS), barrier(PRODUCERS), barrier(PRODUCERS),
    )  # fmt: skip
    empty = (barrier(1), barrier(1), barrier(1), barrier(1))
    q_seen = barrier(2)
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
    # The left warpgroup has more values under way at once, and needs a little more where both have less.
    APART: gl.constexpr = 8 if GROUPS > 0 else 0
    gl.warp_specialize([
        (produce, (
            v_smem, k_smem, full, empty, q_ready, walk, lengths, k_base, k, v_base, v, scales, table,
            kv_head, out, lse, D_V, D_K, VECTOR, K_VECTOR, BLOCK_SIZE, BLOCKS_PER_PAGE, K_AT, V_AT, GROUPS,
            GROUP_SIZE, SCHEDULED, FIXED_SPLITS, HAS_LEFT, HAS_RIGHT, SHARDED,
        )),
        (consume_left, (
            q_v_smem, q_k_smem, v_smem, k_smem, limits0_smem, reference0_smem, reference1_smem,
            sum0_smem, sum1_smem,
            maxima_smem, full, empty, q_seen, q_ready, p0_ready, p1_ready, done0, done1,
            walk, lengths, latent_ptr, latent, q_ptr + K_AT, rope, q_descale, k_descale, v_descale,
            sinks, out, lse, partial,
            softmax_scale, softcap, cp_rank, kv_head, gl.num_programs(1),
            D_HALF, D_K, Q_VECTOR, GROUP_SIZE, SCHEDULED, FIXED_SPLITS, SHARES, LINES, DIMS,
            HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, CP_WORLD_SIZE, CP_INTERLEAVE, OUT_UNIT, OUT_VECTOR, False,
            True, V_AT >= 0, NARROWED,
        )),
        (consume_right, (
            q_v_smem, q_k_smem, v_smem, k_smem, limits1_smem, reference0_smem, reference1_smem,
            sum1_smem, sum0_smem,
            maxima_smem, full, empty, q_seen, q_ready, p0_ready, p1_ready, done1, done0,
            walk, lengths, latent_ptr, latent, q_ptr + K_AT, rope, q_descale, k_descale, v_descale,
            sinks, out, lse, partial,
            softmax_scale, softcap, cp_rank, kv_head, gl.num_programs(1),
            D_HALF, D_K, Q_VECTOR, GROUP_SIZE, SCHEDULED, FIXED_SPLITS, SHARES, LINES, DIMS,
            HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, CP_WORLD_SIZE, CP_INTERLEAVE, OUT_UNIT, OUT_VECTOR, False,
            True, V_AT >= 0, NARROWED,
        )),
    ], [4, 4], [CONSUMER_REGISTERS + APART, CONSUMER_REGISTERS - APART])  # fmt: skip
