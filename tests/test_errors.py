"""Every message: its first line, its numbers, all of its reasons; and no fault without a test."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import anystride
from anystride import (
    AnystrideError,
    InvalidInputError,
    UnsupportedError,
    explain,
    flash_attn_varlen_func,
    get_scheduler_metadata,
)
from anystride import api as api_module
from anystride import plan as plan_module
from anystride import problem as problem_module
from anystride.errors import Fault


def ints(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def right_call(**change: Any) -> dict[str, Any]:
    """2 sequences, 4 query heads on 2 KV heads, ``d_qk`` 16, ``d_v`` 8, 6 blocks of 4 tokens."""
    arguments = {
        "q": torch.zeros(3, 4, 16),
        "k": torch.zeros(6, 4, 2, 16),
        "v": torch.zeros(6, 4, 2, 8),
        "max_seqlen_q": 2,
        "cu_seqlens_q": ints(0, 1, 3),
        "max_seqlen_k": 8,
        "seqused_k": ints(5, 8),
        "block_table": torch.zeros(2, 3, dtype=torch.int32),
    }
    return arguments | change


def dense_call(**change: Any) -> dict[str, Any]:
    """The same without a table."""
    dense = {"k": torch.zeros(13, 2, 16), "v": torch.zeros(13, 2, 8), "cu_seqlens_k": ints(0, 5, 13)}
    return right_call(seqused_k=None, block_table=None, **dense | change)


def fp8_call(heads: int = 2, **change: Any) -> dict[str, Any]:
    """The first one over an fp8 cache of so many heads."""
    k, v = (torch.zeros(6, 4, heads, d).to(torch.float8_e4m3fn) for d in (16, 8))
    return right_call(k=k, v=v, **change)


def caught(arguments: dict[str, Any], call: Callable[..., Any] = flash_attn_varlen_func) -> InvalidInputError:
    with pytest.raises(InvalidInputError) as caught_one:
        call(**arguments)
    return caught_one.value


def half(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(*shape, dtype=torch.float16, **options)


# One fault each: the arguments, then the whole message, without the name of the function.
FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "device": (
        right_call(seqused_k=ints(5, 8).to("meta")),
        """\
seqused_k must be on the device of q.
  got    int32 [2] strides (1,) on meta
  needs  cpu
  do     seqused_k = seqused_k.to(q.device)""",
    ),
    "device_of_the_cache": (
        right_call(k=torch.zeros(6, 4, 2, 16, device="meta")),
        """\
k must be on the device of q.
  got    float32 [6, 4, 2, 16] strides (128, 32, 16, 1) on meta
  needs  cpu""",
    ),
    "no_tensor": (
        right_call(block_table=[[0, 1, 2], [3, 4, 5]]),
        """\
block_table must be a tensor.
  got    list
  needs  torch.Tensor""",
    ),
    "dims_of_q": (
        right_call(q=torch.zeros(3, 64)),
        """\
q must have 3 dimensions.
  got    float32 [3, 64] strides (64, 1) on cpu
  needs  [total_q, num_q_heads, d_qk]""",
    ),
    "dims_of_a_paged_cache": (
        right_call(k=torch.zeros(24, 2, 16)),
        """\
k must have 4 or 5 dimensions.
  got    float32 [24, 2, 16] strides (32, 16, 1) on cpu
  needs  [num_blocks, block_size, num_kv_heads, d] or """
        "[num_pages, blocks_per_page, block_size, num_kv_heads, d]",
    ),
    "dims_of_a_dense_cache": (
        dense_call(v=torch.zeros(13, 16)),
        """\
v must have 3 dimensions.
  got    float32 [13, 16] strides (16, 1) on cpu
  needs  [total_k, num_kv_heads, d] (no block_table was given)""",
    ),
    "dims_of_the_table": (
        right_call(block_table=ints(0, 1)),
        """\
block_table must have 2 dimensions.
  got    int32 [2] strides (1,) on cpu
  needs  [batch, max_blocks]""",
    ),
    "dims_of_slopes": (
        right_call(alibi_slopes=torch.zeros(1, 2, 4)),
        """\
alibi_slopes must have 1 or 2 dimensions.
  got    float32 [1, 2, 4] strides (8, 4, 1) on cpu
  needs  1 or 2 dimensions""",
    ),
    "int64": (
        right_call(block_table=torch.zeros(2, 3, dtype=torch.int64)),
        """\
