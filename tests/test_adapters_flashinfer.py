"""``anystride.adapters.flashinfer`` against what FlashInfer's two wrappers are documented to do."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from originals import (
    GQA_LAYOUTS,
    MLA_LAYOUTS,
    WHERE,
    assert_as_stated,
    assert_refused,
    gqa_inputs,
    mla_inputs,
    never_waits,
    one_sequence,
    page_lists,
    sequences,
)
from torch import Tensor

from anystride import InvalidInputError, flash_attn_varlen_func
from anystride.adapters.flashinfer import decode, mla
from anystride.testing import Inputs

SCALE = 0.19
Result = tuple[Tensor, Tensor]
CPU = ("cpu", False)
# What run returns hangs on an argument.
BatchMLAPagedAttentionWrapper: Any = mla.BatchMLAPagedAttentionWrapper
BatchDecodeWithPagedKVCacheWrapper: Any = decode.BatchDecodeWithPagedKVCacheWrapper


def workspace(device: str) -> Tensor:
    return torch.empty(16, dtype=torch.uint8, device=device)


def stated(
    inputs: Inputs, dtype: torch.dtype, scale: float = SCALE, base: float = 2.0, **more: Any
) -> Result:
    """Rows of all requests one after the other; lse by row and head, base 2, -inf for an empty request."""
    both = [
        one_sequence(inputs.kwargs["q"][rows], k, v, scale, dtype, **more) for rows, k, v in sequences(inputs)
    ]
    return torch.cat([out for out, _ in both]), torch.cat([lse for _, lse in both]) / math.log(base)


def starts(inputs: Inputs) -> Tensor:
    cu_seqlens_q: Tensor = inputs.kwargs["cu_seqlens_q"]
    return cu_seqlens_q


# ---- MLA --------------------------------------------------------------------------------------------


def plan_mla(wrapper: Any, inputs: Inputs, causal: bool = False, **more: Any) -> None:
    case = inputs.case
    indptr, indices, _ = (t.to(wrapper.device) for t in page_lists(inputs))
    ends = torch.cat([indptr, indptr[-1:]])  # longer than batch + 1, as engines pass it
    wrapper.plan(
        starts(inputs), ends, indices, inputs.kwargs["seqused_k"], case.num_q_heads, case.d_v,
        case.d_qk - case.d_v, case.block_size, causal, SCALE, case.torch_dtype, case.torch_kv_dtype, **more,
    )  # fmt: skip


def mla_arguments(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``q_nope, q_pe, ckv_cache, kpe_cache``: views of the rows."""
    q, rows, rank = inputs.kwargs["q"], inputs.kwargs["k"].squeeze(-2), inputs.case.d_v
    return q[..., :rank], q[..., rank:], rows[..., :rank], rows[..., rank:]


@pytest.mark.parametrize("layout", [*MLA_LAYOUTS, "M3b"])
@pytest.mark.parametrize("where", WHERE)
def test_mla_is_as_documented_in_every_layout(where: tuple[str, bool], layout: str) -> None:
    inputs = mla_inputs(where, layout, blocks_per_page=2 if layout == "M3b" else 1)
    wrapper = BatchMLAPagedAttentionWrapper(workspace(where[0]))
    plan_mla(wrapper, inputs)
    with never_waits(where[0]):
        out, lse = wrapper.run(*mla_arguments(inputs), return_lse=True)
        natural = wrapper.run(*mla_arguments(inputs), return_lse=True, return_lse_base_on_e=True)[1]
    assert_as_stated(lambda dtype: stated(inputs, dtype), out, lse, torch.bfloat16)
    assert_as_stated(lambda dtype: stated(inputs, dtype, base=math.e), out, natural, torch.bfloat16)
    assert (out[0] == 0).all()
    assert (lse[0] == float("-inf")).all()
    inputs.assert_untouched()


