"""The portable back end on GPUs: the launch of the Triton kernels.

Accepts everything in the contract and uses nothing of one vendor. Two launches at most a call: decode
and, where work may be cut, combine; a third one, first, when no ``scheduler_metadata`` was given.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from anystride.kernels.combine import combine_kernel
from anystride.kernels.decode import decode_kernel
from anystride.kernels.ranges import KEYS_PER_STEP
from anystride.kernels.schedule import WORDS_PER_PART, schedule_kernel
from anystride.problem import Call, Problem

NAME = "triton"

STEP = KEYS_PER_STEP.value
FIXED_SPLIT_STEPS = 32  # batch_invariant: 2048 keys a split, enough splits for one long sequence
OVERHEAD_STEPS = 1  # what starting and finishing a unit costs, in steps of 64 keys
WIDE_ROWS = 64  # rows of a tile of a long query


class Target(NamedTuple):
    """What of a device decides a configuration."""

    backend: str  # cuda, hip, xpu; cpu: the interpreter
    arch: int  # 90 for sm_90; 0 where that means nothing
    processors: int
    shared_bytes: int  # shared memory that one program can have


class Tiles(NamedTuple):
    """The launch shape of the decode kernel."""

    m: int
    n: int
    warps: int
    stages: int
    programs_per_processor: int


@lru_cache(maxsize=64)
def device_target(device: torch.device) -> Target:
    """The target of a device, asked once."""
    if device.type == "cpu":
        return Target("cpu", 0, 4, 1 << 20)
    properties = torch.cuda.get_device_properties(device)
    shared = int(getattr(properties, "shared_memory_per_block_optin", 65536))
    if torch.version.hip:
        return Target("hip", 0, properties.multi_processor_count, shared)
    arch = properties.major * 10 + properties.minor
    return Target("cuda", arch, properties.multi_processor_count, shared)


def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU (TRITON_INTERPRET=1)."""
    return bool(triton.knobs.runtime.interpret)


def pieces(dims: int) -> tuple[int, int]:
    """Two powers of two, 16 at least, that cover ``dims`` with little waste; the second may be 0."""
    whole = max(16, triton.next_power_of_2(dims))
    first = whole // 2
    if first < 16 or dims <= first:
        return whole, 0
    rest = max(16, triton.next_power_of_2(dims - first))
    return (first, rest) if first + rest < whole else (whole, 0)


def tile_rows(rows: int, dtype: torch.dtype, d_v: int, target: Target) -> int:
    """Rows of a tile, for ``rows`` rows a sequence and KV head.

    Depends on nothing that a caller of ``get_scheduler_metadata`` does not state.
    """
    if rows <= 16:
        return 16
    wide = d_v > 256
    most = WIDE_ROWS
    if dtype == torch.float32 or target.backend == "hip":
        most = 16 if wide else 32
    elif target.backend == "cuda" and target.arch < 90 and wide:
        most = 32
    return min(32 if rows <= 32 else WIDE_ROWS, most)


def choose_tiles(rows: int, problem: Problem, target: Target) -> Tiles:
    """Tile sizes for ``rows`` rows a sequence and KV head.

    Measured on an H200 where the target is one (docs/kernels.md); elsewhere the largest tiles of which two
    stages fit into shared memory.
    """
    itemsize = max(problem.dtype.itemsize, 2)
    key_dims = problem.d_qk - (problem.d_v if problem.relation.kind == "v_in_k" else 0)
    width = sum(pieces(problem.d_v)) + (sum(pieces(key_dims)) if key_dims else 0)
    wide = problem.d_v > 256
    m = tile_rows(rows, problem.dtype, problem.d_v, target)
    if problem.dtype == torch.float32:
        n, warps, stages, programs = (16, 4, 2, 1) if wide else (32, 4, 2, 2)
    elif target.backend == "hip":
        n, warps, stages, programs = (16, 4, 1, 1) if wide else (32, 4, 1, 2)
    elif wide:
        n, warps, stages, programs = (32, 4, 3, 2) if m == 16 else (64, 8, 2, 1)
    else:
        n, warps, stages, programs = (64, 4, 3, 2) if width <= 256 else (32, 4, 3, 2)
        if m == WIDE_ROWS and width >= 256:
            warps = 8
    while n > 16 and stages * n * width * itemsize + m * width * itemsize > target.shared_bytes:
        n //= 2
    return Tiles(m, n, warps, stages, programs)


