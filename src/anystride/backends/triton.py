"""The portable back end on GPUs: the launch of the Triton kernels.

Accepts everything in the contract and needs nothing of one vendor; Hopper and later start the second kernel
early. Two launches at most a call: decode and, where work may be cut, combine; a third one, first, when
no ``scheduler_metadata`` was given.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from anystride.kernels.combine import combine_kernel
from anystride.kernels.decode import decode_kernel
from anystride.kernels.ranges import KEYS_PER_STEP
from anystride.kernels.schedule import WORDS_PER_PART, schedule_kernel
from anystride.problem import Call, Problem, bucket

NAME = "triton"

STEP = KEYS_PER_STEP.value
FIXED_SPLIT_STEPS = 32  # batch_invariant: 2048 keys a split, enough splits for one long sequence
OVERHEAD_STEPS = 2  # what starting and finishing a unit costs, in steps of 64 keys
COMBINE_ROWS = 16  # rows of a tile of the combine kernel: 64 bytes of each dimension's line
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
        # Few sequences: half as many shares to combine outweigh two programs that hide each other's waits.
        few = bucket(problem.batch) * problem.num_kv_heads * 4 <= target.processors
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
        row_tiles: Row tiles of a unit: they walk the same keys at the same time.
        parts: Programs of the decode kernel along the cost axis.
        scheduled: Whether parts come from the schedule kernel; else from ``splits_per_unit``.
        units_per_seq: Upper bound on the units of a sequence.
        splits_per_unit: Shares of each unit's keys when not scheduled.
        steps_per_split: Size of a share when it is fixed (``batch_invariant``), else 0.
        partial_lines: Rows of partial results; their lse come behind them.
        combine_grid: Programs of the combine kernel.
        scratch: The partial results, then the metadata if the call brings none.
        ready: The launches of the plan, once its first call has compiled them.
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
    partial_lines: int
    combine_grid: tuple[int, int, int]
    scratch: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    ready: list[Any] = field(default_factory=list, compare=False)

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
    return bool(STEP * strides[2] < 1 << 31)


def schedule_rows(problem: Problem, target: Target) -> tuple[Tiles, int, int]:
    """Tiles, row tiles a unit, and units a sequence at most: what the schedule knows of rows."""
    group = problem.group_size
    # A row's tile must not depend on how long its neighbours' queries are.
    rows = group if problem.batch_invariant else group * problem.max_seqlen_q
    tiles = choose_tiles(rows, problem, target)
    row_tiles = -(-rows // tiles.m)
    if problem.batch_invariant or row_tiles > 4:
        row_tiles = 1
    return tiles, row_tiles, -(-group * problem.max_seqlen_q // (row_tiles * tiles.m))


def full_parts(problem: Problem, target: Target) -> int:
    """Parts that run at once; more where queries are long and the costs of their units uneven."""
    tiles, row_tiles, units = schedule_rows(problem, target)
    slots = target.processors * tiles.programs_per_processor
    if units > 1:
        slots *= 4  # causal units cost less than they are charged with
    return max(1, slots // (row_tiles * problem.num_kv_heads))


def num_parts(problem: Problem, target: Target) -> int:
    """Parts of the schedule: no more than there are steps of work."""
    _tiles, _row_tiles, units = schedule_rows(problem, target)
    steps: int = -(-problem.max_keys // STEP)
    return min(full_parts(problem, target), max(1, problem.batch * units * steps))


def combine_tiles(shares: int, groups: int, d_v: int, processors: int) -> tuple[int, int]:
    """Shares and dimensions that a program of the combine kernel reads at once.

    Its rows are ``COMBINE_ROWS``; there are ``groups`` programs for each slice of ``d_v``. Slices are as wide
    as two programs a processor allow; the rest of what registers hold goes to shares.
    """
    slices = bucket(2 * processors // groups)
    d = min(512, max(4, bucket(d_v) // slices))
    elements = 4096 if shares <= 64 else 8192
    return min(bucket(shares), max(1, elements // (COMBINE_ROWS * d))), d


def choose_config(problem: Problem) -> Config:
    """The configuration for the problem's own device."""
    return config_for(problem, device_target(problem.device))