@pytest.mark.parametrize("layout", ["M7", "M9", "M10"])
@pytest.mark.parametrize("where", WHERE)
def test_latent_and_rope_part_may_be_two_tensors(where: tuple[str, bool], layout: str) -> None:
    changes = {"d_qk": 64, "d_v": 512} if where[1] else {"d_qk": 16, "d_v": 32}
    inputs = mla_inputs(where, layout, form="q_v", causal=True, q_lens=(2, 1, 3), **changes)
    given, case = inputs.kwargs, inputs.case
    wrapper = BatchMLAPagedAttentionWrapper(workspace(where[0]), backend="fa3")
    indptr, indices, _ = page_lists(inputs)  # on the host
    wrapper.plan(
        starts(inputs), indptr, indices, given["seqused_k"], case.num_q_heads, case.d_v, case.d_qk,
        case.block_size, True, SCALE, case.torch_dtype, case.torch_kv_dtype,
    )  # fmt: skip
    caches = given["v"].squeeze(-2), given["k"].squeeze(-2)
    out, lse = wrapper.run(given["q_v"], given["q"], *caches, return_lse=True)

    def both_parts(dtype: torch.dtype) -> Result:
        whole = torch.cat([given["q"], given["q_v"]], -1)
        results = [
            one_sequence(whole[rows], torch.cat([k, v], -1), v, SCALE, dtype, causal=True)
            for rows, k, v in sequences(inputs)
        ]
        return torch.cat([o for o, _ in results]), torch.cat([x for _, x in results]) / math.log(2)

    assert_as_stated(both_parts, out, lse, torch.bfloat16)


@pytest.mark.parametrize("where", WHERE[:2])
def test_mla_writes_what_it_is_given(where: tuple[str, bool]) -> None:
    inputs = mla_inputs(where, "M2")
    wrapper = BatchMLAPagedAttentionWrapper(workspace(where[0]))
    plan_mla(wrapper, inputs)
    expected = wrapper.run(*mla_arguments(inputs), return_lse=True)
    out, lse = torch.zeros_like(expected[0]), torch.zeros_like(expected[1])
    result = wrapper.run(*mla_arguments(inputs), out, lse, return_lse=True)
    assert result[0] is out
    assert result[1] is lse
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    assert torch.equal(wrapper.run(*mla_arguments(inputs)), out)


@pytest.mark.parametrize("where", WHERE[:2])
def test_without_a_rope_part_the_latent_one_is_k_and_v(where: tuple[str, bool]) -> None:
    inputs = mla_inputs(where, "M1", d_qk=32)
    wrapper = BatchMLAPagedAttentionWrapper(workspace(where[0]))
    plan_mla(wrapper, inputs)
    out, lse = wrapper.run(*mla_arguments(inputs), return_lse=True)
    assert_as_stated(lambda dtype: stated(inputs, dtype), out, lse, torch.bfloat16)


@pytest.mark.parametrize("where", WHERE[:2])
def test_scales_of_an_fp8_cache_count(where: tuple[str, bool]) -> None:
    inputs = mla_inputs(where, "M14", kv_dtype="float8_e4m3fn")
    wrapper = BatchMLAPagedAttentionWrapper(workspace(where[0]))
    plan_mla(wrapper, inputs)
    rank = inputs.case.d_v

    def scaled(dtype: torch.dtype) -> Result:
        results = []
        for rows, k, _ in sequences(inputs):
            latent, rope = 0.5 * k[..., :rank].to(dtype), 2.0 * k[..., rank:].to(dtype)
            k = torch.cat([latent, rope], -1)
            results.append(one_sequence(inputs.kwargs["q"][rows], k, latent, SCALE, dtype))
        return torch.cat([o for o, _ in results]), torch.cat([x for _, x in results]) / math.log(2)

    arguments = mla_arguments(inputs)
    out, lse = wrapper.run(*arguments, return_lse=True, ckv_scale=0.5, kpe_scale=2.0)
    assert_as_stated(scaled, out, lse, torch.bfloat16)
    # The same factor, written once for each token and each of two groups of dimensions.
    scales = torch.full((*arguments[2].shape[:-1], 2), 0.5, device=where[0])
    out, lse = wrapper.run(*arguments, return_lse=True, ckv_scale_arr=scales, kpe_scale=2.0)
    assert_as_stated(scaled, out, lse, torch.bfloat16)


