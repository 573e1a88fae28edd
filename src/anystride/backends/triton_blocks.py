"""Copying blocks on GPUs: the launch of the Triton kernel."""

from __future__ import annotations

from anystride.blocks import BlocksCall, BlocksProblem
from anystride.kernels.blocks import copy_blocks_kernel
from anystride.launch import Launch, Pointer, Prepared, device_refusals, run_prepared
from anystride.problem import bucket
from anystride.work import vector

TILE = 4096  # elements of a program
MOST_ROWS = 64


def refusals(problem: BlocksProblem) -> list[str]:
    """Every reason why the Triton kernel cannot run the call here."""
    return device_refusals(problem.device)


def choose_config(problem: BlocksProblem) -> Prepared:
    """The launch for the problem."""
    p = problem
    itemsize = p.dtype.itemsize
    tile_d = bucket(p.d)
    rows = p.block_size * p.heads
    tile_rows = max(1, min(MOST_ROWS, TILE // tile_d, bucket(rows)))
    arguments = (
        Pointer("source_ids"), p.source_id_stride,
        None if p.counts else Pointer("target_ids"), p.target_id_stride,
        Pointer("source"), *p.source_strides, Pointer("target"), *p.target_strides,
        p.source_blocks_per_page, p.target_blocks_per_page, rows,
    )  # fmt: skip
    constants = {
        "HEADS": p.heads,
        "D": p.d,
        "SOURCE_UNIT": p.source_strides[4] == 1,
        "SOURCE_VECTOR": vector(p.source_strides[:4], p.source_align, itemsize),
        "TARGET_UNIT": p.target_strides[4] == 1,
        "TARGET_VECTOR": vector(p.target_strides[:4], p.target_align, itemsize),
        "ROWS": tile_rows,
        "BLOCK_D": tile_d,
    }
    grid = (p.count, -(-rows // tile_rows), 1)
    return Prepared(Launch(copy_blocks_kernel, grid, arguments, constants, {"num_warps": 4}))


def run(problem: BlocksProblem, config: Prepared, call: BlocksCall) -> None:
    """Launch the kernel on the device's current stream."""
    run_prepared(config, problem.device, call._asdict())
