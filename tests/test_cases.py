"""The table of cases: what it claims to cover is there, its tags are true, and all of it can be built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch

from anystride.testing import (
    CASES,
    LAYOUTS,
    Case,
    Inputs,
    Layout,
    compatible,
    find_case,
    find_layout,
    make_inputs,
    select,
)
from anystride.testing.cases import TAGS, varied_lengths
from anystride.testing.judgement import assert_right, attend

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
RUNNABLE = select("full")
PACKED = {"kv": "G16", "row": "M1", "q_v": "M9"}


def test_names_are_unique_and_fit_a_test_id() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    for name in names:
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-._"), name


def test_no_two_cases_ask_the_same() -> None:
    seen: dict[Case, str] = {}
    for case in CASES:
        asked = replace(case, name="", source="", tags=frozenset())
        assert asked not in seen, f"{case.name} is {seen.get(asked)} again"
        seen[asked] = case.name


def test_cases_are_found_by_name_and_by_tags() -> None:
    assert find_case("llama-3-8b").num_q_heads == 32
    assert {case.name for case in select("quick", "q_v", "model")} == {"deepseek-v3-q_v"}
    with pytest.raises(KeyError, match="no case 'llama'"):
        find_case("llama")
    with pytest.raises(KeyError, match="no tag 'qiuck'; there are quick, full, cpu"):
        select("qiuck")


def keys_and_queries(case: Case) -> int:
    return max(*case.seqused_k, *case.q_lens)


TRUE_OF: dict[str, Callable[[Case], bool]] = {
    "quick": lambda c: keys_and_queries(c) <= 1200,
    "full": lambda c: "bench" not in c.tags,
    "cpu": lambda c: keys_and_queries(c) <= 4200 and "bench" not in c.tags,
    "tiny": lambda c: max(c.seqused_k) <= 40 and c.num_q_heads <= 8 and c.num_splits <= 2,
    "bench": lambda c: min(c.seqused_k) >= 1 and not c.tags & {"full", "cpu", "quick"},
    **{tag: lambda c: "bench" in c.tags for tag in TAGS if tag.startswith("suite-")},
    "model": lambda c: "edge" not in c.tags,
    "edge": lambda c: "model" not in c.tags,
    "gqa": lambda c: c.form == "kv",
    "mla": lambda c: c.form in ("row", "q_v"),
    "q_v": lambda c: c.form == "q_v",
    "prefill": lambda c: max(c.q_lens) >= 32,
    "fp8": lambda c: c.torch_kv_dtype in (E4M3, E5M2),
    "cp": lambda c: c.cp is not None,
    "pages": lambda c: c.blocks_per_page > 1,
    "dense": lambda c: not c.paged,
}
FOLLOWS = ("gqa", "mla", "q_v", "prefill", "fp8", "cp", "pages", "dense")  # present wherever they are true


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_tags_are_known_and_true(case: Case) -> None:
    assert case.tags <= TAGS.keys()
    for tag in case.tags:
        assert TRUE_OF[tag](case), tag
    for tag in FOLLOWS:
        assert (tag in case.tags) == TRUE_OF[tag](case), tag
    assert len(case.tags & {"model", "edge", "bench"}) == 1
    assert len(case.q_lens) == case.batch
    assert case.source


def test_every_tag_selects_something_and_quick_is_a_small_share() -> None:
    for tag in TAGS:
        assert select(tag), tag
    assert len(select("quick")) < len(RUNNABLE) / 3
    for tag in ("mla", "q_v", "prefill", "fp8", "cp", "pages", "dense", "model"):
        assert select("quick", tag), f"no quick case shows {tag}"


# ---------------------------------------------------------------------------------------------------
# Coverage: what the project promises to test. Take a case out, and one of these fails.
# ---------------------------------------------------------------------------------------------------

Claim = Callable[[Case], bool]

TINY = select("tiny")
EDGES = tuple(case for case in select("edge") if case not in TINY)
FEATURES = (
    "dtype", "kv_dtype", "rope_as_q", "causal", "window", "softcap", "alibi", "sinks", "lse", "descales",
    "scale_caches", "cp", "num_splits", "batch_invariant", "softmax_scale",
)  # fmt: skip
DEFAULTS = {field.name: field.default for field in fields(Case)}


def asks(case: Case) -> set[str]:
    """The features that a case asks for; the scale of a split row is the row's, and no feature."""
    found = {name for name in FEATURES if getattr(case, name) != DEFAULTS[name]}
    return found - ({"softmax_scale"} if case.form != "kv" else set())


