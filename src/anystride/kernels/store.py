"""Store rows into a cache of any strides: the Triton kernel of the write side.

Rows come in two halves, K and V, or the latent part and the rope part of MLA: ``[tokens, heads, d]`` each,
into ``[pages, blocks, tokens, heads, d]``. A row of a head may be cut into groups, each with a scale of its
own; what follows calls each of them a row.

fp8 is written as bytes: from the GPU's own instruction where it has one, else as computed here.
"""

import triton
import triton.language as tl

RUNTIME = [
    "stride_slot", "num_tokens",
    *(
        f"stride_{half}{name}"
        for half in ("a", "b")
        for name in (
            "_token", "_head", "_dim", "c_page", "c_block", "c_token", "c_head", "c_dim",
            "s_page", "s_block", "s_token", "s_head", "s_group",
        )
    ),
]  # fmt: skip
UNALIGNED = ["slots_ptr", "a_scale_ptr", "b_scale_ptr"]


@triton.jit
def to_fp8(x, FORMAT: tl.constexpr):
    """float32 to the bytes of e4m3fn or e5m2: to nearest, ties to even.

    Beyond the largest number: that number; NaN stays NaN. As ``x.clamp(-most, most).to(dtype)`` of PyTorch.
    """
    MANTISSA: tl.constexpr = 3 if FORMAT == "e4m3" else 2
    BIAS: tl.constexpr = 7 if FORMAT == "e4m3" else 15
    MOST: tl.constexpr = 448.0 if FORMAT == "e4m3" else 57344.0
    SHIFT: tl.constexpr = 23 - MANTISSA
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    size = tl.abs(x)
    is_nan = x != x
    size = tl.where(size > MOST, MOST, size)
    near = size.to(tl.int32, bitcast=True)
    # Half of the last place that stays, less one where that place is even: then the rest is cut off.
    near += ((1 << (SHIFT - 1)) - 1) + ((near >> SHIFT) & 1)
    normal = (near >> SHIFT) - ((127 - BIAS) << MANTISSA)
    # Below the least normal number: a float32 whose last place is fp8's, so that adding rounds.
    magic: tl.constexpr = 2.0 ** (24 - BIAS - MANTISSA)
    subnormal = (size + magic).to(tl.int32, bitcast=True) - ((127 + 24 - BIAS - MANTISSA) << 23)
    least: tl.constexpr = 2.0 ** (1 - BIAS)
    code = tl.where(size < least, subnormal, normal)
    code = tl.where(is_nan, 0x7F, code)
    return (code | sign).to(tl.uint8)


@triton.jit
def fp8_bytes(x, FORMAT: tl.constexpr, NATIVE: tl.constexpr):
    """float32 to the bytes of e4m3fn or e5m2.

    The instruction rounds and saturates as :func:`to_fp8` does; of a NaN it may drop the sign.
    """
    if NATIVE:
        fp8: tl.constexpr = tl.float8e4nv if FORMAT == "e4m3" else tl.float8e5
        code = x.to(fp8).to(tl.uint8, bitcast=True)
    else:
        code = to_fp8(x, FORMAT)
    return code


@triton.jit
def divide(x, scale, FORMAT: tl.constexpr, BY_REMAINDER: tl.constexpr):
    """``x / scale``, rightly rounded; ``[rows, dimensions]`` and a scale for each row, or one for all.

    BY_REMAINDER: a product with the inverse, and one correction by the exact remainder, where fused products
    are fused: a division of each element costs several times as much. Beyond fp8's range none is needed, and
    there may be no remainder. Dividing by a tiny scale, which has no inverse, makes both sides larger first.

    Source: P. Markstein, "Computation of elementary functions on the IBM RISC System/6000 processor", 1990.
    """
    if BY_REMAINDER:
        MOST: tl.constexpr = 448.0 if FORMAT == "e4m3" else 57344.0
        larger = tl.where(scale < 2.0**-64, 2.0**64, 1.0)
        x = x * larger
        scale = scale * larger
        inverse = tl.div_rn(1.0, scale)
        near = x * inverse
        quotient = tl.fma(tl.fma(-near, scale, x), inverse, near)
        quotient = tl.where((near != 0) & (tl.abs(near) < 2 * MOST), quotient, near)  # -0 stays -0
    else:
        quotient = tl.div_rn(x, tl.zeros_like(x) + scale)
    return quotient


