"""What a case costs whoever does it: bytes that must move, operations that must be done."""

from __future__ import annotations

import itertools

from anystride.problem import FP8_DTYPES
from anystride.testing import Case, Storage
from anystride.testing.cases import GROUPS

__all__ = ["bytes_of_key", "bytes_to_move", "operations"]


def _first_key(case: Case, length: int, q_len: int, query: int) -> tuple[int, int]:
    """The first key that a query token sees, and one past the last."""
    own = length - q_len + query
    left, right = case.window[0], 0 if case.causal else case.window[1]
    first = 0 if left < 0 else max(0, own - left)
    return first, length if right < 0 else min(length, own + right + 1)


def _ranges(case: Case) -> list[list[tuple[int, int]]]:
    """Of each sequence's query tokens, the keys that they see."""
    return [
        [_first_key(case, length, q_len, query) for query in range(q_len)]
        for length, q_len in zip(case.seqused_k, case.q_lens, strict=True)
    ]


def bytes_of_key(case: Case, storage: Storage) -> int:
    """Bytes of a token's rows of K and V in all heads, with their scales.

    What K and V share, or heads, counts once: the addresses say so, whatever the case's form.

    Args:
        case: What is asked.
        storage: Where K and V lie.
    """
    seen: dict[tuple[int, int], int] = {}  # buffer and element: its bytes
    for geometry in (storage.k_geometry, storage.v_geometry):
        size = storage.buffers[geometry.buffer].itemsize
        _, _, _, heads, d = geometry.size
        _, _, _, stride_head, stride_dim = geometry.stride
        for head, dim in itertools.product(range(heads), range(d)):
            seen[geometry.buffer, geometry.offset + head * stride_head + dim * stride_dim] = size
    scaled = sum(dtype in FP8_DTYPES for dtype in (case.torch_k_dtype, case.torch_kv_dtype))
    scales = {"": 0, "rows": case.num_kv_heads, "groups": GROUPS}[case.scale_caches] * scaled
    return sum(seen.values()) + 4 * scales


def bytes_to_move(case: Case, storage: Storage) -> int:
    """Bytes that any implementation must move: each row that a query sees once, q, q_v, and out."""
    keys = sum(
        max((last for _, last in seen), default=0) - min((first for first, _ in seen), default=0)
        for seen in _ranges(case)
    )
    per_query = case.d_qk + case.d_v * (2 if case.form == "q_v" else 1)
    queries = case.total_q * case.num_q_heads * per_query * case.torch_dtype.itemsize
    return keys * bytes_of_key(case, storage) + queries


def operations(case: Case) -> int:
    """Floating-point operations of both products: two for each dimension of each pair of query and key."""
    pairs = sum(max(0, last - first) for seen in _ranges(case) for first, last in seen)
    per_pair = case.d_qk + case.d_v * (2 if case.form == "q_v" else 1)
    return 2 * pairs * case.num_q_heads * per_pair