def alone(*features: str, form: str = "kv", where: Claim = lambda c: True) -> Claim:
    """A case of this form that asks for these features and for no other."""
    return lambda c: c.form == form and asks(c) == set(features) and where(c)


def plain_where(where: Claim, form: str = "kv") -> Claim:
    return alone(form=form, where=where)


def widths(form: str, d_qk: int, d_v: int) -> Claim:
    return plain_where(lambda c: (c.d_qk, c.d_v) == (d_qk, d_v) and c.paged and c.blocks_per_page == 1, form)


def heads(form: str, num_q_heads: int, num_kv_heads: int) -> Claim:
    return plain_where(lambda c: (c.num_q_heads, c.num_kv_heads) == (num_q_heads, num_kv_heads), form)


def pages(form: str, blocks: int, size: int) -> Claim:
    return plain_where(lambda c: (c.blocks_per_page, c.block_size) == (blocks, size), form)


def filled_more_than_once(form: str, size: int) -> Claim:
    return plain_where(lambda c: c.block_size == size and max(c.seqused_k) > size, form)


def fp8(cache: torch.dtype, *features: str, **options: object) -> Claim:
    wanted = {"kv_dtype", *features}
    return lambda c: (
        c.torch_kv_dtype == cache
        and asks(c) == wanted
        and all(getattr(c, name) == value for name, value in options.items())
    )


def scales(cache: torch.dtype, *features: str, **options: object) -> Claim:
    """A case with scale caches, by rows unless "groups" is among the features."""
    kind = "groups" if "groups" in features else "rows"
    others = [name for name in features if name != "groups"]
    return fp8(cache, "scale_caches", *others, scale_caches=kind, **options)


def parallel(form: str, world_size: int, interleave: int, *features: str) -> Claim:
    return alone("cp", *features, form=form, where=lambda c: c.cp == (world_size, interleave))


EVERYTHING = ("window", "softcap", "alibi", "sinks")

