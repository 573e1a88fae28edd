"""The operators ``torch.ops.anystride.*``: what ``torch.compile``, ``make_fx`` and ``opcheck`` see.

Registered through a raw ``torch.library.Library``, which costs a third of ``custom_op``. Eager calls do not
come here: they go straight to their plan (docs/design/0006).
"""

from __future__ import annotations

import torch

from anystride.plan import execute, find_plan
from anystride.problem import Call, Numbers, bucket

__all__ = ["attention"]

_library = torch.library.Library("anystride", "DEF")
_library.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? q_v, Tensor cu_seqlens_q, Tensor? cu_seqlens_k, "
    "Tensor? seqused_k, Tensor? block_table, Tensor? alibi_slopes, Tensor? s_aux, Tensor? q_descale, "
    "Tensor? k_descale, Tensor? v_descale, Tensor? cp_tot_seqused_k, Tensor? scheduler_metadata, "
    "Tensor(a!) out, Tensor(b!)? lse, SymInt max_seqlen_q, SymInt max_keys, float? softmax_scale, "
    "bool causal, int window_left, int window_right, float softcap, int num_splits, "
    "bool deterministic, bool batch_invariant, int cp_world_size, int cp_rank, int cp_interleave, "
    "str? backend) -> ()",
    # Inductor must hand over the strides that the caller's views have.
    tags=(torch.Tag.needs_fixed_stride_order,),
)


def _attention(*args: object) -> None:
    """Run one call; the arguments are those of the schema, in its order."""
    tensors, rest = args[:17], args[17:]
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
