"""What a case costs whoever does it: bytes that must move, operations that must be done."""

from __future__ import annotations

from anystride.problem import FP8_DTYPES
from anystride.testing.cases import GROUPS, Case

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


def bytes_of_key(case: Case) -> int:
    """Bytes of a token's rows of K and V in all heads, bytes that both share once, with their scales."""
    k, v = case.d_qk * case.torch_k_dtype.itemsize, case.d_v * case.torch_kv_dtype.itemsize
    scaled = sum(dtype in FP8_DTYPES for dtype in (case.torch_k_dtype, case.torch_kv_dtype))
    scales = {"": 0, "rows": case.num_kv_heads, "groups": GROUPS}[case.scale_caches] * scaled
    return case.num_kv_heads * (k if case.form == "row" else k + v) + 4 * scales


def bytes_to_move(case: Case) -> int:
    """Bytes that any implementation must move: each row that a query sees once, q, q_v, and out."""
    keys = sum(
        max((last for _, last in seen), default=0) - min((first for first, _ in seen), default=0)
        for seen in _ranges(case)
    )
    per_query = case.d_qk + case.d_v * (2 if case.form == "q_v" else 1)
    return keys * bytes_of_key(case) + (
        case.total_q * case.num_q_heads * per_query * case.torch_dtype.itemsize
    )


def operations(case: Case) -> int:
    """Floating-point operations of both products: two for each dimension of each pair of query and key."""
    pairs = sum(max(0, last - first) for seen in _ranges(case) for first, last in seen)
    per_pair = case.d_qk + case.d_v * (2 if case.form == "q_v" else 1)
    return 2 * pairs * case.num_q_heads * per_pair
