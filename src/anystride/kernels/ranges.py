"""Which keys a unit of work sees: shared by the schedule, the decode and the combine kernel.

Words. A *row* is a query token and head of one group: row ``r`` of a sequence is token ``r // group_size``,
head ``r % group_size``. A *unit* is a run of ``rows_per_unit`` rows of one sequence. Keys are counted in
*steps* of ``KEYS_PER_STEP``: the schedule cuts nowhere else, so that any tile size up to it fits.
"""

import triton
import triton.language as tl

KEYS_PER_STEP = tl.constexpr(64)


@triton.jit
def sequence_facts(
    seq,
    cu_seqlens_q_ptr, stride_cu_q,
    cu_seqlens_k_ptr, stride_cu_k,
    seqused_k_ptr, stride_seqused,
    cp_tot_ptr, stride_cp_tot,
):  # fmt: skip
    """``(first query token, query tokens, keys here, keys over all ranks)`` of a sequence."""
    q_start = tl.load(cu_seqlens_q_ptr + seq * stride_cu_q)
    num_tokens = tl.load(cu_seqlens_q_ptr + (seq + 1) * stride_cu_q) - q_start
    if seqused_k_ptr is not None:
        length = tl.load(seqused_k_ptr + seq * stride_seqused)
    else:
        length = tl.load(cu_seqlens_k_ptr + (seq + 1) * stride_cu_k) - tl.load(
            cu_seqlens_k_ptr + seq * stride_cu_k
        )
    total = length
    if cp_tot_ptr is not None:
        total = tl.load(cp_tot_ptr + seq * stride_cp_tot)
    return q_start, num_tokens, length, total


@triton.jit
def positions_over_ranks(positions, cp_rank, CP_WORLD_SIZE: tl.constexpr, CP_INTERLEAVE: tl.constexpr):
    """Where this rank's tokens stand in the sequence."""
    if CP_WORLD_SIZE > 1:
        turns = positions // CP_INTERLEAVE
        positions = (turns * CP_WORLD_SIZE + cp_rank) * CP_INTERLEAVE + positions % CP_INTERLEAVE
    return positions


@triton.jit
def num_units(num_tokens, group_size, rows_per_unit):
    """Units of a sequence; an empty one counts as one, so that every sequence has a place."""
    return tl.maximum((num_tokens * group_size + rows_per_unit - 1) // rows_per_unit, 1)


@triton.jit
def nominal_steps(
    num_tokens, length, group_size, rows_per_unit, window_left, window_right, WINDOWED: tl.constexpr
):
    """Steps that a unit of the sequence is charged with: an upper bound, the same for all its units."""
    steps = (length + (KEYS_PER_STEP - 1)) // KEYS_PER_STEP
    if WINDOWED:
        tokens_apart = tl.minimum(num_tokens - 1, (rows_per_unit - 1) // group_size + 1)
        seen = (tokens_apart + window_left + window_right) // KEYS_PER_STEP + 2
        steps = tl.minimum(steps, seen)
    return tl.maximum(steps, 1)


@triton.jit
def unit_keys(
    unit, num_tokens, length, total, group_size, rows_per_unit, window_left, window_right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SHARDED: tl.constexpr,
):  # fmt: skip
    """``(first step, first key, end of keys)`` that any row of the unit can see. Shards are visited whole."""
    first_token = unit * rows_per_unit // group_size
    last_token = tl.minimum((unit * rows_per_unit + rows_per_unit - 1) // group_size, num_tokens - 1)
    first_step = 0
    first_key = 0
    key_end = length
    if not SHARDED:
        if HAS_LEFT:
            first_key = tl.maximum(total - num_tokens + first_token - window_left, 0)
            first_step = first_key // KEYS_PER_STEP
        if HAS_RIGHT:
            key_end = tl.minimum(key_end, total - num_tokens + last_token + window_right + 1)
    return first_step, first_key, key_end
