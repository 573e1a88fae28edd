"""What ``explain`` says: who, why not, what moves; and that it says it without running anything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import anystride.explanation as explanation_module
from anystride import InvalidInputError, explain
from anystride.explanation import Explanation, copy_bandwidth
from anystride.problem import Relation
from anystride.testing import Inputs, find_case, find_layout, make_inputs


@pytest.fixture(autouse=True)
def _bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round number instead of a measurement; one test measures."""
    monkeypatch.setattr(explanation_module, "copy_bandwidth", lambda device: 50e9)


def inputs_of(case: str = "tiny-gqa", layout: str = "G2", **options: Any) -> Inputs:
    return make_inputs(find_case(case), find_layout(layout), **options)


def explained(case: str = "tiny-gqa", layout: str = "G2", **others: Any) -> Explanation:
    return explain(**inputs_of(case, layout).kwargs | others)


def test_the_text_says_who_what_and_how_much() -> None:
    inputs = inputs_of()
    num_blocks = inputs.kwargs["k"].shape[0]
    answer = explain(**inputs.kwargs)
    lines = dict(line.split(maxsplit=1) for line in str(answer).splitlines())
    assert lines["backend"] == "cpu"
    page = 2 * 8 * 2 * 16
    assert lines["call"] == (
        f"q bf16 [4, 4, 16] strides (64, 16, 1), "
        f"k bf16 [{num_blocks}, 1, 8, 2, 16] strides ({page}, 0, 32, 16, 1), "
        f"v bf16 [{num_blocks}, 1, 8, 2, 16] strides ({page}, 0, 32, 16, 1), cpu"
    )
    assert lines["relation"] == "separate"
    assert lines["config"].startswith("Config(")
    # 38 tokens of 2 heads, q and out of 4 rows of 4 heads, 1 + 5 table entries.
    moved = 38 * 2 * 2 * (16 + 16) + 4 * 4 * 2 * (16 + 16) + 4 * 6
    assert answer.bytes_moved == moved
    assert lines["moves"] == f"{moved:,} bytes: {moved / 50e9 * 1e6:.1f} us at 50 GB/s (measured)"
    assert lines["triton"].startswith("refuses ")
    assert len(lines) == len(str(answer).splitlines())


def test_scales_move_and_are_named() -> None:
    scaled = explained("tiny-row-scales", "A-padded-rows")
    plain = explained("tiny-row-scales", "A-padded-rows", k_scale_cache=None, v_scale_cache=None)
    assert scaled.bytes_moved == plain.bytes_moved + 38 * 2 * 4 * 4
    assert "scale_cache" not in plain.call
    for name in ("k", "v"):  # in rows of 96 bytes
        assert f", {name}_scale_cache 4 a row strides ({8 * 24}, 0, 24, 0, 1), " in scaled.call


def test_every_refusal_is_a_line_with_its_reason() -> None:
    refusals = {"triton": ["one", "two"], "cpu": ["three"]}
    answer = Explanation(None, refusals, Relation("v_in_k", 64), None, 10**6, 1e9, "the call")
    assert (
        str(answer)
        == """\
backend   none
call      the call
relation  v_in_k, V at element 64 of K's row
moves     1,000,000 bytes: 1000.0 us at 1 GB/s (measured)
triton refuses    one
triton refuses    two
cpu refuses       three"""
    )
    assert answer.floor_seconds == pytest.approx(1e-3)


def test_the_back_end_that_was_asked_for_is_the_one_explained() -> None:
    assert explained().backend == "cpu"
    assert explained(backend="reference").backend == "reference"
    refused = explained(backend="triton")
    assert refused.backend is None
    assert refused.config is None
    assert refused.refusals["triton"]
    assert str(refused).splitlines()[0] == "backend   none"
    assert "cpu" not in refused.refusals  # it could, and was not asked


def test_a_call_that_nobody_can_run_is_explained_and_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explanation_module, "bytes_to_move", lambda problem, call: 0)  # it reads lengths
    inputs = inputs_of()
    nowhere: dict[str, Any] = {
        name: x.to("meta") if isinstance(x, Tensor) else x for name, x in inputs.kwargs.items()
    }
    answer = explain(**nowhere)
    assert answer.backend is None
    assert list(answer.refusals) == ["hopper", "triton", "cpu"]
    assert all(answer.refusals.values())