CLAIMS: dict[str, Claim] = {
    **{f"{d} wide": widths("kv", d, d) for d in (16, 64, 72, 80, 96, 128, 256, 512)},
    **{
        f"{d_qk} and {d_v} wide": widths("kv", d_qk, d_v)
        for d_qk, d_v in ((192, 128), (320, 256), (576, 512), (64, 128), (80, 96), (33, 27))
    },
    "a row of 96 and 64": widths("row", 96, 64),
    "a row that is all V": widths("row", 64, 64),
    "a row of 576 and 512": pages("row", 2, 64),
    "equal parts of a row": widths("q_v", 64, 64),
    **{f"groups of {n}": heads("kv", 2 * n, 2) for n in (3, 5, 7, 12)},
    **{
        f"{n} and {kv_heads} heads": heads("kv", n, kv_heads)
        for n, kv_heads in ((1, 1), (8, 8), (16, 1), (128, 1), (128, 8))
    },
    **{f"MLA, {n} heads": heads("row", n, 1) for n in (1, 5)},
    "MLA, 2 KV heads": heads("row", 6, 2),
    "MLA in two parts, 2 KV heads": heads("q_v", 6, 2),
    **{
        f"blocks of {size}, {form}": filled_more_than_once(form, size)
        for size in (1, 3, 16, 32, 64, 128, 256, 480, 528, 784, 1056)
        for form in ("kv", "row")
    },
    "pages of 4 blocks": pages("kv", 4, 16),
    "a page of 528 in blocks of 176": pages("kv", 3, 176),
    "pages, MLA in two parts": pages("q_v", 2, 32),
    **{f"no table, {form}": plain_where(lambda c: not c.paged, form) for form in ("kv", "row", "q_v")},
    "no table, slack": plain_where(lambda c: not c.paged and c.slack > 0),
    **{
        f"decode, speculative and prefill rows, {form}": plain_where(
            lambda c: {1, 4} < set(c.q_lens) and max(c.q_lens) >= 64, form
        )
        for form in ("kv", "row", "q_v")
    },
    "a chunk of thousands": plain_where(lambda c: max(c.q_lens) >= 2000 and min(c.q_lens) == 1),
    "a chunk in a batch of decode rows": plain_where(
        lambda c: 500 <= max(c.q_lens) < 2000 and min(c.q_lens) == 1
    ),
    "prompts without a past": plain_where(lambda c: c.q_lens == c.seqused_k and max(c.q_lens) >= 64),
    "an empty sequence": plain_where(lambda c: 0 in c.seqused_k and any(c.seqused_k) and c.batch == 3),
    "an empty sequence, MLA": plain_where(lambda c: 0 in c.seqused_k, "row"),
    "nothing in the cache": plain_where(lambda c: set(c.seqused_k) == {0}),
    "one token": plain_where(lambda c: c.seqused_k == (1,)),
    "exactly one block": plain_where(lambda c: all(n == c.block_size for n in c.seqused_k)),
    "one past a block": plain_where(lambda c: min(c.seqused_k) == c.block_size + 1 and c.batch == 2),
    "around a step of 64 keys": plain_where(lambda c: {63, 64, 65} <= set(c.seqused_k) and c.batch < 8),
    "300 sequences": plain_where(lambda c: c.batch >= 300),
    "one long sequence among short ones": plain_where(
        lambda c: c.batch > 4 and max(c.seqused_k) > 100 * sorted(c.seqused_k)[-2]
    ),
    "a sequence without queries": plain_where(lambda c: 0 in c.q_lens and max(c.q_lens) > 0),
    "no queries at all": plain_where(lambda c: c.total_q == 0),
    "more queries than keys": plain_where(
        lambda c: any(map(int.__gt__, c.q_lens, c.seqused_k)) and max(c.q_lens) > 20
    ),
    "more queries than keys, and sinks": alone(
        "sinks", where=lambda c: any(map(int.__gt__, c.q_lens, c.seqused_k))
    ),
    "rows of no sequence": plain_where(lambda c: c.padded_q > 0),
    "no lse": alone("lse"),
    "not causal": alone("causal"),
    "left window": alone("window", where=lambda c: c.window[0] > 0 and c.window[1] == -1),
    "right window": alone("window", "causal", where=lambda c: c.window[0] == -1 and c.window[1] > 0),
    "both windows": alone("window", "causal", where=lambda c: min(c.window) > 0),
    "a window of the query's own key": alone("window", where=lambda c: c.window == (0, 0)),
    "softcap": alone("softcap"),
    "alibi by head": alone("alibi", where=lambda c: c.alibi == "heads"),
    "alibi by sequence": alone("alibi", "causal", where=lambda c: c.alibi == "batch"),
    "sinks": alone("sinks", where=lambda c: not any(map(int.__gt__, c.q_lens, c.seqused_k))),
    "a scale": alone("softmax_scale"),
    "one split": alone("num_splits", where=lambda c: c.num_splits == 1),
    "several splits": alone("num_splits", where=lambda c: 1 < c.num_splits < 10),
    "more splits than steps": alone("num_splits", where=lambda c: c.num_splits > max(c.seqused_k) / 64 + 10),
    "several splits, MLA": alone("num_splits", form="row"),
    "a fixed split": alone("batch_invariant", where=lambda c: max(c.seqused_k) <= 2048),
    "a fixed split, MLA": alone("batch_invariant", form="row", where=lambda c: max(c.seqused_k) <= 2048),
    "several fixed splits": alone("batch_invariant", where=lambda c: max(c.seqused_k) > 2 * 2048),
    "several fixed splits, MLA": alone(
        "batch_invariant", form="row", where=lambda c: max(c.seqused_k) > 2048
    ),
    **{
        f"{dtype}, {form}": alone("dtype", form=form, where=lambda c, dtype=dtype: c.dtype == dtype)  # type: ignore[misc]
        for dtype in ("float16", "float32")
        for form in ("kv", "row")
    },
    **{f"everything, {form}": alone(*EVERYTHING, form=form) for form in ("kv", "row", "q_v")},
    "everything in splits": alone(*EVERYTHING, "num_splits"),
    **{
        f"{dtype}, {descales or 'no'} descales": fp8(
            dtype, *(["descales"] if descales else []), form="kv", descales=descales
        )
        for dtype in (E4M3, E5M2)
        for descales in ("", "scalar", "per_head")
    },
    "fp8, floats as descales": fp8(E4M3, "descales", descales="floats"),
    "fp8, expanded descales": fp8(E4M3, "descales", descales="expanded"),
    "fp8 under float16": fp8(E4M3, "descales", "dtype", dtype="float16"),
    "fp8 under float32": fp8(E4M3, "descales", "dtype", dtype="float32"),
    "fp8, MLA": fp8(E4M3, "descales", form="row"),
    "fp8, MLA in two parts": fp8(E5M2, "descales", form="q_v"),
    "fp8, everything": fp8(E4M3, "descales", *EVERYTHING),
    **{
        f"{dtype}, scales of rows": scales(dtype, form="kv", paged=True, blocks_per_page=1, block_size=16)
        for dtype in (E4M3, E5M2)
    },
    "scales of rows and a window": scales(E4M3, "window", form="kv"),
    "scales of rows and descales": scales(E4M3, "descales", form="kv"),
    "scales of rows under float16": scales(E4M3, "dtype", form="kv"),
    "scales of rows in pages": scales(E4M3, form="kv", blocks_per_page=4),
    "scales of rows in blocks of 3": scales(E4M3, form="kv", block_size=3),
    "scales of rows without a table": scales(E4M3, form="kv", paged=False),
    "scales of groups": scales(E5M2, "groups", form="kv"),
    "scales of rows and everything": scales(E4M3, "descales", *EVERYTHING, form="kv"),
    "scales of MLA rows": scales(E4M3, form="row"),
    "scales of groups of MLA rows": scales(E4M3, "groups", form="row"),
    "scales of latents": scales(E4M3, "rope_as_q", form="q_v"),
    "scales of groups of latents": scales(E4M3, "rope_as_q", "groups", form="q_v"),
    "scales of groups of latents and descales": scales(E4M3, "rope_as_q", "groups", "descales", form="q_v"),
    **{f"ranks {shares}": parallel("kv", *shares) for shares in ((2, 1), (4, 4), (2, 16), (3, 5))},
    **{f"ranks {shares}, MLA": parallel("row", *shares) for shares in ((4, 1), (2, 16))},
    "ranks, MLA in two parts": parallel("q_v", 2, 4),
    "ranks and a window": parallel("kv", 3, 4, "window"),
    "ranks, not causal": parallel("kv", 2, 1, "causal"),
    "ranks and alibi": parallel("kv", 2, 1, "alibi"),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_the_edges_that_are_claimed_are_in_the_table(claim: str) -> None:
    assert [case.name for case in EDGES if CLAIMS[claim](case)]


def test_no_edge_is_there_without_a_claim() -> None:
    assert [case.name for case in EDGES if not any(claim(case) for claim in CLAIMS.values())] == []


def test_ranks_have_several_query_tokens_and_shares_that_fit_no_block() -> None:
    cases = [case for case in EDGES if case.cp is not None]
    assert all(max(case.q_lens) > 1 for case in cases)
    assert any(case.block_size % case.cp.interleave for case in cases if case.cp is not None)


# What an interpreted kernel must have gone through once.
TINY_CLAIMS: dict[str, Claim] = {
    **{f"nothing, {form}": alone(form=form) for form in ("kv", "row", "q_v")},
    **{
        f"everything in splits, {form}": alone(*EVERYTHING, "num_splits", form=form)
        for form in ("kv", "row", "q_v")
    },
    "unequal widths, no power of two": plain_where(lambda c: c.d_qk != c.d_v and c.group_size == 3),
    "float32, both windows": alone("dtype", "causal", "window", where=lambda c: min(c.window) > 0),
    "fp8": fp8(E4M3, "descales", form="kv"),
    "fp8, MLA": fp8(E5M2, "descales", form="row"),
    "scales of rows": scales(E4M3, form="kv"),
    "scales of groups of MLA rows": scales(E5M2, "groups", form="row"),
    "scales of groups of latents": scales(E4M3, "rope_as_q", "groups", form="q_v"),
    "ranks": parallel("kv", 2, 4),
    "ranks, MLA": parallel("row", 2, 1),
    "pages": pages("kv", 2, 8),
    "pages, MLA": pages("row", 2, 8),
    "blocks of 1": plain_where(lambda c: c.block_size == 1),
    "one head": heads("kv", 1, 1),
    "no table": plain_where(lambda c: not c.paged),
    "fixed splits": alone("batch_invariant"),
    "prefill": plain_where(lambda c: max(c.q_lens) >= 32 and 0 in c.q_lens),
}  # fmt: skip


@pytest.mark.parametrize("claim", TINY_CLAIMS)
def test_what_an_interpreter_must_go_through_is_there_in_tiny(claim: str) -> None:
    assert [case.name for case in TINY if TINY_CLAIMS[claim](case)]


# Source: form, query heads, KV heads, d_qk, d_v.
MODELS = {
    "DeepSeek-V3, DeepSeek-R1, one GPU": ("row", 128, 1, 576, 512),
    "DeepSeek-V3, DeepSeek-R1, tensor parallel 8": ("row", 16, 1, 576, 512),
    "DeepSeek-V3, DeepSeek-R1, tensor parallel 16": ("row", 8, 1, 576, 512),
    "Kimi-K2": ("row", 64, 1, 576, 512),
    "GLM-4.7-Flash": ("row", 20, 1, 576, 512),
    "GLM-5": ("row", 64, 1, 576, 512),
    "GLM-4.5": ("kv", 96, 8, 128, 128),
    "Mistral Small 4": ("row", 32, 1, 320, 256),
    "Llama-3 8B": ("kv", 32, 8, 128, 128),
    "Llama-3 70B": ("kv", 64, 8, 128, 128),
    "Llama-3 70B, tensor parallel 8": ("kv", 8, 1, 128, 128),
    "Qwen3 30B-A3B": ("kv", 32, 4, 128, 128),
    "Qwen3 0.6B": ("kv", 16, 8, 128, 128),
    "gpt-oss": ("kv", 64, 8, 64, 64),
    "Gemma 2 9B": ("kv", 16, 8, 256, 256),
}


def of_model(source: str) -> list[Case]:
    return [case for case in select("model") if case.source.startswith(source)]


@pytest.mark.parametrize("source", MODELS)
def test_real_models(source: str) -> None:
    shapes = [(c.form, c.num_q_heads, c.num_kv_heads, c.d_qk, c.d_v) for c in of_model(source)]
    assert MODELS[source] in shapes


def test_what_is_special_in_real_models() -> None:
    assert any(max(case.q_lens) == 2 for case in of_model("DeepSeek")), "speculative decoding"
    assert any(case.form == "q_v" for case in of_model("DeepSeek"))
    assert any(case.form == "q_v" for case in of_model("Mistral"))
    assert all(case.scale == 192**-0.5 for case in of_model("DeepSeek")), "not the root of 576"
    assert all(case.sinks for case in of_model("gpt-oss"))
    assert {case.window for case in of_model("gpt-oss")} == {(127, 0), (-1, -1)}
    assert {case.softcap for case in of_model("Gemma")} == {50.0}
    assert {case.window for case in of_model("Gemma")} == {(63, 0), (-1, -1)}


def test_what_is_timed() -> None:
    assert len(select("suite-mla")) == 16
    assert {case.num_q_heads for case in select("suite-mla")} == {8, 16, 32, 64, 128}
    assert {max(case.q_lens) for case in select("suite-mla")} == {1, 2}
    assert {case.d_qk for case in select("suite-gqa")} == {64, 128, 256}
    assert {case.batch for case in select("suite-small")} == {1, 2, 4, 8}
    assert {case.scale_caches for case in select("suite-fp8")} == {"", "rows", "groups"}
    assert {case.form for case in select("suite-layouts")} == {"row", "kv"}
    assert {case.block_size for case in select("suite-blocks")} == {1, 3, 16, 48, 64, 528, 1056}
    assert {max(case.q_lens) for case in select("suite-prefill")} == {512, 2048}
    assert all(any(tag.startswith("suite-") for tag in case.tags) for case in select("bench"))


def test_varied_lengths_are_the_same_every_time_and_near_their_mean() -> None:
    lengths = varied_lengths(128, 8192)
    assert lengths == varied_lengths(128, 8192)
    assert min(lengths) >= 1
    assert abs(sum(lengths) / 128 - 8192) < 1024
    assert max(lengths) > 2 * min(lengths)


# ---------------------------------------------------------------------------------------------------
# Every case can be built, is right, and stands beside the same case in other layouts.
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", RUNNABLE, ids=lambda case: case.name)
def test_the_reference_answers_every_case(case: Case) -> None:
    inputs = make_inputs(case, find_layout(PACKED[case.form]), out="padded_rows")
    cache = sum(flat.nbytes for flat in inputs.storage.buffers)
    assert cache <= 32 << 20, "too much memory for a table that is run often"
    assert_right(inputs, *attend(inputs, "reference"))


def kind(layout: Layout) -> tuple[object, ...]:
    """What sets a layout apart in the code that builds it."""
    names = {field.name for field in fields(Layout)} - {
        "name",
        "users",
        "description",
        "strides",
        "mla_strides",
    }
    values = {
        name: getattr(layout, name)
        for name in names - {"v_strides", "base", "v_from_k", "order", "mla_order"}
    }
    return tuple(sorted((name, str(value)) for name, value in values.items()))


KINDS = list({kind(layout): layout for layout in LAYOUTS.values()}.values())


@pytest.mark.parametrize("layout", KINDS, ids=lambda layout: layout.name)
def test_every_case_can_be_built_in_every_kind_of_layout(layout: Layout) -> None:
    cases = [case for case in RUNNABLE if compatible(case, layout) is None]
    assert cases
    for case in cases:
        inputs = make_inputs(case, layout, guard=False)  # fill reads back what it wrote
        assert inputs.kwargs["k"].shape[:-1] == inputs.kwargs["v"].shape[:-1]
        assert inputs.kwargs["k"].dim() == (3 if not case.paged else 5 if case.blocks_per_page > 1 else 4)
        assert inputs.kwargs["k"].dtype == case.torch_k_dtype
        assert inputs.kwargs["v"].dtype == case.torch_kv_dtype


def test_every_case_fits_many_layouts() -> None:
    for case in RUNNABLE:
        fits = [layout for layout in LAYOUTS.values() if compatible(case, layout) is None]
        assert len(fits) >= 12 or case.rope_as_q, case.name  # two dtypes: only what has two buffers
    used = {
        layout.name for layout in LAYOUTS.values() for case in RUNNABLE if compatible(case, layout) is None
    }
    assert used == LAYOUTS.keys()


# ---------------------------------------------------------------------------------------------------
# Inputs: garbage where nobody may look, and the parts of a call as the case says.
# ---------------------------------------------------------------------------------------------------


def plain_inputs(name: str, **changes: object) -> Inputs:
    case = replace(find_case(name), **changes)  # type: ignore[arg-type]
    return make_inputs(case, find_layout(PACKED[case.form]))


def test_unused_table_entries_are_garbage_and_block_0_is_never_used() -> None:
    for case in RUNNABLE:
        if not case.paged or case.cp is not None:
            continue
        inputs = make_inputs(case, find_layout(PACKED[case.form]), guard=False)
        table, shape = inputs.kwargs["block_table"], inputs.storage.shape
        mine = []
        for row, length in zip(table.tolist(), case.seqused_k, strict=True):
            needed = -(-length // case.block_size)
            mine += row[:needed]
            assert len(row) >= needed + 3
            assert set(row[needed:]) <= {2147480000, -1}
        assert len(set(mine)) == len(mine), "a block belongs to one sequence"
        assert not mine or (min(mine) >= 1 and max(mine) == shape.num_blocks - 1)
        assert len(mine) <= shape.num_blocks - 2, "an unused block is left, full of NaN"


def test_rows_of_q_that_belong_to_nobody_are_nan() -> None:
    q = plain_inputs("padded-q").kwargs["q"]
    assert q[:3].isfinite().all()
    assert q[3:].isnan().all()
    assert q.shape[0] == 8


def test_ranks_share_one_cache_token_by_token() -> None:
    case = find_case("cp-3-window")
    assert case.cp is not None
    layout = find_layout("G2")
    ranks = [make_inputs(case, layout, rank=rank) for rank in range(3)]
    assert [sum(lengths) for lengths in zip(*(inputs.lengths for inputs in ranks), strict=True)] == list(
        case.seqused_k
    )
    for inputs in ranks:
        assert torch.equal(inputs.values.k, ranks[0].values.k)
        assert inputs.kwargs["cp_tot_seqused_k"].tolist() == list(case.seqused_k)
        assert tuple(inputs.kwargs["seqused_k"].tolist()) == inputs.lengths
    # Token 9 of the third sequence, which begins at row 1 of the values: 9 // 4 % 3 is rank 2, its row 1.
    third = ranks[2].kwargs["block_table"][2, 0]
    assert torch.equal(ranks[2].kwargs["k"][third, 1], ranks[0].values.k[1 + 9])


def test_seeds_change_values_and_names_do_too() -> None:
    case, layout = find_case("tiny-gqa"), find_layout("G2")
    first, again, second = (make_inputs(case, layout, seed=seed).kwargs["q"] for seed in (0, 0, 1))
    other = make_inputs(replace(case, name="other"), layout).kwargs["q"]
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)


def test_inputs_without_a_guard_say_that_they_cannot_check() -> None:
    inputs = make_inputs(find_case("tiny-gqa"), find_layout("G2"), guard=False)
    with pytest.raises(ValueError, match="guard=False"):
        inputs.assert_untouched()


@pytest.mark.parametrize(
    ("descales", "kinds"),
    [("floats", (float, ())), ("scalar", (torch.Tensor, ())), ("expanded", (torch.Tensor, (0, 0))),
     ("per_head", (torch.Tensor, (2, 1)))],
)  # fmt: skip
def test_descales_come_in_every_form(descales: str, kinds: tuple[type, tuple[int, ...]]) -> None:
    inputs = plain_inputs("fp8-e4m3", descales=descales)
    for name in ("q_descale", "k_descale", "v_descale"):
        descale = inputs.kwargs[name]
        assert isinstance(descale, kinds[0])
        if isinstance(descale, torch.Tensor):
            assert descale.stride() == kinds[1]


# Scale caches

BESIDE = ("G1", "G2", "G3", "G4", "G5", "G9", "G11", "G16", "A-padded-rows")


@pytest.mark.parametrize("layout", BESIDE)
def test_scales_that_nobody_may_read_are_nan(layout: str) -> None:
    case = find_case("tiny-scales")
    pages = 2 if find_layout(layout).only == "pages" else 1
    inputs = make_inputs(replace(case, blocks_per_page=pages), find_layout(layout))
    for name in ("k_scale_cache", "v_scale_cache"):
        scales = inputs.kwargs[name]
        assert scales.shape == inputs.kwargs[name[0]].shape[:-1]
        assert int(scales.isfinite().sum()) == inputs.scales[name].numel()
        assert scales.isnan().any()  # unused blocks and tails


def test_scales_are_the_same_in_every_layout_and_strides_are_not() -> None:
    case, values, strides = find_case("tiny-scales"), set(), set()
    for layout in LAYOUTS.values():
        if compatible(case, layout) is None and not layout.huge:
            inputs = make_inputs(case, layout, guard=False)
            scales = inputs.kwargs["k_scale_cache"]
            values.add(tuple(inputs.scales["k_scale_cache"].flatten().tolist()))
            strides.add(scales.stride())
            assert sorted(scales[scales.isfinite()].tolist()) == sorted(
                inputs.scales["k_scale_cache"].flatten().tolist()
            )
    assert len(values) == 1
    assert len(strides) >= 7  # five kinds beside the cache, and in two kinds of gaps


@pytest.mark.parametrize(
    ("name", "layout", "k_at", "v_at"),
    [
        ("tiny-scales", "G12", 16, 16),
        ("tiny-scales", "G14c", 32, 20),  # behind K's row and V's, which are neighbours: K's scale, then V's
        ("tiny-scales", "A-padded-rows", 16, 16),
        ("tiny-row-scales", "A-padded-rows", 48, 48 + 4 * 4),
    ],
)
def test_scales_lie_in_the_gaps_of_rows_that_have_some(name: str, layout: str, k_at: int, v_at: int) -> None:
    a = make_inputs(find_case(name), find_layout(layout)).kwargs
    for cache, at in (("k", k_at), ("v", v_at)):
        scales = a[f"{cache}_scale_cache"]
        assert scales.data_ptr() - a[cache].data_ptr() == at
        for n, stride, bytes_apart in zip(scales.shape, scales.stride(), a[cache].stride(), strict=False):
            if n > 1 and name == "tiny-scales":
                assert 4 * stride == bytes_apart


def test_only_what_is_fp8_has_scales() -> None:
    a = make_inputs(find_case("tiny-q_v-scales"), find_layout("M9")).kwargs
    assert "k_scale_cache" not in a
    assert a["k"].dtype == torch.bfloat16
    assert a["v_scale_cache"].shape == (*a["v"].shape[:-2], 4)
