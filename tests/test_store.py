"""The write side: rows go where their slots say, bit by bit, and nothing else changes.

The law is written down here, without a stride taken for granted: each element's place in the buffer is
computed from the view's own strides, and its bytes by PyTorch's conversions. ``cpu`` is held to it on every
layout of the catalogue, ``triton`` under the interpreter on layouts and features, and on a device on all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import INTERPRETED, assert_passes_interpreted, only_compiled, only_interpreted
from torch import Tensor

from anystride import InvalidInputError, UnsupportedError
from anystride.cache import store_kv, store_mla
from anystride.testing import LAYOUTS, CacheShape, Layout

BACKEND = "triton" if INTERPRETED else "cpu"
FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
SHAPES = {
    "kv": CacheShape(6, 4, 2, 8, 8),
    "uneven": CacheShape(6, 3, 3, 8, 16),
    "odd": CacheShape(5, 3, 2, 5, 5),
    "pages": CacheShape(6, 4, 2, 8, 8, blocks_per_page=2),
    "kv-e4m3": CacheShape(6, 4, 2, 16, 16, torch.float8_e4m3fn),
    "row": CacheShape(6, 4, 1, 24, 16, form="row"),
    "row-pages": CacheShape(6, 4, 1, 24, 16, form="row", blocks_per_page=2),
    "row-e5m2": CacheShape(6, 4, 1, 24, 16, torch.float8_e5m2, form="row"),
    "q_v": CacheShape(6, 4, 1, 8, 16, form="q_v"),
}


@only_compiled
def test_store_under_the_interpreter() -> None:
    assert_passes_interpreted(__file__, "-k", "interpreted or law")


def is_writable(layout: Layout, shape: CacheShape) -> bool:
    """Whether no two rows share bytes."""
    if layout.misfit(shape) or layout.huge or layout.lookalike in ("overlap", "same_pointer"):
        return False
    storage = layout.build(shape, "cpu")
    views = (storage.k,) if shape.form == "row" else (storage.k, storage.v)
    return all(s > 0 or n == 1 for view in views for n, s in zip(view.shape, view.stride(), strict=True))


PAIRS = [
    pytest.param(SHAPES[name], layout, id=f"{name}-{layout.name}")
    for name in SHAPES
    for layout in LAYOUTS.values()
    if is_writable(layout, SHAPES[name])
]


class Bytes(NamedTuple):
    """A buffer as bytes, and what it should become."""

    now: Tensor
    law: Tensor


def bytes_of(*views: Tensor) -> list[Bytes]:
    """The buffers behind some views, each once, full of what must not change."""
    found: dict[int, Bytes] = {}
    for view in views:
        storage = view.untyped_storage()
        if storage.data_ptr() not in found:
            flat = torch.empty(0, dtype=torch.uint8, device=view.device).set_(storage)
            flat.copy_(torch.randint(0, 256, flat.shape, dtype=torch.uint8))
            found[storage.data_ptr()] = Bytes(flat, flat.cpu().clone())
    return list(found.values())


def put(buffers: list[Bytes], view: Tensor, index: tuple[int, ...], values: Tensor) -> None:
    """The law: the bytes of a row at ``view[index]``, element by element."""
    (buffer,) = (
        x for x in buffers if x.now.untyped_storage().data_ptr() == view.untyped_storage().data_ptr()
    )
    size = view.itemsize
    base = view.storage_offset() + sum(i * s for i, s in zip(index, view.stride(), strict=False))
    for i, element in enumerate(values.contiguous().view(torch.uint8).view(-1, size)):
        at = (base + i * view.stride(-1)) * size
        buffer.law[at : at + size] = element


def place(cache: Tensor, slot: int) -> tuple[int, ...]:
    """Indices of a slot: page, block of the page, token; or block, token."""
    block, token = divmod(slot, cache.shape[-3])
    return (block, token) if cache.dim() == 4 else (*divmod(block, cache.shape[1]), token)


def quantised(row: Tensor, scale: float | Tensor | None, dtype: torch.dtype) -> Tensor:
    """A row as it is stored."""
    if dtype not in FP8.values():
        return row.to(dtype)
    row = row.float()
    if scale is not None:
        row = row / torch.as_tensor(scale, dtype=torch.float32)
    most = torch.finfo(dtype).max
    return row.clamp(-most, most).to(dtype)


def store_by_law(
    buffers: list[Bytes], cache: Tensor, rows: Tensor, slots: list[int], scale: Any, groups: int = 1
) -> None:
    """Store a half by the law; ``scale`` may be a tensor with a place a row."""
    for token, slot in enumerate(slots):
        if slot < 0:
            continue
        for head in range(rows.shape[1]):
            row, one = rows[token, head].cpu(), scale
            if isinstance(scale, Tensor) and scale.dim() >= 3:
                cut = row.float().view(groups, -1)
                own = cut.abs().amax(-1) / torch.finfo(cache.dtype).max
                own = torch.where(own == 0, 1.0, own)
                where = (
                    place(cache, slot) if rows.shape[1] == 1 and groups > 1 else (*place(cache, slot), head)
                )
                if groups > 1:
                    put(buffers, scale, where, own)
                else:
                    put(buffers, scale[..., None], where, own)
                row, one = (cut / own[:, None]).flatten(), None
            elif isinstance(scale, Tensor) and scale.numel() > 1:
                one = scale[head].cpu()
            put(buffers, cache, (*place(cache, slot), head), quantised(row, one, cache.dtype))


def assert_lawful(buffers: list[Bytes]) -> None:
    for buffer in buffers:
        different = (buffer.now.cpu() != buffer.law).nonzero()
        assert len(different) == 0, f"{len(different)} bytes differ, the first is {int(different[0])}"


def some_slots(shape: CacheShape) -> list[int]:
    """The first and the last, some between, one that is skipped."""
    last = shape.num_blocks * shape.block_size - 1
    return [last, 0, -1, last // 2, 1, last - shape.block_size]


def random_rows(
    tokens: int, heads: int, d: int, dtype: torch.dtype = torch.bfloat16, device: str = "cpu"
) -> Tensor:
    """Rows of an own stride, as a fused projection leaves them."""
    return torch.randn(tokens, heads + 1, d + 3).mul(3).to(dtype).to(device)[:, 1:, 2 : 2 + d]


def check_layout(shape: CacheShape, layout: Layout, device: str = "cpu", backend: str = BACKEND) -> None:
    storage = layout.build(shape, device)
    k, v = storage.k, storage.v
    slots = some_slots(shape)
    buffers = bytes_of(k, v)
    mapping = torch.tensor(slots, device=device)
    dtype = torch.bfloat16
    if shape.form == "row":
        latent, rope = (random_rows(len(slots), 1, d, dtype, device) for d in (16, 8))
        begins_with_rope = v.data_ptr() > k.data_ptr()
        parts = (v, k[..., :8] if begins_with_rope else k[..., 16:])
        cache: Any = parts if begins_with_rope else k
        store_mla(latent[:, 0], rope, cache, mapping, 0.5, backend=backend)
        for part, rows in zip(parts, (latent, rope), strict=True):
            store_by_law(buffers, part, rows, slots, 0.5)
    else:
        heads, widths = shape.num_kv_heads, (shape.d_qk, shape.d_v)
        key, value = (random_rows(len(slots), heads, d, dtype, device) for d in widths)
        if shape.form == "q_v":
            store_mla(value, key, (v, k), mapping, backend=backend)
        else:
            store_kv(key, value, k, v, mapping, backend=backend)
        for view, some in ((k, key), (v, value)):
            store_by_law(buffers, view, some, slots, None)
    assert_lawful(buffers)


@pytest.mark.parametrize(("shape", "layout"), PAIRS)
def test_rows_go_where_their_slots_say_in_every_layout(shape: CacheShape, layout: Layout) -> None:
    check_layout(shape, layout)


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "layout"), PAIRS)
def test_rows_go_where_their_slots_say_on_a_device(shape: CacheShape, layout: Layout) -> None:
    check_layout(shape, layout, "cuda", "triton")


HUGE = [layout for layout in LAYOUTS.values() if layout.huge]


def check_huge_layout(layout: Layout, device: str, backend: str) -> None:
    """Places beyond 2^31 elements: rows are there, and the other rows are as they were."""
    storage = layout.build(SHAPES["kv"], device)
    before = [view.clone() for view in (storage.k, storage.v)]
    slots = some_slots(SHAPES["kv"])
    rows = [random_rows(len(slots), 2, 8, storage.k.dtype, device) for _ in range(2)]
    store_kv(rows[0], rows[1], storage.k, storage.v, torch.tensor(slots, device=device), backend=backend)
    for view, old, some in zip((storage.k, storage.v), before, rows, strict=True):
        for token, slot in enumerate(slots):
            if slot >= 0:
                old[place(view, slot)] = some[token]
        assert torch.equal(view.view(torch.int16), old.view(torch.int16))


@pytest.mark.large
@pytest.mark.parametrize("layout", HUGE, ids=lambda layout: layout.name)
def test_rows_go_where_64_bits_say(layout: Layout) -> None:
    check_huge_layout(layout, "cpu", "cpu")


@pytest.mark.gpu
@pytest.mark.large
@pytest.mark.parametrize("layout", HUGE, ids=lambda layout: layout.name)
def test_rows_go_where_64_bits_say_on_a_device(layout: Layout) -> None:
    check_huge_layout(layout, "cuda", "triton")


@only_interpreted
@pytest.mark.parametrize("name", SHAPES)
def test_layouts_interpreted(name: str) -> None:
    layouts = [layout for layout in LAYOUTS.values() if is_writable(layout, SHAPES[name])]
    assert layouts
    for layout in layouts[:: max(1, len(layouts) // 5)]:
        check_layout(SHAPES[name], layout)


SCALES = ("none", "float", "tensor", "heads", "rows", "rows in the row")


def with_scales(dtype: torch.dtype, how: str, heads: int = 2, d: int = 16) -> tuple[Tensor, Any]:
    """A cache ``[5, 3, heads, d]`` and its scale; where they lie in one row it has ``d + 4`` bytes."""
    if how == "rows in the row":  # 132 bytes where d is 128
        raw = torch.empty(5, 3, heads, d + 4, dtype=torch.uint8)
        return raw[..., :d].view(dtype), raw.view(torch.float32)[..., d // 4]
    cache = torch.empty(5, 3, heads, d, dtype=dtype)
    scale: Any = {"none": None, "float": 0.037, "tensor": torch.tensor([0.037])}.get(how)
    if how == "heads":
        scale = torch.tensor([[0.5, 9.0], [0.03, 9.0]])[:, 0]
    elif how == "rows":
        scale = torch.empty(5, heads, 3).transpose(1, 2)
    return cache, scale


@pytest.mark.parametrize("how", SCALES)
@pytest.mark.parametrize("fp8", FP8)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_quantised_rows_are_the_law_s_bits(dtype: torch.dtype, fp8: str, how: str) -> None:
    slots = [14, 3, -1, 0, 7]
    halves = [with_scales(FP8[fp8], how) for _ in range(2)]
    written = [x for cache, scale in halves for x in (cache, scale) if isinstance(x, Tensor)]
    buffers = bytes_of(*(x for x in written if how.startswith("rows") or x.dtype == FP8[fp8]))
    key, value = (random_rows(5, 2, 16, dtype) for _ in range(2))
    key[1, 0] = 0  # a row of zeros has a scale of 1
    value[3, 1, :4] = torch.tensor([1e4, -1e4, float("inf"), 1e-9])
    if not how.startswith("rows"):
        value[4, 0, 0] = float("nan")
    else:
        value[3, 1, 2] = 5.0
    (k, k_scale), (v, v_scale) = halves
    store_kv(key, value, k, v, torch.tensor(slots), k_scale, v_scale, backend=BACKEND)
    for (cache, scale), some in zip(halves, (key, value), strict=True):
        store_by_law(buffers, cache, some, slots, scale)
    assert_lawful(buffers)


@pytest.mark.parametrize("groups", [1, 4])
def test_rows_of_mixed_bytes_hold_scales_of_groups(groups: int) -> None:
    # As DeepSeek-V3.2's 656 bytes: fp8, one float32 for each group, bfloat16.
    rank, d_rope = 64, 8
    raw = torch.empty(5, 3, rank + 4 * groups + 2 * d_rope, dtype=torch.uint8)
    latent = raw[..., :rank].view(torch.float8_e4m3fn)
    scale = raw[..., rank : rank + 4 * groups].view(torch.float32)
    rope = raw[..., rank + 4 * groups :].view(torch.bfloat16)
    slots = [14, 2, -3, 7]
    buffers = bytes_of(latent)
    kv_c, k_pe = random_rows(4, 1, rank), random_rows(4, 1, d_rope)
    store_mla(kv_c[:, 0], k_pe[:, 0], (latent, rope), torch.tensor(slots), scale, backend=BACKEND)
    if groups == 1:
        store_by_law(buffers, latent[:, :, None], kv_c, slots, scale)
    else:
        store_by_law(buffers, latent[:, :, None], kv_c, slots, scale, groups)
    store_by_law(buffers, rope[:, :, None], k_pe, slots, None)
    assert_lawful(buffers)


@pytest.mark.parametrize("fp8", FP8)
def test_every_number_is_rounded_as_pytorch_rounds_it_by_law(fp8: str) -> None:
    dtype = FP8[fp8]
    every = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    every = every[every.isfinite()].unique()
    between = (every[1:] + every[:-1]) / 2  # ties
    near = torch.cat([every, between, between.nextafter(every[1:]), between.nextafter(every[:-1])])
    near = torch.cat([near, near * 2**-12, torch.randn(500) * 10 ** torch.empty(500).uniform_(-12, 8)])
    near = torch.cat([near, -near, torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan")])])
    rows = near.view(-1, 1, 1)
    cache = torch.zeros(len(rows), 1, 1, 1, dtype=dtype)
    store_kv(rows, rows, cache, cache.clone(), torch.arange(len(rows)), backend=BACKEND)
    most = torch.finfo(dtype).max
    wanted = near.clamp(-most, most).to(dtype).view(torch.uint8)
    got = cache.view(torch.uint8).flatten()
    nan = near.isnan()
    assert torch.equal(got[~nan], wanted[~nan])
    assert cache.flatten().float()[nan].isnan().all()


@pytest.mark.parametrize("form", ["int32", "strided", "shorter", "empty", "all-skipped"])
def test_slots_of_every_form_by_law(form: str) -> None:
    k, v = torch.empty(2, 5, 3, 2, 8, dtype=torch.float16)
    buffers = bytes_of(k, v)
    slots = {"empty": [], "all-skipped": [-1, -1, -7]}.get(form, [4, -1, 14, 0])
    mapping = torch.tensor(slots, dtype=torch.int32 if form == "int32" else torch.int64)
    if form == "strided":
        mapping = torch.stack([mapping, mapping * 0 + 9], 1)[:, 0]
    tokens = len(slots) + 3 * (form == "shorter")
    key, value = (random_rows(tokens, 2, 8, torch.float16) for _ in range(2))
    store_kv(key, value, k, v, mapping, backend=BACKEND)
    for view, some in ((k, key), (v, value)):
        store_by_law(buffers, view, some, slots, None)
    assert_lawful(buffers)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_mapping_of_distinct_slots_by_law(data: st.DataObject) -> None:
    blocks, size = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    heads, d_k, d_v = (data.draw(st.integers(1, n)) for n in (3, 9, 9))
    every = list(range(blocks * size))
    chosen = data.draw(st.lists(st.sampled_from([-1, *every]), max_size=8))
    slots = [s for i, s in enumerate(chosen) if s < 0 or s not in chosen[:i]]
    pad = data.draw(st.integers(0, 3))
    store = torch.empty(blocks, 2, size * heads * 9 + pad, dtype=torch.float16)
    k = store[:, 0, : size * heads * d_k].unflatten(1, (size, heads, d_k))
    v = store[:, 1, : size * heads * d_v].unflatten(1, (heads, size, d_v)).transpose(1, 2)
    buffers = bytes_of(store)
    key, value = (random_rows(len(slots), heads, d, torch.float16) for d in (d_k, d_v))
    store_kv(key, value, k, v, torch.tensor(slots, dtype=torch.int64), backend=BACKEND)
    for view, some in ((k, key), (v, value)):
        store_by_law(buffers, view, some, slots, None)
    assert_lawful(buffers)


# On a device


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", FP8)
@pytest.mark.parametrize("how", SCALES)
def test_a_device_stores_what_a_cpu_stores(how: str, fp8: str) -> None:
    slots = torch.tensor([14, 3, -1, 0, 7])
    results = []
    key, value = (random_rows(5, 2, 16) for _ in range(2))
    key[1, 0] = 0
    key[3] *= -0.0
    value[3] = value[3].sign() * torch.finfo(value.dtype).tiny  # their own scale has no inverse
    for device, backend in (("cpu", "cpu"), ("cuda", "triton")):
        halves = [with_scales(FP8[fp8], how) for _ in range(2)]
        for cache, scale in halves:
            bytes_of(*(x for x in (cache, scale) if isinstance(x, Tensor) and x.dim() > 2))
            cache.view(torch.uint8).zero_()
            if isinstance(scale, Tensor) and scale.dim() > 2:
                scale.zero_()
        moved = [[x.to(device) if isinstance(x, Tensor) else x for x in half] for half in halves]
        (k, k_scale), (v, v_scale) = moved
        store_kv(key.to(device), value.to(device), k, v, slots.to(device), k_scale, v_scale, backend=backend)
        results.append([x.cpu() for half in moved for x in half if isinstance(x, Tensor)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


@pytest.mark.gpu
def test_a_graph_stores_where_the_slots_say_at_its_replay() -> None:
    k, v = torch.zeros(2, 6, 4, 2, 64, dtype=torch.bfloat16, device="cuda")
    key, value = torch.randn(2, 5, 2, 64, dtype=torch.bfloat16, device="cuda")
    slots = torch.full((5,), -1, device="cuda")
    store_kv(key, value, k, v, slots)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        store_kv(key, value, k, v, slots)
    for chosen in ([3, -1, 0, 23, 9], [-1, 1, 2, -1, 4]):
        k.zero_()
        v.zero_()
        slots.copy_(torch.tensor(chosen))
        graph.replay()
        for rows, cache in ((key, k), (value, v)):
            wanted = torch.zeros_like(cache)
            for token, slot in enumerate(chosen):
                if slot >= 0:
                    wanted[slot // 4, slot % 4] = rows[token]
            assert torch.equal(cache, wanted)


# What is refused


def arguments(**changes: Any) -> dict[str, Any]:
    rows = torch.randn(3, 2, 8, dtype=torch.bfloat16)
    cache = torch.zeros(5, 4, 2, 8, dtype=torch.bfloat16)
    whole = {"key": rows, "value": rows, "k_cache": cache, "v_cache": cache.clone()}
    return whole | {"slot_mapping": torch.arange(3)} | changes


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "slots-of-two-dimensions": (
        {"slot_mapping": torch.zeros(3, 1, dtype=torch.int64)},
        "slot_mapping must be",
    ),
    "slots-of-floats": ({"slot_mapping": torch.zeros(3)}, "slot_mapping must be int32 or int64"),
    "more-slots-than-rows": ({"slot_mapping": torch.arange(4)}, "a row for each slot"),
    "no-tensor": ({"key": [1, 2]}, "key must be a tensor"),
    "other-heads": ({"key": torch.zeros(3, 1, 8)}, "the same heads and dimensions"),
    "two-dimensions": ({"value": torch.zeros(3, 8)}, r"value must be \[num_tokens, num_kv_heads, d\]"),
    "integers": ({"k_cache": torch.zeros(5, 4, 2, 8, dtype=torch.int8)}, "paged cache of floating-point"),
    "expanded": ({"v_cache": torch.zeros(5, 4, 1, 8).expand(5, 4, 2, 8)}, "it can only be read"),
    "other-blocks": ({"v_cache": torch.zeros(6, 4, 2, 8)}, "must have the same blocks"),
    "scale-of-halves": ({"k_scale": torch.ones(2, dtype=torch.float16)}, "k_scale must be float32"),
    "scale-of-other-heads": ({"v_scale": torch.ones(3)}, "one number, one for each head"),
    "scale-of-zero": ({"k_scale": 0.0}, "k_scale must be positive and finite"),
    "scale-as-text": ({"v_scale": "1"}, "v_scale must be a number or a tensor"),
    "scales-of-other-blocks": ({"k_scale": torch.ones(5, 3, 2)}, "a place for each row of k_cache"),
    "scales-of-no-fp8": ({"k_scale": torch.ones(5, 4, 2)}, "for an fp8 cache only"),
    "scales-that-are-one": (
        {"k_cache": torch.zeros(5, 4, 2, 8).to(FP8["e4m3"]), "k_scale": torch.ones(5, 4, 1).expand(5, 4, 2)},
        "gives several scales the same memory",
    ),
    "backend": ({"backend": "hopper"}, "backend names no back end"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_wrong_is_said(name: str) -> None:
    changes, message = FAULTS[name]
    before = arguments()
    given = before | changes
    with pytest.raises(InvalidInputError, match=message) as caught:
        store_kv(**given)
    assert str(caught.value).startswith("store_kv: ")
    assert not given["v_cache"].float().any()


def test_all_faults_are_listed_with_what_was_got_and_needed() -> None:
    changes = {"slot_mapping": torch.zeros(3), "key": torch.zeros(3, 1, 8), "k_scale": torch.ones(7)}
    with pytest.raises(InvalidInputError) as caught:
        store_kv(**arguments(**changes))
    text = str(caught.value)
    assert len(caught.value.faults) == 3
    assert "also: " in text
    assert "got    float32 [3]" in text
    assert "do     slot_mapping = slot_mapping.flatten().to(torch.int64)" in text


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes tensors of the CPU")
def test_a_back_end_that_cannot_says_why() -> None:
    with pytest.raises(UnsupportedError, match="'triton' was asked for and refuses") as caught:
        store_kv(**arguments(backend="triton"))
    assert caught.value.refusals == {
        "triton": ["tensors are on cpu; needs a GPU, or TRITON_INTERPRET=1 to check a kernel slowly"]
    }


def test_computed_scales_are_not_for_an_fp8_rope_part() -> None:
    latent, rope = (torch.zeros(5, 4, 1, d).to(FP8["e4m3"]) for d in (16, 8))
    rows = torch.randn(3, 16), torch.randn(3, 8)
    with pytest.raises(InvalidInputError, match="the rope part must not be fp8"):
        store_mla(*rows, (latent, rope), torch.arange(3), torch.ones(5, 4, 1))


def test_a_scale_is_not_for_other_caches() -> None:
    given = arguments(k_scale=0.1, v_scale=torch.tensor([0.1, 3.0]))
    store_kv(**given)
    for rows, cache in (("key", "k_cache"), ("value", "v_cache")):
        assert torch.equal(given[cache][0, :3], given[rows])


# Operators


@pytest.mark.parametrize("how", SCALES)
def test_operators_pass_opcheck(how: str) -> None:
    written = how.startswith("rows")
    dtype = FP8["e4m3"] if written else torch.float16
    halves = [with_scales(dtype, how) for _ in range(2)] if written else []
    if not written:
        scale = with_scales(FP8["e4m3"], how)[1]
        halves = [(torch.zeros(5, 3, 2, 16, dtype=dtype), scale) for _ in range(2)]
    (k, k_scale), (v, v_scale) = halves
    number = k_scale if isinstance(k_scale, float) else None
    given = k_scale if isinstance(k_scale, Tensor) and not written else None
    own = (k_scale, v_scale) if written else (None, None)
    rows, slots = torch.randn(4, 2, 16), torch.tensor([3, -1, 0, 5])
    args = (rows, rows, k, v, slots, number, number, given, given, *own, None)
    # The check of the schema multiplies results, which PyTorch cannot do in fp8.
    checks = ("test_faketensor",) if written else ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.anystride.store_kv.default, args, test_utils=checks)


@pytest.mark.parametrize("parts", [1, 2])
def test_the_operator_of_mla_passes_opcheck(parts: int) -> None:
    caches = (torch.zeros(5, 3, 24), None) if parts == 1 else (torch.zeros(5, 3, 16), torch.zeros(5, 3, 8))
    rows, slots = torch.randn(4, 24), torch.tensor([3, -1, 0, 5])
    args = (rows[:, :16], rows[:, 16:], *caches, slots, None, None, None, None)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.anystride.store_mla.default, args, test_utils=checks)


def test_a_compiled_step_stores_what_an_eager_one_does() -> None:
    def step(key: Tensor, value: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> Tensor:
        store_kv(key * 2, value, k, v, slots)
        return k.sum()

    caches = [torch.zeros(2, 5, 4, 2, 8, dtype=torch.bfloat16).unbind(0) for _ in range(2)]
    rows = torch.randn(2, 3, 2, 8, dtype=torch.bfloat16)
    slots = torch.tensor([7, -1, 19])
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    sums = [run(*rows, *cache, slots) for run, cache in zip((step, compiled), caches, strict=True)]  # type: ignore[call-arg]
    assert torch.equal(*sums)
    for one, other in zip(*caches, strict=True):
        assert torch.equal(one, other)


def test_catalogue_is_covered() -> None:
    assert len(PAIRS) > 200
    left = {name for name in LAYOUTS if not any(name in str(pair.id) for pair in PAIRS)}
    assert left - {layout.name for layout in HUGE} == {"A-expanded-heads", "A-overlap", "A-same-pointer"}
