"""The back end for sm_90: kernels in Gluon for what must be fast.

MLA decode: the rows of a unit share one pass over the keys, whose latent part is loaded once and used as K
and as V, in one row or in two buffers. What these kernels cannot read or do not know is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anystride.kernels import loaders_sm90
from anystride.kernels.mla_narrow_sm90 import mla_narrow_kernel
from anystride.kernels.mla_wide_sm90 import mla_wide_kernel
from anystride.launch import (
    Launch,
    Pointer,
    Ready,
    Target,
    TensorMap,
    device_target,
    first_run,
    pointer,
    run_again,
    sources,
)
from anystride.problem import Call, Problem, bucket
from anystride.work import (
    STEP,
    Rows,
    Split,
    around,
    context_lengths,
    full_parts,
    lengths,
    out_constants,
    results,
    rows_in_tiles,
    schedule,
    shares,
    sinks,
    split_work,
    vector,
)

NAME = "hopper"
COLUMNS = loaders_sm90.COLUMNS.value

COMBINE_VALUES = 8192  # partial results that a warpgroup holds at once: 64 registers
FEW_SHARES = 16  # of a unit, so few that they are read at once
NARROW_ROWS = 32  # query tokens times heads of a group up to which keys are the long side of the products
# d_v, and the dimensions that only K has, of the narrow kernel and of the wide one
LATENTS, ROPES = (64, 256, 512), (32, 64)
WIDE_LATENTS, WIDE_ROPES = (256, 512), (64,)


class Tiles(NamedTuple):
    """The launch shape of the decode kernel."""

    m: int  # rows
    n: int  # keys
    consumer_registers: int  # of a thread of the two warpgroups that compute


@dataclass(frozen=True)
class Config:
    """How the kernels are launched for a problem.

    Attributes:
        tiles: Launch shape of the decode kernel.
        split: How the work is cut.
        constants: Compile-time arguments of the decode kernel.
        ready: The launches of the plan, once its first call has compiled them.
    """

    tiles: Tiles
    split: Split
    constants: dict[str, Any]
    ready: list[Ready] = field(default_factory=list, compare=False)

    @property
    def scratch(self) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        """Shapes and dtypes of the buffers that a run needs."""
        return self.split.scratch


def rope_dims(problem: Problem) -> int:
    """Dimensions of K that are not V's."""
    return problem.d_qk - (problem.d_v if problem.relation.kind == "v_in_k" else 0)


def row_vector(problem: Problem) -> int:
    """Elements that every row of the cache is aligned to; the parts of a row lie at multiples of 32."""
    return min(
        vector(problem.k_strides[:4], problem.k_align, problem.k_dtype.itemsize),
        vector(problem.v_strides[:4], problem.v_align, problem.v_dtype.itemsize),
    )


def maps_fit(problem: Problem) -> bool:
    """Whether TMA can read the cache tile by tile.

    It asks for a base and strides that are multiples of 16 bytes, for strides below 2^40 bytes and none of 0,
    for no empty dimension, and here for tiles that lie in one block each.
    """
    p = problem
    itemsize = p.k_dtype.itemsize
    for strides, d in ((p.k_strides, p.d_qk), (p.v_strides, p.d_v)):
        for size, stride in zip(map_sizes(p, d)[:-1], map_strides(strides)[:-1], strict=True):
            if size == 0 or (size > 1 and not 0 < stride * itemsize < 1 << 40):
                return False
    aligned = row_vector(p) * itemsize >= 16 and rope_dims(p) % COLUMNS == 0
    return aligned and (not p.paged or p.block_size % STEP == 0)


def loads_by_tma(problem: Problem, rows: Rows, programs: int) -> bool:
    """Whether the wide kernel loads by TMA.

    It frees issue slots where tensor cores decide, and costs the host a description of the tensors: not worth
    it where a program has no more than a share of one unit.
    """
    return maps_fit(problem) and bucket(problem.batch) * rows.units >= full_parts(problem, rows, programs)


def map_sizes(problem: Problem, d: int) -> tuple[int, ...]:
    """Sizes of a cache for a tensor map: pages, blocks of a page, KV heads, tokens of a block, dimensions."""
    p = problem
    if not p.paged:
        return (1, 1, p.num_kv_heads, p.num_pages, d)
    return (p.num_pages, p.blocks_per_page, p.num_kv_heads, p.block_size, d)


