"""The back end ``cpu``: every case of the table, where it cuts, what it allocates, what it must not touch.

``test_layouts.py`` shows that no layout changes a bit of it, ``test_conformance.py`` and
``test_properties.py`` that it is right for strides and features of all kinds.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import textwrap
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from twins import layouts_of

from anystride import packing, plan
from anystride.backends import cpu
from anystride.merge import merge
from anystride.testing import Case, Inputs, find_case, find_layout, make_inputs, select
from anystride.testing.allocations import peak_bytes
from anystride.testing.cases import Parallel
from anystride.testing.judgement import assert_close_as_plain, assert_right, attend, plain, reference
from anystride.testing.law import checked
from anystride.testing.rows import ROW_RECIPES

MOST_EXTRA = 64_000_000  # bytes beyond the results that a call may allocate, whatever its cache

KV = Case("cpu-kv", "this file", (1,), block_size=16)
ROW = Case("cpu-row", "this file", (1,), (1,), 4, 1, 96, 64, "row", 16)
SPLIT = Case("cpu-q_v", "this file", (1,), (1,), 4, 1, 32, 64, "q_v", 16)
DENSE = replace(KV, name="cpu-dense", paged=False)
ALL_FEATURES = replace(KV, name="cpu-features", window=(70, 0), softcap=3.0, alibi="batch", sinks=True)


def with_lengths(case: Case, seqused_k: tuple[int, ...], q_lens: tuple[int, ...] = (1,)) -> Case:
    q_lens = q_lens * len(seqused_k) if len(q_lens) == 1 else q_lens
    return replace(case, seqused_k=seqused_k, q_lens=q_lens)


def inputs_of(case: Case, **options: Any) -> Inputs:
    return make_inputs(case, layouts_of(case)[-1], **options)


def config_of(inputs: Inputs) -> cpu.Config:
    return cpu.choose_config(checked(inputs.kwargs)[0])


@pytest.fixture
def small_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks, tiles and batches so small that short sequences are cut everywhere."""
    monkeypatch.setattr(cpu, "KEY_BYTES", 1 << 15)
    monkeypatch.setattr(cpu, "SCORES", 1 << 10)
    monkeypatch.setattr(plan, "_PLANS", {})


@pytest.mark.parametrize("case", select("cpu"), ids=lambda case: case.name)
def test_every_case_is_right(case: Case) -> None:
    world = case.cp.world_size if case.cp else 1
    for rank in range(world):
        inputs = make_inputs(case, layouts_of(case)[0], rank=rank)
        assert_right(inputs, *attend(inputs, "cpu"))


# Where it cuts


@pytest.mark.usefixtures("small_shares")
@pytest.mark.parametrize(
    "case",
    [
        KV,
        ROW,
        SPLIT,
        DENSE,
        ALL_FEATURES,
        replace(KV, name="cpu-blocks", block_size=48),  # blocks larger than a chunk
        replace(KV, name="cpu-block-1", block_size=1),
        replace(KV, name="cpu-pages", blocks_per_page=3),
        replace(KV, name="cpu-unequal", d_qk=96, d_v=40),
        replace(KV, name="cpu-fp8", kv_dtype="float8_e4m3fn", descales="per_head"),
        replace(KV, name="cpu-scales", kv_dtype="float8_e5m2", scale_caches="rows"),
        replace(ROW, name="cpu-row-scales", kv_dtype="float8_e4m3fn", scale_caches="groups"),
        replace(KV, name="cpu-scales-dense", kv_dtype="float8_e4m3fn", scale_caches="rows", paged=False),
        replace(KV, name="cpu-scales-blocks", kv_dtype="float8_e4m3fn", scale_caches="rows", block_size=48),
        replace(KV, name="cpu-full-mask", causal=False),
        replace(KV, name="cpu-cp", cp=Parallel(2, 4)),
    ],
    ids=lambda case: case.name,
)
@pytest.mark.parametrize("q_len", [1, 3, 40])
def test_lengths_around_a_chunk_are_right(case: Case, q_len: int) -> None:
    chunk = config_of(inputs_of(case)).packing.chunk
    assert 16 <= chunk <= 128, "the chunk is to be reached by short sequences"
    lengths = tuple(n for edge in (chunk, 3 * chunk) for n in (edge - 1, edge, edge + 1))
    inputs = inputs_of(with_lengths(case, lengths, (q_len,)))
    assert_right(inputs, *attend(inputs, "cpu"))


