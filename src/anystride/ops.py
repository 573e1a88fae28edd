"""The operators ``torch.ops.anystride.*``: what ``torch.compile``, ``make_fx`` and ``opcheck`` see.

Registered through a raw ``torch.library.Library``, which costs a third of ``custom_op``. Eager calls do not
come here: they go straight to their plan (docs/design/0006).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anystride import store_plan
from anystride.plan import execute, find_plan
from anystride.problem import Call, Numbers, bucket

__all__ = ["attention", "is_traced", "store_kv", "store_mla"]

_library = torch.library.Library("anystride", "DEF")
_library.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? q_v, Tensor cu_seqlens_q, Tensor? cu_seqlens_k, "
    "Tensor? seqused_k, Tensor? block_table, Tensor? alibi_slopes, Tensor? s_aux, Tensor? q_descale, "
    "Tensor? k_descale, Tensor? v_descale, Tensor? k_scale_cache, Tensor? v_scale_cache, "
    "Tensor? cp_tot_seqused_k, Tensor? scheduler_metadata, "
    "Tensor(a!) out, Tensor(b!)? lse, SymInt max_seqlen_q, SymInt max_keys, float? softmax_scale, "
    "bool causal, int window_left, int window_right, float softcap, int num_splits, "
    "bool deterministic, bool batch_invariant, int cp_world_size, int cp_rank, int cp_interleave, "
    "str? backend) -> ()",
    # Inductor must hand over the strides that the caller's views have.
    tags=(torch.Tag.needs_fixed_stride_order,),
)


def _attention(*args: object) -> None:
    """Run one call; the arguments are those of the schema, in its order."""
    tensors, rest = args[:19], args[19:]
    max_seqlen_q, max_keys, scale, causal, left, right, *numbers, backend = rest
    call = Call(*tensors)  # type: ignore[arg-type]
    packed = Numbers(  # type: ignore[call-arg]
        max_seqlen_q,  # type: ignore[arg-type]
        bucket(max_keys),  # type: ignore[arg-type]
        scale,  # type: ignore[arg-type]
        causal,  # type: ignore[arg-type]
        (left, right),  # type: ignore[arg-type]
        *numbers,  # type: ignore[arg-type]
        call.lse is not None,
    )
    execute(find_plan(call, packed, backend), call)  # type: ignore[arg-type]


def _attention_fake(*args: object) -> None:
    """The operator returns nothing: ``out`` and ``lse`` are given and have their shapes."""


_library.impl("attention", _attention, "CompositeExplicitAutograd")
torch.library.register_fake("anystride::attention", _attention_fake, lib=_library)


def is_traced(q: object) -> bool:
    """Whether somebody watches the call: a compiler, a dispatch mode, or a tensor subclass."""
    return (
        torch.compiler.is_compiling()
        or (type(q) is not Tensor and isinstance(q, Tensor))  # what is no tensor is left to the checks
        or torch._C._len_torch_dispatch_stack() > 0
    )


def attention(call: Call, numbers: Numbers, backend: str | None) -> None:
    """Call the operator; ``call.out`` is given, and ``call.lse`` if it is wanted."""
    tensors = [
        torch.full((), t, dtype=torch.float32, device=call.q.device) if isinstance(t, float | int) else t
        for t in call
    ]
    n = numbers
    torch.ops.anystride.attention(
        *tensors,
        n.max_seqlen_q,
        n.max_keys,
        n.softmax_scale,
        n.causal,
        *n.window,
        n.softcap,
        n.num_splits,
        n.deterministic,
        n.batch_invariant,
        n.cp_world_size,
        n.cp_rank,
        n.cp_interleave,
        backend,
    )


# The write side. Scales are either given, as a number or a tensor, or written.

_library.define(
    "store_kv(Tensor key, Tensor value, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping, "
    "float? k_number, float? v_number, Tensor? k_scale, Tensor? v_scale, "
    "Tensor(c!)? k_scale_cache, Tensor(d!)? v_scale_cache, str? backend) -> ()",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
_library.define(
    "store_mla(Tensor kv_c, Tensor k_pe, Tensor(a!) kv_cache, Tensor(b!)? rope_cache, Tensor slot_mapping, "
    "float? number, Tensor? scale, Tensor(c!)? scale_cache, str? backend) -> ()",
    tags=(torch.Tag.needs_fixed_stride_order,),
)


def _first(*scales: Any) -> Any:
    """The one that is given; None if none is."""
    return next((scale for scale in scales if scale is not None), None)


def _store_kv(
    key: Any, value: Any, k_cache: Any, v_cache: Any, slot_mapping: Any,
    k_number: Any, v_number: Any, k_scale: Any, v_scale: Any, k_scale_cache: Any, v_scale_cache: Any,
    backend: str | None,
) -> None:  # fmt: skip
    scales = _first(k_number, k_scale, k_scale_cache), _first(v_number, v_scale, v_scale_cache)
    store_plan.store_kv(key, value, k_cache, v_cache, slot_mapping, *scales, backend)


def _store_mla(
    kv_c: Any, k_pe: Any, kv_cache: Any, rope_cache: Any, slot_mapping: Any,
    number: Any, scale: Any, scale_cache: Any, backend: str | None,
) -> None:  # fmt: skip
    one = _first(number, scale, scale_cache)
    store_plan.store_mla(kv_c, k_pe, kv_cache, rope_cache, slot_mapping, one, backend)


_library.define(
    "copy_blocks(Tensor source, Tensor(a!) target, Tensor block_mapping, str? backend) -> ()",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
_library.define(
    "gather_blocks(Tensor source, Tensor block_ids, Tensor(a!) target, str? backend) -> ()",
    tags=(torch.Tag.needs_fixed_stride_order,),
)


def _copy_blocks(source: Any, target: Any, block_mapping: Any, backend: str | None) -> None:
    store_plan.copy_blocks("copy_blocks", source, target, block_mapping, 2, backend)


def _gather_blocks(source: Any, block_ids: Any, target: Any, backend: str | None) -> None:
    store_plan.copy_blocks("gather_blocks", source, target, block_ids, 1, backend)


def _store_fake(*args: object) -> None:
    """The operators return nothing."""


for _name, _function in (
    ("store_kv", _store_kv),
    ("store_mla", _store_mla),
    ("copy_blocks", _copy_blocks),
    ("gather_blocks", _gather_blocks),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"anystride::{_name}", _store_fake, lib=_library)


def _parted(scale: Any) -> tuple[float | None, Tensor | None, Tensor | None]:
    """A scale as a number, as a tensor that is given, or as one that is written: it has a place a row."""
    if not isinstance(scale, Tensor):
        return scale, None, None
    return (None, None, scale) if scale.dim() > 2 else (None, scale, None)


def store_kv(
    key: Any, value: Any, k_cache: Any, v_cache: Any, slot_mapping: Any, k_scale: Any, v_scale: Any,
    backend: str | None,
) -> None:  # fmt: skip
    """Call the operator."""
    k, v = _parted(k_scale), _parted(v_scale)
    pairs = (x for pair in zip(k, v, strict=True) for x in pair)
    torch.ops.anystride.store_kv(key, value, k_cache, v_cache, slot_mapping, *pairs, backend)


def store_mla(
    kv_c: Any, k_pe: Any, kv_cache: Any, rope_cache: Any, slot_mapping: Any, scale: Any, backend: str | None
) -> None:
    """Call the operator."""
    torch.ops.anystride.store_mla(kv_c, k_pe, kv_cache, rope_cache, slot_mapping, *_parted(scale), backend)
