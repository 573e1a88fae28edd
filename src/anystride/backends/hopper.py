"""The back end for sm_90: kernels in Gluon for what must be fast.

The rows of a unit share one pass over the keys. MLA: the latent part of a key is loaded once and used as K
and as V, in one row or in two buffers. GQA, MQA and MHA: K and V are rows of their own, wherever they lie.
What these kernels cannot read or do not know is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anystride import memory
from anystride.kernels import combine_sm90, loaders_sm90
from anystride.kernels.gqa_sm90 import gqa_kernel
from anystride.kernels.mla_narrow_fp8_sm90 import COLUMNS as PIECE
from anystride.kernels.mla_narrow_fp8_sm90 import mla_narrow_fp8_kernel
from anystride.kernels.mla_narrow_sm90 import mla_narrow_kernel
from anystride.kernels.mla_wide_fp8_sm90 import mla_wide_fp8_kernel
from anystride.kernels.mla_wide_sm90 import mla_wide_kernel
from anystride.launch import (
    Launch,
    Pointer,
    Ready,
    Target,
    TensorMap,
    current,
    current_stream,
    device_target,
    first_run,
    is_current,
    pointer,
    run_again,
    sources,
)
from anystride.problem import FP8_DTYPES, Call, Problem, bucket
from anystride.work import (
    STEP,
    Rows,
    Split,
    around,
    context_lengths,
    descales,
    factor,
    full_parts,
    lengths,
    new_scratch,
    out_constants,
    results,
    row_scales,
    rows_in_tiles,
    schedule,
    shares,
    sinks,
    slopes,
    split_work,
    vector,
)

NAME = "hopper"
COLUMNS = loaders_sm90.COLUMNS.value
PIECE_COLUMNS = PIECE.value

WARPGROUP_VALUES = combine_sm90.VALUES_AT_ONCE.value
FEW_SHARES = combine_sm90.FEW.value
# MLA
NARROW_ROWS = 32  # query tokens times heads of a group up to which keys are the long side of the products
# d_v, and the dimensions that only K has, of the narrow kernel and of the wide one
LATENTS, ROPES = (64, 256, 512), (32, 64)
WIDE_LATENTS, WIDE_ROPES = (256, 512), (64,)
# GQA: d_qk and d_v
HEAD_DIMS = ((64, 64), (96, 96), (128, 128), (192, 128), (256, 256))
SHARED_BYTES = 228 << 10  # of a processor, for its programs, each of which takes some for itself
OWN_BYTES = 3 << 10  # of those: the system's, barriers, what reductions and conversions pass through
RING_BYTES = 128 << 10  # tiles that the programs of a processor have on their way: more was never faster
MOST_SEQUENCES = 8  # of which programs find their parts themselves, where no schedule came with the call
REGISTERS, THREADS = 65536, 256  # of a processor; of a program: a producer, and one warpgroup that computes


class Tiles(NamedTuple):
    """The launch shape of the decode kernel."""

    m: int  # rows
    n: int  # keys
    consumer_registers: int  # of a thread of the warpgroups that compute
    warpgroups: int = 2  # that compute
    programs: int = 1  # a processor
    stages: int = 2  # buffers for a tile


@dataclass(frozen=True)
class Config:
    """How the kernels are launched for a problem.

    Attributes:
        tiles: Launch shape of the decode kernel.
        split: How the work is cut.
        constants: Compile-time arguments of the decode kernel.
        captured: How instead while a CUDA graph is captured, if there is one launch, whose scratch is kept.
        ready: The launches of the plan, once its first call has compiled them.
    """

    tiles: Tiles
    split: Split
    constants: dict[str, Any]
    captured: Config | None = None
    ready: list[Ready] = field(default_factory=list, compare=False)


def is_mla(problem: Problem) -> bool:
    """Whether K and V share rows, or are to be scored by ``q`` and by ``q_v``."""
    return problem.relation.kind == "v_in_k" or problem.has_q_v


def is_fp8(problem: Problem) -> bool:
    """Whether tiles are converted before they are multiplied."""
    return problem.v_dtype.itemsize == 1


def scale_groups(problem: Problem) -> tuple[int, ...]:
    """Scales that a row of an fp8 latent may have: each for whole pieces of a tile."""
    return tuple(n for n in (1, 2, 4) if n == 1 or problem.d_v % (n * PIECE_COLUMNS) == 0)


def ring_slots(problem: Problem, m: int, shared_bytes: int) -> int:
    """Pieces of fp8 tiles on their way to the narrow kernel: what room its 16-bit tiles and queries leave.

    A tile that has begun has a place for its rope piece, too.
    """
    p, itemsize = problem, problem.dtype.itemsize
    taken = 2 * STEP * (p.d_v + m) * itemsize  # tiles, weights
    taken += m * (p.d_v + rope_dims(p)) * itemsize  # queries
    taken += 16 * p.v_scale_groups * STEP + 5 * 1024  # scales; barriers, what layouts are converted through
    pieces = max(1, p.d_v // PIECE_COLUMNS)
    most = 3 * pieces
    rope = STEP * rope_dims(p) * p.k_dtype.itemsize
    while most * STEP * min(p.d_v, PIECE_COLUMNS) + -(-most // pieces) * rope > shared_bytes - taken:
        most -= 1
    return int(most)


def rope_dims(problem: Problem) -> int:
    """Dimensions of K that are not V's."""
    return problem.d_qk - (problem.d_v if problem.relation.kind == "v_in_k" else 0)


