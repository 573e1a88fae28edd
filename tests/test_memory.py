"""Results are packed; scratch that is kept belongs to one stream, and is zeros when it is new."""

from __future__ import annotations

import pytest
import torch

from anystride import memory

CPU = torch.device("cpu")
KEPT_SCRATCH = memory.kept_scratch  # without the poison


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_KEPT", {})


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4), (2, 0, 4), (0,)])
def test_fresh_buffers_are_packed(shape: tuple[int, ...]) -> None:
    buffer = memory.allocate(shape, torch.float16, CPU)
    assert (buffer.shape, buffer.dtype) == (shape, torch.float16)
    assert buffer.is_contiguous()


def test_calls_on_one_stream_share_what_is_kept() -> None:
    first = KEPT_SCRATCH(CPU, 7, 100, 32)
    assert (first.partial.dtype, first.schedule.dtype) == (torch.float32, torch.int32)
    assert (first.partial.shape, first.schedule.shape) == ((100,), (32,))
    assert not first.partial.any()
    assert not first.schedule.any()
    for values, words in ((100, 32), (1, 0), (100, 16)):
        again = KEPT_SCRATCH(CPU, 7, values, words)
        assert all(one is other for one, other in zip(first, again, strict=True))


def test_streams_share_nothing() -> None:
    first, other = KEPT_SCRATCH(CPU, 7, 100, 32), KEPT_SCRATCH(CPU, 8, 100, 32)
    assert first.partial.data_ptr() != other.partial.data_ptr()
    assert first.schedule.data_ptr() != other.schedule.data_ptr()


@pytest.mark.parametrize(("values", "words"), [(101, 1), (1, 33), (101, 33)])
def test_what_is_kept_grows_and_is_zeros_again(values: int, words: int) -> None:
    first = KEPT_SCRATCH(CPU, 7, 100, 32)
    first.schedule.fill_(5)
    grown = KEPT_SCRATCH(CPU, 7, values, words)
    assert (grown.partial.shape, grown.schedule.shape) == ((max(values, 100),), (max(words, 32),))
    assert not grown.schedule.any()
    assert KEPT_SCRATCH(CPU, 7, 100, 32) is grown