block_table must be int32.
  got    int64 [2, 3] strides (3, 1) on cpu
  needs  int32
  do     block_table = block_table.to(torch.int32)""",
    ),
    "dtype_of_q": (
        right_call(q=torch.zeros(3, 4, 16, dtype=torch.float64)) | {
            name: torch.zeros(6, 4, 2, d, dtype=torch.float8_e4m3fn) for name, d in (("k", 16), ("v", 8))
        },
        """\
q must be float16, bfloat16 or float32.
  got    float64 [3, 4, 16] strides (64, 16, 1) on cpu
  needs  float16, bfloat16 or float32
  do     q = q.to(torch.bfloat16)""",
    ),
    "dtype_of_the_cache": (
        right_call(v=half(6, 4, 2, 8)),
        """\
v must have the dtype of q, or be an fp8 cache.
  got    float16 [6, 4, 2, 8] strides (64, 16, 8, 1) on cpu
  needs  float32, float8_e4m3fn or float8_e5m2""",
    ),
    "dtype_of_out": (
        right_call(out=half(3, 4, 8)),
        """\
out must have the dtype of q.
  got    float16 [3, 4, 8] strides (32, 8, 1) on cpu
  needs  float32""",
    ),
    "dtype_of_a_descale": (
        right_call(k_descale=half(2, 2)),
        """\
k_descale must be float32.
  got    float16 [2, 2] strides (2, 1) on cpu
  needs  float32
  do     k_descale = k_descale.float()""",
    ),
    "dtype_of_sinks": (
        right_call(s_aux=ints(1, 2, 3, 4)),
        """\
s_aux must be a floating-point tensor.
  got    int32 [4] strides (1,) on cpu
  needs  float32
  do     s_aux = s_aux.float()""",
    ),
    "d_qk_of_q_is_larger": (
        right_call(q=torch.zeros(3, 4, 24)),
        """\
q and k must have the same last dimension.
  got    q.shape[2] = 24, k.shape[3] = 16
  do     q = q[..., :16]""",
    ),
    "d_qk_of_k_is_larger": (
        dense_call(q=torch.zeros(3, 4, 8)),
        """\
q and k must have the same last dimension.
  got    q.shape[2] = 8, k.shape[2] = 16""",
    ),
    "k_unlike_v": (
        right_call(v=torch.zeros(7, 4, 2, 8)),
        """\
k and v must agree in all dimensions but the last.
  got    k [6, 4, 2, 16], v [7, 4, 2, 8]""",
    ),
    "heads": (
        right_call(q=torch.zeros(3, 5, 16)),
        """\
num_q_heads must be a multiple of num_kv_heads.
  got    num_q_heads = 5 (q.shape[1]), num_kv_heads = 2 (k.shape[2])""",
    ),
    "no_heads": (
        right_call(k=torch.zeros(6, 4, 0, 16), v=torch.zeros(6, 4, 0, 8)),
        """\
num_q_heads must be a multiple of num_kv_heads.
  got    num_q_heads = 4 (q.shape[1]), num_kv_heads = 0 (k.shape[2])""",
    ),
    "d_qk_is_too_large": (
        right_call(q=torch.zeros(3, 4, 577), k=torch.zeros(6, 4, 2, 577)),
        """\
d_qk must be between 1 and 576.
  got    d_qk = 577""",
    ),
    "d_v_is_0": (
        right_call(v=torch.zeros(6, 4, 2, 0)),
        """\
d_v must be between 1 and 576.
  got    d_v = 0""",
    ),
    "shape_of_q_v": (
        right_call(q_v=torch.zeros(3, 4, 16)),
        """\
q_v must be [total_q, num_q_heads, d_v].
  got    float32 [3, 4, 16] strides (64, 16, 1) on cpu
  needs  [3, 4, 8]""",
    ),
    "shape_of_out": (
        right_call(out=torch.zeros(3, 4, 16)),
        """\
out must be [total_q, num_q_heads, d_v].
  got    float32 [3, 4, 16] strides (64, 16, 1) on cpu
  needs  [3, 4, 8]
  do     out = torch.empty([3, 4, 8], dtype=q.dtype, device=q.device)""",
    ),
    "out_expanded": (
        right_call(out=torch.zeros(3, 1, 8).expand(3, 4, 8)),
        """\
