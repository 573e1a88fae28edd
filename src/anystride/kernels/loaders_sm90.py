"""How Hopper's kernels bring rows into shared memory: queries by plain loads, the cache by cp.async.

A cache of any strides is read row by row: a row's address comes from the block table and four strides, and
cp.async copies its 16, 8 or 4 bytes at a time, whatever the block size; a row that is masked becomes zeros.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier

from anystride.kernels.ranges import KEYS_PER_STEP

# Triton 3.8 gave it a new name, and 3.9 refuses the old one.
copy_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared

TILE = gl.constexpr(KEYS_PER_STEP.value)  # keys
COLUMNS = gl.constexpr(64)  # elements of a row that are copied at a time: a swizzled line of 128 bytes


@gluon.jit
def barrier(count: gl.constexpr):
    """A new mbarrier. One allocation each: the compiler would fence two in one from each other."""
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=count)
    return bar


@gluon.jit
def load_queries(smem, ptr, rows, mask, WIDTH: gl.constexpr, LAYOUT: gl.constexpr):
    """Bring queries ``[rows, WIDTH]`` into shared memory; rows that are none become zeros."""
    columns = gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
    ptrs = ptr + (gl.expand_dims(rows, 1) + gl.expand_dims(columns, 0))
    smem.store(gl.load(ptrs, mask=gl.expand_dims(mask, 1), other=0.0))


@gluon.jit
def copy_rows(tile, ptr, rows, mask, WIDTH: gl.constexpr, LAYOUT: gl.constexpr):
    """Start to copy rows into a tile ``[TILE, WIDTH]``; rows that are masked become zeros."""
    STEP: gl.constexpr = min(WIDTH, COLUMNS)
    columns = gl.arange(0, STEP, gl.SliceLayout(0, LAYOUT))
    ptrs = ptr + (gl.expand_dims(rows, 1) + gl.expand_dims(columns, 0))
    for i in gl.static_range(WIDTH // STEP):
        copy_async(tile.slice(i * STEP, STEP, dim=1), ptrs + i * STEP, mask=gl.expand_dims(mask, 1))


@gluon.jit
def row_offsets(
    block, positions, k_start, cache, VECTOR: gl.constexpr, BLOCK_SIZE: gl.constexpr,
    BLOCKS_PER_PAGE: gl.constexpr,
):  # fmt: skip
    """Offsets of the rows at ``positions`` of a sequence, from the ids of their blocks.

    ``cache`` is ``stride_page, stride_block, stride_token``. What is known to be zero is not added: a sum
    that the compiler folds away would take what it knows of the alignment with it.
    """
    stride_page, stride_block, stride_token = cache
    if BLOCK_SIZE == 0:
        rows = (k_start + positions) * stride_token
    else:
        rows = (block // BLOCKS_PER_PAGE).to(gl.int64) * stride_page
        if BLOCKS_PER_PAGE > 1:
            rows += (block % BLOCKS_PER_PAGE).to(gl.int64) * stride_block
        if BLOCK_SIZE > 1:
            rows += (positions % BLOCK_SIZE).to(gl.int64) * stride_token
    return gl.multiple_of(rows, VECTOR)


@gluon.jit
def find_blocks(
    positions, first_key, key_end, table_ptr, stride_table_block,
    BLOCK_SIZE: gl.constexpr, HAS_LEFT: gl.constexpr,
):  # fmt: skip
    """Block ids of the rows at ``positions``, and which of them there are: no entry of the others is read."""
    mask = positions < key_end
    if HAS_LEFT:
        mask = mask & (positions >= first_key)
    block = positions
    if BLOCK_SIZE > 0:
        entry = (positions // BLOCK_SIZE).to(gl.int64)
        block = gl.load(table_ptr + entry * stride_table_block, mask=mask, other=0)
    return block, mask