@pytest.mark.parametrize(
    ("case", "layout", "relation", "line"),
    [
        ("tiny-gqa", "G2", ("separate", 0), "separate"),
        ("tiny-gqa", "G7", ("neighbours", 16), "neighbours, V at element 16 of K's row"),
        ("tiny-row", "M1", ("v_in_k", 0), "v_in_k, V at element 0 of K's row"),
        ("tiny-row", "M1b", ("v_in_k", 16), "v_in_k, V at element 16 of K's row"),
        ("tiny-q_v", "M7", ("split_latent", -32), "split_latent, V at element -32 of K's row"),
        ("tiny-q_v", "M9", ("separate", 0), "separate"),
    ],
)
def test_the_relation_is_named(case: str, layout: str, relation: tuple[str, int], line: str) -> None:
    answer = explained(case, layout)
    assert tuple(answer.relation) == relation
    assert f"relation  {line}" in str(answer).splitlines()


# Tokens, KV heads, bytes of a row, query rows times heads, elements to each, table entries
BYTES = {
    ("tiny-gqa", "G2"): (38, 2, 2 * 32, 16, 16 + 16, 6),
    ("tiny-row", "M1"): (38, 1, 2 * 48, 16, 48 + 32, 6),  # V is in K's row: 32 elements are not read again
    ("tiny-q_v", "M7"): (38, 1, 2 * 48, 16, 16 + 32 + 32, 6),  # q_v too
    ("tiny-fp8", "G2"): (38, 2, 32, 16, 16 + 16, 6),
    ("tiny-dense", "G2"): (38, 2, 2 * 32, 16, 16 + 16, 0),
    ("tiny-uneven-dims", "G13"): (38, 2, 2 * 64, 24, 24 + 40, 6),
    ("tiny-block-1", "G2"): (38, 2, 2 * 32, 16, 16 + 16, 38),
}


@pytest.mark.parametrize(("case", "layout"), BYTES)
def test_the_bytes_that_must_move_are_counted_from_the_lengths(case: str, layout: str) -> None:
    tokens, kv_heads, row, queries, per_query, entries = BYTES[case, layout]
    wanted = tokens * kv_heads * row + queries * per_query * 2 + 4 * entries
    assert explained(case, layout).bytes_moved == wanted


def test_lengths_decide_and_bounds_do_not() -> None:
    inputs = inputs_of()
    shorter = torch.tensor([0, 5, 1], dtype=torch.int32)
    whole, less = (explain(**inputs.kwargs | {"seqused_k": x}) for x in (inputs.kwargs["seqused_k"], shorter))
    # 32 tokens and 4 blocks fewer.
    assert whole.bytes_moved - less.bytes_moved == 32 * 2 * 2 * 32 + 4 * 4
    assert explain(**inputs.kwargs | {"max_seqlen_k": 2**20}).bytes_moved == whole.bytes_moved


def test_nothing_is_run_and_nothing_written() -> None:
    inputs = inputs_of(out="padded_rows")
    explain(**inputs.kwargs)
    inputs.assert_untouched()
    assert inputs.kwargs["out"].isnan().all()


def test_options_come_by_name_and_unknown_ones_are_refused() -> None:
    with pytest.raises(TypeError, match="page_table"):
        explained(page_table=None)
    with pytest.raises(InvalidInputError, match="dropout_p must be 0"):
        explained(dropout_p=0.5)
    with pytest.raises(InvalidInputError, match="softcap must not be negative"):
        explained(softcap=-1.0)


def test_all_features_are_understood() -> None:
    for case in ("tiny-all-features", "tiny-cp", "tiny-fp8", "tiny-batch-invariant", "tiny-pages"):
        assert explained(case).backend == "cpu"


def test_the_bandwidth_is_measured_once_for_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    first = copy_bandwidth(torch.device("cpu"))
    assert 1e8 < first < 1e13  # bytes a second: not bits, not GB
    assert copy_bandwidth(torch.device("cpu")) == first
    assert explained().bandwidth == first