out must not be expanded: each of its elements is written once.
  got    float32 [3, 4, 8] strides (8, 0, 1) on cpu
  needs  no stride of 0 on a dimension of size above 1""",
    ),
    "out_overlaps_itself": (
        right_call(out=torch.zeros(200).as_strided((3, 4, 8), (32, 4, 1))),
        """\
out must not overlap itself: each of its elements is written once.
  got    float32 [3, 4, 8] strides (32, 4, 1) on cpu
  needs  strides that give each element an address of its own""",
    ),
    "no_batch": (
        dense_call(cu_seqlens_q=ints(), cu_seqlens_k=ints()),
        """\
cu_seqlens_q must have batch + 1 entries.
  got    int32 [0] strides (1,) on cpu
  needs  [batch + 1]""",
    ),
    "table_and_cu_seqlens_k": (
        right_call(cu_seqlens_k=ints(0, 5, 13)),
        """\
cu_seqlens_k and block_table exclude each other.
  got    block_table int32 [2, 3] strides (3, 1) on cpu
  needs  seqused_k for a paged cache, cu_seqlens_k without a block_table
  do     cu_seqlens_k=None, seqused_k=cu_seqlens_k.diff()""",
    ),
    "no_lengths": (
        right_call(seqused_k=None),
        """\
a paged cache needs seqused_k, the tokens in the cache of each sequence.
  got    seqused_k = None
  needs  int32 [2]""",
    ),
    "rows_of_the_table": (
        right_call(block_table=torch.zeros(3, 2, dtype=torch.int32)),
        """\
block_table must have a row for each sequence.
  got    int32 [3, 2] strides (2, 1) on cpu
  needs  [2, max_blocks]     (batch = cu_seqlens_q.shape[0] - 1 = 2)""",
    ),
    "block_size": (
        right_call(k=torch.zeros(6, 0, 2, 16), v=torch.zeros(6, 0, 2, 8)),
        """\
block_size must be at least 1 token.
  got    k [6, 0, 2, 16]""",
    ),
    "no_ranges": (
        dense_call(cu_seqlens_k=None),
        """\
cu_seqlens_k is needed when there is no block_table.
  got    cu_seqlens_k = None, block_table = None
  needs  int32 [3]""",
    ),
    "entries_of_seqused_k": (
        right_call(seqused_k=ints(5, 8, 9)),
        """\
seqused_k must have batch entries.
  got    int32 [3] strides (1,) on cpu
  needs  [2]     (batch = cu_seqlens_q.shape[0] - 1 = 2)""",
    ),
    "entries_of_cu_seqlens_k": (
        dense_call(cu_seqlens_k=ints(0, 13)),
        """\
cu_seqlens_k must have batch + 1 entries.
  got    int32 [2] strides (1,) on cpu
  needs  [3]     (batch = cu_seqlens_q.shape[0] - 1 = 2)""",
    ),
    "entries_of_sinks": (
        right_call(s_aux=torch.zeros(2)),
        """\
s_aux must have one logit for each query head.
  got    float32 [2] strides (1,) on cpu
  needs  [4]""",
    ),
    "sinks_on_ranks": (
        right_call(s_aux=torch.zeros(4), cp_world_size=2, cp_tot_seqused_k=ints(10, 16)),
        """\
s_aux cannot be split over ranks: a sink belongs to the merged row.
  got    s_aux float32 [4] strides (1,) on cpu, cp_world_size = 2
  needs  s_aux = None in each rank's call
  do     out, lse = anystride.merge.merge(outs, lses, s_aux=s_aux)""",
    ),
    "entries_of_slopes": (
        right_call(alibi_slopes=torch.zeros(4, 2)),
        """\
alibi_slopes must be [num_q_heads] or [batch, num_q_heads].
  got    float32 [4, 2] strides (2, 1) on cpu
  needs  [4] or [2, 4]""",
    ),
    "entries_of_a_descale": (
        right_call(v_descale=torch.zeros(2, 4)),
        """\
v_descale must be a scalar or [batch, num_kv_heads].
  got    float32 [2, 4] strides (4, 1) on cpu
  needs  [] or [2, 2]
  do     v_descale = v_descale.expand(2, 2)""",
    ),
    "dims_of_a_scale_cache": (
        fp8_call(k_scale_cache=torch.ones(6, 4)),
        """\