@triton.jit
def store_half(
    slots_ptr, stride_slot, num_tokens,
    ptr, stride_token, stride_head, stride_dim,
    cache_ptr, stride_c_page, stride_c_block, stride_c_token, stride_c_head, stride_c_dim,
    scale, scale_ptr, stride_s_page, stride_s_block, stride_s_token, stride_s_head, stride_s_group,
    BLOCK_SIZE: tl.constexpr, BLOCKS_PER_PAGE: tl.constexpr, FP8_NATIVE: tl.constexpr,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, FORMAT: tl.constexpr,
    SCALE: tl.constexpr, UNIT: tl.constexpr, VECTOR: tl.constexpr,
    C_UNIT: tl.constexpr, C_VECTOR: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store ROWS rows of D dimensions."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = rows % GROUPS
    head = (rows // GROUPS % HEADS).to(tl.int64)
    token = (rows // (GROUPS * HEADS)).to(tl.int64)
    given = token < num_tokens
    slot = tl.load(slots_ptr + token * stride_slot, mask=given, other=-1).to(tl.int64)
    exists = slot >= 0
    slot = tl.where(exists, slot, 0)
    block = slot // BLOCK_SIZE
    page = block // BLOCKS_PER_PAGE
    block = block % BLOCKS_PER_PAGE
    in_block = slot % BLOCK_SIZE

    dims = tl.arange(0, BLOCK_D)
    mask = exists[:, None] & (dims < D)[None, :]
    given = given[:, None] & (dims < D)[None, :]  # rows are read without waiting for their slots
    # What is known to be zero is not added: a sum that the compiler folds away would take what it knows of
    # the alignment with it.
    source_rows = token * stride_token
    cache_rows = page * stride_c_page
    if BLOCKS_PER_PAGE > 1:
        cache_rows += block * stride_c_block
    if BLOCK_SIZE > 1:
        cache_rows += in_block * stride_c_token
    if HEADS > 1:
        source_rows += head * stride_head
        cache_rows += head * stride_c_head
    if GROUPS > 1:
        first = (group * D).to(tl.int64)  # dimension
        source_rows += first * stride_dim
        cache_rows += first * stride_c_dim
    source_dims = dims.to(tl.int64)
    if UNIT:
        source_rows = tl.multiple_of(source_rows, VECTOR)
    else:
        source_dims = source_dims * stride_dim
    values = tl.load(ptr + (source_rows[:, None] + source_dims[None, :]), mask=given, other=0.0)

    if SCALE != "none" or FORMAT != "none":
        values = values.to(tl.float32)
    if SCALE == "number":
        values = divide(values, scale, FORMAT, FP8_NATIVE)
    if SCALE == "one":
        values = divide(values, tl.load(scale_ptr), FORMAT, FP8_NATIVE)
    if SCALE == "heads":
        of_head = tl.load(scale_ptr + head * stride_s_head)
        values = divide(values, of_head[:, None], FORMAT, FP8_NATIVE)
    if SCALE == "written":
        MOST: tl.constexpr = 448.0 if FORMAT == "e4m3" else 57344.0
        own = tl.div_rn(tl.max(tl.abs(values), 1), MOST)
        own = tl.where(own == 0, 1.0, own)
        values = divide(values, own[:, None], FORMAT, FP8_NATIVE)
        offsets = page * stride_s_page + block * stride_s_block + in_block * stride_s_token
        offsets += head * stride_s_head + group.to(tl.int64) * stride_s_group
        tl.store(scale_ptr + offsets, own, mask=exists)

    cache_dims = dims.to(tl.int64)
    if C_UNIT:
        cache_rows = tl.multiple_of(cache_rows, C_VECTOR)
    else:
        cache_dims = cache_dims * stride_c_dim
    ptrs = cache_ptr + (cache_rows[:, None] + cache_dims[None, :])
    if FORMAT == "none":
        tl.store(ptrs, values.to(cache_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(ptrs, fp8_bytes(values, FORMAT, FP8_NATIVE), mask=mask)


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=UNALIGNED)
def store_kernel(
    slots_ptr, stride_slot, num_tokens,
    a_ptr, stride_a_token, stride_a_head, stride_a_dim,
    ac_ptr, stride_ac_page, stride_ac_block, stride_ac_token, stride_ac_head, stride_ac_dim,
    a_scale: tl.float32, a_scale_ptr,
    stride_as_page, stride_as_block, stride_as_token, stride_as_head, stride_as_group,
    b_ptr, stride_b_token, stride_b_head, stride_b_dim,
    bc_ptr, stride_bc_page, stride_bc_block, stride_bc_token, stride_bc_head, stride_bc_dim,
    b_scale: tl.float32, b_scale_ptr,
    stride_bs_page, stride_bs_block, stride_bs_token, stride_bs_head, stride_bs_group,
    BLOCK_SIZE: tl.constexpr, BLOCKS_PER_PAGE: tl.constexpr,
    FP8_NATIVE: tl.constexpr,  # the GPU has an instruction that rounds to fp8
    A_HEADS: tl.constexpr, A_GROUPS: tl.constexpr, A_D: tl.constexpr, A_FORMAT: tl.constexpr,
    A_SCALE: tl.constexpr, A_UNIT: tl.constexpr, A_VECTOR: tl.constexpr,
    A_C_UNIT: tl.constexpr, A_C_VECTOR: tl.constexpr, A_ROWS: tl.constexpr, A_BLOCK_D: tl.constexpr,
    B_HEADS: tl.constexpr, B_GROUPS: tl.constexpr, B_D: tl.constexpr, B_FORMAT: tl.constexpr,
    B_SCALE: tl.constexpr, B_UNIT: tl.constexpr, B_VECTOR: tl.constexpr,
    B_C_UNIT: tl.constexpr, B_C_VECTOR: tl.constexpr, B_ROWS: tl.constexpr, B_BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid: ``(tiles of rows, 2)``: the halves side by side, each with as many programs as the larger one."""
    if tl.program_id(1) == 0:
        store_half(
            slots_ptr, stride_slot, num_tokens,
            a_ptr, stride_a_token, stride_a_head, stride_a_dim,
            ac_ptr, stride_ac_page, stride_ac_block, stride_ac_token, stride_ac_head, stride_ac_dim,
            a_scale, a_scale_ptr,
            stride_as_page, stride_as_block, stride_as_token, stride_as_head, stride_as_group,
            BLOCK_SIZE, BLOCKS_PER_PAGE, FP8_NATIVE, A_HEADS, A_GROUPS, A_D, A_FORMAT, A_SCALE,
            A_UNIT, A_VECTOR,
            A_C_UNIT, A_C_VECTOR, A_ROWS, A_BLOCK_D,
        )  # fmt: skip
    else:
        store_half(
            slots_ptr, stride_slot, num_tokens,
            b_ptr, stride_b_token, stride_b_head, stride_b_dim,
            bc_ptr, stride_bc_page, stride_bc_block, stride_bc_token, stride_bc_head, stride_bc_dim,
            b_scale, b_scale_ptr,
            stride_bs_page, stride_bs_block, stride_bs_token, stride_bs_head, stride_bs_group,
            BLOCK_SIZE, BLOCKS_PER_PAGE, FP8_NATIVE, B_HEADS, B_GROUPS, B_D, B_FORMAT, B_SCALE,
            B_UNIT, B_VECTOR,
            B_C_UNIT, B_C_VECTOR, B_ROWS, B_BLOCK_D,
        )  # fmt: skip
