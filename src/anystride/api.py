"""The public functions: one entry for every kind of paged attention, and what goes with it.

check -> plan -> run. A call's arguments are checked and its back end chosen once; later calls of the same
shapes find their plan by look-up. Nothing here reads a tensor's values, except ``explain``, which says so.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from anystride import ops
from anystride.errors import Fault, InvalidInputError
from anystride.explanation import Explanation, explain_call
from anystride.plan import execute, find_plan, make_metadata
from anystride.problem import OPERATION, Call, Numbers, bucket, shape_problem

__all__ = ["explain", "flash_attn_varlen_func", "get_scheduler_metadata", "warmup"]


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    max_seqlen_q: int,
    cu_seqlens_q: Tensor,
    max_seqlen_k: int,
    cu_seqlens_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    q_v: Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    return_softmax_lse: bool = False,
    out: Tensor | None = None,
    scheduler_metadata: Tensor | None = None,
    q_descale: Tensor | float | None = None,
    k_descale: Tensor | float | None = None,
    v_descale: Tensor | float | None = None,
    num_splits: int = 0,
    fa_version: int | None = None,
    s_aux: Tensor | None = None,
    cp_world_size: int = 1,
    cp_rank: int = 0,
    cp_tot_seqused_k: Tensor | None = None,
    *,
    cp_interleave: int = 1,
    batch_invariant: bool = False,
    k_scale_cache: Tensor | None = None,
    v_scale_cache: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of new query tokens over a KV cache of any strides, read in place.

    For query token ``i`` of the ``n`` of a sequence with ``sk`` keys, ``centre = sk - n + i``, over the keys
    ``j`` with ``centre - left <= j <= centre + right`` (causal: ``j <= centre``)::

        s_j = softmax_scale * (q_i . k_j + q_v_i . v_j)
        lse = log(sum_j exp(s_j) + exp(s_aux))          # natural log
        out = sum_j exp(s_j - lse) * v_j

    GQA, MQA and MHA are plain. MLA comes in two forms: ``k`` the whole row (576) and ``v`` its latent part
    (512), a view of the same memory; or the rope parts as ``q, k`` and the latent parts as ``q_v, v``. The
    bytes that K and V share are loaded once, as addresses and strides show.

    Args:
        q: ``[total_q, num_q_heads, d_qk]``, float16, bfloat16 or float32, any strides. The tokens of all
            sequences, one after the other.
        k: The cache of keys, dtype of ``q`` or float8_e4m3fn / float8_e5m2, read only. With ``block_table``:
            ``[num_blocks, block_size, num_kv_heads, d_qk]``, or 5-D
            ``[num_pages, blocks_per_page, block_size, num_kv_heads, d_qk]``, where block ``b`` is block
            ``b % blocks_per_page`` of page ``b // blocks_per_page``. Without:
            ``[total_k, num_kv_heads, d_qk]``.
            Any strides on every axis, 0 and overlaps included; addresses are 64-bit.
        v: The cache of values, as ``k`` with ``d_v`` for ``d_qk``; its strides are its own.
        max_seqlen_q: Upper bound on the query tokens of a sequence.
        cu_seqlens_q: ``[batch + 1]`` int32: where each sequence's query tokens begin in ``q``.
        max_seqlen_k: Upper bound on the keys of a sequence; need not be tight.
        cu_seqlens_k: ``[batch + 1]`` int32, without ``block_table`` only: where each sequence's keys begin.
        seqused_k: ``[batch]`` int32: keys of each sequence, new ones included; 0 is allowed.
        q_v: ``[total_q, num_q_heads, d_v]``, any strides: adds ``q_v . v`` to the scores.
        dropout_p: Refused unless 0: this is inference.
        softmax_scale: Default ``(d_qk + d_v if q_v) ** -0.5``, as upstream FlashAttention-3. vLLM's wrapper
            leaves ``d_v`` out of its default, and its back ends always pass the scale. MLA models need their
            own: the dimension before absorption, ``(128 + 64) ** -0.5`` for DeepSeek.
        causal: Mask keys after the query's own position, aligned to the bottom right.
        window_size: ``(left, right)`` in tokens, inclusive, -1 for unbounded, same alignment.
        softcap: ``softcap * tanh(s / softcap)`` on the scaled scores; 0 for none.
        alibi_slopes: ``[num_q_heads]`` or ``[batch, num_q_heads]``: subtracts ``slope * |centre - j|``.
        deterministic: Accepted; every run of a plan gives the same bits anyway.
        return_attn_probs: Refused: probabilities are never formed in memory.
        block_table: ``[batch, max_blocks]`` int32, any strides. Entry ``[b, i]`` is the block of the tokens
            from ``i * block_size`` on. Entries past a sequence's length may hold anything.
        return_softmax_lse: Also return ``lse``.
        out: ``[total_q, num_q_heads, d_v]`` in the dtype of ``q``, any strides that do not overlap:
            written in place and returned. Must not overlap the cache.
        scheduler_metadata: From :func:`get_scheduler_metadata`, for the same lengths.
        q_descale, k_descale, v_descale: float, 0-D float32 tensor, or float32 ``[batch, num_kv_heads]``
            of any strides: factors of the stored values.
        k_scale_cache: float32 scales of the rows of an fp8 ``k``, beside the cache or inside its rows, as
            :func:`anystride.cache.store_kv` and ``store_mla`` write them: factors of the stored values, next
            to ``k_descale``. The shape of ``k`` without its last dimension, ``[num_blocks, block_size,
            num_kv_heads]``, ``[num_pages, blocks_per_page, block_size, num_kv_heads]`` or ``[total_k,
            num_kv_heads]``: one for each token and head. With one head the last dimension may be any divisor
            of ``d_qk``: as many groups of neighbouring dimensions have a scale each. Any strides, 0 included.
        v_scale_cache: The same of an fp8 ``v``; in the ``q_v`` form it scales the scores with ``q_v``, too.
            Where V lies in K's row, its scales say what it is as V, those of K what it is as K.
        num_splits: 0: work is split over the processors by length. ``n``: each sequence in ``n`` shares.
        fa_version: Accepted for the signature's sake; there is one version here.
        s_aux: ``[num_q_heads]``, any float dtype: sinks, one more logit in the denominator and the lse.
        cp_world_size, cp_rank, cp_tot_seqused_k, cp_interleave: Decode context parallelism: token ``p`` lives
            on rank ``(p // cp_interleave) % cp_world_size``; ``seqused_k`` counts this rank's tokens,
            ``cp_tot_seqused_k`` ``[batch]`` int32 all of them. Merge with :func:`anystride.merge.merge`.
        batch_invariant: The bits of a sequence do not depend on its neighbours: splits have a fixed size.
        backend: None picks the first that can; ``hopper``, ``triton``, ``cpu`` or ``reference`` is
            obeyed or refused.

    Returns:
        ``out`` ``[total_q, num_q_heads, d_v]`` in the dtype of ``q``; with ``return_softmax_lse`` also
        ``lse`` ``[num_q_heads, total_q]`` float32. A row that sees no key has out 0 and lse -inf. Rows of
        ``q`` past ``cu_seqlens_q[-1]`` are left unwritten.

    Raises:
        InvalidInputError: The call breaks the contract above, on whatever device.
        UnsupportedError: The call is valid, but no back end here, or not the one asked for, can run it.

    Notes:
        Never copies the cache, never synchronises, never reads a value on the host (``cpu`` and
        ``reference`` read lengths and tables, being the host). Safe to capture in a CUDA graph and to
        replay with other lengths and tables. Inference only: no gradient is recorded.

    Source: FlashAttention-2, https://arxiv.org/abs/2307.08691; MLA: DeepSeek-V2,
    https://arxiv.org/abs/2405.04434, section 2.1.
    """
    if dropout_p != 0.0 or return_attn_probs:
        _refuse(dropout_p, return_attn_probs)
    # fmt: off
    tensors = (
        q, k, v, q_v, cu_seqlens_q, cu_seqlens_k, seqused_k, block_table, alibi_slopes, s_aux,
        q_descale, k_descale, v_descale, k_scale_cache, v_scale_cache, cp_tot_seqused_k, scheduler_metadata,
        out, None,
    )
    traced = ops.is_traced(q)
    numbers = (
        max_seqlen_q, max_seqlen_k if traced else bucket(max_seqlen_k), softmax_scale, causal,
        (-1, -1) if window_size is None else tuple(window_size),
        softcap, num_splits, deterministic, batch_invariant, cp_world_size, cp_rank, cp_interleave,
        return_softmax_lse,
    )
    # fmt: on
    if traced:
        call = _through_operator(Call(*tensors), Numbers(*numbers), backend)  # type: ignore[arg-type]
    else:
        call = execute(find_plan(tensors, numbers, backend), tensors)
    if return_softmax_lse:
        assert call.lse is not None  # it was asked for, so it was allocated
        return call.out, call.lse
    return call.out