k_scale_cache must have 3 or 4 dimensions.
  got    float32 [6, 4] strides (4, 1) on cpu
  needs  the dimensions of its cache but the last: [num_blocks, block_size, num_kv_heads] or """
        "[num_pages, blocks_per_page, block_size, num_kv_heads]",
    ),
    "dtype_of_a_scale_cache": (
        fp8_call(v_scale_cache=half(6, 4, 2)),
        """\
v_scale_cache must be float32.
  got    float16 [6, 4, 2] strides (8, 2, 1) on cpu
  needs  float32""",
    ),
    "device_of_a_scale_cache": (
        fp8_call(k_scale_cache=torch.ones(6, 4, 2, device="meta")),
        """\
k_scale_cache must be on the device of q.
  got    float32 [6, 4, 2] strides (8, 2, 1) on meta
  needs  cpu""",
    ),
    "scale_cache_of_no_fp8_cache": (
        right_call(v_scale_cache=torch.ones(6, 4, 2)),
        """\
v_scale_cache must belong to an fp8 cache.
  got    v is float32
  needs  float8_e4m3fn or float8_e5m2
  do     v_scale_cache=None""",
    ),
    "blocks_of_a_scale_cache": (
        fp8_call(k_scale_cache=torch.ones(7, 4, 2)),
        """\
k_scale_cache must have a scale for each token and KV head of k.
  got    float32 [7, 4, 2] strides (8, 2, 1) on cpu
  needs  [6, 4, 2]""",
    ),
    "groups_of_several_heads": (
        fp8_call(k_scale_cache=torch.ones(6, 4, 4)),
        """\
k_scale_cache must have a scale for each token and KV head of k.
  got    float32 [6, 4, 4] strides (16, 4, 1) on cpu
  needs  [6, 4, 2]""",
    ),
    "groups_that_do_not_divide_the_row": (
        fp8_call(1, v_scale_cache=torch.ones(6, 4, 3)),
        """\
v_scale_cache must have a scale for each token and KV head of v.
  got    float32 [6, 4, 3] strides (12, 3, 1) on cpu
  needs  [6, 4, 1], or with a divisor of 8 in place of the 1""",
    ),
    "metadata_of_another_kind": (
        right_call(scheduler_metadata=ints(1, 2, 3)),
        """\
scheduler_metadata must come from get_scheduler_metadata.
  got    int32 [3] strides (1,) on cpu
  needs  int32 [8 * (num_parts + 1)], stride 1
  do     scheduler_metadata = anystride.get_scheduler_metadata(...)""",
    ),
    "window": (
        right_call(window_size=(-2, 4)),
        """\
window_size must be (left, right), in tokens, -1 for unbounded.
  got    window_size = (-2, 4)""",
    ),
    "window_of_one_number": (
        right_call(window_size=(4,)),
        """\
window_size must be (left, right), in tokens, -1 for unbounded.
  got    window_size = (4,)""",
    ),
    "softcap": (
        right_call(softcap=-2.5),
        """\
softcap must not be negative.
  got    softcap = -2.5""",
    ),
    "num_splits": (
        right_call(num_splits=-3),
        """\
num_splits must not be negative.
  got    num_splits = -3
  needs  0 to let the library choose, 1 or more to fix the number""",
    ),
    "two_kinds_of_splits": (
        right_call(num_splits=3, batch_invariant=True),
        """\
batch_invariant fixes the size of a split, num_splits their number: give one of them.
  got    batch_invariant = True, num_splits = 3
  do     num_splits=0""",
    ),
    "rank": (
        right_call(cp_world_size=2, cp_rank=2, cp_tot_seqused_k=ints(10, 16)),
        """\
cp_rank must be below cp_world_size, and cp_interleave at least 1.
  got    cp_world_size = 2, cp_rank = 2, cp_interleave = 1""",
    ),
    "interleave": (
        right_call(cp_world_size=2, cp_interleave=0, cp_tot_seqused_k=ints(10, 16)),
        """\
cp_rank must be below cp_world_size, and cp_interleave at least 1.
  got    cp_world_size = 2, cp_rank = 0, cp_interleave = 0""",
    ),
    "no_lengths_over_ranks": (
        right_call(cp_world_size=2),
        """\