@dataclass(frozen=True)
class Config:
    """How the kernels are launched for a problem.

    Attributes:
        tiles: Launch shape of the decode kernel.
        row_tiles: Row tiles of a unit: they walk the same keys at the same time.
        parts: Programs of the decode kernel along the cost axis.
        scheduled: Whether parts come from the schedule kernel; else from ``splits_per_unit``.
        units_per_seq: Upper bound on the units of a sequence.
        splits_per_unit: Shares of each unit's keys when not scheduled.
        steps_per_split: Size of a share when it is fixed (``batch_invariant``), else 0.
        scratch: Partial results and their lse, then the metadata if the call brings none.
    """

    tiles: Tiles
    row_tiles: int
    parts: int
    scheduled: bool
    units_per_seq: int
    splits_per_unit: int
    steps_per_split: int
    constants: dict[str, Any]
    combine_constants: dict[str, Any]
    scratch: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    compiled: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def rows_per_unit(self) -> int:
        """Rows of a unit."""
        return self.row_tiles * self.tiles.m

    @property
    def cuts(self) -> bool:
        """Whether a unit may be shared by several parts."""
        return self.parts > 1 if self.scheduled else self.splits_per_unit > 1


def refusals(problem: Problem) -> list[str]:
    """Every reason why the Triton kernels cannot run the problem here."""
    reasons = []
    if problem.device.type == "cpu" and not interpreted():
        reasons.append("tensors are on cpu; needs a GPU, or TRITON_INTERPRET=1 to check a kernel slowly")
    elif problem.device.type not in ("cpu", "cuda", "xpu"):
        reasons.append(f"tensors are on {problem.device}; needs a GPU that Triton supports")
    elif problem.device.type == "cuda" and not torch.version.hip:
        arch = device_target(problem.device).arch
        if arch < 80:
            reasons.append(f"compute capability {arch // 10}.{arch % 10}; needs 8.0 or later")
    return reasons


