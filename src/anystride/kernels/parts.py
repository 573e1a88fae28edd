"""What one part of a call does: the runs of keys of the units that it walks.

A part is a program's share of the work (``schedule.py``): from a step of one unit to a step of another.
These functions are scalar, so that Triton's and Gluon's kernels share them. Two tuples go through them:

``walk``: ``metadata_ptr, batch, units_per_seq, splits_per_unit, steps_per_split, rows_per_unit, window_left,
window_right``, then what ``schedule.own_part`` found, or None where the schedule was written before.

``lengths``: the arguments of ``sequence_facts`` after ``seq``.
"""

import triton
import triton.language as tl

from anystride.kernels.ranges import KEYS_PER_STEP, nominal_steps, num_units, sequence_facts, unit_keys
from anystride.kernels.schedule import ROW, is_foreign


@triton.jit
def part_range(part, walk, SCHEDULED: tl.constexpr):
    """Where a part begins and ends: ``(seq, unit, step, end seq, end unit, end step)``.

    SCHEDULED: as ``schedule_kernel`` wrote it; nothing, if the schedule was made for another call.
    Otherwise part ``p`` is split ``p % splits_per_unit`` of unit ``p // splits_per_unit``, and steps count
    splits, until the length is known.
    """
    if walk[8] is not None:
        own = walk[8]
        seq, unit, step, end_seq, end_unit, end_step = own[0], own[1], own[2], own[3], own[4], own[5]
    elif SCHEDULED:
        row = walk[0] + (part + 1) * ROW
        seq = tl.load(row + 0)
        unit = tl.load(row + 1)
        step = tl.load(row + 2)
        end_seq = tl.load(row + 3)
        end_unit = tl.load(row + 4)
        end_step = tl.load(row + 5)
        end_seq = tl.where(is_foreign(walk[0], walk[5], walk[1], tl.num_programs(2)), -1, end_seq)
    else:
        index = part // walk[3]
        seq = index // walk[2]
        unit = index % walk[2]
        step = part % walk[3]
        end_seq = seq
        end_unit = unit
        end_step = step + 1
    return seq, unit, step, end_seq, end_unit, end_step


@triton.jit
def is_before(seq, unit, step, end_seq, end_unit, end_step):
    """Whether a place of the walk comes before another."""
    earlier = (unit < end_unit) | ((unit == end_unit) & (step < end_step))
    return (seq < end_seq) | ((seq == end_seq) & earlier)


@triton.jit
def next_unit(seq, unit, step, units, SCHEDULED: tl.constexpr):
    """The place after a unit, in a sequence of ``units``; a part that was not scheduled ends there."""
    if SCHEDULED:
        step = step * 0
        unit += 1
        if unit >= units:
            unit = unit * 0
            seq += 1
    else:
        seq += 1
    return seq, unit, step


@triton.jit
def facts_of(seq, first_seq, part, walk, lengths, SCHEDULED: tl.constexpr):
    """``(first query token, query tokens, keys here, keys over all ranks)`` of a sequence.

    Those of a part's first sequence stand beside where it begins: no need to wait for another line of memory.
    """
    if SCHEDULED:
        if seq == first_seq:
            if walk[8] is not None:
                q_start, num_tokens, length = walk[8][6], walk[8][7], walk[8][8]
            else:
                row = walk[0] + (part + 1) * ROW
                q_start = tl.load(row + 8)
                num_tokens = tl.load(row + 9)
                length = tl.load(row + 10)
        else:
            q_start, num_tokens, length, _total = sequence_facts(seq, *lengths)
    else:
        q_start, num_tokens, length, _total = sequence_facts(seq, *lengths)
    total = length
    if lengths[6] is not None:
        total = tl.load(lengths[6] + seq * lengths[7])
    return q_start, num_tokens, length, total


@triton.jit
def unit_share(
    seq, unit, step, end_seq, end_unit, end_step, first_seq, part, walk, lengths, tile_in_unit,
    GROUP_SIZE: tl.constexpr, TILE_M: tl.constexpr, SCHEDULED: tl.constexpr, FIXED_SPLITS: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SHARDED: tl.constexpr,
):  # fmt: skip
    """What a part does of one unit, of which it begins with ``step``.

    Returns:
        ``(q_start, num_tokens, length, total, units, first_row, step, stop_step, whole, exists)``: the first
        query token, query tokens, keys here and over all ranks, units of the sequence; the first row of this
        row tile; the steps of this share; whether they are all of the unit's; whether there are such rows and
        steps.
    """
    rows_per_unit = walk[5]
    q_start, num_tokens, length, total = facts_of(seq, first_seq, part, walk, lengths, SCHEDULED)
    WINDOWED: tl.constexpr = HAS_LEFT and HAS_RIGHT and not SHARDED
    steps = nominal_steps(num_tokens, length, GROUP_SIZE, rows_per_unit, walk[6], walk[7], WINDOWED)
    units = num_units(num_tokens, GROUP_SIZE, rows_per_unit)
    if SCHEDULED:
        stop_step = tl.where((seq == end_seq) & (unit == end_unit), end_step, steps)
    else:
        size = walk[4]
        if not FIXED_SPLITS:
            size = (steps + walk[3] - 1) // walk[3]
        step = step * size
        stop_step = tl.minimum(step + size, steps)
    whole = (step == 0) & (stop_step == steps)
    first_row = unit * rows_per_unit + tile_in_unit * TILE_M
    exists = (first_row < num_tokens * GROUP_SIZE) & (step < stop_step) & (unit < units)
    return q_start, num_tokens, length, total, units, first_row, step, stop_step, whole, exists


@triton.jit
def share_keys(
    unit, step, stop_step, num_tokens, length, total, walk,
    GROUP_SIZE: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SHARDED: tl.constexpr,
):  # fmt: skip
    """``(first key that a row of the unit sees, first key of the share, end of its keys)``."""
    first_step, first_key, key_end = unit_keys(
        unit, num_tokens, length, total, GROUP_SIZE, walk[5], walk[6], walk[7],
        HAS_LEFT, HAS_RIGHT, SHARDED,
    )  # fmt: skip
    key_begin = (first_step + step) * KEYS_PER_STEP
    key_end = tl.minimum(key_end, (first_step + stop_step) * KEYS_PER_STEP)
    return first_key, key_begin, key_end


@triton.jit
def partial_line(
    seq, unit, first_seq, first_unit, part, kv_head, num_kv_heads, rows_per_unit, tile_in_unit,
    TILE_M: tl.constexpr, SCHEDULED: tl.constexpr,
):  # fmt: skip
    """The first line of a row tile's partial results.

    A scheduled part has two slots: for its first unit, which it may not begin, and for its last.
    """
    slot = part
    if SCHEDULED:
        later = (seq != first_seq) | (unit != first_unit)
        slot = 2 * part + later.to(tl.int32)
    return (slot * num_kv_heads + kv_head).to(tl.int64) * rows_per_unit + tile_in_unit * TILE_M