@pytest.mark.parametrize("more", [-1, 0, 1, 150])
def test_long_queries_are_cut_into_tiles(more: int) -> None:
    case = replace(KV, d_qk=128, d_v=128)
    n = config_of(inputs_of(case)).tokens + more
    inputs = inputs_of(with_lengths(case, (n, n + 30), (n,)))
    assert_right(inputs, *attend(inputs, "cpu"))


@pytest.mark.parametrize("case", [KV, ALL_FEATURES], ids=["plain", "all-features"])
def test_large_blocks_are_not_staged(case: Case) -> None:
    inputs = inputs_of(with_lengths(replace(case, block_size=1024), (1500, 3), (2, 1)))
    assert not config_of(inputs).packing.staged
    assert_right(inputs, *attend(inputs, "cpu"))


@pytest.mark.parametrize("block_size", [16, 1024])
def test_pages_of_one_block_are_pages(block_size: int) -> None:
    inputs = inputs_of(with_lengths(replace(KV, block_size=block_size), (1500, 3, 40)))
    out, _ = attend(inputs, "cpu")
    pages = {name: inputs.kwargs[name].unsqueeze(1) for name in ("k", "v")}
    assert torch.equal(attend(inputs, "cpu", **pages)[0], out)


@pytest.mark.usefixtures("small_shares")
@pytest.mark.parametrize("case", [KV, ROW, SPLIT, ALL_FEATURES], ids=lambda case: case.name)
def test_no_layout_changes_a_bit_of_a_sequence_of_many_chunks(case: Case) -> None:
    case = with_lengths(case, (300, 40, 7, 131), (1, 3, 1, 40))
    # Alike in values and in the relation of K and V; where elements are shared the values are others.
    groups: dict[Any, list[tuple[Tensor, Tensor | None]]] = {}
    for layout in layouts_of(case):
        inputs = make_inputs(case, layout, guard=False)
        kind = layout.relation(inputs.storage.shape).kind == "v_in_k"
        key = (kind, inputs.values.k.double().sum().item(), inputs.values.v.double().sum().item())
        groups.setdefault(key, []).append(attend(inputs, "cpu"))
    sizes = [len(results) for results in groups.values()]
    assert max(sizes) >= 10
    for results in groups.values():
        for out, lse in results[1:]:
            assert torch.equal(out, results[0][0])
            assert lse is not None
            assert results[0][1] is not None
            assert torch.equal(lse, results[0][1])


# What must not matter


@pytest.mark.parametrize("block_size", [16, 1024])
def test_an_expanded_scale_is_one_for_all(block_size: int) -> None:
    case = replace(KV, kv_dtype="float8_e4m3fn", block_size=block_size)
    inputs = inputs_of(with_lengths(case, (1500, 3, 40)))
    one, shape = torch.tensor([0.5, 2.0]), inputs.kwargs["k"].shape[:-1]
    scales = {"k_scale_cache": one[0].expand(shape), "v_scale_cache": one[1].expand(shape)}
    descales = {"k_descale": one[0], "v_descale": one[1]}
    for got, wanted in zip(attend(inputs, "cpu", **scales), attend(inputs, "cpu", **descales), strict=True):
        assert got is not None
        assert wanted is not None
        assert torch.equal(got, wanted)  # powers of two


def test_num_splits_changes_nothing() -> None:
    inputs = inputs_of(with_lengths(KV, (1, 200, 33)))
    out, lse = attend(inputs, "cpu")
    for num_splits in (1, 3, 40):
        again, lse_again = attend(inputs, "cpu", num_splits=num_splits)
        assert torch.equal(out, again)
        assert lse is not None
        assert lse_again is not None
        assert torch.equal(lse, lse_again)


