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
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from anystride.kernels.decode import descale
from anystride.kernels.loaders_sm90 import COLUMNS, copy_async, reinterpret, row_offsets


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
def converted(values, scales, SCALED: gl.constexpr, dtype: gl.constexpr):
    """A tile of fp8 in 16 bits, times its rows' scales if SCALED."""
    values = values.to(gl.float16)
    # By way of float32: directly, fp16 becomes bf16 one element at a time.
    if SCALED:
        values = values.to(gl.float32) * gl.expand_dims(scales, 1)
    elif dtype == gl.bfloat16:
        values = values.to(gl.float32)
    return values.to(dtype)


@gluon.jit
def load_operand(source, scales_smem, WIDTH: gl.constexpr, SCALED: gl.constexpr, dtype: gl.constexpr):
    """A tile of fp8 in 16 bits, times its rows' scales, ``[TILE, WIDTH]`` as it lies in the cache."""
    LAYOUT: gl.constexpr = operand_layout(WIDTH)
    values = source.load(LAYOUT)
    scales = values  # none, and nobody looks at them
    if SCALED:
        scales = scales_smem.load(gl.SliceLayout(1, LAYOUT))
    return converted(values, scales, SCALED, dtype)


@gluon.jit
def largest(queries):
    """The largest size of each row's elements, float32."""
    return gl.max(gl.abs(queries.to(gl.float32)), 1)


@gluon.jit
def larger(most, queries):
    """``most``, or the largest size of each row where that is larger; both have a row in the same threads."""
    return gl.maximum(most, gl.convert_layout(largest(queries), most.type.layout, assert_trivial=True))


@gluon.jit
def powers_of_two(most):
    """Powers of two that bring rows near the end of fp16's range, and back, by the most that they hold."""
    exponent = gl.maximum((most.to(gl.int32, bitcast=True) >> 23) & 255, 15)
    up = ((268 - exponent) << 23).to(gl.float32, bitcast=True)  # the largest is then below 2^15
    down = ((exponent - 14) << 23).to(gl.float32, bitcast=True)
    return up, down


@gluon.jit
def agree_on_powers(W: gl.constexpr, own, maxima_smem, q_seen, turn, ROW: gl.constexpr):
    """Powers of two of rows of which each of two warpgroups has seen a part; ``own``: its parts' largest.

    Returns:
        ``(what brings rows into range, in the layout of own; what brings them back, in ROW)``.
    """
    LAYOUT: gl.constexpr = own.type.layout
    maxima_smem.index(W).store(own)
    mbarrier.arrive(q_seen, count=1)
    mbarrier.wait(q_seen, turn & 1)
    most = gl.maximum(maxima_smem.index(0).load(LAYOUT), maxima_smem.index(1).load(LAYOUT))
    up, _down = powers_of_two(most)
    most = gl.maximum(maxima_smem.index(0).load(ROW), maxima_smem.index(1).load(ROW))
    _up, down = powers_of_two(most)
    return up, down


@gluon.jit
def scaled(queries, up, dtype: gl.constexpr):
    """Rows times their powers of two, in ``dtype``."""
    ROW: gl.constexpr = gl.SliceLayout(1, queries.type.layout)
    up = gl.convert_layout(up, ROW, assert_trivial=True)
    return (queries.to(gl.float32) * gl.expand_dims(up, 1)).to(dtype)


@gluon.jit
def query_box(q_smem, box, dtype: gl.constexpr):
    """64 columns of queries where they lie, and in registers, a row in eight threads as they were loaded."""
    BOX: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    ROWS: gl.constexpr = q_smem.shape[1]
    smem = reinterpret(q_smem, dtype, [q_smem.shape[2] // COLUMNS, ROWS, COLUMNS], BOX).index(box)
    return smem, smem.load(LAYOUT)


@gluon.jit
def largest_of_boxes(q_smem, first, count, dtype: gl.constexpr):
    """The largest size of each row in columns of ``dtype``, 64 at a time: a loop, as code is fetched, too."""
    _smem, most = query_box(q_smem, first, dtype)
    most = gl.abs(most.to(gl.float32))
    for i in range(1, count):
        _smem, more = query_box(q_smem, first + i, dtype)
        most = gl.maximum(most, gl.abs(more.to(gl.float32)))
    return gl.max(most, 1)


@gluon.jit
def narrow_boxes(q_smem, first, count, up, dtype: gl.constexpr):
    """Columns of ``dtype``, 64 at a time, times their rows' powers of two, in the tile's dtype."""
    for i in range(count):
        smem, queries = query_box(q_smem, first + i, dtype)
        smem.store(scaled(queries, up, q_smem.dtype).to(dtype, bitcast=True))


@gluon.jit
def factor_of(descales, seq, kv_head):
    """What numbers of K or V are multiplied by: ``descales`` are a pointer, its strides, and a number."""
    return descales[3] * descale(descales[0], descales[1], descales[2], seq, kv_head)


@gluon.jit
def factors(softmax_scale, q_descale, k_descale, v_descale, seq, kv_head, ONE_ROW: gl.constexpr):
    """What all scores are multiplied by, what queries of the rope piece are ahead of it, and results.

    Scores of the latent have V's factor where it does not lie in K's row; the rope piece then has what K's is
    of that, in its queries, so that one accumulator takes both.
    """
    scale = softmax_scale * descale(q_descale[0], q_descale[1], q_descale[2], seq, kv_head)
    k_factor = factor_of(k_descale, seq, kv_head)
    v_factor = factor_of(v_descale, seq, kv_head)
    rope = k_factor
    if ONE_ROW:
        scale *= k_factor
    else:
        divisor = gl.where(v_factor == 0, 2.0**-40, v_factor)  # as good as none, but nothing to divide by
        scale *= divisor
        rope = k_factor / divisor
    return scale, rope, v_factor


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
