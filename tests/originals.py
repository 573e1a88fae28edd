"""What the tests of the adapters share: poisoned caches, and the attention of one sequence, written out.

Each test states from ``one_sequence`` what its original is documented to do, in the original's shapes and
dialect, and calls the statement twice: in float64 for the answer, in the dtype of ``q`` for the tolerance.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from anystride import UnsupportedError
from anystride.adapters.translation import Refusal
from anystride.testing import Inputs, find_case, find_layout, make_inputs
from anystride.testing.judgement import assert_close_as_plain
from anystride.testing.storage import read

__all__ = [
    "GQA_LAYOUTS", "MLA_LAYOUTS", "WHERE", "assert_as_stated", "assert_refused", "gqa_inputs", "mla_inputs",
    "never_waits", "one_sequence", "page_lists", "sequences",
]  # fmt: skip

MLA_LAYOUTS = ("M1", "M2", "M3", "A-inner-step-2", "A-dim-major", "A-blocks-innermost", "A-odd-page")
GQA_LAYOUTS = ("G16", "G2", "G6", "G9", "G15", "A-inner-step-2", "A-v-before-k", "A-odd-page")

# A device, and whether dimensions are those of a model.
WHERE = [
    pytest.param(("cpu", False), id="cpu"),
    pytest.param(("cuda", False), id="cuda", marks=pytest.mark.gpu),
    pytest.param(("cuda", True), id="cuda-model", marks=pytest.mark.gpu),
]


MODEL: dict[str, Any] = {"seqused_k": (0, 5, 700), "num_q_heads": 16}
MLA_MODEL = MODEL | {"d_qk": 576, "d_v": 512, "block_size": 64}
GQA_MODEL = MODEL | {"d_qk": 128, "d_v": 128, "block_size": 16}


def mla_inputs(where: tuple[str, bool], layout: str, **changes: Any) -> Inputs:
    """MLA rows, an empty sequence among others; one query token each unless ``changes`` say otherwise."""
    return _inputs("tiny-row", where, layout, MLA_MODEL, changes)


def gqa_inputs(where: tuple[str, bool], layout: str, **changes: Any) -> Inputs:
    """K and V of two heads, an empty sequence among others; one query token each, or as ``changes`` say."""
    return _inputs("tiny-gqa", where, layout, GQA_MODEL, changes)


def _inputs(
    case: str, where: tuple[str, bool], layout: str, of_model: dict[str, Any], changes: dict[str, Any]
) -> Inputs:
    device, is_model = where
    facts: dict[str, Any] = {"name": f"{case}-original", "q_lens": (1, 1, 1), "causal": False}
    facts |= (of_model if is_model else {}) | changes
    asked = replace(find_case(case), **facts)
    return make_inputs(asked, find_layout(layout), device, rows="padded_rows", table="columns_of_wider")


def one_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    dtype: torch.dtype,
    *,
    causal: bool = False,
    window_left: int = -1,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of one sequence: ``q [n, heads, d]`` over ``k [length, kv_heads, d]`` and ``v``.

    Returns:
        ``out [n, heads, d_v]`` and the natural ``lse [n, heads]``, both in ``dtype``: 0 and -inf where a
        token sees nothing.
    """
    q, k, v = (x.to(dtype) for x in (q, k, v))
    n, heads, length = q.shape[0], q.shape[1], k.shape[0]
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("nhd,lhd->hnl", q, k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    own = torch.arange(length - n, length, device=q.device)[:, None]
    keys = torch.arange(length, device=q.device)[None]
    hidden = (keys > own) & causal
    if window_left >= 0:
        hidden |= keys < own - window_left
    scores = scores.masked_fill(hidden, float("-inf"))
    empty = hidden.all(-1)  # also where there is no key
    weights = torch.softmax(scores, -1).masked_fill(empty[:, None], 0)
    lse = torch.logsumexp(scores, -1).masked_fill(empty, float("-inf"))
    return torch.einsum("hnl,lhd->nhd", weights, v), lse.t()


def sequences(inputs: Inputs) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """For each sequence its rows of q, and its rows of K and of V, ``[length, kv_heads, d]``."""
    lengths = torch.tensor(inputs.lengths, dtype=torch.int32, device=inputs.kwargs["q"].device)
    k, v = read(inputs.storage, inputs.kwargs["block_table"], lengths)
    row = key = 0
    for n, length in zip(inputs.case.q_lens, inputs.lengths, strict=True):
        yield slice(row, row + n), k[key : key + length], v[key : key + length]
        row, key = row + n, key + length


def page_lists(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """``indptr``, ``indices`` and ``last_page_len``, as FlashInfer has them, of the block table."""
    size = inputs.case.block_size
    pages = torch.tensor([-(-length // size) for length in inputs.lengths], dtype=torch.int32)
    table = inputs.kwargs["block_table"].cpu()
    indices = torch.cat([row[:n] for row, n in zip(table, pages.tolist(), strict=True)])
    # A request without pages has no last one: what stands there must not matter.
    last = torch.tensor([(n - 1) % size + 1 if n else 5 for n in inputs.lengths], dtype=torch.int32)
    indptr = torch.cat([torch.zeros(1, dtype=torch.int32), pages.cumsum(0, dtype=torch.int32)])
    return indptr, indices, last


def assert_as_stated(
    statement: Callable[[torch.dtype], tuple[Tensor, Tensor]],
    out: Tensor,
    lse: Tensor | None,
    dtype: torch.dtype,
) -> None:
    """Fail unless ``out`` and ``lse`` are what ``statement`` says, within twice its errors in ``dtype``."""
    right, plain = statement(torch.float64), statement(dtype)
    assert_close_as_plain("out", out, plain[0], right[0].cpu(), out.dtype)
    if lse is not None:
        assert_close_as_plain("lse", lse, plain[1], right[1].cpu(), lse.dtype)


def assert_refused(
    refusals: Mapping[str, Refusal], name: str, value: object, call: Callable[..., object], keyword: str = ""
) -> None:
    """Fail unless passing ``value`` is refused with the argument's name, its reason and a way out."""
    with pytest.raises(UnsupportedError) as caught:
        call(**{keyword or name: value})
    message = str(caught.value)
    assert name in message.splitlines()[0]
    assert refusals[name].why in message
    assert refusals[name].do in message
    assert list(caught.value.refusals) == [name]


@contextmanager
def never_waits(device: str) -> Iterator[None]:
    """Fail if the host waits for the device."""
    if device == "cpu":
        yield
        return
    with warnings.catch_warnings():  # that the mode is a prototype
        warnings.filterwarnings("ignore", "Synchronization debug mode")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
