"""The checks themselves: they pass what is right, however it was rounded, and catch what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from anystride.testing import Inputs, find_case, find_layout, make_inputs
from anystride.testing.judgement import assert_close_as_plain, assert_right, attend, plain, reference

STEP = torch.finfo(torch.bfloat16).eps
LAYOUTS = {"kv": "G2", "row": "M1", "q_v": "M7"}


def inputs_of(name: str, **options: object) -> Inputs:
    case = find_case(name)
    return make_inputs(case, find_layout(LAYOUTS[case.form]), **options)  # type: ignore[arg-type]


def attention_in_steps(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """A right answer by another road: 64 keys at a time, base 2, float32 sums, weights in the dtype of q."""
    case, q = inputs.case, inputs.kwargs["q"]
    out = torch.empty((*q.shape[:2], case.d_v), dtype=q.dtype)
    lse = torch.empty((q.shape[1], q.shape[0]))
    begin = first = 0
    log2e = 1.4426950408889634
    for n, length in zip(case.q_lens, inputs.lengths, strict=True):
        top, total = torch.full((case.num_q_heads, n), -torch.inf), torch.zeros(case.num_q_heads, n)
        acc = torch.zeros(case.num_q_heads, n, case.d_v)
        queries = q[begin : begin + n].transpose(0, 1).float()
        centre = (length - n + torch.arange(n))[:, None]
        for step in range(0, length, 64):
            keys = slice(first + step, first + min(step + 64, length))
            k, v = (
                rows[keys].transpose(0, 1).repeat_interleave(case.group_size, 0).float()
                for rows in (inputs.values.k, inputs.values.v)
            )
            scores = queries @ k.transpose(1, 2) * (case.scale * log2e)
            scores = scores.masked_fill(torch.arange(step, step + k.shape[1]) > centre, -torch.inf)
            higher = torch.maximum(top, scores.amax(-1))
            shift = higher.masked_fill(higher.isinf(), 0)
            weights, decay = torch.exp2(scores - shift[..., None]), torch.exp2(top - shift)
            total = total * decay + weights.sum(-1)
            acc = acc * decay[..., None] + weights.to(q.dtype).float() @ v
            top = higher
        empty = total == 0
        rows = (acc / total.masked_fill(empty, 1)[..., None]).to(q.dtype)
        out[begin : begin + n] = rows.transpose(0, 1)
        lse[:, begin : begin + n] = ((top + total.log2()) / log2e).masked_fill(empty, -torch.inf)
        begin, first = begin + n, first + length
    return out, lse


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "name",
    ["tiny-gqa", "tiny-float32", "row-float32", "row-float16", "fp8-e4m3", "d-16", "d-512", "length-0",
     "length-1", "heads-row-1", "more-queries-than-keys", "deepseek-v3-mtp", "mixed", "batch-invariant-long"],
)  # fmt: skip
def test_a_right_answer_by_another_road_passes(name: str, seed: int) -> None:
    case = replace(find_case(name), causal=True, window=(-1, -1))
    inputs = make_inputs(case, find_layout(LAYOUTS[case.form]), seed=seed)
    assert_right(inputs, *attention_in_steps(inputs))


def test_what_the_reference_says_is_right_and_plain_is_right_too() -> None:
    for name in ("all-features", "row-all-features", "q_v-all-features", "fp8-all-features", "cp-3-window"):
        inputs = inputs_of(name)
        out, lse = attend(inputs, "reference")
        assert_right(inputs, out, lse)
        right_out, right_lse = reference(inputs)
        assert torch.equal(out, right_out.to(out.dtype))
        assert lse is not None
        assert torch.equal(lse, right_lse.float())
        assert_right(inputs, *plain(inputs))


def test_the_reference_does_not_look_at_strides() -> None:
    case = find_case("tiny-row")
    right = reference(make_inputs(case, find_layout("M1")))
    for name in ("M3", "A-dim-major", "A-huge-blocks"):
        other = reference(make_inputs(case, find_layout(name)))
        assert all(torch.equal(a, b) for a, b in zip(right, other, strict=True))


def with_a_key_missing(inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    return attend(inputs, "reference", seqused_k=inputs.kwargs["seqused_k"] - 1, causal=False)


def with_another_mask(inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    return attend(inputs, "reference", causal=False)


def with_a_larger_scale(inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    return attend(inputs, "reference", softmax_scale=inputs.case.scale * 1.03)


def with_one_wrong_element(inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    out, lse = attend(inputs, "reference")
    out[-1, -1, -1] += 0.1
    return out, lse


def with_heads_swapped(inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    out, lse = attend(inputs, "reference")
    return out[:, [1, 0, *range(2, out.shape[1])]], lse


@pytest.mark.parametrize(
    "fault",
    [with_a_key_missing, with_another_mask, with_a_larger_scale, with_one_wrong_element, with_heads_swapped],
)
@pytest.mark.parametrize("name", ["llama-3-8b", "deepseek-v3-mtp", "tiny-float32"])
def test_a_small_fault_is_caught(name: str, fault: Callable[[Inputs], tuple[Tensor, Tensor | None]]) -> None:
    case = replace(find_case(name), seqused_k=(100, 150), q_lens=(2, 2), causal=True, window=(-1, -1))
    inputs = make_inputs(case, find_layout(LAYOUTS[case.form]))
    assert_right(inputs, *attend(inputs, "reference"))
    out, lse = fault(inputs)
    with pytest.raises(AssertionError, match="off by more than twice plain PyTorch"):
        assert_right(inputs, out, lse)


def test_a_wrong_lse_is_caught_though_out_is_right() -> None:
    inputs = inputs_of("llama-3-8b")
    out, lse = attend(inputs, "reference")
    assert lse is not None
    for wrong in (lse / 0.6931472, lse + 0.02):
        with pytest.raises(AssertionError, match="lse: off by more"):
            assert_right(inputs, out, wrong)
    with pytest.raises(AssertionError, match="if and only if"):
        assert_right(inputs, out, None)


def test_empty_rows_must_be_zero_and_minus_infinity() -> None:
    inputs = inputs_of("length-0")  # its first sequence is empty
    out, lse = attend(inputs, "reference")
    assert lse is not None
    for wrong in (float("inf"), 0.0, float("nan")):
        changed = lse.clone()
        changed[0, 0] = wrong
        with pytest.raises(AssertionError, match="lse: 1 of"):
            assert_right(inputs, out, changed)
    for wrong in (float("inf"), 1.0, float("nan")):
        changed = out.clone()
        changed[0, 0, 0] = wrong
        with pytest.raises(AssertionError, match="out: "):
            assert_right(inputs, changed, lse)


def test_wrong_shapes_dtypes_and_another_out_are_caught() -> None:
    inputs = inputs_of("tiny-gqa", out="packed")
    out, lse = attend(inputs, "reference")
    assert lse is not None
    with pytest.raises(AssertionError, match="the given out was not returned"):
        assert_right(inputs, out.clone(), lse)
    with pytest.raises(AssertionError, match=r"out is torch\.float32"):
        assert_right(inputs, out.float(), lse)
    with pytest.raises(AssertionError, match="lse: shape"):
        assert_right(inputs, out, lse[:, 1:])
    with pytest.raises(AssertionError, match=r"lse is torch\.float64"):
        assert_right(inputs, out, lse.double())


def test_a_touched_cache_is_caught() -> None:
    inputs = inputs_of("tiny-gqa")
    out, lse = attend(inputs, "reference")
    inputs.kwargs["k"][0, 0, 0, 0] = 1.0
    with pytest.raises(AssertionError, match="1 elements of the cache were written"):
        assert_right(inputs, out, lse)


def test_the_message_names_the_worst_element() -> None:
    right = torch.ones(2, 3, dtype=torch.float64)
    got = right.clone()
    got[1, 2] = 1.5
    with pytest.raises(
        AssertionError, match=r"(?s)x: off .*largest error  5\.000e-01.*\[1, 2\]: got 1\.5, right 1,"
    ):
        assert_close_as_plain("x", got, right, right, torch.bfloat16)


def test_one_rounding_step_is_allowed_where_plain_is_exact_by_luck() -> None:
    right = torch.full((100,), 1.0, dtype=torch.float64)
    for error, passes in ((STEP / 2, True), (2.5 * STEP, False)):
        got = right.clone()
        got[0] += error
        if passes:
            assert_close_as_plain("x", got, right, right, torch.bfloat16)
        else:
            with pytest.raises(AssertionError):
                assert_close_as_plain("x", got, right, right, torch.bfloat16)


def test_rows_of_no_sequence_are_not_compared() -> None:
    inputs = inputs_of("padded-q", out="packed")
    assert_right(inputs, *attend(inputs, "reference"))
