"""The adapters beside their originals: one call for both, and both are as the adapter's test states.

The originals are the peers' own kernels, of the folder that ``../shared/peers/get_peers`` fills, or of
``ANYSTRIDE_PEERS``. Without them these tests are skipped. FlashInfer compiles for minutes at first.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_adapters_flash_attn as flash_attn
import test_adapters_flash_mla as flash_mla
import test_adapters_flashinfer as flashinfer
import test_adapters_vllm_triton as vllm_triton
import torch
from originals import assert_as_stated, gqa_inputs, mla_inputs
from torch import Tensor

from anystride.adapters.flash_mla import flash_mla_with_kvcache
from anystride.adapters.vllm_triton import decode_attention_fwd
from anystride.peers import Absent, find_peer
from anystride.peers.vllm_triton import load_file

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),  # the originals' own
]
PEERS = Path(os.environ.get("ANYSTRIDE_PEERS", Path(__file__).parents[1] / ".peers"))
WHERE = ("cuda", True)
Result = tuple[Tensor, Tensor]


def load(name: str) -> None:
    try:
        find_peer(name).load(PEERS)
    except Absent as why:
        pytest.skip(str(why))


def assert_alike(ours: Result, theirs: Result, stated: Callable[[torch.dtype], Result]) -> None:
    """Fail unless both are as stated, in one shape and dtype, and infinite in the same places."""
    for mine, original in zip(ours, theirs, strict=True):
        assert mine.shape == original.shape
        assert mine.dtype == original.dtype
        assert torch.equal(mine.isposinf(), original.isposinf())
        assert torch.equal(mine.isneginf(), original.isneginf())
    for out, lse in (theirs, ours):
        assert_as_stated(stated, out, lse, torch.bfloat16)


@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize("layout", ["M1", "M2", "M3"])
def test_flash_mla(layout: str, queries: int) -> None:
    load("flash-mla")
    inputs = mla_inputs(WHERE, layout, q_lens=(queries,) * 3, causal=True)
    given = flash_mla.arguments(inputs)
    theirs = torch.ops._flashmla_C.dense_decode_fwd(
        given["q"], given["k_cache"], 512, given["cache_seqlens"], given["block_table"], 576**-0.5, True,
        None, None, None,
    )[:2]  # fmt: skip
    ours = flash_mla_with_kvcache(**given, causal=True)
    assert_alike(ours, theirs, lambda dtype: flash_mla.stated(inputs, dtype, None, True))


@pytest.mark.parametrize("layout", ["G16", "G2", "G6", "G9"])
def test_flash_attention_3(layout: str) -> None:
    load("flash-attn-3")
    inputs = gqa_inputs(WHERE, layout, q_lens=(2, 2, 2))
    given = flash_attn.arguments(inputs)
    theirs = torch.ops._vllm_fa3_C.fwd(
        given["q"], given["k_cache"], given["v_cache"], *[None] * 8, given["cache_seqlens"], None, None,
        given["page_table"], *[None] * 8, 128**-0.5, True, 300, 0, 0.0, True, None, 0, None, 0, None, 1, 0,
        None,
    )[:2]  # fmt: skip
    more = {"causal": True, "window_size": (300, 0), "return_softmax_lse": True}
    ours = flash_attn.flash_attn_with_kvcache(**given, **more)
    assert_alike(ours, theirs, lambda dtype: flash_attn.stated(inputs, dtype, causal=True, window_left=300))


@pytest.mark.parametrize("layout", ["M7", "M9"])
def test_flash_attention_3_with_qv(layout: str) -> None:
    load("flash-attn-3")
    inputs = mla_inputs(WHERE, layout, form="q_v", q_lens=(2, 2, 2), d_qk=64, d_v=512)
    given = flash_attn.arguments(inputs)
    theirs = torch.ops._vllm_fa3_C.fwd(
        given["q"], given["k_cache"], given["v_cache"], None, None, given["qv"], *[None] * 5,
        given["cache_seqlens"], None, None, given["page_table"], *[None] * 8, 576**-0.5, True, -1, -1, 0.0,
        True, None, 0, None, 0, None, 1, 0, None,
    )[:2]  # fmt: skip
    ours = flash_attn.flash_attn_with_kvcache(**given, causal=True, return_softmax_lse=True)
    assert_alike(ours, theirs, lambda dtype: flash_attn.stated(inputs, dtype, causal=True))


@pytest.mark.parametrize("family", ["gqa", "mla"])
def test_vllm_triton(family: str) -> None:
    load("vllm-triton-decode")
    lengths = (7, 5, 700)  # the original gives NaN for an empty sequence
    make, layout = (mla_inputs, "M2") if family == "mla" else (gqa_inputs, "G4")
    inputs = make(WHERE, layout, seqused_k=lengths)
    original = load_file(PEERS, "triton_decode_attention").decode_attention_fwd
    given, case = inputs.kwargs, inputs.case
    shape = (case.batch, case.num_q_heads)

    def call(function: Callable[..., object]) -> Result:
        out = torch.empty(*shape, case.d_v, dtype=torch.bfloat16, device="cuda")
        lse = torch.empty(shape, device="cuda")
        logits = torch.empty(*shape, vllm_triton.SPLITS, case.d_v + 1, device="cuda")
        function(
            given["q"], given["k"], given["v"], out, lse, given["block_table"], given["seqused_k"], logits,
            vllm_triton.SPLITS, vllm_triton.SCALE, case.block_size, is_mla=family == "mla",
        )  # fmt: skip
        return out, lse

    assert_alike(call(decode_attention_fwd), call(original), lambda d: vllm_triton.stated(inputs, d))


@pytest.mark.parametrize("layout", ["M1", "M2"])
def test_flashinfer_mla(layout: str) -> None:
    load("flashinfer-fa3")
    original = importlib.import_module("flashinfer.mla").BatchMLAPagedAttentionWrapper
    inputs = mla_inputs(WHERE, layout)

    def call(wrapper: Any) -> Result:
        flashinfer.plan_mla(wrapper, inputs)
        result: Result = wrapper.run(*flashinfer.mla_arguments(inputs), return_lse=True)
        return result

    space = torch.empty(128 << 20, dtype=torch.int8, device="cuda")
    ours, theirs = flashinfer.BatchMLAPagedAttentionWrapper(space), original(space, backend="fa3")
    assert_alike(call(ours), call(theirs), lambda dtype: flashinfer.stated(inputs, dtype))


@pytest.mark.parametrize("layout", ["G16", "G2"])
def test_flashinfer_decode(layout: str) -> None:
    load("flashinfer-decode")
    original = importlib.import_module("flashinfer.decode").BatchDecodeWithPagedKVCacheWrapper
    inputs = gqa_inputs(WHERE, layout, seqused_k=(7, 5, 700))  # the original says that pages are not empty
    space = torch.empty(128 << 20, dtype=torch.int8, device="cuda")

    def call(wrapper: Any) -> Result:
        flashinfer.plan_decode(wrapper, inputs)
        result: Result = wrapper.run(
            inputs.kwargs["q"], (inputs.kwargs["k"], inputs.kwargs["v"]), return_lse=True
        )
        return result

    ours = flashinfer.BatchDecodeWithPagedKVCacheWrapper(space, "NHD")
    theirs = original(space, "NHD", use_tensor_cores=True)
    assert_alike(call(ours), call(theirs), lambda dtype: flashinfer.stated(inputs, dtype))