def _through_operator(call: Call, numbers: Numbers, backend: str | None) -> Call:
    """Allocate the results where the tracer sees it, then call the operator."""
    q = call.q
    if call.out is None:
        call = call._replace(out=q.new_empty((q.shape[0], q.shape[1], call.v.shape[-1])))
    if numbers.wants_lse:
        lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
        call = call._replace(lse=lse)
    ops.attention(call, numbers, backend)
    return call


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    max_seqlen_q: int,
    cu_seqlens_q: Tensor,
    max_seqlen_k: int,
    **options: Any,
) -> Explanation:
    """Tell who would run a call and how, who refuses and why, and what it must move.

    Takes the arguments of :func:`flash_attn_varlen_func` and runs nothing of it. Reads the lengths and times
    a copy once a device, so it synchronises: for a person, not for a hot path.

    Returns:
        An :class:`~anystride.explanation.Explanation`; ``print`` it.

    Raises:
        InvalidInputError: The call is wrong. A call that nobody can run is explained, not raised.
    """
    arguments = inspect.signature(flash_attn_varlen_func).bind(
        q, k, v, max_seqlen_q, cu_seqlens_q, max_seqlen_k, **options
    )
    arguments.apply_defaults()
    a = arguments.arguments
    if a["dropout_p"] != 0.0 or a["return_attn_probs"]:
        _refuse(a["dropout_p"], a["return_attn_probs"])
    tensors = {name: a[name] for name in Call._fields if name != "lse"}
    window = (-1, -1) if a["window_size"] is None else tuple(a["window_size"])
    plain = {name: a[name] for name in Numbers._fields if name in a}
    numbers = Numbers(
        max_keys=bucket(max_seqlen_k),
        window=window,
        wants_lse=a["return_softmax_lse"],
        **plain,
    )
    return explain_call(Call(**tensors, lse=None), numbers, a["backend"])


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: Tensor,
    qkv_dtype: torch.dtype = torch.bfloat16,
    headdim_v: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> Tensor:
    """Share out the work of a step, on the device, once for all of its layers.

    The signature is that of FlashAttention-3 in vLLM. Pass the result as ``scheduler_metadata`` to every call
    of the step that has these shapes, lengths, causality and window, one call after the other: it holds
    counters, and two calls at the same time, on two streams, need one each. In a CUDA graph, capture it too,
    or copy a new one into the captured tensor before a replay.

    Args:
        batch_size: Sequences.
        max_seqlen_q: Upper bound on the query tokens of a sequence, as in the calls.
        max_seqlen_k: Upper bound on the keys of a sequence.
        num_heads_q, num_heads_kv: Heads.
        headdim: ``d_qk``; in the ``q_v`` form of MLA the rope part's width.
        cache_seqlens: ``[batch]`` int32: what the calls get as ``seqused_k``.
        qkv_dtype: dtype of ``q``.
        headdim_v: ``d_v``, default ``headdim``.
        cu_seqlens_q: ``[batch + 1]`` int32; None where every sequence has ``max_seqlen_q`` query tokens.
        cu_seqlens_k_new, cache_leftpad, max_seqlen_k_new: Refused unless empty: the cache holds the new
            tokens already, and sequences begin at their first block.
        page_size, has_softcap, pack_gqa, num_splits: Accepted; they change nothing in a schedule. A call
            with ``num_splits`` above 0 needs none and ignores it.
        causal, window_size: As in the calls; under context parallelism without a window, as shards are
            visited whole.
        sm_margin: Processors to leave free.

    Returns:
        int32 ``[16 * (parts + 1)]`` on the device of ``cache_seqlens``; its length depends on shapes only. On
        a CPU, where nothing is scheduled, a header of zeros.

    Raises:
        InvalidInputError: For arguments that have no meaning here.
    """
    faults = []
    for name, value, empty in (
        ("cu_seqlens_k_new", cu_seqlens_k_new, None),
        ("cache_leftpad", cache_leftpad, None),
        ("max_seqlen_k_new", max_seqlen_k_new, 0),
    ):
        if value is not empty and value != empty:
            what = f"{name} has no meaning here: the cache holds the new tokens already."
            faults.append(Fault(what, f"{name} was given", do=f"{name}={empty}"))
    if cache_seqlens.dtype != torch.int32 or list(cache_seqlens.shape) != [batch_size]:
        faults.append(
            Fault(
                "cache_seqlens must be int32 of shape [batch].",
                f"{cache_seqlens.dtype} {list(cache_seqlens.shape)}",
                f"int32 [{batch_size}]",
                "cache_seqlens = cache_seqlens.to(torch.int32)",
            )
        )
    if faults:
        raise InvalidInputError("get_scheduler_metadata", faults)
    device = cache_seqlens.device
    problem = shape_problem(
        device,
        qkv_dtype,
        batch_size,
        max_seqlen_q,
        max_seqlen_k,
        num_heads_q,
        num_heads_kv,
        headdim,
        headdim if headdim_v is None else headdim_v,
        causal,
        tuple(window_size),  # type: ignore[arg-type]
    )
    return make_metadata(problem, cu_seqlens_q, cache_seqlens, sm_margin)


