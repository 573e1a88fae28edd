"""How Hopper's kernels read an fp8 cache: tiles arrive as they are stored, and are converted on their way.

Keys are converted in registers, where wgmma takes them; values through registers into a 16-bit tile, as wgmma
reads a transposed operand of 16 bits only. An fp8 number is exact in both 16-bit dtypes. float16 costs one
instruction for two elements, bfloat16 four: products are made in float16, unless values are multiplied with
scales of their rows, which may take them out of its range.

Scales that belong to a sequence and head are folded into scores and results, those of a row of K into its
scores.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from anystride.kernels.attention_sm90 import load_queries
from anystride.kernels.decode import descale
from anystride.kernels.loaders_sm90 import copy_async, row_offsets


@gluon.constexpr_function
def operand_layout(width):
    """``[TILE, width]`` fp8, 16 neighbours a thread (8 of 32 columns), rows where wgmma has its operand's."""
    own = min(width // 4, 16)
    registers = [[0, 1 << i] for i in range(own.bit_length() - 1)]
    registers += [[8, 0], *([0, 4 * own << i] for i in range((width // (4 * own)).bit_length() - 1))]
    lanes = [[0, own], [0, 2 * own], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [64, width])


@gluon.jit
def in_operand_order(x):
    """Columns of ``[rows, columns]`` in the order in which a thread's neighbours are wgmma's operand.

    A step of a product takes four elements of a thread: two of the step's first half, two of its second. A
    sum over columns knows no order, if both factors have the same.
    """
    ROWS: gl.constexpr = x.shape[0]
    WIDTH: gl.constexpr = x.shape[1]
    STEPS: gl.constexpr = min(WIDTH // 4, 16) // 4
    x = x.reshape([ROWS, WIDTH // (16 * STEPS), 4, STEPS, 2, 2])  # runs, threads, steps, halves, neighbours
    return x.permute((0, 1, 3, 4, 2, 5)).reshape([ROWS, WIDTH])


@gluon.jit
def load_operand(source, scales_smem, WIDTH: gl.constexpr, SCALED: gl.constexpr, dtype: gl.constexpr):
    """A tile of fp8 in 16 bits, times its rows' scales, ``[TILE, WIDTH]`` as it lies in the cache."""
    LAYOUT: gl.constexpr = operand_layout(WIDTH)
    values = source.load(LAYOUT).to(gl.float16)
    # By way of float32: directly, fp16 becomes bf16 one element at a time.
    if SCALED:
        values = values.to(gl.float32) * gl.expand_dims(scales_smem.load(gl.SliceLayout(1, LAYOUT)), 1)
    elif dtype == gl.bfloat16:
        values = values.to(gl.float32)
    return values.to(dtype)


@gluon.jit
def largest(queries):
    """The largest size of each row's elements, float32."""
    return gl.max(gl.abs(queries.to(gl.float32)), 1)


@gluon.jit
def powers_of_two(left, middle, right):
    """Powers of two that bring rows in three pieces near the end of fp16's range, and that bring them back.

    The pieces' rows must lie in the same threads.
    """
    ROW: gl.constexpr = gl.SliceLayout(1, left.type.layout)
    most = gl.maximum(largest(left), gl.convert_layout(largest(middle), ROW, assert_trivial=True))
    most = gl.maximum(most, gl.convert_layout(largest(right), ROW, assert_trivial=True))
    exponent = gl.maximum((most.to(gl.int32, bitcast=True) >> 23) & 255, 15)
    up = ((268 - exponent) << 23).to(gl.float32, bitcast=True)  # the largest is then below 2^15
    down = ((exponent - 14) << 23).to(gl.float32, bitcast=True)
    return up, down


@gluon.jit
def scaled(queries, up, dtype: gl.constexpr):
    """Rows times their powers of two, in ``dtype``."""
    ROW: gl.constexpr = gl.SliceLayout(1, queries.type.layout)
    return (queries.to(gl.float32) * gl.expand_dims(gl.convert_layout(up, ROW), 1)).to(dtype)


@gluon.jit
def factor_of(descales, seq, kv_head):
    """What numbers of K or V are multiplied by: ``descales`` are a pointer, its strides, and a number."""
    return descales[3] * descale(descales[0], descales[1], descales[2], seq, kv_head)


@gluon.jit
def factors(softmax_scale, q_descale, k_descale, v_descale, seq, kv_head, ONE_ROW: gl.constexpr):
    """What all scores are multiplied by, and what queries of the rope piece are ahead of it.

    Scores of the latent have V's factor where it does not lie in K's row; the rope piece then has what K's is
    of that, in its queries, so that one accumulator takes both.
    """
    scale = softmax_scale * descale(q_descale[0], q_descale[1], q_descale[2], seq, kv_head)
    k_factor = factor_of(k_descale, seq, kv_head)
    rope = k_factor
    if ONE_ROW:
        scale *= k_factor
    else:
        v_factor = factor_of(v_descale, seq, kv_head)
        v_factor = gl.where(v_factor == 0, 2.0**-40, v_factor)  # as good as none, but nothing to divide by
        scale *= v_factor
        rope = k_factor / v_factor
    return scale, rope


@gluon.jit
def load_whole_queries(
    q_v_ptr, q_v, q_k_ptr, q_k, rope_scale, q_start, first_row, num_rows, kv_head,
    GROUP_SIZE: gl.constexpr, ROWS: gl.constexpr, D_HALF: gl.constexpr, D_K: gl.constexpr,
    VECTOR: gl.constexpr, ONE_ROW: gl.constexpr,
):  # fmt: skip
    """Left half, rope piece and right half of queries, and the powers of two of ``powers_of_two``."""
    left = load_queries(
        q_v_ptr, q_v, q_start, first_row, num_rows, kv_head, GROUP_SIZE, ROWS, D_HALF,
        min(VECTOR, D_HALF // 32),
    )  # fmt: skip
    rope = load_queries(
        q_k_ptr, q_k, q_start, first_row, num_rows, kv_head, GROUP_SIZE, ROWS, D_K, min(VECTOR, D_K // 32)
    )
    right = load_queries(
        q_v_ptr + D_HALF, q_v, q_start, first_row, num_rows, kv_head, GROUP_SIZE, ROWS, D_HALF,
        min(VECTOR, D_HALF // 32),
    )  # fmt: skip
    if not ONE_ROW:
        rope = rope.to(gl.float32) * rope_scale
    up, down = powers_of_two(left, rope, right)
    return left, rope, right, up, down


@gluon.jit
def copy_scales(
    scales_smem, scales, kv_head, GROUP: gl.constexpr, block, positions, k_start, mask,
    BLOCK_SIZE: gl.constexpr, BLOCKS_PER_PAGE: gl.constexpr,
):  # fmt: skip
    """Start to copy a tile's scales of one group; those of rows that are masked become zeros.

    ``scales`` is a pointer, and ``stride_page, stride_block, stride_token, stride_head, stride_group``.
    """
    rows = row_offsets(block, positions, k_start, scales[1:4], 1, BLOCK_SIZE, BLOCKS_PER_PAGE)
    at = kv_head.to(gl.int64) * scales[4]
    if GROUP > 0:
        at += gl.to_tensor(GROUP).to(gl.int64) * scales[5]
    copy_async(scales_smem, scales[0] + (rows + at), mask=mask)