def graph_mla(where: tuple[str, bool], room: int) -> tuple[Any, list[Tensor]]:
    sizes = (4, 4, room, 3)
    buffers = [torch.full((n,), -1, dtype=torch.int32, device=where[0]) for n in sizes]
    return BatchMLAPagedAttentionWrapper(workspace(where[0]), True, *buffers), buffers


@pytest.mark.parametrize("where", WHERE[:2])
def test_a_captured_run_replays_what_was_planned_last(where: tuple[str, bool]) -> None:
    device = where[0]
    short = mla_inputs(where, "M2", seqused_k=(1, 3, 2))
    long = mla_inputs(where, "M2", seqused_k=(33, 0, 40))
    wrapper, buffers = graph_mla(where, 3 * 5)
    # One cache and one query at one address: what a captured call reads.
    static = [torch.full_like(t, float("nan")) for t in mla_arguments(long)]
    out, lse = static[0].new_empty(3, 4, 32), static[0].new_empty(3, 4, dtype=torch.float32)

    def load(inputs: Inputs) -> None:
        for buffer, new in zip(static, mla_arguments(inputs), strict=True):
            buffer[: len(new)].copy_(new)

    def step() -> None:
        wrapper.run(*static, out, lse, return_lse=True)

    load(short)
    plan_mla(wrapper, short)
    if device == "cuda":
        step()  # compile
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        replay = graph.replay
    else:
        replay = step
    batch = wrapper._batch
    kept = [t.data_ptr() for t in (batch.table, batch.starts, batch.lengths, batch.schedule) if t is not None]
    for inputs in (short, long, short):
        load(inputs)
        plan_mla(wrapper, inputs)
        replay()
        assert_as_stated(partial(stated, inputs), out, lse, torch.bfloat16)
        indptr, indices, _ = page_lists(inputs)
        assert torch.equal(buffers[0].cpu(), starts(inputs).cpu())
        assert torch.equal(buffers[1].cpu(), indptr)
        assert torch.equal(buffers[2][: len(indices)].cpu(), indices)
        assert buffers[3].tolist() == list(inputs.lengths)
    now = [t.data_ptr() for t in (batch.table, batch.starts, batch.lengths, batch.schedule) if t is not None]
    assert now == kept
    assert len(kept) == 4


def test_a_step_that_a_captured_graph_cannot_read_is_told() -> None:
    wrapper, _ = graph_mla(CPU, 9)
    plan_mla(wrapper, mla_inputs(CPU, "M1", seqused_k=(1, 3, 2)))
    with pytest.raises(
        InvalidInputError, match="no request may have more pages than an equal share"
    ) as caught:
        plan_mla(wrapper, mla_inputs(CPU, "M1", seqused_k=(1, 33, 2)))
    assert "a buffer of 15 pages or more" in str(caught.value)
    with pytest.raises(
        InvalidInputError, match="no request may have more query tokens than at the first plan"
    ):
        plan_mla(wrapper, mla_inputs(CPU, "M1", seqused_k=(1, 3, 2), q_lens=(1, 2, 1)))
    with pytest.raises(InvalidInputError, match="the number of requests is that of the buffers"):
        plan_mla(wrapper, mla_inputs(CPU, "M1", seqused_k=(1, 3), q_lens=(1, 1)))
    with pytest.raises(InvalidInputError, match="use_cuda_graph needs qo_indptr, kv_indptr, kv_indices"):
        BatchMLAPagedAttentionWrapper(workspace("cpu"), True)