context parallelism needs cp_tot_seqused_k, the lengths over all ranks.
  got    cp_world_size = 2, cp_tot_seqused_k = None
  needs  int32 [2]""",
    ),
    "dropout": (
        right_call(dropout_p=0.25),
        """\
dropout_p must be 0: attention over a cache is inference.
  got    dropout_p = 0.25
  do     dropout_p=0.0""",
    ),
    "probabilities": (
        right_call(return_attn_probs=True),
        """\
return_attn_probs is not possible: probabilities are never formed in memory.
  got    return_attn_probs = True
  do     return_softmax_lse=True      (p = exp(s - lse))""",
    ),
    "backend": (
        right_call(backend="cuda"),
        """\
backend names no back end.
  got    backend = 'cuda'
  needs  one of ('hopper', 'triton', 'cpu', 'reference') or None""",
    ),
}  # fmt: skip


def schedule_call(**change: Any) -> dict[str, Any]:
    arguments = {
        "batch_size": 2, "max_seqlen_q": 1, "max_seqlen_k": 8, "num_heads_q": 4, "num_heads_kv": 2,
        "headdim": 16, "cache_seqlens": ints(5, 8),
    }  # fmt: skip
    return arguments | change


SCHEDULE_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "new_keys": (
        schedule_call(cu_seqlens_k_new=ints(0, 1, 2)),
        """\
cu_seqlens_k_new has no meaning here: the cache holds the new tokens already.
  got    cu_seqlens_k_new was given
  do     cu_seqlens_k_new=None""",
    ),
    "left_padding": (
        schedule_call(cache_leftpad=ints(0, 1)),
        """\
cache_leftpad has no meaning here: the cache holds the new tokens already.
  got    cache_leftpad was given
  do     cache_leftpad=None""",
    ),
    "new_keys_at_most": (
        schedule_call(max_seqlen_k_new=4),
        """\
max_seqlen_k_new has no meaning here: the cache holds the new tokens already.
  got    max_seqlen_k_new was given
  do     max_seqlen_k_new=0""",
    ),
    "lengths": (
        schedule_call(cache_seqlens=torch.zeros(3, dtype=torch.int64)),
        """\