def row_vectors(problem: Problem) -> tuple[int, int]:
    """Elements that every row of K, and of V, is aligned to; the parts of a row lie at multiples of 32.

    One number where they have one dtype.
    """
    k = vector(problem.k_strides[:4], problem.k_align, problem.k_dtype.itemsize)
    v = vector(problem.v_strides[:4], problem.v_align, problem.v_dtype.itemsize)
    return (min(k, v),) * 2 if problem.k_dtype == problem.v_dtype else (k, v)


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
    aligned = row_vectors(p)[1] * itemsize >= 16 and rope_dims(p) % COLUMNS == 0
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


def tensor_maps(problem: Problem, config: Config) -> tuple[TensorMap | None, ...]:
    """The maps of K and V that the wide kernel of 16 bits takes, and whether there are any."""
    p = problem
    if not is_mla(p) or is_fp8(p) or config.tiles.m <= NARROW_ROWS:
        return ()
    if not config.constants["BY_TMA"]:
        return None, None
    k_map = tensor_map(p, "k", p.k_strides, p.d_qk)
    if config.constants["V_AT"] >= 0:
        return k_map, None
    return k_map, tensor_map(p, "v", p.v_strides, p.d_v)


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
    caches = {(p.dtype, p.dtype), *((fp8, fp8) for fp8 in FP8_DTYPES)}
    if p.has_q_v:
        caches |= {(p.dtype, fp8) for fp8 in FP8_DTYPES}  # the rope part may be wider than the latent
    if (p.k_dtype, p.v_dtype) not in caches:
        wanted = f"q's {p.dtype} or one fp8 dtype" + (", or fp8 for V alone" if p.has_q_v else "")
        reasons.append(f"the cache is {p.k_dtype} and {p.v_dtype}; needs {wanted}")
    if not is_mla(p):
        if (p.d_qk, p.d_v) not in HEAD_DIMS:
            reasons.append(
                f"K and V are {p.relation.kind}, of {p.d_qk} and {p.d_v} dimensions; needs V in K's row, "
                f"q_v, or one of {HEAD_DIMS}"
            )
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
    if p.has_alibi and is_mla(p):
        reasons.append("alibi_slopes were given for MLA; needs None")
    if not is_fp8(p) and (p.has_q_descale or p.has_k_descale or p.has_v_descale):
        reasons.append(f"descales were given for a cache of {p.k_dtype}; needs an fp8 cache, or None")
    if is_mla(p):
        if p.k_scale_groups:
            reasons.append("k_scale_cache was given for MLA; needs None")
        if p.v_scale_groups and (p.relation.kind == "v_in_k" or p.v_scale_groups not in scale_groups(p)):
            reasons.append(
                f"v_scale_cache has {p.v_scale_groups} scales for {p.d_v} dimensions; needs q_v, and one of "
                f"{scale_groups(p)}"
            )
    elif max(p.k_scale_groups, p.v_scale_groups) > 1:
        reasons.append(f"rows have {p.k_scale_groups} and {p.v_scale_groups} scales; needs one at most")
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
    k_vector, v_vector = row_vectors(p)
    aligned = min(k_vector * p.k_dtype.itemsize, v_vector * p.v_dtype.itemsize)
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
    if problem.group_size * problem.max_seqlen_q <= 8:
        m = 8
    elif rows <= 32:
        m = 16 if rows <= 16 else 32
    else:
        m = 64
    if is_mla(problem):
        if not is_fp8(problem):
            registers = 184 if m <= 16 else 224
        elif m <= NARROW_ROWS:
            registers = 208 if m <= 16 else 232 if problem.d_v > 256 else 224
        else:  # the producer has half a tile in its registers, and scales beside it
            registers = 200 if problem.v_scale_groups else 208
        return Tiles(m, STEP, registers)
    return gqa_tiles(problem, m)