def config_for(problem: Problem, target: Target) -> Config:
    """The configuration for any target: a pure function, also for targets that are not here."""
    tiles, row_tiles, units = schedule_rows(problem, target)
    rows_per_unit = row_tiles * tiles.m
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
    scratch.append(((lines * (problem.d_v + 1),), torch.float32))
    if scheduled and not problem.metadata_words:
        scratch.append((((parts + 1) * WORDS_PER_PART,), torch.int32))

    v_in_k = problem.relation.kind == "v_in_k"
    key_dims = problem.d_qk - (problem.d_v if v_in_k else 0)
    k_pieces = pieces(key_dims) if key_dims else (16, 0)
    v_pieces = pieces(problem.d_v)
    native = target.backend == "cuda" and target.arch >= 89
    overlap = target.backend == "cuda" and target.arch >= 90  # programmatic dependent launch
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
        "OVERLAP": overlap,
        "TILE_M": tiles.m,
        "TILE_N": tiles.n,
        "STAGES": tiles.stages,
    }
    row_groups = -(-min(rows_per_unit, problem.group_size * problem.max_seqlen_q) // COMBINE_ROWS)
    if scheduled:
        # From the bucket of the batch and not from the longest sequence: neither may compile anew.
        # A unit that spans several parts has a share in each, and most have one at either end.
        full = full_parts(problem, target)
        most_units = bucket(problem.batch) * units
        by_unit = most_units <= full
        groups = row_groups * problem.num_kv_heads * min(most_units, full)
        shares = -(-full // most_units) + 1
        combine_splits, combine_d = combine_tiles(shares, groups, problem.d_v, target.processors)
    else:
        # Nothing of the batch: under batch_invariant its sums must not change with it.
        by_unit, combine_splits, combine_d = True, 16, 16
    places = problem.batch * units if by_unit else parts
    combine_constants = {
        "GROUP_SIZE": problem.group_size,
        "DIMS_V": problem.d_v,
        "WINDOWED": problem.window_left >= 0 and problem.window_right >= 0 and problem.cp_world_size == 1,
        "SCHEDULED": scheduled,
        "BY_UNIT": by_unit,
        "FIXED_SPLITS": fixed > 0,
        "OVERLAP": overlap,
        "NARROW": scheduled and lines * (problem.d_v + 1) < 1 << 31,
        "DECODE_M": tiles.m,
        "TILE_SEQ": 128 if problem.batch <= 128 else 1024,
        "TILE_SPLITS": combine_splits,
        "TILE_M": COMBINE_ROWS,
        "TILE_D": combine_d,
    }
    combine_grid = (row_groups * -(-problem.d_v // combine_d), problem.num_kv_heads, places)
    return Config(
        tiles, row_tiles, parts, scheduled, units, splits, fixed, constants, combine_constants, lines,
        combine_grid, tuple(scratch),
    )  # fmt: skip


class Pointer(str):
    """Stands for a tensor of the call, by its name in ``SOURCES``, among the arguments of a launch."""


SOURCES = (*Call._fields, "partial", "schedule")  # what a launch points to: the call's tensors, the scratch


class Launch(NamedTuple):
    """One kernel launch of a plan, complete but for the addresses."""

    kernel: Any
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, int]


class Ready(NamedTuple):
    """A launch whose kernel is compiled: what is left to do is to fill in addresses."""

    run: Any  # Triton's launcher
    arguments: list[Any]
    places: tuple[tuple[int, int], ...]  # (place among the arguments, index into SOURCES)


STREAM = 3  # its position among a launcher's arguments


def _strides(tensor: Tensor | None, dims: int) -> tuple[int, ...]:
    return (0,) * dims if tensor is None else tensor.stride()


def _pointer(call: Call, name: str) -> Pointer | None:
    return None if getattr(call, name) is None else Pointer(name)


def _lengths(call: Call) -> tuple[Any, ...]:
    """The tensors that say how long sequences are, and their strides, as all kernels take them."""
    names = ("cu_seqlens_q", "cu_seqlens_k", "seqused_k")
    return tuple(x for name in names for x in (_pointer(call, name), *_strides(getattr(call, name), 1)))


def _descale(name: str, descale: Tensor | float | None) -> tuple[Any, int, int]:
    """Pointer and strides (seq, head): 0 for a scalar."""
    if not isinstance(descale, Tensor):
        return None, 0, 0
    if descale.numel() == 1:
        return Pointer(name), 0, 0
    return Pointer(name), descale.stride(0), descale.stride(1)


def _factor(descale: Tensor | float | None) -> float:
    return descale if isinstance(descale, float | int) else 1.0


def schedule_launch(problem: Problem, config: Config, call: Call, parts: int) -> Launch:
    """The schedule kernel, which fills ``schedule``, int32 ``[8 * (parts + 1)]``, from the lengths."""
    arguments = (
        *_lengths(call), Pointer("schedule"), problem.batch, parts, problem.group_size, config.rows_per_unit,
        problem.window_left, problem.window_right, OVERHEAD_STEPS,
    )  # fmt: skip
    constants = {name: config.combine_constants[name] for name in ("WINDOWED", "TILE_SEQ")}
    return Launch(schedule_kernel, (parts, 1, 1), arguments, constants, {"num_warps": 4})


def launches(problem: Problem, config: Config, call: Call) -> list[Launch]:
    """What one call launches, in order. Looks at the strides of the call's tensors, never at an address."""
    pointer = partial(_pointer, call)
    # fmt: off
    steps: list[Launch] = []
    parts = config.parts
    metadata = pointer("scheduler_metadata") if config.scheduled else None
    if config.scheduled and metadata is None:
        metadata = Pointer("schedule")
        steps.append(schedule_launch(problem, config, call, parts))
    alibi = _strides(call.alibi_slopes, 2)
    if len(alibi) == 1:
        alibi = (0, *alibi)
    tot = call.cp_tot_seqused_k if problem.cp_world_size > 1 else None
    v_in_k = problem.relation.kind == "v_in_k"
    lengths = _lengths(call)
    results = (
        pointer("out"), *problem.out_strides, pointer("lse"), 0 if call.lse is None else call.lse.stride(0)
    )
    sinks = (pointer("s_aux"), *_strides(call.s_aux, 1))
    window = (problem.window_left, problem.window_right)
    shares = (
        config.units_per_seq, config.splits_per_unit, config.steps_per_split, config.rows_per_unit
    )
    arguments = (
        pointer("q"), *problem.q_strides,
        pointer("q_v"), *(problem.q_strides if v_in_k else problem.q_v_strides),
        pointer("k"), *problem.k_strides,
        pointer("v"), *problem.v_strides,
        pointer("block_table"), *problem.table_strides,
        *lengths,
        None if tot is None else Pointer("cp_tot_seqused_k"), *_strides(tot, 1),
        pointer("alibi_slopes"), *alibi, *sinks,
        *_descale("q_descale", call.q_descale),
        *_descale("k_descale", call.k_descale),
        *_descale("v_descale", call.v_descale),
        metadata, *results, Pointer("partial"), config.partial_lines,
        problem.softmax_scale * _factor(call.q_descale), problem.softcap,
        _factor(call.k_descale), _factor(call.v_descale),
        problem.batch, parts, *window, problem.cp_rank, *shares,
    )
    grid = (config.row_tiles, problem.num_kv_heads, parts)
    options = {"num_warps": config.tiles.warps, "num_stages": config.tiles.stages}
    steps.append(Launch(decode_kernel, grid, arguments, config.constants, options))
    if config.cuts:
        arguments = (
            Pointer("partial"), config.partial_lines, metadata, *lengths, *sinks, *results,
            problem.batch, *window, *shares, problem.num_kv_heads, OVERHEAD_STEPS,
        )
        options = {"num_warps": 8}
        if config.combine_constants["OVERLAP"]:
            options["launch_pdl"] = True
        steps.append(
            Launch(combine_kernel, config.combine_grid, arguments, config.combine_constants, options)
        )
    # fmt: on
    return steps


def first_start(launch: Launch, tensors: Mapping[str, Any]) -> Ready | None:
    """Compile a launch, or find it compiled, and start it; None from the interpreter.

    What the kernel is specialised on are strides, alignments and dtypes, all of which are a part of the
    plan: later calls of the plan skip Triton's own look-up, and pass addresses, about which Triton would ask
    the driver if they came as tensors. They skip its launch hooks, too: a Proton session sees first calls.
    """
    given = [tensors[x] if isinstance(x, Pointer) else x for x in launch.arguments]
    made = launch.kernel[launch.grid](*given, **launch.constants, **launch.options)
    if made is None:
        return None
    # The calling convention of compiled kernels, the same from Triton 3.6 to 3.9: grid, stream, function,
    # packed metadata, launch metadata, two hooks, then the arguments.
    before = [*launch.grid, None, made.function, made.packed_metadata, None, None, None]
    arguments = [*before, *launch.arguments, *launch.constants.values()]
    places = tuple((i, SOURCES.index(x)) for i, x in enumerate(arguments) if isinstance(x, Pointer))
    return Ready(made.run, arguments, places)


def metadata_words(problem: Problem, margin: int) -> int:
    """Length of the schedule of a problem, ``margin`` processors left free."""
    target = device_target(problem.device)
    target = target._replace(processors=max(1, target.processors - margin))
    return (num_parts(problem, target) + 1) * WORDS_PER_PART


def make_metadata(problem: Problem, cu_seqlens_q: Tensor, seqused_k: Tensor, metadata: Tensor) -> None:
    """Fill the schedule that all calls of these shapes and lengths can share."""
    nothing = dict.fromkeys(Call._fields)
    call = Call(**nothing | {"cu_seqlens_q": cu_seqlens_q, "seqused_k": seqused_k})  # type: ignore[arg-type]
    parts = metadata.shape[0] // WORDS_PER_PART - 1
    launch = schedule_launch(problem, choose_config(problem), call, parts)
    with _current(problem.device):
        first_start(launch, call._asdict() | {"schedule": metadata})


def _current(device: torch.device) -> AbstractContextManager[None]:
    """Triton launches on the current device, whatever its tensors say."""
    if device.type == "cpu":
        return nullcontext()
    context: AbstractContextManager[None] = torch.get_device_module(device).device(device)
    return context


def run(problem: Problem, config: Config, call: Call, scratch: list[Tensor]) -> None:
    """Launch the kernels of one call on its device's current stream."""
    if not config.ready:
        tensors = call._asdict() | dict(zip(SOURCES[len(call) :], scratch, strict=False))
        for name, form in (("k", "K_FORMAT"), ("v", "V_FORMAT")):
            if config.constants[form] != "none" and not config.constants["FP8_NATIVE"]:
                tensors[name] = tensors[name].view(torch.uint8)  # the target cannot load fp8
        with _current(problem.device):
            started = [first_start(launch, tensors) for launch in launches(problem, config, call)]
        config.ready[:] = [x for x in started if x is not None]  # two threads may come here at once
        return
    driver = triton.runtime.driver.active
    if driver.get_current_device() == problem.device.index:
        start_ready(config, driver.get_current_stream(problem.device.index), (*call, *scratch))
    else:
        with _current(problem.device):
            start_ready(config, driver.get_current_stream(problem.device.index), (*call, *scratch))


def start_ready(config: Config, stream: int, sources: tuple[Any, ...]) -> None:
    """Start the launches of a plan that are compiled, on a stream of the current device."""
    for launch, template, places in config.ready:
        arguments = template.copy()
        arguments[STREAM] = stream
        for place, source in places:
            arguments[place] = sources[source].data_ptr()
        launch(*arguments)