cache_seqlens must be int32 of shape [batch].
  got    torch.int64 [3]
  needs  int32 [2]
  do     cache_seqlens = cache_seqlens.to(torch.int32)""",
    ),
}


def test_the_calls_that_are_changed_are_right() -> None:
    for arguments in (
        right_call(),
        dense_call(),
        fp8_call(k_scale_cache=torch.ones(6, 4, 2)),
        fp8_call(1, k_scale_cache=torch.ones(6, 4, 16), v_scale_cache=torch.ones(1).expand(6, 4, 2)),
    ):
        out = flash_attn_varlen_func(**arguments, backend="reference")
        assert isinstance(out, Tensor)
        assert out.shape == (3, 4, 8)
    get_scheduler_metadata(**schedule_call())


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_says_what_was_got_what_is_needed_and_what_to_do(name: str) -> None:
    arguments, message = FAULTS[name]
    error = caught(arguments)
    assert str(error) == f"flash_attn_varlen_func: {message}"
    assert [fault.what for fault in error.faults] == [message.splitlines()[0]]


@pytest.mark.parametrize("name", SCHEDULE_FAULTS)
def test_each_fault_of_a_schedule(name: str) -> None:
    arguments, message = SCHEDULE_FAULTS[name]
    assert str(caught(arguments, get_scheduler_metadata)) == f"get_scheduler_metadata: {message}"


@pytest.mark.parametrize("name", FAULTS)
def test_explain_refuses_a_wrong_call_with_the_same_words(name: str) -> None:
    arguments, message = FAULTS[name]
    assert str(caught(arguments, explain)) == f"flash_attn_varlen_func: {message}"


def sentences(module: Any) -> dict[str, str]:
    """Every sentence that the module can put into a fault, as a regular expression, and its source."""
    tree, found = ast.parse(inspect.getsource(module)), {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        place = {"need": 1, "Fault": 0}.get(name)
        if place is None:
            continue
        what = node.args[place]
        if isinstance(what, ast.Name) and what.id == "what":
            continue  # _Faults.need passes on what it was given; api.py builds one a line above
        parts = what.values if isinstance(what, ast.JoinedStr) else [what]
        pattern = "".join(
            re.escape(str(part.value)) if isinstance(part, ast.Constant) else ".+" for part in parts
        )
        found[pattern] = ast.unparse(what)
    return found


@pytest.mark.parametrize("module", [problem_module, plan_module, api_module], ids=lambda m: m.__name__)
def test_no_fault_is_without_a_test(module: Any) -> None:
    tested = [message.splitlines()[0] for _, message in (FAULTS | SCHEDULE_FAULTS).values()]
    known = sentences(module)
    assert known, "found no sentence at all: the way in which faults are written has changed"
    untested = [
        source for pattern, source in known.items() if not any(re.fullmatch(pattern, one) for one in tested)
    ]
    assert untested == []


# Each argument that may be a tensor, and something that is none.
TENSORS = (
    "q", "k", "v", "q_v", "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "block_table", "alibi_slopes", "s_aux",
    "k_scale_cache", "v_scale_cache", "cp_tot_seqused_k", "scheduler_metadata", "out",
)  # fmt: skip


@pytest.mark.parametrize("wrong", [[1, 2], "text", 3, 2.5], ids=repr)
@pytest.mark.parametrize("name", TENSORS)
def test_what_must_be_a_tensor_and_is_none_is_said_so(name: str, wrong: object) -> None:
    arguments = dense_call() if name == "cu_seqlens_k" else right_call()
    error = caught(arguments | {name: wrong})
    assert str(error).startswith(f"flash_attn_varlen_func: {name} must be a tensor.\n")
    assert error.faults[0].got == type(wrong).__name__


@pytest.mark.parametrize("name", ["q", "k", "v", "cu_seqlens_q"])
def test_what_must_be_given_and_is_none_is_said_so(name: str) -> None:
    error = caught(right_call(**{name: None}))
    assert str(error).splitlines()[0] == f"flash_attn_varlen_func: {name} must be a tensor."


@pytest.mark.parametrize("name", ["q_descale", "k_descale", "v_descale"])
def test_a_descale_may_be_a_number_but_no_text(name: str) -> None:
    error = caught(right_call(**{name: "1.0"}))
    assert str(error).splitlines()[0] == f"flash_attn_varlen_func: {name} must be a tensor."


@pytest.mark.parametrize("strides", [(1, 1, 1), (8, 8, 1), (32, 4, 1), (32, 8, 4)])
def test_an_out_whose_elements_share_memory_is_refused(strides: tuple[int, int, int]) -> None:
    out = torch.zeros(200).as_strided((3, 4, 8), strides)
    error = caught(right_call(out=out))
    assert str(strides) in error.faults[0].got


def test_all_faults_are_listed_in_the_order_of_the_checks() -> None:
    error = caught(right_call(q=torch.zeros(3, 5, 24), softcap=-1.0, num_splits=-1, seqused_k=ints(1)))
    assert (
        str(error)
        == """\
flash_attn_varlen_func: q and k must have the same last dimension.
  got    q.shape[2] = 24, k.shape[3] = 16
  do     q = q[..., :16]
also: num_q_heads must be a multiple of num_kv_heads.
  got    num_q_heads = 5 (q.shape[1]), num_kv_heads = 2 (k.shape[2])
also: seqused_k must have batch entries.
  got    int32 [1] strides (1,) on cpu
  needs  [2]     (batch = cu_seqlens_q.shape[0] - 1 = 2)
also: softcap must not be negative.
  got    softcap = -1.0
