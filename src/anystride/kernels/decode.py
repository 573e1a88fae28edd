"""Attention of one tile of rows over a run of keys, read from a paged cache of any strides.

One kernel serves GQA, MQA, MHA and MLA. A key row has up to three pieces: two of dimensions that only K has
(``KEY_DIMS``), and V's own (``d_v``) where V takes part in the scores: because V lies in K's row, or because
``q_v`` was given. V's tile is then loaded once and used twice.

Strides are run-time numbers and never specialised on (but for 32 or 64 bits of width); their products are
64-bit. What the compiler needs to know of them for wide loads comes as ``*_VECTOR``, the elements that every
row of the cache is aligned to, and ``*_NARROW``: a tile's rows lie within 2^31 elements of its first, so that
one 64-bit base and 32-bit offsets reach them.

The second product is transposed: the accumulator is ``[d_v, rows]``. Dimensions then are the long side of a
tensor-core instruction and rows the short one: sixteen rows waste nothing, no operand but the accumulator
needs registers, and Hopper's wgmma reads the cache's tile from shared memory. The first product is not, where
rows are few: each warp then takes some keys and all rows, and reads no key twice.

Source: FlashAttention-2, https://arxiv.org/abs/2307.08691; split-KV as in Flash-Decoding.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from anystride.kernels.parts import is_before, next_unit, part_range, partial_line, share_keys, unit_share
from anystride.kernels.ranges import positions_over_ranks
from anystride.kernels.schedule import is_foreign
from anystride.kernels.softmax import LN_2, LOG2_E, add_sink, normaliser, tanh

# Everything that may change from call to call without a new compilation.
RUNTIME = [
    "stride_q_token", "stride_q_head", "stride_q_dim",
    "stride_q_v_token", "stride_q_v_head", "stride_q_v_dim",
    "stride_k_page", "stride_k_block", "stride_k_token", "stride_k_head", "stride_k_dim",
    "stride_v_page", "stride_v_block", "stride_v_token", "stride_v_head", "stride_v_dim",
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
    "batch", "num_parts", "window_left", "window_right", "cp_rank",
    "units_per_seq", "splits_per_unit", "steps_per_split", "rows_per_unit", "partial_lines",
]  # fmt: skip
# Small tensors whose base address may be anything: their loads are scalar or short.
UNALIGNED = [
    "block_table_ptr", "cu_seqlens_q_ptr", "cu_seqlens_k_ptr", "seqused_k_ptr", "cp_tot_ptr",
    "alibi_ptr", "sinks_ptr", "q_descale_ptr", "k_descale_ptr", "v_descale_ptr",
    "k_scale_cache_ptr", "v_scale_cache_ptr", "metadata_ptr",
]  # fmt: skip


@triton.jit
def fp8_to(x, DTYPE: tl.constexpr, FORMAT: tl.constexpr, NATIVE: tl.constexpr):
    """An fp8 tile, loaded as bytes or as fp8, in the dtype of the products; exact in all of them.

    fp16 holds every e4m3 and e5m2 number. e5m2 is fp16 without its last byte. e4m3 in the bits of an fp16 is
    2^8 too small (the biases are 7 and 15), and its one NaN would read as a number.
    """
    if FORMAT == "none":
        wide = x
    elif NATIVE:
        wide = x.to(tl.float16)
    else:
        bits = x.to(tl.uint8, bitcast=True).to(tl.uint16)
        if FORMAT == "e5m2":
            wide = (bits << 8).to(tl.float16, bitcast=True)
        else:
            half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
            half = tl.where((bits & 0x7F) == 0x7F, 0x7E00, half).to(tl.uint16)
            wide = half.to(tl.float16, bitcast=True) * 256.0
    return wide.to(DTYPE)


@triton.jit
def scale_offsets(
    block, positions, kv_head, stride_page, stride_block, stride_token, stride_head,
    BLOCK_SIZE: tl.constexpr, BLOCKS_PER_PAGE: tl.constexpr,
):  # fmt: skip
    """Where the scales of a tile's rows begin, ``[TILE_N]``, 64-bit.

    ``block``: ids, one or ``[TILE_N]``; without a block table the row in which the sequence begins.
    """
    offsets = kv_head.to(tl.int64) * stride_head
    if BLOCK_SIZE == 0:
        offsets += (block + positions) * stride_token
    else:
        offsets += (block // BLOCKS_PER_PAGE).to(tl.int64) * stride_page
        offsets += (block % BLOCKS_PER_PAGE).to(tl.int64) * stride_block
        offsets += (positions % BLOCK_SIZE).to(tl.int64) * stride_token
    return offsets


@triton.jit
def dequantise(
    x, dims, scale_ptr, offsets, stride_group, mask_n, DTYPE: tl.constexpr, FORMAT: tl.constexpr,
    NATIVE: tl.constexpr, GROUPS: tl.constexpr, GROUP_DIMS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """A tile ``[rows, D]`` of the cache in the dtype of the products, times its scales if it has any.

    A row has GROUPS scales, from its offset on, for GROUP_DIMS dimensions each; ``dims`` ``[D]`` says which
    these are. RUN of them at a time, a power of two, belong to one group.
    """
    if GROUPS == 0:
        wide = fp8_to(x, DTYPE, FORMAT, NATIVE)
    elif GROUPS == 1:
        scales = tl.load(scale_ptr + offsets, mask=mask_n, other=0.0)  # [rows]
        wide = (fp8_to(x, tl.float32, FORMAT, NATIVE) * scales[:, None]).to(DTYPE)
    else:
        RUNS: tl.constexpr = x.shape[1] // RUN
        group = tl.min(tl.reshape(dims, [RUNS, RUN]), 1) // GROUP_DIMS  # [RUNS]
        ptrs = scale_ptr + offsets[:, None] + group[None, :].to(tl.int64) * stride_group
        mask = mask_n[:, None] & (group < GROUPS)[None, :]
        scales = tl.load(ptrs, mask=mask, other=0.0)  # [rows, RUNS]
        runs = tl.reshape(fp8_to(x, tl.float32, FORMAT, NATIVE), [x.shape[0], RUNS, RUN])
        wide = tl.reshape(runs * scales[:, :, None], [x.shape[0], x.shape[1]]).to(DTYPE)
    return wide


@triton.jit
def descale(ptr, stride_seq, stride_head, seq, kv_head):
    """A descale factor of a sequence and KV head; 1 where there is none."""
    scale = 1.0
    if ptr is not None:
        scale = tl.load(ptr + seq * stride_seq + kv_head * stride_head)
    return scale


@triton.jit
def score(q, keys, scores, ROWS_FIRST: tl.constexpr):
    """Add the products of queries ``[TILE_M, D]`` and keys ``[TILE_N, D]``, rows first or keys first."""
    if ROWS_FIRST:
        scores = tl.dot(q, tl.trans(keys), scores, input_precision="ieee")
    else:
        scores = tl.dot(keys, tl.trans(q), scores, input_precision="ieee")
    return scores


@triton.jit
def load_rows(ptr, rows, dims, stride_dim, mask_n, D: tl.constexpr, DIMS: tl.constexpr, UNIT: tl.constexpr):
    """A tile ``[rows, D]``: zero where a row is masked or past the last of ``DIMS`` dimensions."""
    ptrs = ptr + rows[:, None]
    if UNIT:
        ptrs += dims[None, :]
    else:
        ptrs += dims[None, :].to(tl.int64) * stride_dim
    mask = mask_n[:, None]
    if D != DIMS:
        mask = mask & (tl.arange(0, D) < DIMS)[None, :]
    return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def row_offsets(offs_n, stride_token, NARROW: tl.constexpr, VECTOR: tl.constexpr):
    """Offsets of a tile's rows from its first: the same for all tiles."""
    if NARROW:
        offsets = offs_n * stride_token.to(tl.int32)
    else:
        offsets = offs_n.to(tl.int64) * stride_token
    return tl.multiple_of(offsets, VECTOR)


