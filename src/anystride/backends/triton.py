"""The portable back end on GPUs: the launch of the Triton kernels.

Accepts everything in the contract and needs nothing of one vendor; Hopper and later start the second kernel
early. Two launches at most a call: decode and, where work may be cut, combine; a third one, first, when
no ``scheduler_metadata`` was given.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import gcd
from typing import Any, NamedTuple

import torch
import triton

from anystride.kernels.decode import decode_kernel
from anystride.launch import (
    Launch,
    Pointer,
    Ready,
    Target,
    current,
    current_stream,
    device_refusals,
    device_target,
    first_run,
    is_current,
    pointer,
    run_again,
    sources,
)
from anystride.problem import FP8_NAMES, Call, Problem, bucket
from anystride.work import (
    STEP,
    WIDE_ROWS,
    Split,
    around,
    context_lengths,
    converts_fp8,
    cut_rows,
    descales,
    factor,
    given_parts,
    lengths,
    new_scratch,
    out_constants,
    overlaps,
    results,
    row_scales,
    schedule,
    shares,
    sinks,
    slopes,
    split_work,
    vector,
)

NAME = "triton"


class Tiles(NamedTuple):
    """The launch shape of the decode kernel."""

    m: int
    n: int
    warps: int
    stages: int
    programs_per_processor: int


def pieces(dims: int) -> tuple[int, int]:
    """Two powers of two, 16 at least, that cover ``dims`` with little waste; the second may be 0."""
    whole = max(16, triton.next_power_of_2(dims))
    first = whole // 2
    if first < 16 or dims <= first:
        return whole, 0
    rest = max(16, triton.next_power_of_2(dims - first))
    return (first, rest) if first + rest < whole else (whole, 0)


def choose_tiles(problem: Problem, target: Target) -> Tiles:
    """Tile sizes of the decode kernel.

    Measured on an H200 where the target is one (docs/kernels.md); elsewhere the largest tiles of which two
    stages fit into shared memory.
    """
    rows = cut_rows(problem, target)
    itemsize = max(problem.dtype.itemsize, 2)
    key_dims = problem.d_qk - (problem.d_v if problem.relation.kind == "v_in_k" else 0)
    width = sum(pieces(problem.d_v)) + (sum(pieces(key_dims)) if key_dims else 0)
    if problem.relation.kind == "v_in_k" and is_scaled(problem):
        width += sum(pieces(problem.d_v))  # a tile as K and one as V
    wide = problem.d_v > 256
    m = rows.tile
    if problem.dtype == torch.float32:
        n, warps, stages, programs = (16, 4, 2, 1) if wide else (32, 4, 2, 2)
    elif target.backend == "hip":
        n, warps, stages, programs = (16, 4, 1, 1) if wide else (32, 4, 1, 2)
    elif wide:
        # Few sequences: half as many shares to combine outweigh two programs that hide each other's waits.
        few = bucket(problem.batch) * problem.num_kv_heads * 4 <= target.processors
        # A schedule that was made for another back end has one part for each processor.
        few = few or 0 < given_parts(problem) * rows.tiles * problem.num_kv_heads <= target.processors
        if m == 16 and (problem.batch_invariant or not few):
            n, warps, stages, programs = 32, 4, 3, 2
        else:
            n, warps, stages, programs = (64, 8, 3, 1) if m <= 32 else (32, 8, 3, 1)
    elif width < 256:
        n, warps, stages, programs = 64, 4, 3, 3
    else:
        n, warps, stages, programs = (32, 4, 3, 3) if width == 256 else (32, 4, 3, 2)
        if m == WIDE_ROWS:
            warps = 8
    # Operands of wgmma have a buffer for each stage, those of mma one less.
    buffers = stages if m >= 64 and n >= 64 else max(1, stages - 1)
    while n > 16 and (buffers * n + m) * width * itemsize > target.shared_bytes:
        n //= 2
    programs = max(1, min(programs, target.shared_bytes // ((buffers * n + m) * width * itemsize)))
    return Tiles(m, n, warps, stages, programs)


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


def refusals(problem: Problem) -> list[str]:
    """Every reason why the Triton kernels cannot run the problem here."""
    return device_refusals(problem.device)


def is_scaled(problem: Problem) -> bool:
    """Whether rows of the cache have scales of their own."""
    return problem.k_scale_groups > 0 or problem.v_scale_groups > 0


def scale_run(groups: int, d: int, starts: tuple[int, ...], widths: tuple[int, ...]) -> int:
    """Dimensions, a power of two, that lie in one of the groups of a row wherever a tile cuts it.

    Args:
        groups: Of the row.
        d: Dimensions of the row.
        starts: Where in the row V begins and ends, if it lies there.
        widths: Of the pieces of a tile; those that are none are 0.
    """
    whole = gcd(d // max(groups, 1), *starts)
    return min(whole & -whole, *(width for width in widths if width))


def is_narrow(strides: tuple[int, ...]) -> bool:
    """Whether the rows of a tile lie within 2^31 elements of its first."""
    return bool(STEP * strides[2] < 1 << 31)


def choose_config(problem: Problem) -> Config:
    """The configuration for the problem's own device."""
    return config_for(problem, device_target(problem.device))


def programs(problem: Problem, target: Target) -> int:
    """Programs of the decode kernel that run at once."""
    return target.processors * choose_tiles(problem, target).programs_per_processor


