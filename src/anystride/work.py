"""How the work of a call is shared out over a GPU, and the kernels around the one that does it.

Rows are cut into tiles and units, keys into parts; a schedule kernel makes the parts, a combine kernel puts
cut units together. All GPU back ends share this, so that one schedule serves whichever of them runs a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch

from anystride import memory
from anystride.kernels.combine import combine_kernel
from anystride.kernels.ranges import KEYS_PER_STEP
from anystride.kernels.schedule import OVERHEAD_STEPS, WORDS_PER_PART, schedule_kernel
from anystride.launch import Launch, Pointer, Target, current, first_run, pointer, sources, strides
from anystride.problem import Call, Problem, bucket

STEP = KEYS_PER_STEP.value
FIXED_SPLIT_STEPS = 32  # batch_invariant: 2048 keys a split, enough splits for one long sequence
COMBINE_VALUES = 8192  # partial results that a program of the combine kernel holds at most: 32 registers
COMBINE_WARPS = 32  # of the combine kernel, a processor: one look-up of a unit serves many tiles
WIDE_ROWS = 64  # rows of a tile of a long query


class Rows(NamedTuple):
    """How the rows (query tokens times heads of a group) of a sequence and KV head are cut."""

    tile: int  # rows of a tile
    tiles: int  # tiles of a unit: they walk the same keys at the same time
    units: int  # upper bound on the units of a sequence

    @property
    def unit(self) -> int:
        """Rows of a unit."""
        return self.tile * self.tiles


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


def rows_in_tiles(problem: Problem) -> int:
    """The rows that decide the tile: it must not depend on how long a neighbour's query is."""
    return problem.group_size * (1 if problem.batch_invariant else problem.max_seqlen_q)