def warmup(
    k: Tensor,
    v: Tensor,
    num_q_heads: int,
    *,
    max_batch: int = 1024,
    max_seqlen_q: Sequence[int] = (1,),
    max_seqlen_k: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    q_v: bool = False,
    **options: Any,
) -> None:
    """Compile what calls over this cache will need, before the first request.

    Runs calls whose sequences are all empty: nothing of the cache is read. Covers every bucket of batch sizes
    up to ``max_batch``, with and without ``lse`` and ``scheduler_metadata``; lengths, table widths and other
    strides of the same alignment compile nothing more.

    Args:
        k, v: The paged cache's views of one layer, as the calls will get them.
        num_q_heads: Query heads.
        max_batch: The largest batch.
        max_seqlen_q: Query lengths that will occur; each may select other tiles.
        max_seqlen_k: The longest sequence, default: what the cache can hold.
        dtype: dtype of ``q``.
        q_v: Whether calls use the ``q_v`` form.
        **options: What else the calls will pass: ``causal``, ``window_size``, ``softcap``, ``softmax_scale``,
            ``s_aux``, descales, scale caches, ``num_splits``, ``batch_invariant``, ``backend``.
    """
    device, d_qk, d_v = k.device, k.shape[-1], v.shape[-1]
    longest = max_seqlen_k or k[..., 0, 0].numel()
    for query_len in max_seqlen_q:
        for batch in sorted({1 << i for i in range(max_batch.bit_length())} | {max_batch}):
            q = torch.zeros(batch * query_len, num_q_heads, d_qk, dtype=dtype, device=device)
            latent = q.new_zeros(q.shape[0], num_q_heads, d_v) if q_v else None
            starts = torch.arange(batch + 1, dtype=torch.int32, device=device) * query_len
            empty = torch.zeros(batch, dtype=torch.int32, device=device)
            table = torch.zeros(batch, 1, dtype=torch.int32, device=device)
            # An upper bound far above the table's width: expand it, so that splits are as in real calls.
            table = table.expand(batch, max(1, -(-longest // k.shape[-3])))
            metadata = get_scheduler_metadata(
                batch, query_len, longest, num_q_heads, k.shape[-2], d_qk, empty, dtype, d_v, starts,
                causal=options.get("causal", False),
                window_size=options.get("window_size") or (-1, -1),
            )  # fmt: skip
            for lse in (False, True):
                for shared in (None, metadata):
                    flash_attn_varlen_func(
                        q, k, v, query_len, starts, longest, seqused_k=empty, block_table=table,
                        q_v=latent, return_softmax_lse=lse, scheduler_metadata=shared, **options,
                    )  # fmt: skip


def _refuse(dropout_p: float, return_attn_probs: bool) -> None:
    faults = []
    if dropout_p != 0.0:
        faults.append(
            Fault(
                "dropout_p must be 0: attention over a cache is inference.",
                f"dropout_p = {dropout_p}",
                do="dropout_p=0.0",
            )
        )
    if return_attn_probs:
        faults.append(
            Fault(
                "return_attn_probs is not possible: probabilities are never formed in memory.",
                "return_attn_probs = True",
                do="return_softmax_lse=True      (p = exp(s - lse))",
            )
        )
    raise InvalidInputError(OPERATION, faults)