def gqa_tiles(problem: Problem, m: int) -> Tiles:
    """Tiles of m rows: two programs a processor, one where two have no room for rings or for registers."""
    itemsize = problem.dtype.itemsize
    elements = STEP * (bucket(problem.d_qk) + bucket(problem.d_v))
    tile = elements * problem.k_dtype.itemsize
    once = m * (bucket(problem.d_qk) + STEP) * itemsize  # queries and weights
    if is_fp8(problem):
        once += STEP * bucket(problem.d_v) * itemsize  # the values, converted
        tile += 2 * STEP * 4  # scales of its rows

    def stages(programs: int) -> int:
        room = SHARED_BYTES // programs - OWN_BYTES - once
        return int(min(room // tile, max(2, RING_BYTES // programs // tile)))

    if m <= 16 and stages(2) >= 2:
        return Tiles(m, STEP, 168, 1, 2, stages(2))
    return Tiles(m, STEP, 248, 1, 1, stages(1))


def programs(problem: Problem, target: Target) -> int:
    """Programs of the decode kernel that run at once: they fill the shared memory of the processors."""
    return target.processors * choose_tiles(problem).programs


def config_for(problem: Problem, target: Target, captured: bool = False) -> Config:
    """The configuration for any target of this architecture, for a graph if so: a pure function."""
    p = problem
    tiles = choose_tiles(p)
    split = split_work(p, target, programs(p, target))
    constants = {
        "GROUP_SIZE": p.group_size,
        "BLOCK_SIZE": p.block_size if p.paged else 0,
        "BLOCKS_PER_PAGE": p.blocks_per_page,
        "D_V": p.d_v,
        "VECTOR": row_vectors(p)[1],
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
    if is_mla(p):
        v_at = p.relation.offset if p.relation.kind == "v_in_k" else -1
        constants |= {"D_K": rope_dims(p), "K_AT": p.d_v if v_at == 0 else 0, "V_AT": v_at}
        if is_fp8(p):
            constants |= {"K_VECTOR": row_vectors(p)[0], "GROUPS": p.v_scale_groups}
        if tiles.m <= NARROW_ROWS:
            constants["TILE_M"] = tiles.m
            if is_fp8(p):
                constants["SLOTS"] = ring_slots(p, tiles.m, target.shared_bytes)
        elif not is_fp8(p):
            constants["BY_TMA"] = loads_by_tma(p, split.rows, programs(p, target))
    else:
        constants |= {"D_QK": p.d_qk, "K_SIZE": bucket(p.d_qk), "V_SIZE": bucket(p.d_v)}
        constants |= {"TILE_M": tiles.m, "STAGES": tiles.stages}
    constants["SHARES"], constants["LINES"], constants["DIMS"] = combine_shape(p, split, target)
    combines = constants["SHARES"] > 0
    # 32 bits must hold the total cost times the parts.
    short = p.batch * (p.max_keys // STEP + 3) * split.parts < 1 << 31
    few = p.batch <= MOST_SEQUENCES and split.rows.units == 1 and short
    own = combines and split.schedule_words > 0 and few and not captured
    constants["SEQUENCES"] = bucket(p.batch) if own else 0
    constants["CONSUMER_REGISTERS"] = tiles.consumer_registers
    one_launch = combines and (own or not split.schedule_words)
    return Config(
        tiles, split, constants, config_for(p, target, True) if one_launch and not captured else None
    )


def combine_shape(problem: Problem, split: Split, target: Target) -> tuple[int, int, int]:
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
    tiles = choose_tiles(problem)
    # The warpgroups of all parts of a unit take one tile each, if there are so many parts and so much room:
    # else few shares take several smaller tiles, and many are read in turns.
    results = max(32, bucket(-(-tiles.m * problem.d_v // (tiles.warpgroups * shares))))
    if shares <= FEW_SHARES:
        results = min(results, WARPGROUP_VALUES // bucket(shares))
    lines, dims = combine_sm90.lines_and_dims(results, tiles.m, problem.d_v)
    return min(bucket(shares), WARPGROUP_VALUES // (lines * dims)), lines, dims


def launches(problem: Problem, config: Config, call: Call) -> list[Launch]:
    """What one call launches, in order. Looks at the strides of the call's tensors, never at an address."""
    split, p = config.split, problem
    factors = [p.softmax_scale * factor(call.q_descale), p.softcap]
    scales: tuple[Any, ...] = ()
    if is_fp8(p) or not is_mla(p):
        scales = (*descales(call), *row_scales(call, "v_scale_cache", p.v_scale_strides))
        factors += [factor(call.k_descale), factor(call.v_descale)]
    cache = (
        pointer(call, "k"), *p.k_strides[:4], pointer(call, "v"), *p.v_strides[:4],
        *tensor_maps(p, config), pointer(call, "block_table"), *p.table_strides,
        *lengths(call), *context_lengths(p, call),
    )  # fmt: skip
    rest = (
        *sinks(call), *scales, schedule(split, call), *results(p, call), Pointer("partial"),
        split.partial_lines, *factors, p.batch, p.window_left, p.window_right, p.cp_rank, *shares(split),
    )  # fmt: skip
    arguments: tuple[Any, ...]
    if is_mla(p):
        if config.tiles.m <= NARROW_ROWS:
            kernel = mla_narrow_fp8_kernel if is_fp8(p) else mla_narrow_kernel
        else:
            kernel = mla_wide_fp8_kernel if is_fp8(p) else mla_wide_kernel
        q_v = (pointer(call, "q_v"), *p.q_v_strides[:2])
        arguments = (pointer(call, "q"), *p.q_strides[:2], *q_v, *cache, *rest)
    else:
        kernel = gqa_kernel
        k_scales = row_scales(call, "k_scale_cache", p.k_scale_strides)
        arguments = (pointer(call, "q"), *p.q_strides[:2], *cache, *k_scales, *slopes(call), *rest)
    grid = (split.rows.tiles, problem.num_kv_heads, split.parts)
    combines = config.constants["SHARES"] > 0
    options: dict[str, Any] = {"num_warps": 4}
    if combines:
        options["launch_cooperative_grid"] = True  # all at once, or not at all
    if config.tiles.programs > 1:
        options["maxnreg"] = REGISTERS // (config.tiles.programs * THREADS)
    decode = Launch(kernel, grid, arguments, config.constants, options)
    return around(problem, split, call, decode, combines, config.constants["SEQUENCES"] > 0)


def run(problem: Problem, config: Config, call: Call) -> None:
    """Launch the kernels of one call on its device's current stream."""
    device = problem.device
    if not is_current(device):
        with current(device):
            return run(problem, config, call)
    stream = current_stream(device)
    scratch: tuple[Tensor, ...]
    if config.captured is not None and not torch.cuda.is_current_stream_capturing():
        split = config.split
        scratch = memory.kept_scratch(device, stream, split.partial_values, split.schedule_words)
    else:
        config = config.captured or config
        scratch = new_scratch(config.split, device)
    if config.ready:
        return run_again(config.ready, stream, (*call, *scratch))
    # Two threads may come here at once.
    config.ready[:] = first_run(launches(problem, config, call), sources(call, scratch))
    return None