def cut_rows(problem: Problem, target: Target) -> Rows:
    """Tiles and units of a problem's rows: all that the schedule knows of them."""
    rows = rows_in_tiles(problem)
    tile = tile_rows(rows, problem.dtype, problem.d_v, target)
    tiles = -(-rows // tile)
    if problem.batch_invariant or tiles > 4:
        tiles = 1
    return Rows(tile, tiles, -(-problem.group_size * problem.max_seqlen_q // (tile * tiles)))


def full_parts(problem: Problem, rows: Rows, programs: int) -> int:
    """Parts that run at once, of ``programs`` that do; more where queries are long and units uneven."""
    if rows.units > 1:
        programs *= 4  # causal units cost less than they are charged with
    return max(1, programs // (rows.tiles * problem.num_kv_heads))


def num_parts(problem: Problem, rows: Rows, programs: int) -> int:
    """Parts of the schedule: no more than there are steps of work."""
    steps: int = -(-problem.max_keys // STEP)
    return min(full_parts(problem, rows, programs), max(1, problem.batch * rows.units * steps))


def given_parts(problem: Problem) -> int:
    """Parts of the schedule that came with the call; 0 if none did, or if it is not used."""
    if problem.num_splits > 0 or problem.batch_invariant or not problem.metadata_words:
        return 0
    return problem.metadata_words // WORDS_PER_PART - 1


@dataclass(frozen=True)
class Split:
    """How the work of a problem is cut.

    Attributes:
        rows: Tiles and units.
        parts: Programs along the cost axis.
        scheduled: Whether parts come from the schedule kernel; else from ``splits_per_unit``.
        splits_per_unit: Shares of each unit's keys when not scheduled.
        steps_per_split: Size of a share when it is fixed (``batch_invariant``), else 0.
        partial_lines: Rows of partial results; their lse come behind them.
        combine_constants: Compile-time arguments of the combine kernel.
        combine_tiles: Its tiles of a unit.
        combine_grid: Its programs.
        partial_values: Elements of the partial results.
        schedule_words: Elements of the schedule; 0 if the call brings one, or needs none.
    """

    rows: Rows
    parts: int
    scheduled: bool
    splits_per_unit: int
    steps_per_split: int
    partial_lines: int
    combine_constants: dict[str, Any]
    combine_tiles: int
    combine_grid: tuple[int, int, int]
    partial_values: int
    schedule_words: int

    @property
    def cuts(self) -> bool:
        """Whether a unit may be shared by several parts."""
        return self.parts > 1 if self.scheduled else self.splits_per_unit > 1


def is_windowed(problem: Problem) -> bool:
    """Whether a row sees a bounded run of keys."""
    return problem.window_left >= 0 and problem.window_right >= 0 and problem.cp_world_size == 1


def split_work(problem: Problem, target: Target, programs: int) -> Split:
    """Cut the work of a problem.

    Args:
        problem: Its facts.
        target: The device.
        programs: Programs of the decode kernel that run at once.
    """
    rows = cut_rows(problem, target)
    scheduled = problem.num_splits == 0 and not problem.batch_invariant
    steps = max(1, -(-problem.max_keys // STEP))
    if scheduled:
        splits, fixed = 0, 0
        parts = given_parts(problem) or num_parts(problem, rows, programs)
        slots = 2 * parts
    else:
        fixed = FIXED_SPLIT_STEPS if problem.batch_invariant else 0
        splits = -(-steps // fixed) if fixed else min(problem.num_splits, steps)
        parts = slots = problem.batch * rows.units * splits
    lines = slots * problem.num_kv_heads * rows.unit
    words = (parts + 1) * WORDS_PER_PART if scheduled and not problem.metadata_words else 0

    lines_of_unit = min(rows.unit, problem.group_size * problem.max_seqlen_q)
    if scheduled:
        # From the bucket of the batch and not from the longest sequence: neither may compile anew.
        full = full_parts(problem, rows, programs)
        most_units = bucket(problem.batch) * rows.units
        by_unit = 2 * most_units <= full
        busy = min(most_units, full)
        shared = lines_of_unit * problem.num_kv_heads * busy
        tile = combine_tile(max(1, full // most_units), shared, lines_of_unit, problem.d_v, target.processors)
    else:
        # Nothing of the batch: under batch_invariant its sums must not change with it.
        by_unit, tile, busy = True, (8, 1, min(512, bucket(problem.d_v))), problem.batch * rows.units
    tile_splits, tile_m, tile_d = tile
    places = problem.batch * rows.units if by_unit else parts
    constants = {
        "GROUP_SIZE": problem.group_size,
        "DIMS_V": problem.d_v,
        "WINDOWED": is_windowed(problem),
        "SCHEDULED": scheduled,
        "BY_UNIT": by_unit,
        "FIXED_SPLITS": fixed > 0,
        "OVERLAP": overlaps(target),
        "NARROW": scheduled and lines * (problem.d_v + 1) < 1 << 31,
        **out_constants(problem),
        "TILE_SEQ": schedule_tile(problem),
        "TILE_SPLITS": tile_splits,
        "TILE_M": tile_m,
        "TILE_D": tile_d,
    }
    tiles = -(-lines_of_unit // tile_m) * -(-problem.d_v // tile_d)
    programs_at_once = target.processors * COMBINE_WARPS // combine_warps(tile)
    wanted = -(-programs_at_once // (busy * problem.num_kv_heads))
    grid = (min(tiles, wanted), problem.num_kv_heads, places)
    values = lines * (problem.d_v + 1)
    return Split(rows, parts, scheduled, splits, fixed, lines, constants, tiles, grid, values, words)


def new_scratch(split: Split, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Scratch for one call: the partial results, then the schedule if the call needs one of its own."""
    partial = memory.allocate((split.partial_values,), torch.float32, device)
    if not split.schedule_words:
        return (partial,)
    return partial, memory.allocate((split.schedule_words,), torch.int32, device)


def combine_tile(
    shares: int, shared: int, lines_of_unit: int, d_v: int, processors: int
) -> tuple[int, int, int]:
    """Shares, lines and dimensions that a program of the combine kernel takes at once.

    Args:
        shares: Of a unit, about.
        shared: Lines of results of all units that may be cut.
        lines_of_unit: Of one.
        d_v: Dimensions of a line.
        processors: A program for each and one more: then all of them have something to wait for.
    """
    results = min(1024, max(32, bucket(shared * d_v // (2 * processors))))
    d = min(bucket(d_v), 512, results)
    m = min(results // d, bucket(lines_of_unit))
    return min(max(4, bucket(shares)), COMBINE_VALUES // (m * d)), m, d


def combine_warps(tile: tuple[int, ...]) -> int:
    """Warps of a program of the combine kernel, so that a thread holds 32 values at most."""
    return 8 if 2 * prod(tile) > COMBINE_VALUES else 4


def out_constants(problem: Problem) -> dict[str, Any]:
    """What kernels know of how ``out`` lies: whether dimensions are neighbours, and how rows are aligned."""
    return {
        "OUT_UNIT": problem.out_strides[2] == 1 or problem.d_v == 1,
        "OUT_VECTOR": vector(problem.out_strides[:2], problem.out_align, problem.dtype.itemsize),
    }


def overlaps(target: Target) -> bool:
    """Whether the combine kernel is launched while the decode kernel runs: programmatic dependent launch."""
    return target.backend == "cuda" and target.arch >= 90


def converts_fp8(target: Target) -> bool:
    """Whether there are instructions from and to e4m3 and e5m2, as PyTorch has them."""
    return target.backend == "cuda" and target.arch >= 89


def schedule_tile(problem: Problem) -> int:
    """Sequences that a program looks at together."""
    return 128 if problem.batch <= 128 else 1024


def vector(strides: tuple[int, ...], align: int, itemsize: int) -> int:
    """Elements that every row address is a multiple of, at most 16 bytes' worth."""
    most = max(align // itemsize, 1)
    for stride in strides:
        while stride % most:
            most //= 2
    return most


def metadata_words(problem: Problem, rows: Rows, programs: int) -> int:
    """Length of the schedule of a problem."""
    return (num_parts(problem, rows, programs) + 1) * WORDS_PER_PART


def make_metadata(
    problem: Problem,
    target: Target,
    cu_seqlens_q: torch.Tensor,
    seqused_k: torch.Tensor,
    metadata: torch.Tensor,
) -> None:
    """Fill the schedule that all calls of these shapes and lengths can share."""
    call = Call(**dict.fromkeys(Call._fields) | {"cu_seqlens_q": cu_seqlens_q, "seqused_k": seqused_k})  # type: ignore[arg-type]
    parts = metadata.shape[0] // WORDS_PER_PART - 1
    launch = schedule_launch(problem, cut_rows(problem, target), call, parts)
    with current(problem.device):
        first_run([launch], sources(call, ()) | {"schedule": metadata})


def lengths(call: Call) -> tuple[Any, ...]:
    """The tensors that say how long sequences are, and their strides, as all kernels take them."""
    names = ("cu_seqlens_q", "cu_seqlens_k", "seqused_k")
    return tuple(x for name in names for x in (pointer(call, name), *strides(getattr(call, name), 1)))


def context_lengths(problem: Problem, call: Call) -> tuple[Any, ...]:
    """The lengths over all ranks and their stride."""
    tot = call.cp_tot_seqused_k if problem.cp_world_size > 1 else None
    return (None if tot is None else Pointer("cp_tot_seqused_k"), *strides(tot, 1))


def slopes(call: Call) -> tuple[Any, ...]:
    """The slopes of alibi and their strides: of a sequence, of a head."""
    alibi = strides(call.alibi_slopes, 2)
    return (pointer(call, "alibi_slopes"), *((0, *alibi) if len(alibi) == 1 else alibi))


def sinks(call: Call) -> tuple[Any, ...]:
    """The sinks and their stride."""
    return (pointer(call, "s_aux"), *strides(call.s_aux, 1))


def descale(call: Call, name: str) -> tuple[Any, ...]:
    """A descale that is a tensor, and its strides: of a sequence, of a head; 0 for a scalar."""
    given = getattr(call, name)
    if not isinstance(given, torch.Tensor):
        return None, 0, 0
    return (Pointer(name), 0, 0) if given.numel() == 1 else (Pointer(name), *given.stride())


def descales(call: Call) -> tuple[Any, ...]:
    """The descales that are tensors, of q, K and V, and their strides."""
    return tuple(x for name in ("q_descale", "k_descale", "v_descale") for x in descale(call, name))


def row_scales(call: Call, name: str, strides: tuple[int, ...]) -> tuple[Any, ...]:
    """A scale cache and its strides; None, which is no parameter of a kernel, where there is none."""
    return (None,) * 6 if getattr(call, name) is None else (Pointer(name), *strides)


def factor(descale: torch.Tensor | float | None) -> float:
    """A descale that is a number; 1 for others."""
    return descale if isinstance(descale, float | int) else 1.0


def results(problem: Problem, call: Call) -> tuple[Any, ...]:
    """``out`` and ``lse`` with their strides, as all kernels take them."""
    lse_stride = 0 if call.lse is None else call.lse.stride(0)
    return (pointer(call, "out"), *problem.out_strides, pointer(call, "lse"), lse_stride)


def shares(split: Split) -> tuple[int, ...]:
    """The numbers by which kernels find a part's share of a unit."""
    return (split.rows.units, split.splits_per_unit, split.steps_per_split, split.rows.unit)


def schedule(split: Split, call: Call) -> Pointer | None:
    """The schedule that the kernels of a call read: the one it brought, or its own."""
    if not split.scheduled:
        return None
    return pointer(call, "scheduler_metadata") or Pointer("schedule")


def schedule_launch(problem: Problem, rows: Rows, call: Call, parts: int) -> Launch:
    """The schedule kernel, which fills ``schedule``, int32 ``[16 * (parts + 1)]``, from the lengths."""
    arguments = (
        *lengths(call), Pointer("schedule"), problem.batch, parts, problem.group_size, rows.unit,
        problem.window_left, problem.window_right, OVERHEAD_STEPS.value,
    )  # fmt: skip
    constants = {"WINDOWED": is_windowed(problem), "TILE_SEQ": schedule_tile(problem)}
    return Launch(schedule_kernel, (parts, 1, 1), arguments, constants, {"num_warps": 4})


def combine_launch(problem: Problem, split: Split, call: Call) -> Launch:
    """The combine kernel, which writes the results of units that were cut."""
    arguments = (
        Pointer("partial"), split.partial_lines, schedule(split, call), *lengths(call), *sinks(call),
        *results(problem, call), problem.batch, problem.window_left, problem.window_right, *shares(split),
        problem.num_kv_heads, OVERHEAD_STEPS.value, split.combine_tiles, split.parts,
    )  # fmt: skip
    tile = tuple(split.combine_constants[name] for name in ("TILE_SPLITS", "TILE_M", "TILE_D"))
    options: dict[str, Any] = {"num_warps": combine_warps(tile)}
    if split.combine_constants["OVERLAP"]:
        options["launch_pdl"] = True
    return Launch(combine_kernel, split.combine_grid, arguments, split.combine_constants, options)


def around(
    problem: Problem,
    split: Split,
    call: Call,
    decode: Launch,
    combines: bool = False,
    schedules: bool = False,
) -> list[Launch]:
    """What one call launches, in order, around its decode kernel.

    Looks at the strides of the call's tensors, never at an address. ``combines``: the decode kernel puts cut
    units together itself; ``schedules``: it finds its parts itself.
    """
    launches = [decode]
    if split.scheduled and call.scheduler_metadata is None and not schedules:
        launches.insert(0, schedule_launch(problem, split.rows, call, split.parts))
    if split.cuts and not combines:
        launches.append(combine_launch(problem, split, call))
    return launches