def map_strides(strides: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in the order of a tensor map."""
    page, block, token, head, dim = strides
    return (page, block, head, token, dim)


def tensor_map(problem: Problem, name: str, strides: tuple[int, ...], d: int) -> TensorMap:
    """The map through which TMA reads K or V."""
    sizes = map_sizes(problem, d)
    # The stride of a dimension of size 1 is never used, but must be one that could be.
    legal = tuple(y if x > 1 else COLUMNS for x, y in zip(sizes, map_strides(strides), strict=True))
    box = (1, 1, 1, STEP, COLUMNS)
    return TensorMap(name, sizes, (*legal[:-1], 1), box, loaders_sm90.BOX_LAYOUT.value)


def query_vector(problem: Problem) -> int:
    """Elements that every row of q, and of q_v, is aligned to."""
    both = vector(problem.q_strides[:2], problem.q_align, problem.dtype.itemsize)
    if problem.has_q_v:
        both = min(both, vector(problem.q_v_strides[:2], problem.q_v_align, problem.dtype.itemsize))
    return both


def refusals(problem: Problem) -> list[str]:
    """Every reason why the Hopper kernels cannot run the problem here."""
    if problem.device.type != "cuda" or torch.version.hip:
        return [f"tensors are on {problem.device}; needs an NVIDIA GPU"]
    arch = device_target(problem.device).arch
    reasons = []
    if arch != 90:
        reasons.append(f"compute capability {arch // 10}.{arch % 10}; needs 9.0")
    return reasons + shape_refusals(problem) + stride_refusals(problem)


def shape_refusals(problem: Problem) -> list[str]:
    """What of a problem's shapes, dtypes and features these kernels do not know."""
    p = problem
    reasons = []
    if p.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"q is {p.dtype}; needs float16 or bfloat16")
    if p.k_dtype != p.dtype or p.v_dtype != p.dtype:
        reasons.append(f"the cache is {p.k_dtype} and {p.v_dtype}; needs q's {p.dtype}")
    if p.relation.kind != "v_in_k" and not p.has_q_v:
        reasons.append(f"K and V are {p.relation.kind}; needs V in K's row, or q_v")
    elif p.relation.kind == "v_in_k" and p.relation.offset not in (0, p.d_qk - p.d_v):
        reasons.append(f"V begins at element {p.relation.offset} of K's row; needs its begin or its end")
    else:
        rows = rows_in_tiles(p)
        latents, ropes = (LATENTS, ROPES) if rows <= NARROW_ROWS else (WIDE_LATENTS, WIDE_ROPES)
        if p.d_v not in latents or rope_dims(p) not in ropes:
            reasons.append(
                f"V of {p.d_v} and {rope_dims(p)} more dimensions of K, with {rows} rows (query tokens x "
                f"heads of a group); needs {latents} and {ropes} of them"
            )
    if p.has_alibi:
        reasons.append("alibi_slopes were given; needs None")
    if p.has_q_descale or p.has_k_descale or p.has_v_descale:
        reasons.append("descales were given; needs None")
    return reasons


def stride_refusals(problem: Problem) -> list[str]:
    """What of a problem's strides and addresses these kernels cannot read."""
    p = problem
    reasons = []
    for name, stride in (("q", p.q_strides[2]), ("k", p.k_strides[4]), ("v", p.v_strides[4])):
        if stride != 1:
            reasons.append(f"the last stride of {name} is {stride}; needs 1")
    if p.has_q_v and p.q_v_strides[2] != 1:
        reasons.append(f"the last stride of q_v is {p.q_v_strides[2]}; needs 1")
    aligned = row_vector(p) * p.k_dtype.itemsize
    if aligned < 4:
        reasons.append(
            f"rows of the cache begin at multiples of {aligned} bytes: strides {p.k_strides[:4]} and "
            f"{p.v_strides[:4]}, bases aligned to {p.k_align} and {p.v_align} bytes; needs multiples of 4"
        )
    return reasons


def choose_config(problem: Problem) -> Config:
    """The configuration for the problem's own device."""
    return config_for(problem, device_target(problem.device))


def choose_tiles(problem: Problem) -> Tiles:
    """Tile sizes of the decode kernel; eight rows where there are no more."""
    rows = rows_in_tiles(problem)
    if rows > NARROW_ROWS:
        return Tiles(64, 64, 224)
    if rows > 16:
        return Tiles(32, 64, 224)
    return Tiles(8 if problem.group_size * problem.max_seqlen_q <= 8 else 16, 64, 184)


def is_narrow(tiles: Tiles) -> bool:
    """Whether the kernel for few rows runs."""
    return tiles.m <= NARROW_ROWS


def programs(problem: Problem, target: Target) -> int:
    """Programs of the decode kernel that run at once: one a processor, whose shared memory it fills."""
    return target.processors


