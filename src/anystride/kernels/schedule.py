"""Split the work of a step evenly over the processors, on the device, from the lengths.

All units of all sequences lie on one axis of cost: a unit costs its steps plus ``overhead`` (what
starting and finishing it costs, in steps). The axis is cut into equal parts; a part begins and ends anywhere,
so one long sequence spreads over all processors and many short ones share one. The grid and the
size of the result depend on shapes only.

The result is int32, rows of 16: a header (see ``schedule_kernel``), then one row a part:

- 0 to 5: ``begin seq, unit, step; end seq, unit, step``
- 6, 7: parts of the end unit, if it begins in this part, else 0; whether it is the begin unit, too
- 8 to 10: ``first query token, query tokens, keys`` of the begin sequence: nobody need wait for the lengths
- 11, 12: slot of the begin unit in its first part (see ``parts.partial_line``); its parts
- 13: how many have finished the unit that begins here, counted by the kernels that combine themselves
- 14, 15: ``first query token, query tokens`` of the end sequence
"""

import triton
import triton.language as tl

from anystride.kernels.ranges import nominal_steps, num_units, sequence_facts

WORDS_PER_PART = 16
ROW = tl.constexpr(WORDS_PER_PART)
ARRIVALS = tl.constexpr(13)  # the word of the counter, which is 0 before and after each call
RUNTIME = [
    "stride_cu_q", "stride_cu_k", "stride_seqused", "batch", "num_parts", "group_size",
    "rows_per_unit", "window_left", "window_right", "overhead",
]  # fmt: skip
UNALIGNED = ["cu_seqlens_q_ptr", "cu_seqlens_k_ptr", "seqused_k_ptr", "metadata_ptr"]
OVERHEAD_STEPS = tl.constexpr(2)  # what starting and finishing a unit costs, in steps of 64 keys
SCHEDULE_MARK = tl.constexpr(0x5CED)  # first word of the header: tells a schedule from a zeroed buffer


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=UNALIGNED)
def schedule_kernel(
    cu_seqlens_q_ptr, stride_cu_q,
    cu_seqlens_k_ptr, stride_cu_k,
    seqused_k_ptr, stride_seqused,
    metadata_ptr,
    batch,
    num_parts,
    group_size,
    rows_per_unit,
    window_left,
    window_right,
    overhead,
    WINDOWED: tl.constexpr,
    TILE_SEQ: tl.constexpr,
):  # fmt: skip
    """One program a part: finds where its share of the cost begins and ends.

    Grid: ``(num_parts,)``. Reads the lengths twice: once for the total, once to find the two cuts.
    Header: ``mark, rows_per_unit, batch, used parts, num_parts``, zeros. Kernels compare it with their own.
    """
    part = tl.program_id(0)
    lengths = (
        cu_seqlens_q_ptr, stride_cu_q, cu_seqlens_k_ptr, stride_cu_k, seqused_k_ptr, stride_seqused, None, 0,
    )  # fmt: skip
    offs = tl.arange(0, TILE_SEQ)
    total = tl.zeros([], tl.int64)
    largest = tl.zeros([], tl.int64)
    for first in range(0, batch, TILE_SEQ):
        cost = costs(
            first + offs, batch, lengths, group_size, rows_per_unit, window_left, window_right, overhead,
            WINDOWED,
        )  # [TILE_SEQ]  # fmt: skip
        total += tl.sum(cost, 0)
        largest = tl.maximum(largest, tl.max(cost, 0))
    used_parts, begin, end = part_costs(part, num_parts, total, largest, batch)

    before = tl.zeros([], tl.int64)
    begin_seq = tl.zeros([], tl.int32)
    end_seq = tl.zeros([], tl.int32)
    begin_base = tl.zeros([], tl.int64)
    end_base = tl.zeros([], tl.int64)
    for first in range(0, batch, TILE_SEQ):
        cost = costs(
            first + offs, batch, lengths, group_size, rows_per_unit, window_left, window_right, overhead,
            WINDOWED,
        )  # fmt: skip
        ends = before + tl.cumsum(cost, 0)
        passed = (first + offs < batch) & (ends <= begin)
        begin_seq += tl.sum(passed.to(tl.int32), 0)
        begin_base = tl.maximum(begin_base, tl.max(tl.where(passed, ends, 0), 0))
        passed = (first + offs < batch) & (ends <= end)
        end_seq += tl.sum(passed.to(tl.int32), 0)
        end_base = tl.maximum(end_base, tl.max(tl.where(passed, ends, 0), 0))
        before += tl.sum(cost, 0)

    write_part(
        part, total, used_parts,
        _place(
            begin_seq, begin - begin_base, batch, lengths, group_size, rows_per_unit, window_left,
            window_right, overhead, WINDOWED,
        ),
        _place(
            end_seq, end - end_base, batch, lengths, group_size, rows_per_unit, window_left,
            window_right, overhead, WINDOWED,
        ),
        begin_base, end_base, batch, lengths, metadata_ptr, overhead,
    )  # fmt: skip
    tl.store(metadata_ptr + (part + 1) * ROW + ARRIVALS, 0)
    if part == 0:
        tl.store(metadata_ptr + 0, SCHEDULE_MARK)
        tl.store(metadata_ptr + 1, rows_per_unit)
        tl.store(metadata_ptr + 2, batch)
        tl.store(metadata_ptr + 3, used_parts.to(tl.int32))
        tl.store(metadata_ptr + 4, num_parts)
        for word in range(5, ROW):
            tl.store(metadata_ptr + word, 0)