@triton.jit
def load_blocks(
    table_ptr, stride_table_block, key, first_key, key_end, BLOCK_SIZE: tl.constexpr, TILE_N: tl.constexpr,
    HAS_LEFT: tl.constexpr,
):  # fmt: skip
    """Block ids of the tile that begins at ``key``: one, or ``[TILE_N]`` if it may span several."""
    entry = key // BLOCK_SIZE
    mask = key < key_end
    if BLOCK_SIZE % TILE_N != 0:
        positions = key + tl.arange(0, TILE_N)
        entry = positions // BLOCK_SIZE
        mask = positions < key_end
        if HAS_LEFT:
            mask = mask & (positions >= first_key)
    half_ptr = (table_ptr + entry.to(tl.int64) * stride_table_block).to(tl.pointer_type(tl.int16))
    low = tl.load(half_ptr, mask=mask, other=0).to(tl.int32) & 0xFFFF
    high = tl.load(half_ptr + 1, mask=mask, other=0).to(tl.int32)
    block = (high << 16) | low
    return block


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=UNALIGNED)
def decode_kernel(
    q_ptr, stride_q_token, stride_q_head, stride_q_dim,
    q_v_ptr, stride_q_v_token, stride_q_v_head, stride_q_v_dim,
    k_ptr, stride_k_page, stride_k_block, stride_k_token,
    stride_k_head, stride_k_dim,
    v_ptr, stride_v_page, stride_v_block, stride_v_token,
    stride_v_head, stride_v_dim,
    block_table_ptr, stride_table_seq, stride_table_block,
    cu_seqlens_q_ptr, stride_cu_q,
    cu_seqlens_k_ptr, stride_cu_k,
    seqused_k_ptr, stride_seqused,
    cp_tot_ptr, stride_cp_tot,
    alibi_ptr, stride_alibi_seq, stride_alibi_head,
    sinks_ptr, stride_sinks,
    q_descale_ptr, stride_q_descale_seq, stride_q_descale_head,
    k_descale_ptr, stride_k_descale_seq, stride_k_descale_head,
    v_descale_ptr, stride_v_descale_seq, stride_v_descale_head,
    k_scale_cache_ptr, stride_k_scale_page, stride_k_scale_block, stride_k_scale_token,
    stride_k_scale_head, stride_k_scale_group,
    v_scale_cache_ptr, stride_v_scale_page, stride_v_scale_block, stride_v_scale_token,
    stride_v_scale_head, stride_v_scale_group,
    metadata_ptr,
    out_ptr, stride_out_token, stride_out_head, stride_out_dim,
    lse_ptr, stride_lse_head,
    partial_ptr, partial_lines,
    softmax_scale: tl.float32, softcap: tl.float32, k_scale: tl.float32, v_scale: tl.float32,
    batch, num_parts, window_left, window_right, cp_rank,
    units_per_seq, splits_per_unit, steps_per_split, rows_per_unit,
    GROUP_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCKS_PER_PAGE: tl.constexpr,  # BLOCK_SIZE 0: no block table
    KEY_DIMS: tl.constexpr, D_K0: tl.constexpr, D_K1: tl.constexpr,
    DIMS_V: tl.constexpr, D_V0: tl.constexpr, D_V1: tl.constexpr,
    V_AT: tl.constexpr,  # dimensions of K from here on come after V's, which lies in K's row
    V_IN_SCORES: tl.constexpr,
    K_UNIT: tl.constexpr, V_UNIT: tl.constexpr, Q_UNIT: tl.constexpr,
    K_NARROW: tl.constexpr, V_NARROW: tl.constexpr,
    OUT_UNIT: tl.constexpr, OUT_VECTOR: tl.constexpr,
    K_VECTOR: tl.constexpr, V_VECTOR: tl.constexpr, Q_VECTOR: tl.constexpr,
    K_FORMAT: tl.constexpr, V_FORMAT: tl.constexpr, FP8_NATIVE: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_DESCALES: tl.constexpr,
    K_GROUPS: tl.constexpr, K_GROUP_DIMS: tl.constexpr, K_RUN: tl.constexpr,  # 0 groups: no scales
    V_GROUPS: tl.constexpr, V_GROUP_DIMS: tl.constexpr, V_RUN: tl.constexpr,
    CP_WORLD_SIZE: tl.constexpr, CP_INTERLEAVE: tl.constexpr,
    SCHEDULED: tl.constexpr, FIXED_SPLITS: tl.constexpr,
    OVERLAP: tl.constexpr,  # the combine kernel is launched early and waits by itself
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Scores, online softmax and weighted values for the rows and keys of one part.

    Grid: ``(row tiles of a unit, num_kv_heads, parts)``. Row tiles of a unit walk the same keys at once.

    SCHEDULED: the part's run of (sequence, unit, step) comes from ``schedule_kernel``. Otherwise part
    ``p`` is split ``p % splits_per_unit`` of unit ``p // splits_per_unit``: an equal share of the unit's
    steps, or, if FIXED_SPLITS, ``steps_per_split`` of them.

    A unit whose keys all fall to this part is finished here. Else its rows, normalised, go to ``partial_ptr``
    ``[slots, num_kv_heads, rows_per_unit, DIMS_V]``, behind which come their lse in base 2, for
    ``combine_kernel``; a scheduled part has two slots: for its first unit, which it may not begin, and
    its last.

    Reads table entries and rows below each length only, and of a window only what some row of the unit sees.
    Masked values enter as zero: 0 x NaN is NaN.
    """
    tile_in_unit = tl.program_id(0)
    kv_head = tl.program_id(1)
    part = tl.program_id(2)
    if OVERLAP:
        gdc_launch_dependents()
    ROWS_FIRST: tl.constexpr = TILE_M <= 32
    SHARDED: tl.constexpr = CP_WORLD_SIZE > 1
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    # V lies in K's row, and one of them has scales: what is loaded once becomes two tiles.
    TWICE: tl.constexpr = V_AT <= KEY_DIMS and K_GROUPS + V_GROUPS > 0
    walk = (
        metadata_ptr, batch, units_per_seq, splits_per_unit, steps_per_split, rows_per_unit,
        window_left, window_right, None,
    )  # fmt: skip
    lengths = (
        cu_seqlens_q_ptr, stride_cu_q, cu_seqlens_k_ptr, stride_cu_k, seqused_k_ptr, stride_seqused,
        cp_tot_ptr, stride_cp_tot,
    )  # fmt: skip
    seq, unit, step, end_seq, end_unit, end_step = part_range(part, walk, SCHEDULED)
    if SCHEDULED:
        # A schedule made for other arguments would give wrong results without a word: give NaN instead.
        if is_foreign(metadata_ptr, rows_per_unit, batch, tl.num_programs(2)):
            fill_nan(
                out_ptr, stride_out_token, stride_out_head, stride_out_dim, lse_ptr, stride_lse_head,
                cu_seqlens_q_ptr, stride_cu_q, batch, tile_in_unit, kv_head, part, num_parts,
                GROUP_SIZE, DIMS_V, TILE_M, 16,
            )  # fmt: skip
            return
    first_seq = seq
    first_unit = unit

    offs_m = tl.arange(0, TILE_M)
    offs_n = tl.arange(0, TILE_N)
    dims_k0 = tl.arange(0, D_K0)
    dims_v0 = tl.arange(0, D_V0)
    # The dimensions of K that are not V's, around V's.
    in_k0 = dims_k0
    if V_AT < KEY_DIMS:
        in_k0 = tl.where(dims_k0 >= V_AT, dims_k0 + DIMS_V, dims_k0) if V_AT > 0 else dims_k0 + DIMS_V

    while is_before(seq, unit, step, end_seq, end_unit, end_step):
        q_start, num_tokens, length, total, units, first_row, step, stop_step, whole, exists = unit_share(
            seq, unit, step, end_seq, end_unit, end_step, first_seq, part, walk, lengths, tile_in_unit,
            GROUP_SIZE, TILE_M, SCHEDULED, FIXED_SPLITS, HAS_LEFT, HAS_RIGHT, SHARDED,
        )  # fmt: skip
        if exists:
            first_key, key_begin, key_end = share_keys(
                unit, step, stop_step, num_tokens, length, total, walk, GROUP_SIZE, HAS_LEFT, HAS_RIGHT,
                SHARDED,
            )  # fmt: skip
            rows = first_row + offs_m  # [TILE_M]
            row_mask = rows < num_tokens * GROUP_SIZE
            token = rows // GROUP_SIZE
            head = kv_head * GROUP_SIZE + rows % GROUP_SIZE
            q_token = (q_start + token).to(tl.int64)
            q_rows = q_token * stride_q_token + head.to(tl.int64) * stride_q_head
            q_rows = tl.multiple_of(q_rows, Q_VECTOR)
            if KEY_DIMS > 0:
                q0 = load_rows(
                    q_ptr, q_rows, in_k0, stride_q_dim, row_mask, D_K0, min(KEY_DIMS, D_K0), Q_UNIT
                )  # [TILE_M, D_K0]
            if D_K1 > 0:
                dims_k1 = D_K0 + tl.arange(0, D_K1)
                in_k1 = dims_k1
                if V_AT < KEY_DIMS:
                    in_k1 = tl.where(dims_k1 >= V_AT, dims_k1 + DIMS_V, dims_k1)
                q1 = load_rows(
                    q_ptr, q_rows, in_k1, stride_q_dim, row_mask, D_K1, KEY_DIMS - D_K0, Q_UNIT
                )  # [TILE_M, D_K1]
            if V_IN_SCORES:
                if q_v_ptr is not None:
                    q_v_base = q_v_ptr
                    q_v_rows = q_token * stride_q_v_token + head.to(tl.int64) * stride_q_v_head
                    q_v_rows = tl.multiple_of(q_v_rows, Q_VECTOR)
                else:  # V lies in K's row: its queries lie in q's
                    q_v_base = q_ptr
                    q_v_rows = q_rows
                in_v0 = dims_v0
                if V_AT <= KEY_DIMS:
                    in_v0 = V_AT + dims_v0
                q_v0 = load_rows(
                    q_v_base, q_v_rows, in_v0, stride_q_v_dim, row_mask, D_V0, min(DIMS_V, D_V0), Q_UNIT
                )  # [TILE_M, D_V0]
                if D_V1 > 0:
                    in_v1 = D_V0 + tl.arange(0, D_V1)
                    if V_AT <= KEY_DIMS:
                        in_v1 = V_AT + in_v1
                    q_v1 = load_rows(
                        q_v_base, q_v_rows, in_v1, stride_q_v_dim, row_mask, D_V1, DIMS_V - D_V0, Q_UNIT
                    )  # [TILE_M, D_V1]

            q_factor = descale(q_descale_ptr, stride_q_descale_seq, stride_q_descale_head, seq, kv_head)
            k_factor = k_scale * descale(
                k_descale_ptr, stride_k_descale_seq, stride_k_descale_head, seq, kv_head
            )
            v_factor = v_scale * descale(
                v_descale_ptr, stride_v_descale_seq, stride_v_descale_head, seq, kv_head
            )
            scale = softmax_scale * q_factor
            centre = total - num_tokens + token  # [TILE_M], position of the row's own token
            if alibi_ptr is not None:
                slope = tl.load(
                    alibi_ptr + seq * stride_alibi_seq + head * stride_alibi_head,
                    mask=row_mask, other=0.0,
                ).to(tl.float32)  # fmt: skip

            row_max = tl.full([TILE_M], float("-inf"), tl.float32)
            prob_sum = tl.zeros([TILE_N, TILE_M], tl.float32)  # summed over keys at the end only
            acc0 = tl.zeros([D_V0, TILE_M], tl.float32)
            if D_V1 > 0:
                acc1 = tl.zeros([D_V1, TILE_M], tl.float32)

            k_head = kv_head.to(tl.int64) * stride_k_head
            v_head = kv_head.to(tl.int64) * stride_v_head
            ONE_BASE: tl.constexpr = BLOCK_SIZE % TILE_N == 0  # the tile lies in one block, or in no block
            if ONE_BASE:
                k_rows = row_offsets(offs_n, stride_k_token, K_NARROW, K_VECTOR)  # [TILE_N]
                v_rows = row_offsets(offs_n, stride_v_token, V_NARROW, V_VECTOR)
            if BLOCK_SIZE == 0:
                k_start = tl.load(cu_seqlens_k_ptr + seq * stride_cu_k).to(tl.int64)
            else:
                table_ptr = block_table_ptr + seq.to(tl.int64) * stride_table_seq
            for tile_begin in tl.range(key_begin, key_end, TILE_N, num_stages=STAGES):
                key = tl.zeros([], tl.int32) + tile_begin  # the interpreter counts in Python's integers
                positions = key + offs_n  # [TILE_N]
                mask_n = positions < key_end
                if HAS_LEFT:
                    mask_n = mask_n & (positions >= first_key)
                if BLOCK_SIZE == 0:
                    block = k_start
                    k_base = k_head + (k_start + key) * stride_k_token
                    v_base = v_head + (k_start + key) * stride_v_token
                else:
                    block = load_blocks(
                        table_ptr, stride_table_block, key, first_key, key_end, BLOCK_SIZE, TILE_N, HAS_LEFT
                    )
                    if BLOCKS_PER_PAGE == 1:
                        k_base = k_head + block.to(tl.int64) * stride_k_page
                        v_base = v_head + block.to(tl.int64) * stride_v_page
                    else:
                        page = (block // BLOCKS_PER_PAGE).to(tl.int64)
                        sub = (block % BLOCKS_PER_PAGE).to(tl.int64)
                        k_base = k_head + page * stride_k_page + sub * stride_k_block
                        v_base = v_head + page * stride_v_page + sub * stride_v_block
                    if BLOCK_SIZE > 1:  # adding a zero is folded away, and the hint below with it
                        if ONE_BASE:
                            slot = (key % BLOCK_SIZE).to(tl.int64)
                        else:
                            slot = (positions % BLOCK_SIZE).to(tl.int64)
                        k_base += slot * stride_k_token
                        v_base += slot * stride_v_token
                k_base = tl.multiple_of(k_base, K_VECTOR)
                v_base = tl.multiple_of(v_base, V_VECTOR)
                if ONE_BASE:
                    k_tile_ptr = k_ptr + k_base
                    v_tile_ptr = v_ptr + v_base
                else:
                    k_tile_ptr = k_ptr
                    v_tile_ptr = v_ptr
                    k_rows = k_base  # [TILE_N]
                    v_rows = v_base

                k_scales = 0
                if K_GROUPS > 0:
                    k_scales = scale_offsets(
                        block, positions, kv_head, stride_k_scale_page, stride_k_scale_block,
                        stride_k_scale_token, stride_k_scale_head, BLOCK_SIZE, BLOCKS_PER_PAGE,
                    )  # fmt: skip
                v_scales = 0
                if V_GROUPS > 0:
                    v_scales = scale_offsets(
                        block, positions, kv_head, stride_v_scale_page, stride_v_scale_block,
                        stride_v_scale_token, stride_v_scale_head, BLOCK_SIZE, BLOCKS_PER_PAGE,
                    )  # fmt: skip

                stored_v0 = load_rows(
                    v_tile_ptr, v_rows, dims_v0, stride_v_dim, mask_n, D_V0, min(DIMS_V, D_V0), V_UNIT
                )  # [TILE_N, D_V0]
                v0 = dequantise(
                    stored_v0, dims_v0, v_scale_cache_ptr, v_scales, stride_v_scale_group, mask_n, DTYPE,
                    V_FORMAT, FP8_NATIVE, V_GROUPS, V_GROUP_DIMS, V_RUN,
                )  # fmt: skip
                scored_v0 = v0
                if TWICE:
                    scored_v0 = dequantise(
                        stored_v0, in_v0, k_scale_cache_ptr, k_scales, stride_k_scale_group, mask_n, DTYPE,
                        V_FORMAT, FP8_NATIVE, K_GROUPS, K_GROUP_DIMS, K_RUN,
                    )  # fmt: skip
                if D_V1 > 0:
                    dims_v1 = D_V0 + tl.arange(0, D_V1)
                    stored_v1 = load_rows(
                        v_tile_ptr, v_rows, dims_v1, stride_v_dim, mask_n, D_V1, DIMS_V - D_V0, V_UNIT
                    )  # [TILE_N, D_V1]
                    v1 = dequantise(
                        stored_v1, dims_v1, v_scale_cache_ptr, v_scales, stride_v_scale_group, mask_n, DTYPE,
                        V_FORMAT, FP8_NATIVE, V_GROUPS, V_GROUP_DIMS, V_RUN,
                    )  # fmt: skip
                    scored_v1 = v1
                    if TWICE:
                        scored_v1 = dequantise(
                            stored_v1, in_v1, k_scale_cache_ptr, k_scales, stride_k_scale_group, mask_n,
                            DTYPE, V_FORMAT, FP8_NATIVE, K_GROUPS, K_GROUP_DIMS, K_RUN,
                        )  # fmt: skip

                scores = tl.zeros([TILE_M, TILE_N] if ROWS_FIRST else [TILE_N, TILE_M], tl.float32)
                if KEY_DIMS > 0:
                    k0 = load_rows(
                        k_tile_ptr, k_rows, in_k0, stride_k_dim, mask_n, D_K0, min(KEY_DIMS, D_K0), K_UNIT
                    )  # [TILE_N, D_K0]
                    k0 = dequantise(
                        k0, in_k0, k_scale_cache_ptr, k_scales, stride_k_scale_group, mask_n, DTYPE,
                        K_FORMAT, FP8_NATIVE, K_GROUPS, K_GROUP_DIMS, K_RUN,
                    )  # fmt: skip
                    scores = score(q0, k0, scores, ROWS_FIRST)
                if D_K1 > 0:
                    k1 = load_rows(
                        k_tile_ptr, k_rows, in_k1, stride_k_dim, mask_n, D_K1, KEY_DIMS - D_K0, K_UNIT
                    )  # [TILE_N, D_K1]
                    k1 = dequantise(
                        k1, in_k1, k_scale_cache_ptr, k_scales, stride_k_scale_group, mask_n, DTYPE,
                        K_FORMAT, FP8_NATIVE, K_GROUPS, K_GROUP_DIMS, K_RUN,
                    )  # fmt: skip
                    scores = score(q1, k1, scores, ROWS_FIRST)
                if HAS_DESCALES and V_IN_SCORES and V_AT >= KEY_DIMS + DIMS_V:
                    # The q_v form: K and V have descales of their own.
                    of_v = score(q_v0, scored_v0, tl.zeros_like(scores), ROWS_FIRST)
                    if D_V1 > 0:
                        of_v = score(q_v1, scored_v1, of_v, ROWS_FIRST)
                    scores = scores * k_factor + of_v * v_factor
                else:
                    if V_IN_SCORES:
                        scores = score(q_v0, scored_v0, scores, ROWS_FIRST)
                        if D_V1 > 0:
                            scores = score(q_v1, scored_v1, scores, ROWS_FIRST)
                    if HAS_DESCALES:
                        scores = scores * k_factor

                if ROWS_FIRST:
                    scores = tl.trans(scores)  # [TILE_N, TILE_M], as the accumulator wants its weights
                if HAS_SOFTCAP:
                    scores = tanh(scores * (scale / softcap)) * (softcap * LOG2_E)
                else:
                    scores = scores * (scale * LOG2_E)
                where = positions_over_ranks(positions, cp_rank, CP_WORLD_SIZE, CP_INTERLEAVE)
                if alibi_ptr is not None:
                    apart = tl.abs(centre[None, :] - where[:, None]).to(tl.float32)
                    scores -= (slope * LOG2_E)[None, :] * apart
                visible = mask_n[:, None]
                if HAS_RIGHT:
                    visible = visible & (where[:, None] <= (centre + window_right)[None, :])
                if HAS_LEFT:
                    visible = visible & (where[:, None] >= (centre - window_left)[None, :])
                scores = tl.where(visible, scores, float("-inf"))

                new_max = tl.maximum(row_max, tl.max(scores, 0))
                anchor = tl.where(new_max == float("-inf"), 0.0, new_max)
                shrink = tl.exp2(row_max - anchor)
                probs = tl.exp2(scores - anchor[None, :])  # [TILE_N, TILE_M]
                prob_sum = prob_sum * shrink[None, :] + probs
                row_max = new_max
                probs = probs.to(v0.dtype)
                acc0 = tl.dot(tl.trans(v0), probs, acc0 * shrink[None, :], input_precision="ieee")
                if D_V1 > 0:
                    acc1 = tl.dot(tl.trans(v1), probs, acc1 * shrink[None, :], input_precision="ieee")
            row_sum = tl.sum(prob_sum, 0)  # [TILE_M]

            if whole:
                out_rows = q_token * stride_out_token + head.to(tl.int64) * stride_out_head
                out_rows = tl.multiple_of(out_rows, OUT_VECTOR)
                row_total = row_sum
                if sinks_ptr is not None:
                    sink = tl.load(sinks_ptr + head * stride_sinks, mask=row_mask, other=0.0)
                    sink = sink.to(tl.float32) * LOG2_E
                    row_max, shrink, row_total = add_sink(row_max, row_sum, sink)
                    acc0 = acc0 * shrink[None, :]
                    if D_V1 > 0:
                        acc1 = acc1 * shrink[None, :]
                some, row_total, inverse = normaliser(row_total, v_factor)
                if lse_ptr is not None:
                    lse = tl.where(some, (row_max + tl.log2(row_total)) * LN_2, float("-inf"))
                    lse_row = lse_ptr + head.to(tl.int64) * stride_lse_head + q_token
                    tl.store(lse_row, lse, mask=row_mask)
                store_rows(
                    out_ptr, out_rows, dims_v0, stride_out_dim, row_mask, tl.trans(acc0 * inverse[None, :]),
                    D_V0, min(DIMS_V, D_V0), OUT_UNIT,
                )  # fmt: skip
                if D_V1 > 0:
                    store_rows(
                        out_ptr, out_rows, D_V0 + tl.arange(0, D_V1), stride_out_dim, row_mask,
                        tl.trans(acc1 * inverse[None, :]), D_V1, DIMS_V - D_V0, OUT_UNIT,
                    )  # fmt: skip
            else:
                first_line = partial_line(
                    seq, unit, first_seq, first_unit, part, kv_head, tl.num_programs(1), rows_per_unit,
                    tile_in_unit, TILE_M, SCHEDULED,
                )  # fmt: skip
                some, row_sum, inverse = normaliser(row_sum, v_factor)
                lse = tl.where(some, row_max + tl.log2(row_sum), float("-inf"))
                partial_lse_ptr = partial_ptr + partial_lines.to(tl.int64) * DIMS_V
                tl.store(partial_lse_ptr + first_line + offs_m, lse)
                # Rows that are none are written, too: scratch.
                tile_ptr = partial_ptr + first_line * DIMS_V + offs_m[None, :] * DIMS_V
                mask = (dims_v0 < DIMS_V)[:, None]
                tl.store(tile_ptr + dims_v0[:, None], acc0 * inverse[None, :], mask=mask)
                if D_V1 > 0:
                    dims_v1 = D_V0 + tl.arange(0, D_V1)
                    mask = (dims_v1 < DIMS_V)[:, None]
                    tl.store(tile_ptr + dims_v1[:, None], acc1 * inverse[None, :], mask=mask)
        seq, unit, step = next_unit(seq, unit, step, units, SCHEDULED)


@triton.jit
def fill_nan(
    out_ptr, stride_out_token, stride_out_head, stride_out_dim, lse_ptr, stride_lse_head,
    cu_seqlens_q_ptr, stride_cu_q, batch, tile_in_unit, kv_head, part, num_parts,
    GROUP_SIZE: tl.constexpr, DIMS_V: tl.constexpr, TILE_M: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The answer to a schedule that was made for another call: NaN in every row."""
    if tile_in_unit == 0:
        for seq in range(part, batch, num_parts):
            q_start = tl.load(cu_seqlens_q_ptr + seq * stride_cu_q)
            num_tokens = tl.load(cu_seqlens_q_ptr + (seq + 1) * stride_cu_q) - q_start
            for first_row in range(0, num_tokens * GROUP_SIZE, TILE_M):
                rows = first_row + tl.arange(0, TILE_M)
                head = kv_head * GROUP_SIZE + rows % GROUP_SIZE
                q_token = (q_start + rows // GROUP_SIZE).to(tl.int64)
                if lse_ptr is not None:
                    lse_row = lse_ptr + head * stride_lse_head + q_token
                    tl.store(lse_row, float("nan"), mask=rows < num_tokens * GROUP_SIZE)
                out_rows = q_token * stride_out_token
                out_rows += head.to(tl.int64) * stride_out_head
                for first_dim in range(0, DIMS_V, D):
                    dims = first_dim + tl.arange(0, D)
                    ptrs = out_ptr + out_rows[:, None] + dims[None, :].to(tl.int64) * stride_out_dim
                    mask = (rows < num_tokens * GROUP_SIZE)[:, None] & (dims < DIMS_V)[None, :]
                    nan = tl.full([TILE_M, D], float("nan"), out_ptr.dtype.element_ty)
                    tl.store(ptrs, nan, mask=mask)


@triton.jit
def store_rows(
    ptr, rows, dims, stride_dim, mask_m, tile, D: tl.constexpr, DIMS: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Write a tile ``[rows, D]``, its first ``DIMS`` dimensions, in the dtype of the target."""
    mask = mask_m[:, None]
    if D != DIMS:
        mask = mask & (tl.arange(0, D) < DIMS)[None, :]
    ptrs = ptr + rows[:, None]
    if UNIT:
        ptrs += dims[None, :]
    else:
        ptrs += dims[None, :].to(tl.int64) * stride_dim
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=mask)
