"""How Hopper's kernels bring rows of the cache into shared memory: by TMA, or by cp.async.

TMA reads through a tensor map: base, sizes and strides of the cache as it lies, ``[pages, blocks of a page,
KV heads, tokens of a block, d]``, and boxes of 64 tokens and 64 dimensions, each in one block. It asks for
strides that are multiples of 16 bytes and for blocks of whole tiles, and it takes whole tiles: what lies
behind a sequence's end in its last block may be anything, and must not be read into a product.

cp.async reads everything else: a row's address comes from the block table and four strides, and its elements
are copied 16, 8 or 4 bytes at a time, whatever the block size; a row that is masked becomes zeros.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma

from anystride.kernels.ranges import KEYS_PER_STEP

# Triton 3.8 gave it a new name, and 3.9 refuses the old one.
copy_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
load_box = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
NAMED = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))  # 3.7 took off its underscore

TILE = gl.constexpr(KEYS_PER_STEP.value)  # keys
COLUMNS = gl.constexpr(64)  # elements of a row that are copied at a time: a swizzled line of 128 bytes
PRODUCERS = gl.constexpr(128)  # threads of the producer: so many arrivals complete a barrier of a full buffer
BOX_LAYOUT = gl.constexpr(gl.NVMMASharedLayout(128, 16, rank=5))


@gluon.jit
def barrier(count: gl.constexpr):
    """A new mbarrier. One allocation each: the compiler would fence two in one from each other."""
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=count)
    return bar


@gluon.jit
def reinterpret(smem, DTYPE: gl.constexpr, SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
    """The same shared memory as another tensor."""
    if NAMED:
        return smem.reinterpret(DTYPE, SHAPE, LAYOUT)
    else:
        return smem._reinterpret(DTYPE, SHAPE, LAYOUT)


@gluon.jit
def boxes_of(smem, COUNT: gl.constexpr):
    """The boxes ``[1, 1, 1, TILE, COLUMNS]`` that make up tiles, from left to right."""
    return reinterpret(smem, smem.dtype, [COUNT, 1, 1, 1, TILE, COLUMNS], BOX_LAYOUT)


@gluon.constexpr_function
def span(width, most):
    """Elements of a row of ``width`` that are copied at a time: a power of two that divides it."""
    return min(width & -width, most)


@gluon.jit
def copy_rows(
    tile, ptr, rows, mask, WIDTH: gl.constexpr, LAYOUT: gl.constexpr, MOST: gl.constexpr = COLUMNS
):  # fmt: skip
    """Start to copy rows of WIDTH elements into a tile, MOST at a time; rows that are masked become zeros."""
    STEP: gl.constexpr = span(WIDTH, MOST)
    columns = gl.arange(0, STEP, gl.SliceLayout(0, LAYOUT))
    ptrs = ptr + (gl.expand_dims(rows, 1) + gl.expand_dims(columns, 0))
    for i in gl.static_range(WIDTH // STEP):
        copy_async(tile.slice(i * STEP, STEP, dim=1), ptrs + i * STEP, mask=gl.expand_dims(mask, 1))


@gluon.jit
def find_sequence(seq, lengths, table, BLOCK_SIZE: gl.constexpr):
    """``(first row of a cache without a block table, else the sequence's number; its row of the table)``."""
    k_start = seq.to(gl.int64)
    if BLOCK_SIZE == 0:
        k_start = gl.load(lengths[2] + seq * lengths[3]).to(gl.int64)
        table_ptr = lengths[2]  # no table, and nobody reads it; but a function cannot return None
    else:
        table_ptr = table[0] + k_start * table[1]
    return k_start, table_ptr


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


@gluon.jit
def load_boxes(
    boxes, first_box, tensor_map, column, block, key, k_start, kv_head, bar,
    WIDTH: gl.constexpr, BLOCK_SIZE: gl.constexpr, BLOCKS_PER_PAGE: gl.constexpr,
):  # fmt: skip
    """Start to load WIDTH dimensions of a whole tile, from ``column`` on, into boxes one after the other."""
    page = block // BLOCKS_PER_PAGE
    in_page = block % BLOCKS_PER_PAGE
    token = key
    if BLOCK_SIZE > 0:
        token = key % BLOCK_SIZE
    else:
        page = key * 0
        token = key + k_start.to(gl.int32)
    for i in gl.static_range(WIDTH // COLUMNS):
        where = [page, in_page, kv_head, token, column + i * COLUMNS]
        load_box(tensor_map, where, bar, boxes.index(first_box + i))
