"""Copying blocks: bit by bit between any two layouts, there and back, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreted import INTERPRETED, assert_passes_interpreted, only_compiled, only_interpreted
from test_store import SHAPES, is_writable
from torch import Tensor

from anystride import InvalidInputError
from anystride.cache import copy_blocks, gather_blocks
from anystride.testing import LAYOUTS, CacheShape, Layout
from anystride.testing.storage import Geometry, Storage

BACKEND = "triton" if INTERPRETED else "cpu"
IDS = [4, -1, 0, 2]


@only_compiled
def test_blocks_under_the_interpreter() -> None:
    assert_passes_interpreted(__file__, "-k", "interpreted")


def writable(shape: CacheShape) -> list[Layout]:
    return [layout for layout in LAYOUTS.values() if is_writable(layout, shape)]


def filled(layout: Layout, shape: CacheShape, device: str) -> Storage:
    """A cache full of random bits."""
    storage = layout.build(shape, device)
    for flat in storage.buffers:
        raw = flat.view(torch.uint8)
        raw.copy_(torch.randint(0, 256, raw.shape, dtype=torch.uint8))
    return storage


def twins_of(storage: Storage) -> list[Tensor]:
    """What the buffers hold, to be changed by the law."""
    return [flat.clone() for flat in storage.bits()]


def block_of(geometry: Geometry, buffers: Any, block: int) -> Tensor:
    """The view of a block ``[block_size, heads, d]``."""
    view = geometry.view(buffers)
    return view[block // view.shape[1], block % view.shape[1]]


def check_pair(
    one: Layout, other: Layout, shape: CacheShape, device: str = "cpu", backend: str = BACKEND
) -> None:
    source, target, again = (filled(layout, shape, device) for layout in (one, other, one))
    mapping = torch.tensor([[i, block] for i, block in enumerate(IDS)], device=device)
    for half in ("k", "v"):
        geometry = {s: getattr(s, f"{half}_geometry") for s in (source, target)}
        there, back = twins_of(target), twins_of(again)
        for i, block in enumerate(IDS):
            if block >= 0:
                block_of(geometry[target], there, i).copy_(block_of(geometry[source], source.bits(), block))
                place = block_of(geometry[source], back, block)
                place.copy_(block_of(geometry[source], source.bits(), block))
        gather_blocks(getattr(source, half), mapping[:, 1], getattr(target, half), backend=backend)
        for now, law in zip(target.bits(), there, strict=True):
            assert torch.equal(now, law), f"{half} from {one.name} to {other.name}"
        copy_blocks(getattr(target, half), getattr(again, half), mapping, backend=backend)
        for now, law in zip(again.bits(), back, strict=True):
            assert torch.equal(now, law), f"{half} from {other.name} back to {one.name}"


PAIRS = [
    pytest.param(name, layout, id=f"{name}-{layout.name}")
    for name in ("kv", "pages", "row", "q_v", "kv-e4m3")
    for layout in writable(SHAPES[name])
]


@pytest.mark.parametrize(("name", "layout"), PAIRS)
def test_blocks_go_to_every_layout_and_back(name: str, layout: Layout) -> None:
    for other in writable(SHAPES[name]):
        check_pair(layout, other, SHAPES[name])


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "layout"), PAIRS)
def test_blocks_go_to_every_layout_and_back_on_a_device(name: str, layout: Layout) -> None:
    for other in writable(SHAPES[name])[::4]:
        check_pair(layout, other, SHAPES[name], "cuda", "triton")


@only_interpreted
@pytest.mark.parametrize("name", ["kv", "odd", "pages", "row", "kv-e4m3"])
def test_blocks_interpreted(name: str) -> None:
    layouts = writable(SHAPES[name])
    for one, other in zip(layouts[::3], layouts[::-3], strict=False):
        check_pair(one, other, SHAPES[name])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_pages_of_one_cache_are_blocks_of_another(dtype: torch.dtype) -> None:
    paged = torch.randn(3, 4, 5, 2, 8)  # 3 pages of 4 blocks
    plain = torch.zeros(12, 5, 2, 8)
    mapping = torch.stack([torch.arange(12), torch.arange(11, -1, -1)], 1).to(dtype)
    copy_blocks(paged, plain, mapping, backend=BACKEND)
    assert torch.equal(plain.flip(0), paged.flatten(0, 1))
    paged_again = torch.zeros_like(paged)
    gather_blocks(plain, mapping[:, 1], paged_again, backend=BACKEND)
    assert torch.equal(paged_again, paged)


def test_a_prefix_is_copied_within_a_cache() -> None:
    cache = torch.randn(6, 4, 2, 8, dtype=torch.float16)
    before = cache.clone()
    copy_blocks(cache, cache, torch.tensor([[0, 5], [2, 3], [-1, 1], [1, -1]]), backend=BACKEND)
    before[5], before[3] = before[0], before[2]
    assert torch.equal(cache, before)


def test_more_blocks_than_are_held_at_once() -> None:
    source = torch.randn(300, 64, 8, 128, dtype=torch.bfloat16)  # 39 MB
    target = torch.zeros_like(source)
    gather_blocks(source, torch.arange(299, -1, -1), target)
    assert torch.equal(target, source.flip(0))


@pytest.mark.parametrize("count", [0, 3])
def test_nothing_to_copy(count: int) -> None:
    cache = torch.randn(6, 4, 2, 8)
    before = cache.clone()
    copy_blocks(cache, cache, torch.full((count, 2), -1), backend=BACKEND)
    gather_blocks(cache, torch.full((count,), -1), cache, backend=BACKEND)
    assert torch.equal(cache, before)


CACHE = torch.zeros(6, 4, 2, 8)
FAULTS: dict[str, tuple[tuple[Any, ...], str]] = {
    "no-tensor": ((CACHE, CACHE, [[0, 1]]), "block_mapping must be a tensor"),
    "one-column": ((CACHE, CACHE, torch.zeros(3, dtype=torch.int64)), r"of shape \[n, 2\]"),
    "floats": ((CACHE, CACHE, torch.zeros(3, 2)), "block_mapping must be int32 or int64"),
    "three-dimensions": ((CACHE[0], CACHE, torch.zeros(3, 2).long()), "source must be a paged cache"),
    "integers": ((CACHE, CACHE.int(), torch.zeros(3, 2).long()), "target must be a paged cache"),
    "expanded": (
        (CACHE[:, :, :1].clone(), CACHE[:1, :, :1].expand(6, 4, 1, 8), torch.zeros(3, 2).long()),
        "it can only be read",
    ),
    "other-dtype": ((CACHE, CACHE.half(), torch.zeros(3, 2).long()), "the same dtype, tokens, heads"),
    "other-blocks": ((CACHE, CACHE[:, :3], torch.zeros(3, 2).long()), "the same dtype, tokens, heads"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_wrong_is_said(name: str) -> None:
    arguments, message = FAULTS[name]
    with pytest.raises(InvalidInputError, match=message) as caught:
        copy_blocks(*arguments)
    assert str(caught.value).startswith("copy_blocks: ")


def test_a_target_of_too_few_blocks() -> None:
    with pytest.raises(InvalidInputError, match="a block for each id"):
        gather_blocks(CACHE, torch.arange(6), CACHE[:5])


def test_operators_pass_opcheck() -> None:
    source, target = torch.randn(2, 6, 4, 2, 8)
    checks = ("test_schema", "test_faketensor")
    mapping = torch.tensor([[0, 5], [2, 3]])
    torch.library.opcheck(
        torch.ops.anystride.copy_blocks.default, (source, target, mapping, None), test_utils=checks
    )
    torch.library.opcheck(
        torch.ops.anystride.gather_blocks.default, (source, mapping[:, 0], target, None), test_utils=checks
    )


def test_a_compiled_step_copies_what_an_eager_one_does() -> None:
    def step(source: Tensor, target: Tensor, mapping: Tensor) -> Tensor:
        copy_blocks(source * 2, target, mapping)
        return target.sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    source, mapping = torch.randn(6, 4, 2, 8), torch.tensor([[0, 5], [2, 3]])
    one, other = torch.zeros(2, 6, 4, 2, 8)
    assert torch.equal(step(source, one, mapping), compiled(source, other, mapping))
    assert torch.equal(one, other)