def config_for(problem: Problem, target: Target) -> Config:
    """The configuration for any target of this architecture: a pure function."""
    p = problem
    tiles = choose_tiles(p)
    split = split_work(p, target, programs(p, target))
    v_at = p.relation.offset if p.relation.kind == "v_in_k" else -1
    constants = {
        "GROUP_SIZE": p.group_size,
        "BLOCK_SIZE": p.block_size if p.paged else 0,
        "BLOCKS_PER_PAGE": p.blocks_per_page,
        "D_V": p.d_v,
        "D_K": rope_dims(p),
        "K_AT": p.d_v if v_at == 0 else 0,
        "V_AT": v_at,
        "VECTOR": row_vector(p),
        "Q_VECTOR": query_vector(p),
        "HAS_LEFT": p.window_left >= 0,
        # One query token sees all keys up to its own; but a bounded window counts in the schedule.
        "HAS_RIGHT": p.window_right >= 0 and (p.max_seqlen_q > 1 or p.window_left >= 0),
        "HAS_SOFTCAP": p.softcap > 0,
        "CP_WORLD_SIZE": p.cp_world_size,
        "CP_INTERLEAVE": p.cp_interleave,
        **out_constants(p),
        "SCHEDULED": split.scheduled,
        "FIXED_SPLITS": split.steps_per_split > 0,
    }
    if is_narrow(tiles):
        constants["TILE_M"] = tiles.m
    else:
        constants["BY_TMA"] = loads_by_tma(p, split.rows, programs(p, target))
    constants["SHARES"], constants["LINES"], constants["DIMS"] = combine_tile(p, split, target)
    constants["CONSUMER_REGISTERS"] = tiles.consumer_registers
    return Config(tiles, split, constants)


def combine_tile(problem: Problem, split: Split, target: Target) -> tuple[int, int, int]:
    """Shares, lines and dimensions that a warpgroup combines at once; zeros: a kernel of its own combines.

    The decode kernel combines if all of its programs run at once, as they wait for each other, and if the
    parts come from the schedule, which has the counters: docs/design/0009.
    """
    programs_at_once = programs(problem, target)
    at_once = split.rows.tiles * problem.num_kv_heads * split.parts <= programs_at_once
    if not (split.scheduled and at_once):
        return 0, 0, 0
    # From the bucket of the batch and not from the longest sequence: neither may compile anew.
    units = bucket(problem.batch) * split.rows.units
    shares = max(2, full_parts(problem, split.rows, programs_at_once) // units)
    tile_rows = choose_tiles(problem).m
    # Both warpgroups of all parts of a unit take one tile each, if there are so many parts and so much room:
    # else few shares take several smaller tiles, and many are read in turns.
    results = max(32, bucket(-(-tile_rows * problem.d_v // (2 * shares))))
    if shares <= FEW_SHARES:
        results = min(results, COMBINE_VALUES // bucket(shares))
    dims = min(results, problem.d_v)
    lines = min(results // dims, tile_rows)
    return min(bucket(shares), COMBINE_VALUES // (lines * dims)), lines, dims


def launches(problem: Problem, config: Config, call: Call) -> list[Launch]:
    """What one call launches, in order. Looks at the strides of the call's tensors, never at an address."""
    split = config.split
    maps: tuple[TensorMap | None, ...] = () if is_narrow(config.tiles) else (None, None)
    if config.constants.get("BY_TMA"):
        k_map = tensor_map(problem, "k", problem.k_strides, problem.d_qk)
        maps = (k_map, None)
        if config.constants["V_AT"] < 0:
            maps = (k_map, tensor_map(problem, "v", problem.v_strides, problem.d_v))
    # fmt: off
    arguments = (
        pointer(call, "q"), *problem.q_strides[:2],
        pointer(call, "q_v"), *problem.q_v_strides[:2],
        pointer(call, "k"), *problem.k_strides[:4],
        pointer(call, "v"), *problem.v_strides[:4],
        *maps,
        pointer(call, "block_table"), *problem.table_strides,
        *lengths(call), *context_lengths(problem, call), *sinks(call),
        schedule(split, call), *results(problem, call), Pointer("partial"), split.partial_lines,
        problem.softmax_scale, problem.softcap,
        problem.batch, problem.window_left, problem.window_right, problem.cp_rank, *shares(split),
    )
    # fmt: on
    grid = (split.rows.tiles, problem.num_kv_heads, split.parts)
    kernel = mla_narrow_kernel if is_narrow(config.tiles) else mla_wide_kernel
    combines = config.constants["SHARES"] > 0
    options: dict[str, Any] = {"num_warps": 4}
    if combines:
        options["launch_cooperative_grid"] = True  # all at once, or not at all
    decode = Launch(kernel, grid, arguments, config.constants, options)
    return around(problem, split, call, decode, combines)


def run(problem: Problem, config: Config, call: Call, scratch: list[Tensor]) -> None:
    """Launch the kernels of one call on its device's current stream."""
    if config.ready:
        run_again(config.ready, (*call, *scratch), problem.device)
        return
    # Two threads may come here at once.
    config.ready[:] = first_run(launches(problem, config, call), sources(call, scratch), problem.device)