def config_for(problem: Problem, target: Target) -> Config:
    """The configuration for any target: a pure function, also for targets that are not here."""
    tiles = choose_tiles(problem, target)
    split = split_work(problem, target, programs(problem, target))
    v_in_k = problem.relation.kind == "v_in_k"
    key_dims = problem.d_qk - (problem.d_v if v_in_k else 0)
    k_pieces = pieces(key_dims) if key_dims else (16, 0)
    v_pieces = pieces(problem.d_v)
    k_groups, v_groups = problem.k_scale_groups, problem.v_scale_groups
    v_starts = (problem.relation.offset, problem.d_v) if v_in_k else ()
    k_widths = (*k_pieces, *v_pieces) if v_in_k else k_pieces
    constants = {
        "GROUP_SIZE": problem.group_size,
        "BLOCK_SIZE": problem.block_size if problem.paged else 0,
        "BLOCKS_PER_PAGE": problem.blocks_per_page,
        "KEY_DIMS": key_dims,
        "D_K0": k_pieces[0],
        "D_K1": k_pieces[1],
        "DIMS_V": problem.d_v,
        "D_V0": v_pieces[0],
        "D_V1": v_pieces[1],
        "V_AT": problem.relation.offset if v_in_k else key_dims + problem.d_v,
        "V_IN_SCORES": v_in_k or problem.has_q_v,
        "K_UNIT": problem.k_strides[4] == 1 or problem.d_qk == 1,
        "V_UNIT": problem.v_strides[4] == 1 or problem.d_v == 1,
        "Q_UNIT": (problem.q_strides[2] == 1 or problem.d_qk == 1)
        and (problem.q_v_strides[2] == 1 or not problem.has_q_v or problem.d_v == 1),
        "K_NARROW": is_narrow(problem.k_strides),
        "V_NARROW": is_narrow(problem.v_strides),
        **out_constants(problem),
        "K_VECTOR": vector(problem.k_strides[:4], problem.k_align, problem.k_dtype.itemsize),
        "V_VECTOR": vector(problem.v_strides[:4], problem.v_align, problem.v_dtype.itemsize),
        "Q_VECTOR": min(
            vector(problem.q_strides[:2], problem.q_align, problem.dtype.itemsize),
            vector(problem.q_v_strides[:2], problem.q_v_align, problem.dtype.itemsize),
        ),
        "K_FORMAT": FP8_NAMES.get(problem.k_dtype, "none"),
        "V_FORMAT": FP8_NAMES.get(problem.v_dtype, "none"),
        "FP8_NATIVE": converts_fp8(target),
        "HAS_LEFT": problem.window_left >= 0,
        "HAS_RIGHT": problem.window_right >= 0,
        "HAS_SOFTCAP": problem.softcap > 0,
        "HAS_DESCALES": problem.has_k_descale or problem.has_v_descale,
        "K_GROUPS": k_groups,
        "K_GROUP_DIMS": problem.d_qk // max(k_groups, 1),
        "K_RUN": scale_run(k_groups, problem.d_qk, v_starts, k_widths),
        "V_GROUPS": v_groups,
        "V_GROUP_DIMS": problem.d_v // max(v_groups, 1),
        "V_RUN": scale_run(v_groups, problem.d_v, (), v_pieces),
        "CP_WORLD_SIZE": problem.cp_world_size,
        "CP_INTERLEAVE": problem.cp_interleave,
        "SCHEDULED": split.scheduled,
        "FIXED_SPLITS": split.steps_per_split > 0,
        "OVERLAP": overlaps(target),
        "TILE_M": tiles.m,
        "TILE_N": tiles.n,
        "STAGES": tiles.stages,
    }
    return Config(tiles, split, constants)


def launches(problem: Problem, config: Config, call: Call) -> list[Launch]:
    """What one call launches, in order. Looks at the strides of the call's tensors, never at an address."""
    split = config.split
    v_in_k = problem.relation.kind == "v_in_k"
    # fmt: off
    arguments = (
        pointer(call, "q"), *problem.q_strides,
        pointer(call, "q_v"), *(problem.q_strides if v_in_k else problem.q_v_strides),
        pointer(call, "k"), *problem.k_strides,
        pointer(call, "v"), *problem.v_strides,
        pointer(call, "block_table"), *problem.table_strides,
        *lengths(call), *context_lengths(problem, call),
        *slopes(call), *sinks(call),
        *descales(call),
        *row_scales(call, "k_scale_cache", problem.k_scale_strides),
        *row_scales(call, "v_scale_cache", problem.v_scale_strides),
        schedule(split, call), *results(problem, call), Pointer("partial"), split.partial_lines,
        problem.softmax_scale * factor(call.q_descale), problem.softcap,
        factor(call.k_descale), factor(call.v_descale),
        problem.batch, split.parts, problem.window_left, problem.window_right, problem.cp_rank,
        *shares(split),
    )
    # fmt: on
    grid = (split.rows.tiles, problem.num_kv_heads, split.parts)
    options = {"num_warps": config.tiles.warps, "num_stages": config.tiles.stages}
    decode = Launch(decode_kernel, grid, arguments, config.constants, options)
    return around(problem, split, call, decode)


def run(problem: Problem, config: Config, call: Call) -> None:
    """Launch the kernels of one call on its device's current stream."""
    device = problem.device
    if not is_current(device):
        with current(device):
            return run(problem, config, call)
    scratch = new_scratch(config.split, device)
    if config.ready:
        return run_again(config.ready, current_stream(device), (*call, *scratch))
    tensors = sources(call, scratch)
    for name, form in (("k", "K_FORMAT"), ("v", "V_FORMAT")):
        if config.constants[form] != "none" and not config.constants["FP8_NATIVE"]:
            tensors[name] = tensors[name].view(torch.uint8)  # the target cannot load fp8
    # Two threads may come here at once.
    config.ready[:] = first_run(launches(problem, config, call), tensors)
    return None