def test_run_needs_a_plan_for_its_dtype() -> None:
    inputs = mla_inputs(CPU, "M1")
    wrapper = BatchMLAPagedAttentionWrapper(workspace("cpu"))
    with pytest.raises(InvalidInputError, match="plan must be called before run"):
        wrapper.run(*mla_arguments(inputs))
    plan_mla(wrapper, mla_inputs(CPU, "M1", dtype="float16"))
    with pytest.raises(InvalidInputError, match="q must have the dtype of plan"):
        wrapper.run(*mla_arguments(inputs))


@pytest.mark.parametrize("name", mla.REFUSED)
def test_what_mla_has_no_counterpart_for_is_refused_by_name(name: str) -> None:
    inputs = mla_inputs(CPU, "M1")
    wrapper = BatchMLAPagedAttentionWrapper(workspace("cpu"))
    plan_mla(wrapper, inputs)
    calls: dict[str, Any] = {
        "backend": ("cutlass", lambda **more: BatchMLAPagedAttentionWrapper(workspace("cpu"), **more)),
        "use_profiler": (True, lambda **more: plan_mla(wrapper, inputs, **more)),
    }
    value, call = calls.get(name, (torch.ones(1), lambda **more: wrapper.run(*mla_arguments(inputs), **more)))
    assert_refused(mla.REFUSED, name, value, call)


# ---- Decode with K and V ----------------------------------------------------------------------------


def plan_decode(wrapper: Any, inputs: Inputs, **more: Any) -> None:
    case = inputs.case
    lists = (t.to(wrapper.device) for t in page_lists(inputs))
    wrapper.plan(
        *lists, case.num_q_heads, case.num_kv_heads, case.d_qk, case.block_size,
        **({"q_data_type": case.torch_dtype, "sm_scale": SCALE} | more),
    )  # fmt: skip


def one_tensor(inputs: Inputs, kv_layout: str) -> Tensor:
    """The whole cache, poison included, as ``[num_pages, 2, ...]`` in the middle of three layers."""
    k, v = inputs.kwargs["k"], inputs.kwargs["v"]
    if kv_layout == "HND":
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    layers: Tensor = k.new_full((k.shape[0], 3, 2, *k.shape[1:]), float("nan"))
    layers[:, 1, 0], layers[:, 1, 1] = k, v
    return layers[:, 1]


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize("layout", GQA_LAYOUTS)
@pytest.mark.parametrize("where", WHERE)
def test_decode_is_as_documented_in_every_layout(
    where: tuple[str, bool], layout: str, kv_layout: str
) -> None:
    inputs = gqa_inputs(where, layout)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace(where[0]), kv_layout)
    plan_decode(wrapper, inputs)
    q, k, v = (inputs.kwargs[name] for name in "qkv")
    if kv_layout == "HND":
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    with never_waits(where[0]):
        out, lse = wrapper.run(q, (k, v), return_lse=True)
    assert_as_stated(lambda dtype: stated(inputs, dtype), out, lse, torch.bfloat16)
    assert (out[0] == 0).all()
    assert (lse[0] == float("-inf")).all()
    out, lse = wrapper.run_return_lse(q, one_tensor(inputs, kv_layout))
    assert_as_stated(lambda dtype: stated(inputs, dtype), out, lse, torch.bfloat16)
    inputs.assert_untouched()


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
def test_pages_of_one_token_need_no_dimension(kv_layout: str) -> None:
    inputs = gqa_inputs(CPU, "G2", block_size=1)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace("cpu"), kv_layout)
    plan_decode(wrapper, inputs)
    q, k, v = (inputs.kwargs[name] for name in "qkv")
    pair = k.squeeze(1), v.squeeze(1)
    for cache in (pair, torch.stack(pair, 1)):
        out, lse = wrapper.run(q, cache, return_lse=True)
        assert_as_stated(lambda dtype: stated(inputs, dtype), out, lse, torch.bfloat16)