def vector(strides: tuple[int, ...], align: int, itemsize: int) -> int:
    """Elements that every row address is a multiple of, at most 16 bytes' worth."""
    most = max(align // itemsize, 1)
    for stride in strides:
        while stride % most:
            most //= 2
    return most


def is_narrow(strides: tuple[int, ...]) -> bool:
    """Whether the rows of a tile lie within 2^31 elements of its first."""
    return STEP * strides[2] < 1 << 31


def schedule_rows(problem: Problem, target: Target) -> tuple[Tiles, int]:
    """Tiles and row tiles a unit: what the schedule's idea of a unit depends on."""
    group = problem.group_size
    # A row's tile must not depend on how long its neighbours' queries are.
    rows = group if problem.batch_invariant else group * problem.max_seqlen_q
    tiles = choose_tiles(rows, problem, target)
    row_tiles = -(-rows // tiles.m)
    if problem.batch_invariant or row_tiles > 4:
        row_tiles = 1
    return tiles, row_tiles


def num_parts(problem: Problem, target: Target) -> int:
    """Parts of the schedule: as many as run at once; more where queries are long and costs uneven."""
    tiles, row_tiles = schedule_rows(problem, target)
    group, heads = problem.group_size, problem.num_kv_heads
    units = -(-group * problem.max_seqlen_q // (row_tiles * tiles.m))
    slots = target.processors * tiles.programs_per_processor
    if units > 1:
        slots *= 4  # causal units cost less than they are charged with
    parts = max(1, slots // (row_tiles * heads))
    steps = -(-problem.max_keys // STEP)
    return min(parts, max(1, problem.batch * units * steps))


def choose_config(problem: Problem) -> Config:
    """The configuration for the problem's own device."""
    return config_for(problem, device_target(problem.device))


def config_for(problem: Problem, target: Target) -> Config:
    """The configuration for any target: a pure function, also for targets that are not here."""
    tiles, row_tiles = schedule_rows(problem, target)
    rows_per_unit = row_tiles * tiles.m
    units = -(-problem.group_size * problem.max_seqlen_q // rows_per_unit)
    scheduled = problem.num_splits == 0 and not problem.batch_invariant
    steps = max(1, -(-problem.max_keys // STEP))
    if scheduled:
        parts, splits, fixed = num_parts(problem, target), 0, 0
        if problem.metadata_words:
            parts = problem.metadata_words // WORDS_PER_PART - 1
        slots = 2 * parts
    else:
        fixed = FIXED_SPLIT_STEPS if problem.batch_invariant else 0
        splits = -(-steps // fixed) if fixed else min(problem.num_splits, steps)
        parts = slots = problem.batch * units * splits
    scratch: list[tuple[tuple[int, ...], torch.dtype]] = []
    lines = slots * problem.num_kv_heads * rows_per_unit
    scratch.append(((lines * problem.d_v,), torch.float32))
    scratch.append(((lines,), torch.float32))
    if scheduled and not problem.metadata_words:
        scratch.append((((parts + 1) * WORDS_PER_PART,), torch.int32))

    v_in_k = problem.relation.kind == "v_in_k"
    key_dims = problem.d_qk - (problem.d_v if v_in_k else 0)
    k_pieces = pieces(key_dims) if key_dims else (16, 0)
    v_pieces = pieces(problem.d_v)
    native = target.backend == "cuda" and target.arch >= 89
    formats = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
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
        "OUT_UNIT": problem.out_strides[2] == 1 or problem.d_v == 1,
        "OUT_VECTOR": vector(problem.out_strides[:2], problem.out_align, problem.dtype.itemsize),
        "K_VECTOR": vector(problem.k_strides[:4], problem.k_align, problem.k_dtype.itemsize),
        "V_VECTOR": vector(problem.v_strides[:4], problem.v_align, problem.v_dtype.itemsize),
        "Q_VECTOR": min(
            vector(problem.q_strides[:2], problem.q_align, problem.dtype.itemsize),
            vector(problem.q_v_strides[:2], problem.q_v_align, problem.dtype.itemsize),
        ),
        "K_FORMAT": formats.get(problem.k_dtype, "none"),
        "V_FORMAT": formats.get(problem.v_dtype, "none"),
        "FP8_NATIVE": native,
        "HAS_LEFT": problem.window_left >= 0,
        "HAS_RIGHT": problem.window_right >= 0,
        "HAS_SOFTCAP": problem.softcap > 0,
        "HAS_DESCALES": problem.has_k_descale or problem.has_v_descale,
        "CP_WORLD_SIZE": problem.cp_world_size,
        "CP_INTERLEAVE": problem.cp_interleave,
        "SCHEDULED": scheduled,
        "FIXED_SPLITS": fixed > 0,
        "TILE_M": tiles.m,
        "TILE_N": tiles.n,
        "STAGES": tiles.stages,
    }
    many_splits = parts > 2 * problem.batch * units if scheduled else splits > 8
    slice_d = min(128 if many_splits else 512, triton.next_power_of_2(problem.d_v))
    rows = min(1 if many_splits else 4, tiles.m)
    combine_constants = {
        "GROUP_SIZE": problem.group_size,
        "DIMS_V": problem.d_v,
        "WINDOWED": problem.window_left >= 0
        and problem.window_right >= 0
        and problem.cp_world_size == 1,
        "SCHEDULED": scheduled,
        "FIXED_SPLITS": fixed > 0,
        "TILE_SPLITS": 32 if many_splits else 2,
        "TILE_M": rows,
        "TILE_D": slice_d,
    }
    return Config(
        tiles, row_tiles, parts, scheduled, units, splits, fixed, constants, combine_constants,
        tuple(scratch),
    )  # fmt: skip


def _strides(tensor: Tensor | None, dims: int) -> tuple[int, ...]:
    return (0,) * dims if tensor is None else tensor.stride()


def _descale_args(descale: Tensor | float | None) -> tuple[Any, int, int]:
    """Pointer and strides (seq, head): 0 for a scalar."""
    if not isinstance(descale, Tensor):
        return None, 0, 0
    if descale.numel() == 1:
        return descale, 0, 0
    return descale, descale.stride(0), descale.stride(1)


def _bytes(cache: Tensor, constants: dict[str, Any], name: str) -> Tensor:
    """An fp8 cache as bytes where the target cannot load its dtype."""
    if constants[name] == "none" or constants["FP8_NATIVE"]:
        return cache
    return cache.view(torch.uint8)


def _factor(descale: Tensor | float | None) -> float:
    return descale if isinstance(descale, float | int) else 1.0


def _launch(
    compiled: dict[str, Any], kernel: Any, grid: tuple[int, int, int], args: tuple[Any, ...],
    constants: dict[str, Any], **options: int,
) -> None:  # fmt: skip
    """Launch a kernel; from the second call of a plan on, without Triton's own look-up.

    What the compiled kernel was specialised on are strides, alignments and dtypes, all of which are a part of
    the plan that ``compiled`` belongs to.
    """
    name = kernel.__name__
    ready = compiled.get(name)
    if ready is None:
        made = kernel[grid](*args, **constants, **options)
        if made is not None:  # the interpreter makes nothing
            compiled[name] = (made, tuple(constants.values()))
        return
    made, values = ready
    made[grid](*args, *values)


def schedule(
    metadata: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None, seqused_k: Tensor | None,
    batch: int, group_size: int, rows_per_unit: int, window: tuple[int, int], windowed: bool,
    compiled: dict[str, Any],
) -> None:  # fmt: skip
    """Fill ``metadata``, int32 ``[8 * (parts + 1)]``, from the lengths."""
    parts = metadata.shape[0] // WORDS_PER_PART - 1
    args = (
        cu_seqlens_q, cu_seqlens_q.stride(0),
        cu_seqlens_k, 0 if cu_seqlens_k is None else cu_seqlens_k.stride(0),
        seqused_k, 0 if seqused_k is None else seqused_k.stride(0),
        metadata, batch, parts, group_size, rows_per_unit, *window, OVERHEAD_STEPS,
    )  # fmt: skip
    constants = {"WINDOWED": windowed, "TILE_SEQ": 128 if batch <= 128 else 1024}
    _launch(compiled, schedule_kernel, (parts, 1, 1), args, constants, num_warps=4)


def metadata_words(problem: Problem, margin: int) -> int:
    """Length of the schedule of a problem, ``margin`` processors left free."""
    target = device_target(problem.device)
    target = target._replace(processors=max(1, target.processors - margin))
    return (num_parts(problem, target) + 1) * WORDS_PER_PART


def make_metadata(
    problem: Problem, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None, seqused_k: Tensor | None,
    metadata: Tensor,
) -> None:  # fmt: skip
    """Fill the schedule that all calls of these shapes and lengths can share."""
    config = choose_config(problem)
    window = (problem.window_left, problem.window_right)
    schedule(
        metadata, cu_seqlens_q, cu_seqlens_k, seqused_k, problem.batch, problem.group_size,
        config.rows_per_unit, window, config.combine_constants["WINDOWED"], {},
    )  # fmt: skip


def run(problem: Problem, config: Config, call: Call, scratch: list[Tensor]) -> None:
    """Launch the kernels of one call on its device's current stream."""
    if problem.device.type == "cuda" and torch.cuda.current_device() != problem.device.index:
        with torch.cuda.device(problem.device):
            _run(problem, config, call, scratch)
    else:
        _run(problem, config, call, scratch)


def _run(problem: Problem, config: Config, call: Call, scratch: list[Tensor]) -> None:
    # fmt: off
    constants = config.constants
    partial, partial_lse = scratch[0], scratch[1]
    metadata, parts = call.scheduler_metadata, config.parts
    window = (problem.window_left, problem.window_right)
    cu_q, cu_k, used = call.cu_seqlens_q, call.cu_seqlens_k, call.seqused_k
    stride_cu_k = 0 if cu_k is None else cu_k.stride(0)
    stride_used = 0 if used is None else used.stride(0)
    if not config.scheduled:
        metadata = None
    elif metadata is None:
        metadata = scratch[2]
        schedule(
            metadata, cu_q, cu_k, used, problem.batch, problem.group_size, config.rows_per_unit,
            window, config.combine_constants["WINDOWED"], config.compiled,
        )
    alibi = call.alibi_slopes
    alibi_strides = (0, 0)
    if alibi is not None:
        alibi_strides = (0, alibi.stride(0)) if alibi.dim() == 1 else alibi.stride()
    sinks = call.s_aux
    stride_sinks = 0 if sinks is None else sinks.stride(0)
    lse = call.lse
    stride_lse = 0 if lse is None else lse.stride(0)
    tot = call.cp_tot_seqused_k if problem.cp_world_size > 1 else None
    v_in_k = problem.relation.kind == "v_in_k"
    args = (
        call.q, *problem.q_strides,
        call.q_v, *(problem.q_strides if v_in_k else problem.q_v_strides),
        _bytes(call.k, constants, "K_FORMAT"), *problem.k_strides,
        _bytes(call.v, constants, "V_FORMAT"), *problem.v_strides,
        call.block_table, *problem.table_strides,
        cu_q, cu_q.stride(0), cu_k, stride_cu_k, used, stride_used,
        tot, 0 if tot is None else tot.stride(0),
        alibi, *alibi_strides, sinks, stride_sinks,
        *_descale_args(call.q_descale), *_descale_args(call.k_descale),
        *_descale_args(call.v_descale),
        metadata, call.out, *problem.out_strides, lse, stride_lse, partial, partial_lse,
        problem.softmax_scale * _factor(call.q_descale), problem.softcap,
        _factor(call.k_descale), _factor(call.v_descale),
        problem.batch, parts, *window, problem.cp_rank,
        config.units_per_seq, config.splits_per_unit, config.steps_per_split, config.rows_per_unit,
    )
    grid = (config.row_tiles, problem.num_kv_heads, parts)
    tiles = config.tiles
    _launch(
        config.compiled, decode_kernel, grid, args, constants,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )
    if not config.cuts:
        return
    combine = config.combine_constants
    slices = -(-problem.d_v // combine["TILE_D"])
    units = parts if config.scheduled else problem.batch * config.units_per_seq
    rows = min(config.rows_per_unit, problem.group_size * problem.max_seqlen_q)
    grid = (-(-rows // combine["TILE_M"]) * slices, problem.num_kv_heads, units)
    args = (
        partial, partial_lse, metadata, cu_q, cu_q.stride(0), cu_k, stride_cu_k, used, stride_used,
        sinks, stride_sinks, call.out, *problem.out_strides, lse, stride_lse, *window,
        config.units_per_seq, config.splits_per_unit, config.steps_per_split, config.rows_per_unit,
        problem.num_kv_heads,
    )
    _launch(config.compiled, combine_kernel, grid, args, combine, num_warps=4)
    # fmt: on
