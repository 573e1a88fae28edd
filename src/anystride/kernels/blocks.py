"""Copy blocks between two caches of any strides: the Triton kernel."""

import triton
import triton.language as tl

RUNTIME = [
    "stride_source_id", "stride_target_id",
    "source_blocks_per_page", "target_blocks_per_page", "rows_of_block",
    *(
        f"stride_{cache}_{name}"
        for cache in ("source", "target")
        for name in ("page", "block", "token", "head", "dim")
    ),
]  # fmt: skip
UNALIGNED = ["source_ids_ptr", "target_ids_ptr"]


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=UNALIGNED)
def copy_blocks_kernel(
    source_ids_ptr, stride_source_id, target_ids_ptr, stride_target_id,
    source_ptr,
    stride_source_page, stride_source_block, stride_source_token, stride_source_head, stride_source_dim,
    target_ptr,
    stride_target_page, stride_target_block, stride_target_token, stride_target_head, stride_target_dim,
    source_blocks_per_page, target_blocks_per_page, rows_of_block,
    HEADS: tl.constexpr, D: tl.constexpr,
    SOURCE_UNIT: tl.constexpr, SOURCE_VECTOR: tl.constexpr,
    TARGET_UNIT: tl.constexpr, TARGET_VECTOR: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid: ``(blocks, tiles of their rows)``. A row is a token and a head.

    Without target ids: 0, 1, 2, ...
    """
    index = tl.program_id(0).to(tl.int64)
    source_id = tl.load(source_ids_ptr + index * stride_source_id).to(tl.int64)
    target_id = index
    if target_ids_ptr is not None:
        target_id = tl.load(target_ids_ptr + index * stride_target_id).to(tl.int64)
    if (source_id < 0) | (target_id < 0):
        return
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_D)
    mask = (rows < rows_of_block)[:, None] & (dims < D)[None, :]
    token = (rows // HEADS).to(tl.int64)
    source_rows = (source_id // source_blocks_per_page) * stride_source_page
    source_rows += (source_id % source_blocks_per_page) * stride_source_block
    source_rows += token * stride_source_token
    target_rows = (target_id // target_blocks_per_page) * stride_target_page
    target_rows += (target_id % target_blocks_per_page) * stride_target_block
    target_rows += token * stride_target_token
    # What is known to be zero is not added: a sum that the compiler folds away would take what it knows of
    # the alignment with it.
    if HEADS > 1:
        head = (rows % HEADS).to(tl.int64)
        source_rows += head * stride_source_head
        target_rows += head * stride_target_head
    source_dims = dims.to(tl.int64)
    target_dims = source_dims
    if SOURCE_UNIT:
        source_rows = tl.multiple_of(source_rows, SOURCE_VECTOR)
    else:
        source_dims = source_dims * stride_source_dim
    if TARGET_UNIT:
        target_rows = tl.multiple_of(target_rows, TARGET_VECTOR)
    else:
        target_dims = target_dims * stride_target_dim
    values = tl.load(source_ptr + (source_rows[:, None] + source_dims[None, :]), mask=mask)
    tl.store(target_ptr + (target_rows[:, None] + target_dims[None, :]), values, mask=mask)