also: num_splits must not be negative.
  got    num_splits = -1
  needs  0 to let the library choose, 1 or more to fix the number"""
    )
    assert len(error.faults) == 5
    assert error.faults[3] == Fault("softcap must not be negative.", "softcap = -1.0")


def test_all_that_is_wrong_with_both_scale_caches_is_said() -> None:
    scales = torch.ones(6, 4, 3)
    error = caught(right_call(k_scale_cache=scales, v_scale_cache=scales))
    assert [(fault.what.split()[0], fault.what.split()[2]) for fault in error.faults] == [
        ("k_scale_cache", "belong"), ("k_scale_cache", "have"),
        ("v_scale_cache", "belong"), ("v_scale_cache", "have"),
    ]  # fmt: skip


def test_dropout_and_probabilities_are_refused_together() -> None:
    error = caught(right_call(dropout_p=0.1, return_attn_probs=True))
    assert [fault.got for fault in error.faults] == ["dropout_p = 0.1", "return_attn_probs = True"]


def test_errors_are_caught_as_the_builtin_ones_and_as_ours() -> None:
    wrong: tuple[type[Exception], ...] = (ValueError, AnystrideError)
    for kind in wrong:
        with pytest.raises(kind, match="softcap"):
            flash_attn_varlen_func(**right_call(softcap=-1.0))
    unsupported: tuple[type[Exception], ...] = (NotImplementedError, AnystrideError)
    for kind in unsupported:
        with pytest.raises(kind, match="triton"):
            flash_attn_varlen_func(**right_call(backend="triton"))
    assert not issubclass(InvalidInputError, NotImplementedError)
    assert not issubclass(UnsupportedError, ValueError)


def test_a_back_end_that_was_asked_for_and_cannot_says_all_of_its_reasons() -> None:
    with pytest.raises(UnsupportedError) as caught_one:
        flash_attn_varlen_func(**right_call(backend="triton"))
    error, lines = caught_one.value, str(caught_one.value).splitlines()
    assert list(error.refusals) == ["triton"]
    assert error.refusals["triton"]
    assert lines[0] == (
        "flash_attn_varlen_func: backend 'triton' was asked for and refuses; nothing else was tried."
    )
    assert lines[1] == (
        "  call    q fp32 [3, 4, 16] strides (64, 16, 1), "
        "k fp32 [6, 1, 4, 2, 16] strides (128, 0, 32, 16, 1), "
        "v fp32 [6, 1, 4, 2, 8] strides (64, 0, 16, 8, 1), cpu"
    )
    assert lines[2] == f"  triton  {error.refusals['triton'][0]}"
    assert lines[-1] == "  do      backend=None would run this on 'cpu'"
    assert len(lines) == 3 + len(error.refusals["triton"])


def test_when_nobody_can_every_back_end_says_why() -> None:
    # Tensors of shapes only: wrong nowhere, and run by nobody.
    arguments: dict[str, Any] = {
        name: value.to("meta") if isinstance(value, Tensor) else value for name, value in right_call().items()
    }
    with pytest.raises(UnsupportedError) as caught_one:
        flash_attn_varlen_func(**arguments)
    error, lines = caught_one.value, str(caught_one.value).splitlines()
    assert list(error.refusals) == ["hopper", "triton", "cpu"]
    assert all(error.refusals.values())
    assert lines[0] == "flash_attn_varlen_func: no backend can run this call."
    assert lines[1].endswith(", meta")
    for name, reasons in error.refusals.items():
        assert f"  {name:<8}{reasons[0]}" in lines
    assert lines[-1] == "  do      move the tensors to a CPU or to a GPU that Triton supports"


def test_a_message_aligns_its_back_ends_and_their_reasons() -> None:
    refusals = {"cpu": ["one", "two"], "reference": ["three"]}
    assert (
        str(UnsupportedError("first line", "the call", refusals, "the way out"))
        == """\
first line
  call       the call
  cpu        one
             two
  reference  three
  do         the way out"""
    )


def test_a_wrong_call_fails_every_time_and_a_right_one_after_it_runs() -> None:
    # Faults are not remembered as plans.
    for _ in range(2):
        caught(right_call(softcap=-1.0))
    flash_attn_varlen_func(**right_call(), backend="reference")


def test_a_plan_for_tensors_on_the_device_is_none_for_tensors_elsewhere() -> None:
    flash_attn_varlen_func(**right_call(), backend="cpu")
    elsewhere = right_call(seqused_k=ints(5, 8).to("meta"), backend="cpu")
    assert caught(elsewhere).faults[0].what == "seqused_k must be on the device of q."


def test_no_message_names_an_argument_that_the_entry_does_not_have() -> None:
    known = set(inspect.signature(flash_attn_varlen_func).parameters) | {
        "num_q_heads", "num_kv_heads", "d_qk", "d_v", "block_size",
    }  # fmt: skip
    for _, message in FAULTS.values():
        first = message.split()[0]
        assert first in known | {"a", "context"}, first


def test_errors_are_public_and_documented() -> None:
    source = Path(inspect.getfile(anystride)).with_name("errors.py").read_text()
    for error in (AnystrideError, InvalidInputError, UnsupportedError):
        assert error.__doc__
        assert error.__name__ in anystride.__all__
        assert source.index(error.__name__) < source.index("from __future__")  # drawn in the tree