@pytest.mark.usefixtures("small_shares")
@pytest.mark.parametrize("case", [KV, ROW, SPLIT, DENSE, ALL_FEATURES], ids=lambda case: case.name)
def test_neighbours_change_no_bit_of_a_batch_invariant_sequence(case: Case) -> None:
    lengths, q_lens = (300, 5, 64, 5, 131), (1, 1, 3, 1, 50)
    inputs = inputs_of(replace(with_lengths(case, lengths, q_lens), batch_invariant=True))
    out, lse = attend(inputs, "cpu")
    assert lse is not None
    starts = inputs.kwargs["cu_seqlens_q"].tolist()
    for seq, (begin, end) in enumerate(itertools.pairwise(starts)):
        alone = {
            "cu_seqlens_q": torch.tensor([0, end - begin], dtype=torch.int32),
            "max_seqlen_q": end - begin,
            "max_seqlen_k": lengths[seq],
        }
        for name in ("q", "q_v"):
            if name in inputs.kwargs:
                alone[name] = inputs.kwargs[name][begin:end]
        for name in ("seqused_k", "block_table"):
            if name in inputs.kwargs:
                alone[name] = inputs.kwargs[name][seq : seq + 1]
        if "cu_seqlens_k" in inputs.kwargs:
            alone["cu_seqlens_k"] = inputs.kwargs["cu_seqlens_k"][seq : seq + 2]
        if "alibi_slopes" in inputs.kwargs:
            alone["alibi_slopes"] = inputs.kwargs["alibi_slopes"][seq : seq + 1]
        own_out, own_lse = attend(inputs, "cpu", **alone)
        assert own_lse is not None
        assert torch.equal(own_out, out[begin:end])
        assert torch.equal(own_lse, lse[:, begin:end])


@pytest.mark.parametrize("rows", ROW_RECIPES)
@pytest.mark.parametrize("case", [KV, SPLIT, replace(KV, dtype="float32")], ids=["kv", "q_v", "float32"])
@pytest.mark.parametrize("lengths", [(40,), (40, 5)], ids=["one", "two"])
def test_strides_of_q_and_out_change_no_bit(rows: str, case: Case, lengths: tuple[int, ...]) -> None:
    case = with_lengths(case, lengths)
    packed, _ = attend(inputs_of(case), "cpu")
    assert torch.equal(attend(inputs_of(case, rows=rows), "cpu")[0], packed)
    assert torch.equal(attend(inputs_of(case, out=rows), "cpu")[0], packed)


def test_no_gradient_is_recorded() -> None:
    inputs = inputs_of(with_lengths(KV, (1, 40)))
    inputs.kwargs["q"].requires_grad_()
    out, _ = attend(inputs, "cpu")
    assert not out.requires_grad
    assert not out.is_inference()


def test_a_nan_in_a_valid_row_is_not_hidden() -> None:
    inputs = inputs_of(with_lengths(KV, (20, 40, 60)), guard=False)
    block = int(inputs.kwargs["block_table"][1, 1])
    inputs.kwargs["v"][block, 3] = float("nan")
    out, _ = attend(inputs, "cpu")
    assert out[1].isnan().all()
    assert not out[[0, 2]].isnan().any()


# Empty rows, ranks


@pytest.mark.parametrize("name", ["length-all-0", "more-queries-than-keys", "more-queries-with-sinks"])
def test_rows_that_see_no_key_are_0_and_minus_infinity(name: str) -> None:
    inputs = inputs_of(find_case(name))
    out, lse = attend(inputs, "cpu")
    assert lse is not None
    _, right_lse = reference(inputs)
    empty = right_lse.isneginf()
    assert empty.any()
    assert torch.equal(lse.isneginf(), empty)
    assert (out.transpose(0, 1)[empty] == 0).all()