@pytest.mark.parametrize("where", WHERE[:2])
def test_windows_caps_defaults_and_several_query_tokens(where: tuple[str, bool]) -> None:
    inputs = gqa_inputs(where, "G6", seqused_k=(2, 9, 33), q_lens=(2, 2, 2), dtype="float16")
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace(where[0]))
    cache = inputs.kwargs["k"], inputs.kwargs["v"]
    # Several query tokens are causal; the scale is one over the root of the width; q is float16.
    plan_decode(wrapper, inputs, q_len_per_req=2, sm_scale=None, q_data_type="float16")
    out, lse = wrapper.run(inputs.kwargs["q"], cache, return_lse=True)
    width = inputs.case.d_qk**-0.5
    assert_as_stated(lambda d: stated(inputs, d, width, causal=True), out, lse, torch.float16)
    plan_decode(wrapper, inputs, q_len_per_req=2, window_left=4, logits_soft_cap=1.5)
    out, lse = wrapper.run(inputs.kwargs["q"], cache, return_lse=True, window_left=4)
    options = {"causal": True, "window_left": 4, "softcap": 1.5}
    assert_as_stated(lambda d: stated(inputs, d, **options), out, lse, torch.float16)


@pytest.mark.parametrize("where", WHERE[:2])
def test_scales_sinks_and_the_dtype_of_the_result(where: tuple[str, bool]) -> None:
    inputs = gqa_inputs(where, "G2", kv_dtype="float8_e4m3fn")
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace(where[0]), backend="trtllm-gen")
    plan_decode(wrapper, inputs, o_data_type=torch.float32)
    q, cache = inputs.kwargs["q"], (inputs.kwargs["k"], inputs.kwargs["v"])

    def scaled(dtype: torch.dtype) -> Result:
        out, lse = stated(inputs, dtype, SCALE * 0.5 * 2.0)
        sink = torch.full((), 0.25, dtype=dtype, device=out.device)
        natural = lse * math.log(2)
        whole = torch.logaddexp(natural, sink)
        seen = natural > float("-inf")
        weight = torch.where(seen, (natural - whole).exp(), 0)
        return 1.5 * out * weight[..., None], torch.where(seen, whole, natural) / math.log(2)

    sinks = torch.full((inputs.case.num_q_heads,), 0.25, device=where[0])
    scales = {"q_scale": 2.0, "k_scale": 0.5, "v_scale": 1.5}
    out, lse = wrapper.run(q, cache, **scales, sinks=sinks, return_lse=True)
    assert out.dtype == torch.float32
    right, plain = scaled(torch.float64), scaled(torch.bfloat16)
    assert_as_stated(lambda d: right if d == torch.float64 else plain, out.bfloat16(), lse, torch.bfloat16)
    given = torch.full_like(out, float("nan"))
    assert wrapper.run(q, cache, **scales, sinks=sinks, out=given) is given
    assert torch.equal(given, out)


@pytest.mark.parametrize(
    ("options", "passed_on"),
    [
        ({}, {"num_splits": 0}),
        ({"disable_split_kv": True}, {"num_splits": 1}),
        ({"fixed_split_size": 64}, {"batch_invariant": True}),
    ],
)
def test_promises_about_splits_are_passed_on(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], passed_on: dict[str, Any]
) -> None:
    # A CPU does not split, so that results cannot tell.
    inputs = gqa_inputs(CPU, "G2")
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace("cpu"))
    plan_decode(wrapper, inputs, **options)
    seen: dict[str, Any] = {}

    def watched(*args: Any, **more: Any) -> Any:
        seen.update(more)
        return flash_attn_varlen_func(*args, **more)

    monkeypatch.setattr(decode, "flash_attn_varlen_func", watched)
    wrapper.run(inputs.kwargs["q"], (inputs.kwargs["k"], inputs.kwargs["v"]))
    assert {name: seen[name] for name in ("num_splits", "batch_invariant") if name in seen} == passed_on