@triton.jit
def part_costs(part, num_parts, total, largest, batch):
    """``(used parts, begin, end)`` of a part on the axis of cost, from the sum and the largest cost.

    In the integers of ``total``, which must hold it times ``num_parts``.
    """
    # A part is worth two steps: less is latency alone, and the kernels for Hopper take two at a time.
    used_parts = tl.maximum(tl.minimum(total // 2, num_parts.to(total.dtype)), 1)
    # Sequences of one length: cut between them, if that leaves few parts idle.
    whole_parts = used_parts // batch * batch
    if (largest * batch == total) & (whole_parts * 16 >= used_parts * 15):
        used_parts = whole_parts
    p = tl.minimum(part.to(total.dtype), used_parts)
    return used_parts, p * total // used_parts, tl.minimum(p + 1, used_parts) * total // used_parts


@triton.jit
def write_part(
    part, total, used_parts, begin, end, begin_base, end_base, batch, lengths, metadata_ptr, overhead,
):  # fmt: skip
    """Write a part's row but for the counter.

    ``begin``, ``end``: as :func:`_place` found them; ``begin_base``: the cost of the sequences before.
    """
    begin_seq, begin_unit, begin_step, begin_steps = begin
    end_seq, end_unit, end_step, steps = end
    p = tl.minimum(part.to(total.dtype), used_parts)
    # The part in which a cut unit begins is the one that the combine kernel works from.
    same_unit = (begin_seq == end_seq) & (begin_unit == end_unit)
    begins_here = (end_step > 0) & ((same_unit == 0) | (begin_step == 0))
    last_step = end_base + end_unit.to(total.dtype) * (steps + overhead) + steps - 1
    sharers = part_at(last_step, total, used_parts) - p.to(tl.int32) + 1
    sharers = tl.where(begins_here, sharers, 0)
    first_cost = begin_base + begin_unit.to(total.dtype) * (begin_steps + overhead)
    first_part = part_at(first_cost, total, used_parts)
    begin_sharers = part_at(first_cost + begin_steps - 1, total, used_parts) - first_part + 1
    # A part that begins with a whole unit may have been moved on to it, from another one's overhead.
    whole = begin_step == 0
    first_part = tl.where(whole, p.to(tl.int32), first_part)
    # In its first part it is the second unit, if that part began in a step of another one.
    is_second = first_part * total // used_parts < first_cost - overhead
    first_slot = 2 * first_part + tl.where(whole, 0, is_second.to(tl.int32))
    begin_sharers = tl.where(whole, tl.where(same_unit, sharers, 1), begin_sharers)

    q_start, num_tokens, length, _total = sequence_facts(tl.minimum(begin_seq, batch - 1), *lengths)
    row = metadata_ptr + (part + 1) * ROW
    tl.store(row + 0, begin_seq)
    tl.store(row + 1, begin_unit)
    tl.store(row + 2, begin_step)
    tl.store(row + 3, end_seq)
    tl.store(row + 4, end_unit)
    tl.store(row + 5, end_step)
    tl.store(row + 6, sharers)
    tl.store(row + 7, same_unit.to(tl.int32))
    tl.store(row + 8, q_start)
    tl.store(row + 9, num_tokens)
    tl.store(row + 10, length)
    tl.store(row + 11, first_slot)
    tl.store(row + 12, begin_sharers)
    q_start, num_tokens, _length, _total = sequence_facts(tl.minimum(end_seq, batch - 1), *lengths)
    tl.store(row + 14, q_start)
    tl.store(row + 15, num_tokens)


@triton.jit
def own_part(
    part, num_parts, walk, lengths, GROUP_SIZE: tl.constexpr, WINDOWED: tl.constexpr, SEQUENCES: tl.constexpr
):
    """Find a part of a schedule that no kernel has written, of SEQUENCES sequences of one unit each at most.

    Writes the row, for those who combine; every program of a part writes the same. The counter is left as it
    is: 0, in a buffer that was zeros at first. 32 bits must hold the total times the parts. ``walk`` and
    ``lengths`` are those of ``parts.py``.

    Returns:
        Words 0 to 5 and 8 to 10 of the row.
    """
    metadata_ptr, batch, rows_per_unit = walk[0], walk[1], walk[5]
    total = batch * 0
    largest = total
    own_costs = ()
    for seq in tl.static_range(SEQUENCES):
        _start, num_tokens, length, _total = sequence_facts(tl.minimum(seq, batch - 1), *lengths)
        steps = nominal_steps(num_tokens, length, GROUP_SIZE, rows_per_unit, walk[6], walk[7], WINDOWED)
        cost = tl.where(seq < batch, steps + OVERHEAD_STEPS, 0)
        own_costs = own_costs + (cost,)
        total += cost
        largest = tl.maximum(largest, cost)
    used_parts, begin, end = part_costs(part, num_parts, total, largest, batch)
    before = total * 0
    begin_base = before
    end_base = before
    begin_seq = before
    end_seq = before
    begin_steps = own_costs[0] - OVERHEAD_STEPS
    end_steps = begin_steps
    for seq in tl.static_range(1, SEQUENCES + 1):
        before += own_costs[seq - 1]
        passed = (seq <= batch) & (before <= begin)
        begin_seq += passed.to(tl.int32)
        begin_base = tl.where(passed, before, begin_base)
        passed_by_end = (seq <= batch) & (before <= end)
        end_seq += passed_by_end.to(tl.int32)
        end_base = tl.where(passed_by_end, before, end_base)
        if seq < SEQUENCES:  # behind the last sequence: its steps, of which 0 are passed
            steps = own_costs[seq] - OVERHEAD_STEPS
            begin_steps = tl.where(passed & (seq < batch), steps, begin_steps)
            end_steps = tl.where(passed_by_end & (seq < batch), steps, end_steps)
    # A cut in an overhead moves on.
    begin_step = begin - begin_base
    begin_seq = tl.where(begin_step >= begin_steps, begin_seq + 1, begin_seq)
    begin_step = tl.where(begin_step >= begin_steps, 0, begin_step)
    end_step = end - end_base
    end_seq = tl.where(end_step >= end_steps, end_seq + 1, end_seq)
    end_step = tl.where(end_step >= end_steps, 0, end_step)
    unit = batch * 0
    write_part(
        part, total, used_parts,
        (begin_seq, unit, begin_step, begin_steps), (end_seq, unit, end_step, end_steps),
        begin_base, end_base, batch, lengths, metadata_ptr, OVERHEAD_STEPS,
    )  # fmt: skip
    q_start, num_tokens, length, _total = sequence_facts(tl.minimum(begin_seq, batch - 1), *lengths)
    return begin_seq, unit, begin_step, end_seq, unit, end_step, q_start, num_tokens, length


@triton.jit
def is_foreign(metadata_ptr, rows_per_unit, batch, num_parts):
    """Whether a schedule was made for other arguments, or is none at all."""
    foreign = tl.load(metadata_ptr) != SCHEDULE_MARK
    foreign = foreign | (tl.load(metadata_ptr + 1) != rows_per_unit)
    foreign = foreign | (tl.load(metadata_ptr + 2) != batch)
    return foreign | (tl.load(metadata_ptr + 4) != num_parts)


@triton.jit
def part_at(cost, total, used_parts):
    """The part in whose share of the axis of cost a place falls."""
    return (((cost + 1) * used_parts - 1) // total).to(tl.int32)


@triton.jit
def costs(
    seqs, batch, lengths, group_size, rows_per_unit, window_left, window_right, overhead,
    WINDOWED: tl.constexpr,
):  # fmt: skip
    """Cost of each sequence, int64; 0 past the batch."""
    cu_seqlens_q_ptr, stride_cu_q = lengths[0], lengths[1]
    mask = seqs < batch
    q_start = tl.load(cu_seqlens_q_ptr + seqs * stride_cu_q, mask=mask, other=0)
    num_tokens = tl.load(cu_seqlens_q_ptr + (seqs + 1) * stride_cu_q, mask=mask, other=0) - q_start
    if lengths[4] is not None:
        length = tl.load(lengths[4] + seqs * lengths[5], mask=mask, other=0)
    else:
        length = tl.load(lengths[2] + (seqs + 1) * lengths[3], mask=mask, other=0)
        length -= tl.load(lengths[2] + seqs * lengths[3], mask=mask, other=0)
    steps = nominal_steps(num_tokens, length, group_size, rows_per_unit, window_left, window_right, WINDOWED)
    units = num_units(num_tokens, group_size, rows_per_unit)
    return tl.where(mask, units.to(tl.int64) * (steps + overhead), 0)


@triton.jit
def _place(
    seq, rest, batch, lengths, group_size, rows_per_unit, window_left, window_right, overhead,
    WINDOWED: tl.constexpr,
):  # fmt: skip
    """``(seq, unit, step, steps)`` at cost ``rest`` into the sequence; a cut in an overhead moves on."""
    seq_read = tl.minimum(seq, batch - 1)  # past the end: any sequence will do
    _start, num_tokens, length, _total = sequence_facts(seq_read, *lengths)
    steps = nominal_steps(num_tokens, length, group_size, rows_per_unit, window_left, window_right, WINDOWED)
    units = num_units(num_tokens, group_size, rows_per_unit)
    unit = (rest // (steps + overhead)).to(tl.int32)
    step = (rest % (steps + overhead)).to(tl.int32)
    unit = tl.where(step >= steps, unit + 1, unit)
    step = tl.where(step >= steps, 0, step)
    next_seq = unit >= units
    return tl.where(next_seq, seq + 1, seq), tl.where(next_seq, 0, unit), step, steps