@pytest.mark.parametrize("case", [KV, ROW, SPLIT], ids=lambda case: case.name)
@pytest.mark.parametrize("parallel", [Parallel(2, 1), Parallel(3, 5)], ids=["2-1", "3-5"])
def test_ranks_merge_to_the_whole(case: Case, parallel: Parallel) -> None:
    case = with_lengths(case, (0, 1, 65, 200, 33), (1, 1, 3, 70, 2))
    parts = []
    for rank in range(parallel.world_size):
        inputs = inputs_of(replace(case, cp=parallel), rank=rank)
        parts.append(attend(inputs, "cpu"))
    lses = [lse for _, lse in parts if lse is not None]
    out, lse = merge(torch.stack([out for out, _ in parts]), torch.stack(lses))
    whole = inputs_of(case)
    right_out, right_lse = reference(whole)
    plain_out, plain_lse = plain(whole)
    assert_close_as_plain("out", out, plain_out, right_out, out.dtype)
    assert_close_as_plain("lse", lse, plain_lse, right_lse, torch.float32)


# What it reads and allocates


@pytest.fixture
def gathered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The elements that each gathering of blocks has read."""
    elements = []
    gather = packing._gather

    def counted(blocks: Tensor, ids: Tensor) -> Tensor:
        rows = gather(blocks, ids)
        elements.append(rows.numel())
        return rows

    monkeypatch.setattr(packing, "_gather", counted)
    return elements


@pytest.mark.parametrize(
    ("case", "layout", "gathers"),
    [(KV, "G16", 2), (ROW, "M1", 1), (SPLIT, "M7", 2)],
    ids=["kv", "row", "q_v"],
)
def test_bytes_that_k_and_v_share_are_gathered_once(
    case: Case, layout: str, gathers: int, gathered: list[int]
) -> None:
    attend(make_inputs(with_lengths(case, (40, 65)), find_layout(layout)), "cpu")
    assert len(gathered) == gathers
    blocks = 3 + 5  # both sequences at once, and no more than they have
    width = case.d_qk if case.form == "row" else case.d_qk + case.d_v
    assert sum(gathered) == blocks * case.block_size * case.num_kv_heads * width


def test_the_keys_of_a_prompt_are_gathered_once_for_all_its_tiles(gathered: list[int]) -> None:
    inputs = inputs_of(with_lengths(KV, (600, 5), (400, 1)))
    assert 2 * config_of(inputs).tokens < 400
    attend(inputs, "cpu")
    blocks = 38 + 1
    assert gathered == [blocks * KV.block_size * KV.num_kv_heads * d for d in (KV.d_qk, KV.d_v)]


def test_no_key_is_gathered_that_a_window_hides(gathered: list[int]) -> None:
    attend(inputs_of(replace(with_lengths(KV, (600, 5), (3, 1)), window=(20, 0))), "cpu")
    blocks = 2 + 1  # keys 577 to 600, and the other sequence's
    assert gathered == [blocks * KV.block_size * KV.num_kv_heads * d for d in (KV.d_qk, KV.d_v)]


GREEDY = {
    "mha": replace(KV, num_q_heads=32, num_kv_heads=32, d_qk=128, d_v=128),
    "gqa": replace(KV, num_q_heads=64, num_kv_heads=8, d_qk=128, d_v=128),
    "mqa": replace(KV, num_q_heads=71, num_kv_heads=1),
    "wide": replace(KV, num_q_heads=128, num_kv_heads=8, d_qk=576, d_v=512),
    "row": replace(ROW, num_q_heads=128, d_qk=576, d_v=512),
    "q_v": replace(SPLIT, num_q_heads=128, d_qk=64, d_v=512),
    "fp8": replace(KV, num_q_heads=64, num_kv_heads=8, d_qk=128, d_v=128, kv_dtype="float8_e4m3fn"),
    "scales": replace(
        KV, num_q_heads=64, num_kv_heads=8, d_qk=128, d_v=128, kv_dtype="float8_e4m3fn", scale_caches="rows"
    ),
    "pages": replace(KV, num_q_heads=32, num_kv_heads=8, d_qk=128, d_v=128, block_size=1056),
}


@pytest.mark.parametrize("name", GREEDY)
@pytest.mark.parametrize("features", [{}, {"softcap": 3.0, "alibi": "batch", "sinks": True}], ids=["", "all"])
@pytest.mark.parametrize(
    ("lengths", "q_lens"), [((2100,), (300,)), ((300, 280, 1, 290), (1,)), ((65,) * 40, (1,))],
    ids=["prefill", "decode", "many"],
)  # fmt: skip
def test_extra_memory_is_bounded(
    name: str, features: dict[str, Any], lengths: tuple[int, ...], q_lens: tuple[int, ...]
) -> None:
    q_lens = (40,) if q_lens[0] > 1 and GREEDY[name].num_q_heads >= 64 else q_lens
    case = with_lengths(replace(GREEDY[name], **features), lengths, q_lens)
    inputs = make_inputs(case, layouts_of(case)[0], guard=False)
    results = sum(t.nbytes for t in attend(inputs, "cpu") if t is not None)
    assert peak_bytes(lambda: attend(inputs, "cpu")) - results <= MOST_EXTRA


HALF_A_GIGABYTE = """
    import resource
    import torch
    from anystride import flash_attn_varlen_func

    torch.set_num_threads(1)
    heads, d, block_size, tokens = {heads}, {d}, 16, {tokens}
    blocks = tokens // block_size
    # A cache of {tokens} tokens: its blocks lie on one, by a stride of 0. The call cannot know.
    one = torch.randn(1, 2, block_size, heads, d, dtype=torch.bfloat16)
    k, v = one.expand(blocks, -1, -1, -1, -1).unbind(1)
    assert k.numel() * k.itemsize + v.numel() * v.itemsize >= 512 << 20

    def call(length, n):
        return flash_attn_varlen_func(
            torch.randn(n, 4 * heads, d, dtype=torch.bfloat16), k, v, n,
            torch.tensor([0, n], dtype=torch.int32), tokens, causal=True, backend="cpu",
            seqused_k=torch.tensor([length], dtype=torch.int32),
            block_table=torch.arange(blocks, dtype=torch.int32)[None],
        )

    call(40, 1), call(40, 3)  # what is loaded at the first call
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call(tokens, 1), call(tokens, 3)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.parametrize(("heads", "d", "tokens"), [(8, 128, 131072), (1, 512, 262144)], ids=["gqa", "mqa"])
def test_a_cache_of_half_a_gigabyte_costs_no_more_memory(heads: int, d: int, tokens: int) -> None:
    code = textwrap.dedent(HALF_A_GIGABYTE.format(heads=heads, d=d, tokens=tokens))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= MOST_EXTRA


def test_numbers_that_lead_out_of_a_tensor_are_refused() -> None:
    inputs = inputs_of(with_lengths(KV, (40, 33)))
    blocks = inputs.kwargs["block_table"].shape[1]
    too_long = torch.tensor([40, 16 * blocks + 1], dtype=torch.int32)
    with pytest.raises(
        IndexError, match=rf"sequence 1 has {16 * blocks + 1} keys; block_table has {blocks} blocks"
    ):
        attend(inputs, "cpu", seqused_k=too_long)
    with pytest.raises(IndexError, match="cu_seqlens_q ends at 3; q has 2 tokens"):
        attend(inputs, "cpu", cu_seqlens_q=torch.tensor([0, 1, 3], dtype=torch.int32))


# Who may ask


def test_other_devices_are_refused_with_what_is_needed() -> None:
    problem, _ = checked(inputs_of(KV).kwargs)
    assert cpu.refusals(problem) == []
    elsewhere = replace(problem, device=torch.device("cuda", 0))
    assert cpu.refusals(elsewhere) == ["tensors are on cuda:0; needs tensors on a CPU"]