@pytest.mark.parametrize("options", [{"fixed_split_size": 64}, {"disable_split_kv": True}])
@pytest.mark.parametrize("where", WHERE[:2])
def test_asked_for_it_the_bits_of_a_request_do_not_depend_on_neighbours(
    where: tuple[str, bool], options: dict[str, Any]
) -> None:
    inputs = gqa_inputs(where, "G2")
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace(where[0]))
    cache = inputs.kwargs["k"], inputs.kwargs["v"]
    plan_decode(wrapper, inputs, **options)
    together = wrapper.run(inputs.kwargs["q"], cache)
    indptr, indices, last = page_lists(inputs)
    case = inputs.case
    wrapper.plan(
        indptr[2:] - indptr[2], indices[int(indptr[2]) :], last[2:], case.num_q_heads, case.num_kv_heads,
        case.d_qk, case.block_size, q_data_type=case.torch_dtype, sm_scale=SCALE, **options,
    )  # fmt: skip
    alone = wrapper.run(inputs.kwargs["q"][2:], cache)
    assert torch.equal(together[2:], alone)


@pytest.mark.parametrize("where", WHERE[:2])
def test_decode_keeps_its_addresses_for_a_graph(where: tuple[str, bool]) -> None:
    buffers = [torch.full((n,), -1, dtype=torch.int32, device=where[0]) for n in (4, 15, 3)]
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace(where[0]), "NHD", True, False, *buffers)
    assert wrapper.is_cuda_graph_enabled
    kept = set()
    for lengths in ((1, 3, 2), (33, 0, 40)):
        inputs = gqa_inputs(where, "G2", seqused_k=lengths)
        plan_decode(wrapper, inputs)
        out, lse = wrapper.run(inputs.kwargs["q"], (inputs.kwargs["k"], inputs.kwargs["v"]), return_lse=True)
        assert_as_stated(partial(stated, inputs), out, lse, torch.bfloat16)
        for buffer, given in zip(buffers, page_lists(inputs), strict=True):
            assert torch.equal(buffer[: len(given)].cpu(), given)
        batch = wrapper._batch
        kept.add(
            tuple(
                t.data_ptr()
                for t in (batch.table, batch.starts, batch.lengths, batch.schedule)
                if t is not None
            )
        )
    assert len(kept) == 1


@pytest.mark.parametrize("name", decode.REFUSED)
def test_what_decode_has_no_counterpart_for_is_refused_by_name(name: str) -> None:
    inputs = gqa_inputs(CPU, "G2")
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace("cpu"))
    plan_decode(wrapper, inputs)
    cache = inputs.kwargs["k"], inputs.kwargs["v"]
    calls: dict[str, Any] = {
        "jit_args": ([1], lambda **more: BatchDecodeWithPagedKVCacheWrapper(workspace("cpu"), **more)),
        "pos_encoding_mode": ("ROPE_LLAMA", lambda **more: plan_decode(wrapper, inputs, **more)),
        "args": ((1,), lambda args: wrapper.run(inputs.kwargs["q"], cache, *args)),
    }
    value, call = calls.get(name, (0.5, lambda **more: wrapper.run(inputs.kwargs["q"], cache, **more)))
    assert_refused(decode.REFUSED, name, value, call)


def test_what_differs_from_the_plan_is_told() -> None:
    inputs = gqa_inputs(CPU, "G2")
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace("cpu"))
    q, cache = inputs.kwargs["q"], (inputs.kwargs["k"], inputs.kwargs["v"])
    with pytest.raises(InvalidInputError, match="plan must be called before run"):
        wrapper.run(q, cache)
    plan_decode(wrapper, inputs)
    with pytest.raises(InvalidInputError, match="window_left must be that of plan"):
        wrapper.run(q, cache, window_left=3)
    with pytest.raises(InvalidInputError, match="q_len_per_req must be that of plan"):
        wrapper.run(q, cache, q_len_per_req=2)
    with pytest.raises(InvalidInputError, match="kv_layout is not known"):
        BatchDecodeWithPagedKVCacheWrapper(workspace("cpu"), "HDN")
