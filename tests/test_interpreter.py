"""The ``triton`` back end under Triton's interpreter: every feature, every layout, at tiny sizes.

Run as usual, this file starts itself once more with TRITON_INTERPRET=1, which Triton reads when it is
imported. It shows that the kernels compute the right thing; that they compile is shown by test_compile.py.
The interpreter multiplies bfloat16 matrices as if their bits were integers, so these cases are in float16.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from interpreted import assert_passes_interpreted, only_compiled, only_interpreted
from torch import Tensor
from twins import layouts_of, packed_twin

from anystride import get_scheduler_metadata
from anystride.merge import merge
from anystride.testing import LAYOUTS, Case, Inputs, find_case, find_layout, make_inputs, select
from anystride.testing.judgement import assert_close_as_plain, assert_right, attend, plain, reference
from anystride.testing.rows import ROW_RECIPES, TABLE_RECIPES


@only_compiled
@pytest.mark.parametrize("part", ["feature", "layout"])
def test_under_the_interpreter(part: str) -> None:
    assert_passes_interpreted(__file__, "-k", part)


def run(inputs: Inputs, **others: Any) -> tuple[Tensor, Tensor | None]:
    """Make the call and hold it to the law."""
    out, lse = attend(inputs, "triton", **others)
    assert_right(inputs, out, lse)
    return out, lse


def tiny(name: str) -> Case:
    """The tiny case of this name, in a dtype that the interpreter can multiply."""
    case = find_case(name)
    return replace(case, dtype="float16") if case.dtype == "bfloat16" else case


def longer(name: str, lengths: tuple[int, ...] = (0, 70, 200), **changes: Any) -> Case:
    """A tiny case with sequences of several steps of 64 keys: only such can be cut."""
    return replace(tiny(name), seqused_k=lengths, **changes)


CUT = {
    "scheduled": longer("tiny-gqa"),
    "scheduled-row": longer("tiny-row"),
    "scheduled-q_v": longer("tiny-q_v"),
    "scheduled-all": longer("tiny-all-features", num_splits=0),
    "splits-3": longer("tiny-all-features", num_splits=3),
    "splits-2-row": longer("tiny-row-all-features", num_splits=2),
    "splits-4-q_v": longer("tiny-q_v-all-features", num_splits=4),
    "more-splits-than-steps": longer("tiny-gqa", num_splits=9),
    "batch-invariant": longer("tiny-batch-invariant", (2200, 5), q_lens=(1, 2), num_q_heads=2),
    "prefill": longer("tiny-prefill", q_lens=(0, 40, 9)),
    "cp": longer("tiny-cp", (0, 150, 300)),
}


@only_interpreted
@pytest.mark.parametrize("name", [case.name for case in select("tiny")])
def test_features(name: str) -> None:
    case = tiny(name)
    run(make_inputs(case, layouts_of(case)[0]))


@only_interpreted
@pytest.mark.parametrize("name", CUT)
def test_features_of_cut_sequences(name: str) -> None:
    run(make_inputs(CUT[name], layouts_of(CUT[name])[0]))


@only_interpreted
@pytest.mark.parametrize("name", ["tiny-cp", "tiny-row-cp"])
def test_feature_ranks_merge_to_the_whole(name: str) -> None:
    case = tiny(name)
    assert case.cp is not None
    layout = layouts_of(case)[0]
    ranks = [make_inputs(case, layout, rank=rank) for rank in range(case.cp.world_size)]
    outs, lses = zip(*(run(inputs) for inputs in ranks), strict=True)
    out, lse = merge(torch.stack(outs), torch.stack(lses))
    whole = make_inputs(replace(case, cp=None), layout)
    (right_out, right_lse), (plain_out, plain_lse) = reference(whole), plain(whole)
    assert_close_as_plain("out", out, plain_out, right_out, out.dtype)
    assert_close_as_plain("lse", lse, plain_lse, right_lse, torch.float32)


@only_interpreted
def test_feature_metadata_gives_the_same_bits() -> None:
    case = CUT["scheduled"]
    inputs = make_inputs(case, layouts_of(case)[0])
    out, lse = run(inputs)
    given_out, given_lse = run(inputs, scheduler_metadata=metadata_of(inputs))
    assert torch.equal(out, given_out)
    assert lse is not None
    assert given_lse is not None
    assert torch.equal(lse, given_lse)


@only_interpreted
@pytest.mark.parametrize("fault", ["zeroed", "of another batch", "of other heads"])
def test_feature_metadata_of_another_step_gives_nan(fault: str) -> None:
    case = CUT["scheduled"]
    inputs = make_inputs(case, layouts_of(case)[0])
    metadata = metadata_of(inputs)
    if fault == "zeroed":
        metadata.zero_()
    elif fault == "of another batch":
        metadata[2] += 1
    else:
        metadata[1] += 16
    out, lse = attend(inputs, "triton", scheduler_metadata=metadata)
    assert lse is not None
    assert out.isnan().all()
    assert lse.isnan().all()
    inputs.assert_untouched()


def metadata_of(inputs: Inputs) -> Tensor:
    case, kwargs = inputs.case, inputs.kwargs
    return get_scheduler_metadata(
        case.batch, kwargs["max_seqlen_q"], kwargs["max_seqlen_k"], case.num_q_heads, case.num_kv_heads,
        case.d_qk, kwargs["seqused_k"], case.torch_dtype, case.d_v, kwargs["cu_seqlens_q"],
        causal=case.causal, window_size=case.window,
    )  # fmt: skip


@only_interpreted
def test_feature_batch_invariant_bits_do_not_depend_on_neighbours() -> None:
    case = longer("tiny-batch-invariant", (70, 200, 5), num_q_heads=2, q_lens=(1, 3, 2))
    inputs = make_inputs(case, layouts_of(case)[0])
    out, lse = run(inputs)
    assert lse is not None
    starts = inputs.kwargs["cu_seqlens_q"]
    for seq in range(case.batch):
        begin, end = int(starts[seq]), int(starts[seq + 1])
        alone_out, alone_lse = attend(
            inputs, "triton", q=inputs.kwargs["q"][begin:end], max_seqlen_q=end - begin,
            cu_seqlens_q=starts[seq : seq + 2] - begin, seqused_k=inputs.kwargs["seqused_k"][seq : seq + 1],
            block_table=inputs.kwargs["block_table"][seq : seq + 1],
        )  # fmt: skip
        assert alone_lse is not None
        assert torch.equal(out[begin:end], alone_out)
        assert torch.equal(lse[:, begin:end], alone_lse)


@only_interpreted
@pytest.mark.parametrize("block_size", [4, 64])
def test_feature_keys_before_every_window_may_be_poison(block_size: int) -> None:
    # Two queries at tokens 98 and 99 see tokens 94 to 99. Tokens 64 to 93 lie in the same step.
    case = longer("tiny-gqa", (100,), q_lens=(2,), window=(4, 0), causal=True, block_size=block_size)
    clean, dirty = (make_inputs(case, layouts_of(case)[0]) for _ in range(2))
    table = dirty.kwargs["block_table"]
    for cache in (dirty.kwargs["k"], dirty.kwargs["v"]):
        for token in range(94):
            cache[int(table[0, token // block_size]), token % block_size] = float("nan")
    right, got = attend(clean, "triton"), attend(dirty, "triton")
    assert torch.equal(right[0], got[0])
    assert right[1] is not None
    assert got[1] is not None
    assert torch.equal(right[1], got[1])


@only_interpreted
def test_feature_rows_of_no_sequence_are_left_alone() -> None:
    case = replace(tiny("tiny-gqa"), padded_q=3)
    run(make_inputs(case, layouts_of(case)[0], out="packed"))


@only_interpreted
@pytest.mark.parametrize("rows", ROW_RECIPES)
@pytest.mark.parametrize("form", ["tiny-gqa", "tiny-q_v"])
def test_strides_of_q_and_out_layout_change_no_bit(form: str, rows: str) -> None:
    case = tiny(form)
    layout = layouts_of(case)[0]
    out, lse = run(make_inputs(case, layout))
    other_out, other_lse = run(make_inputs(case, layout, rows=rows, out=rows))
    assert lse is not None
    assert other_lse is not None
    assert torch.equal(out, other_out)
    assert torch.equal(lse, other_lse)


@only_interpreted
@pytest.mark.parametrize("table", TABLE_RECIPES)
def test_strides_of_the_table_layout_change_no_bit(table: str) -> None:
    case = tiny("tiny-gqa")
    layout = layouts_of(case)[0]
    assert torch.equal(run(make_inputs(case, layout))[0], run(make_inputs(case, layout, table=table))[0])


SCALED = {
    "rows-of-one-block": longer("tiny-scales", block_size=64),
    "rows-of-several-steps": longer("tiny-scales", block_size=3, window=(30, 0)),
    "rows-dense": longer("tiny-scales", paged=False),
    "groups-of-odd-width": longer("tiny-scales", num_kv_heads=1, scale_caches="groups", d_qk=36, d_v=20),
    "groups-of-a-row": longer("tiny-row-scales", d_qk=56, d_v=40),
    "rows-of-a-row": longer("tiny-row-scales", scale_caches="rows"),
    "rows-of-latents": longer("tiny-q_v-scales", scale_caches="rows", descales="per_head"),
    "all": longer("tiny-all-features", num_splits=0, kv_dtype="float8_e5m2", scale_caches="rows"),
    "row-with-two-pieces": longer("tiny-row-scales", d_qk=112, d_v=80),
}


@only_interpreted
@pytest.mark.parametrize("name", SCALED)
def test_features_of_scales(name: str) -> None:
    run(make_inputs(SCALED[name], layouts_of(SCALED[name])[0]))


LAYOUT_CASES = ("tiny-gqa", "tiny-row", "tiny-q_v", "tiny-pages", "tiny-row-pages", "tiny-row-fp8")


@only_interpreted
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_change_no_bit(name: str) -> None:
    layout = LAYOUTS[name]
    cases = [case for case in map(tiny, LAYOUT_CASES) if layout in layouts_of(case)]
    one_head = tiny("tiny-one-head")
    if not cases and layout in layouts_of(one_head):
        cases = [one_head]
    # Pages and fp8 are another feature: only for a layout that exists for them.
    plain_cases = [case for case in cases if not case.tags & {"pages", "fp8"}] or cases
    assert plain_cases, f"no tiny case fits {name}"
    for case in plain_cases:
        inputs = make_inputs(case, layout)
        out, lse = run(inputs)
        twin = packed_twin(inputs)
        if twin is not None:
            packed_out, packed_lse = attend(twin, "triton")
            assert torch.equal(out, packed_out)
            assert lse is not None
            assert packed_lse is not None
            assert torch.equal(lse, packed_lse)


# Scales in the gaps of rows, in a gap that K and V share, beside the cache, and with pages of several blocks.
@only_interpreted
@pytest.mark.parametrize(
    ("case", "name"),
    [("tiny-scales", name) for name in ("G2", "G11", "G12", "G14c", "A-padded-rows", "A-dim-major")]
    + [("tiny-row-scales", name) for name in ("M1", "M3b", "M6", "A-padded-rows", "A-absurd-strides")],
)
def test_layouts_of_scales_change_no_bit(case: str, name: str) -> None:
    one, layout = tiny(case), find_layout(name)
    if layout.only == "pages":
        one = replace(one, blocks_per_page=2)
    inputs = make_inputs(one, layout)
    out, lse = run(inputs)
    twin = packed_twin(inputs)
    if twin is not None:
        packed_out, packed_lse = attend(twin, "triton")
        assert torch.equal(out, packed_out)
        assert lse is not None
        assert packed_lse is not None
        assert torch.equal(lse, packed_lse)
