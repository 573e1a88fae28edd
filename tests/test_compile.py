"""Every kernel, compiled for GPUs that are not here: it compiles, fits, and does not spill where it matters.

Needs Triton's wheel and no GPU. ``make compile-matrix`` runs this file under every supported Triton.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted here, not compiled", allow_module_level=True)
triton = pytest.importorskip("triton")

import torch  # noqa: E402
from compilations import compilations  # noqa: E402
from offline import TARGETS, compile_call, compile_store, standing_in  # noqa: E402

from anystride import flash_attn_varlen_func, get_scheduler_metadata, warmup  # noqa: E402
from anystride.cache import copy_blocks, gather_blocks, store_kv, store_mla  # noqa: E402
from anystride.testing import find_case, find_layout, make_inputs  # noqa: E402

# Triton 3.9 says at the first compilation that a default will change in 3.10.
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset")

BATCH = 64
LONGEST = 1 << 17  # keys: as many splits as a long context has


@dataclass(frozen=True)
class Shape:
    """One call to compile: a case of the table in a layout, with changes."""

    case: str
    layout: str
    changes: dict[str, Any] = field(default_factory=dict)

    def kwargs(self, batch: int = BATCH) -> dict[str, Any]:
        """Arguments of the entry for a real batch; only the cache is small."""
        case = replace(find_case(self.case), **self.changes)
        longest = max(case.q_lens)
        case = replace(case, seqused_k=(longest + 1,) * batch, q_lens=(longest,) * batch)
        kwargs = make_inputs(case, find_layout(self.layout), guard=False).kwargs
        kwargs["max_seqlen_k"] = LONGEST
        if case.paged:
            width = -(-LONGEST // case.block_size)
            kwargs["block_table"] = kwargs["block_table"][:, :1].expand(batch, width)
        return kwargs


# What is decoded most: here a spilled register costs time on every step.
HOT = {
    "mla-h16": Shape("deepseek-v3-h16", "M1"),
    "mla-h128": Shape("deepseek-v3-h128", "M1"),
    "mla-q_v-h16": Shape("deepseek-v3-q_v", "M7"),
    "gqa-d128": Shape("llama-3-8b", "G2"),
    "gqa-d64": Shape("gpt-oss-full", "G2"),
    "gqa-d256": Shape("gemma-2-9b-full", "G2", {"softcap": 0.0}),
    "mha-d128": Shape("llama-3-8b", "G2", {"num_q_heads": 8}),
}
OTHER = {
    "mla-speculative": Shape("deepseek-v3-mtp", "M2"),
    "mla-block-3": Shape("deepseek-v3-h16", "M3", {"block_size": 3}),
    "mla-step-2": Shape("deepseek-v3-h16", "A-inner-step-2"),
    "mla-float32": Shape("deepseek-v3-h16", "M1", {"dtype": "float32"}),
    "mla-e4m3": Shape("fp8-row", "M14"),
    "mla-e5m2-q_v": Shape("fp8-q_v", "M9"),
    "gqa-block-3": Shape("block-3", "G9"),
    "gqa-step-2": Shape("llama-3-8b", "A-inner-step-2"),
    "gqa-float32": Shape("llama-3-8b", "G2", {"dtype": "float32"}),
    "gqa-e4m3": Shape("fp8-e4m3-per-head", "G2"),
    "gqa-e5m2": Shape("fp8-e5m2", "G12"),
    "gqa-scales": Shape("scales-e4m3", "G12"),
    "gqa-scales-groups": Shape("scales-groups", "A-padded-rows"),
    "mla-scales": Shape("scales-row", "M14"),
    "mla-scales-groups": Shape("scales-row-groups", "M14"),
    "mla-q_v-scales-groups": Shape("scales-q_v-groups", "M9"),
    "gqa-features": Shape("all-features", "G11", {"blocks_per_page": 4}),
    "gqa-d512": Shape("d-512", "G2"),
    "gqa-prefill": Shape("prefill-chunk", "G2"),
    "gqa-splits": Shape("splits-40", "G2"),
    "cp": Shape("cp-row-4-1", "M1"),
    "dense": Shape("dense", "G16"),
}
SLOW = {
    "mla-h8": Shape("deepseek-v3-h8", "M1"),
    "mla-h64": Shape("kimi-k2", "M1"),
    "mla-h128-float32": Shape("deepseek-v3-h128", "M1", {"dtype": "float32"}),
    "mla-h128-speculative": Shape("deepseek-v3-h128", "M2", {"q_lens": (2,)}),
    "mla-h128-e4m3": Shape("deepseek-v3-h128", "M14", {"kv_dtype": "float8_e4m3fn"}),
    "mla-h128-block-3": Shape("deepseek-v3-h128", "M1", {"block_size": 3}),
    "mla-h128-step-2": Shape("deepseek-v3-h128", "A-inner-step-2"),
    "mla-320": Shape("mistral-small-4", "M15"),
    "mla-320-q_v": Shape("mistral-small-4-q_v", "M7"),
    "gqa-d320-256": Shape("d-320-256", "G13"),
    "gqa-d80": Shape("d-80", "G2"),
    "gqa-d192-128": Shape("d-192-128", "G13"),
    "gqa-d576-512": Shape("d-576-512", "G2"),
    "gqa-d512-prefill": Shape("d-512", "G2", {"q_lens": (40,)}),
    "gqa-d576-512-prefill": Shape("d-576-512", "G2", {"q_lens": (40,)}),
    "gqa-d256-prefill": Shape("d-256", "G2", {"q_lens": (40,)}),
    "gqa-odd": Shape("d-odd", "G2"),
    "gqa-dim-major": Shape("llama-3-8b", "A-dim-major"),
    "gqa-v-dim-major": Shape("llama-3-8b", "G15"),
    "gqa-off-by-one": Shape("llama-3-8b", "A-off-by-one"),
    "gqa-batch-invariant": Shape("batch-invariant", "G3"),
    "gqa-e4m3-prefill": Shape("fp8-e4m3", "G2", {"q_lens": (40,)}),
}
SHAPES = HOT | OTHER | SLOW
CASES = [(target, name) for target in ("sm_80", "sm_90", "sm_100", "gfx942") for name in HOT | OTHER]
SLOW_CASES = [(target, name) for target in TARGETS for name in SHAPES if (target, name) not in CASES]


@pytest.mark.parametrize(
    ("target", "name"), CASES + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES]
)
def test_compiles_and_fits(target: str, name: str) -> None:
    binaries = compile_call(SHAPES[name].kwargs(), target)
    names = [binary.kernel for binary in binaries]
    assert "decode_kernel" in names
    assert names[-1] == "combine_kernel", "a long context is cut: its partial results must be combined"
    limit = TARGETS[target][0].shared_bytes
    for binary in binaries:
        assert binary.shared_bytes <= limit, f"{binary.kernel} on {target}: more shared memory than there is"


@pytest.mark.parametrize("name", HOT)
def test_nothing_is_spilled_where_it_matters(name: str) -> None:
    # The ptxas of Triton 3.9 keeps two registers of addresses on the stack where those before it need none.
    allowed = 8 if int(triton.__version__.split(".")[1]) >= 9 else 0
    for binary in compile_call(HOT[name].kwargs(), "sm_90"):
        assert binary.spilled_bytes <= allowed, f"{binary.kernel}: registers are spilled"


@pytest.mark.parametrize("name", ["mla-h128", "gqa-prefill"])
def test_many_rows_use_warpgroup_products_on_hopper(name: str) -> None:
    decode = next(b for b in compile_call(SHAPES[name].kwargs(), "sm_90") if b.kernel == "decode_kernel")
    assert "wgmma.mma_async" in decode.assembly


@pytest.mark.parametrize("block_size", [1, 3, 64])
@pytest.mark.parametrize("name", ["mla-h16", "gqa-d128"])
def test_rows_of_16_bytes_are_loaded_asynchronously_and_whole(name: str, block_size: int) -> None:
    shape = replace(HOT[name], changes={"block_size": block_size})
    decode = next(b for b in compile_call(shape.kwargs(), "sm_90") if b.kernel == "decode_kernel")
    assert "cp.async.cg.shared.global" in decode.assembly  # .cg: 16 bytes, .ca: fewer
    assert "cp.async.ca.shared.global" not in decode.assembly


VARIANTS = {
    "mla": ("deepseek-v3-h16", ("M1", "M2", "M3", "M5", "M6")),
    "gqa": ("llama-3-8b", ("G2", "G3", "G4", "G9", "G20")),
}


def variants(family: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Calls that differ in lengths, in strides of one divisibility, and in the batch within its bucket."""
    name, layouts = VARIANTS[family]
    case = find_case(name)
    for layout in layouts[1:]:
        yield f"strides of {layout}", Shape(name, layout).kwargs()
    yield "max_seqlen_k", Shape(name, layouts[0]).kwargs() | {"max_seqlen_k": LONGEST - 1000}
    for batch in (BATCH - 1, BATCH - 11):
        yield f"batch of {batch}", Shape(name, layouts[0]).kwargs(batch)
    for rows in ("heads_first", "fused_qkv", "padded_rows"):
        size = replace(case, seqused_k=(2,) * BATCH, q_lens=(1,) * BATCH)
        others = make_inputs(size, find_layout(layouts[0]), rows=rows, out=rows, guard=False).kwargs
        kwargs = Shape(name, layouts[0]).kwargs()
        yield f"strides of q and out {rows}", kwargs | {"q": others["q"], "out": others["out"]}
    table = torch.zeros(LONGEST // case.block_size, BATCH, dtype=torch.int32).t()
    yield "strides of the table", Shape(name, layouts[0]).kwargs() | {"block_table": table}


@pytest.mark.parametrize("family", VARIANTS)
def test_lengths_strides_and_batches_compile_nothing_new(family: str) -> None:
    name, layouts = VARIANTS[family]
    with standing_in("sm_90"), compilations() as compiled:
        flash_attn_varlen_func(**Shape(name, layouts[0]).kwargs(), backend="triton")
        assert len(compiled) == 3
        for what, kwargs in variants(family):
            flash_attn_varlen_func(**kwargs, backend="triton")
            assert len(compiled) == 3, f"other {what} compile {compiled[3:]}"


@pytest.mark.parametrize("max_batch", [64, 1024])
@pytest.mark.parametrize(
    ("name", "backend"),
    [("mla-h16", None), ("mla-q_v-h16", None), ("gqa-d128", None), ("mla-h16", "triton")],
)
def test_warmup_leaves_nothing_to_compile(name: str, backend: str | None, max_batch: int) -> None:
    case = find_case(HOT[name].case)
    with standing_in("sm_90"):
        kwargs = HOT[name].kwargs()
        warmup(
            kwargs["k"], kwargs["v"], case.num_q_heads, max_batch=max_batch, max_seqlen_k=LONGEST,
            q_v="q_v" in kwargs, causal=case.causal, softmax_scale=case.scale, backend=backend,
        )  # fmt: skip
        for batch in (1, 3, 50, max_batch):
            for longest in (1, 64, 100, 1000, 10_000, LONGEST):
                later = HOT[name].kwargs(batch) | {"max_seqlen_k": longest}
                with compilations() as compiled:
                    metadata = get_scheduler_metadata(
                        batch, 1, longest, case.num_q_heads, case.num_kv_heads, case.d_qk,
                        later["seqused_k"], case.torch_dtype, case.d_v, causal=case.causal,
                    )  # fmt: skip
                    for given in ({}, {"scheduler_metadata": metadata}, {"return_softmax_lse": False}):
                        flash_attn_varlen_func(**(later | given), backend=backend)
                assert not compiled, f"batch {batch}, max_seqlen_k {longest}: compiles {compiled}"


# The write side


def stored(name: str) -> tuple[Any, tuple[Any, ...]]:
    """A call of the write side: the function and its arguments."""
    tokens, dtype = 300, torch.bfloat16
    slots = torch.zeros(tokens, dtype=torch.int64)
    if name.startswith("mla"):
        rows = torch.zeros(tokens, 512, dtype=dtype), torch.zeros(tokens, 64, dtype=dtype)
        if name == "mla":
            return store_mla, (*rows, torch.zeros(9, 64, 576, dtype=dtype), slots)
        raw = torch.zeros(9, 64, 656, dtype=torch.uint8)
        latent, rope = raw[..., :512].view(torch.float8_e4m3fn), raw[..., 528:].view(dtype)
        return store_mla, (*rows, (latent, rope), slots, raw[..., 512:528].view(torch.float32))
    key, value = torch.zeros(2, tokens, 8, 128, dtype=dtype)
    if name == "kv":
        return store_kv, (key, value, *torch.zeros(9, 2, 16, 8, 128, dtype=dtype).unbind(1), slots)
    if name == "kv-step-2":
        cache = torch.zeros(9, 2, 16, 8, 256, dtype=dtype)[..., ::2]
        return store_kv, (key, value, *cache.unbind(1), slots)
    if name == "kv-e4m3":
        cache = torch.zeros(9, 2, 16, 8, 128, dtype=torch.uint8).view(torch.float8_e4m3fn)
        return store_kv, (key, value, *cache.unbind(1), slots, torch.ones(8), torch.ones(8))
    raw = torch.zeros(9, 2, 16, 8, 132, dtype=torch.uint8)
    caches = raw[..., :128].view(torch.float8_e5m2).unbind(1)
    return store_kv, (key, value, *caches, slots, *raw.view(torch.float32)[..., 32].unbind(1))


def copied(name: str) -> tuple[Any, tuple[Any, ...]]:
    """A call that copies blocks."""
    source, target = torch.zeros(2, 9, 16, 8, 128, dtype=torch.bfloat16)
    mapping = torch.zeros(300, 2, dtype=torch.int64)
    if name == "blocks-heads-first":
        return gather_blocks, (source, mapping[:9, 0], target.view(9, 8, 16, 128).transpose(1, 2))
    if name == "blocks-step-2":
        target = torch.zeros(9, 16, 8, 256, dtype=torch.bfloat16)[..., ::2]
    return copy_blocks, (source, target, mapping)


STORES = {"kv": 16, "kv-step-2": 2, "kv-e4m3": 16, "kv-132-bytes": 4, "mla": 16, "mla-656-bytes": 16}
STORES |= {"blocks": 16, "blocks-step-2": 2, "blocks-heads-first": 16}


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("name", STORES)
def test_stores_compile_without_spilling(name: str, target: str) -> None:
    blocks = name.startswith("blocks")
    store, arguments = copied(name) if blocks else stored(name)
    binary = compile_store(store, arguments, target)
    assert binary.kernel == ("copy_blocks_kernel" if blocks else "store_kernel")
    assert binary.spilled_bytes == 0


@pytest.mark.parametrize("name", STORES)
def test_stores_are_as_wide_as_rows_are_aligned(name: str) -> None:
    store, arguments = copied(name) if name.startswith("blocks") else stored(name)
    found = re.findall(r"st\.global(?:\.v(\d))?\.b(\d+)", compile_store(store, arguments, "sm_90").assembly)
    widest = max(int(count or 1) * int(bits) // 8 for count, bits in found)
    assert widest == STORES[name]
