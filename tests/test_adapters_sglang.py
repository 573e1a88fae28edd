"""``anystride.adapters.sglang`` against SGLang's classes, or stand-ins of them where it is not installed.

Pools hold NaN wherever a request has no token, ``req_to_token`` numbers of no slot behind a request's tokens.
Each test states what a layer must return in float64, from the rows that it put into the pool itself.
"""

from __future__ import annotations

import functools
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sglang_stand_in
import torch
from originals import assert_as_stated, assert_refused, never_waits, one_sequence
from sglang_stand_in import published
from torch import Tensor

from anystride import UnsupportedError
from anystride.adapters import sglang as plugin

with sglang_stand_in.installed():
    from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
    from sglang.srt.mem_cache.kv_index_translator import KVIndexTranslator
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool, ReqToTokenPool
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

    from anystride.adapters.sglang import backend

ours: Any = backend  # tests look behind what it exports

EXAMPLE = Path(__file__).parents[1] / "examples" / "sglang_backend.py"
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LAYERS = 3
GARBAGE = 2**30  # behind a request's tokens: the number of no slot
HEADS, KV_HEADS, D = 4, 2, 16
RANK, ROPE = 32, 16


@pytest.fixture(autouse=True)
def _one_rank() -> Iterator[None]:
    with published():
        yield


@dataclass
class World:
    """A runner's pools, filled with poison, and what each request holds.

    ``rows[i][layer]`` are K and V of all tokens of request ``i``, as they were handed over.
    """

    kind: str = "mha"
    page: int = 1
    device: str = "cpu"
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype | None = None
    strided: bool = True
    lengths: tuple[int, ...] = (5, 1, 12)
    window_layer: int | None = None
    context: int = 40
    server: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kv_dtype = self.kv_dtype or self.dtype
        requests = len(self.lengths)
        pages = -(-self.context // self.page)
        self.size = requests * pages * self.page
        shape: tuple[Any, ...] = (self.size, self.page, kv_dtype)
        if self.kind == "mla":
            self.pool = MLATokenToKVPool(*shape, RANK, ROPE, LAYERS, self.device, False)
            self.buffers = [self.pool.kv_buffer]
        elif self.window_layer is None:
            self.pool = MHATokenToKVPool(*shape, KV_HEADS, D, LAYERS, self.device, False)
            self.buffers = [self.pool.k_buffer, self.pool.v_buffer]
        else:
            full = [layer for layer in range(LAYERS) if layer != self.window_layer]
            self.pool = SWAKVPool(
                self.size, self.size, self.page, kv_dtype, KV_HEADS, D, [self.window_layer], full, self.device
            )
            parts = (self.pool.full_kv_pool, self.pool.swa_kv_pool)
            self.buffers = [buffer for part in parts for buffer in (part.k_buffer, part.v_buffer)]
        for buffers in self.buffers:
            if self.strided:  # all layers of a token side by side, and a gap, as in a unified pool
                one = buffers[0]
                whole = one.new_empty((one.shape[0], len(buffers) + 1, *one.shape[1:]))
                buffers[:] = [whole[:, layer] for layer in range(len(buffers))]
            for buffer in buffers:
                buffer.fill_(0x7F if buffer.dtype == torch.uint8 else float("nan"))
        self.slots = ReqToTokenPool(requests, self.context, self.device, False)
        table = self.slots.req_to_token
        table[1:].fill_(GARBAGE)
        order = torch.randperm(requests * pages, generator=torch.Generator().manual_seed(3)) + 1
        self.own = [
            (order[i * pages : (i + 1) * pages, None] * self.page + torch.arange(self.page)).flatten()
            for i in range(requests)
        ]
        self.translator = KVIndexTranslator(
            req_to_token=table, token_to_kv_pool_allocator=None, token_to_kv_pool=self.pool,
            page_size=self.page, device=self.device,
        )  # fmt: skip
        if self.window_layer is not None:  # another permutation of the pages
            swa = torch.randperm(requests * pages, generator=torch.Generator().manual_seed(4)) + 1
            mapping = torch.cat([torch.zeros(1, dtype=torch.long), swa])[:, None] * self.page
            mapping = (mapping + torch.arange(self.page)).flatten()
            self.pool.register_mapping(mapping.to(self.device))
        self.runner = SimpleNamespace(
            token_to_kv_pool=self.pool,
            req_to_token_pool=self.slots,
            page_size=self.page,
            kv_index_translator=self.translator,
            use_mla_backend=self.kind == "mla",
            kv_cache_dtype=kv_dtype,
            kv_cache_dtype_str="auto",
            attention_chunk_size=None,
            model_config=SimpleNamespace(is_encoder_decoder=False),
        )
        with published(**self.server):
            self.backend = ours.AnystrideBackend(self.runner)
        self.rows: list[list[tuple[Tensor, Tensor]]] = [
            [self._new_rows(0) for _ in range(LAYERS)] for _ in self.lengths
        ]
        self.held = [0] * requests
        self.generator = torch.Generator().manual_seed(11)

    def _new_rows(self, n: int) -> tuple[Tensor, Tensor]:
        if self.kind == "mla":
            rows = self.random(n, 1, RANK + ROPE)
            return rows, rows[..., :RANK]
        return self.random(n, KV_HEADS, D), self.random(n, KV_HEADS, D)

    def random(self, *shape: int) -> Tensor:
        generator = getattr(self, "generator", None)
        return torch.randn(*shape, generator=generator).to(self.device, self.dtype)

    def batch(self, new: list[int], mode: Any = ForwardMode.EXTEND, **more: Any) -> Any:
        """A step in which request ``i`` gets ``new[i]`` tokens; all are in it, the last one first."""
        lengths = []
        slots = []
        for i in self.order:
            held, n = self.held[i], new[i]
            here = self.own[i][held : held + n]
            self.slots.req_to_token[i + 1, held : held + n] = here.to(self.device, torch.int32)
            slots.append(here)
            self.held[i] += n
            lengths.append(self.held[i])
        seq_lens = torch.tensor(lengths, dtype=torch.int64)
        counts = [new[i] for i in self.order]
        if mode.is_extend():
            more = {
                "extend_seq_lens": torch.tensor(counts, dtype=torch.int32, device=self.device),
                "extend_seq_lens_cpu": counts,
                "positions": torch.zeros(sum(counts), dtype=torch.int64, device=self.device),
                "seq_lens_cpu": seq_lens,
            } | more
        made = ForwardBatch(
            forward_mode=mode,
            batch_size=len(lengths),
            input_ids=torch.zeros(sum(counts), dtype=torch.int64, device=self.device),
            req_pool_indices=torch.tensor([i + 1 for i in self.order], device=self.device),
            seq_lens=seq_lens.to(self.device),
            out_cache_loc=torch.cat(slots).to(self.device),
            seq_lens_sum=sum(lengths),
        )
        for name, value in more.items():
            setattr(made, name, value)
        self.translator.bind_own_plan(made)
        return made

    @property
    def order(self) -> list[int]:
        return list(reversed(range(len(self.lengths))))

    def run(
        self,
        layer: Any,
        batch: Any,
        new: list[int],
        *,
        apart: bool = True,
        causal: bool = True,
        sinks: Tensor | None = None,
        factors: tuple[float, float] = (1.0, 1.0),
        **more: Any,
    ) -> tuple[Any, Callable[[torch.dtype], tuple[Tensor, Tensor]]]:
        """One layer of a step: what it returned, and the statement of what it must."""
        tokens = sum(new)
        q = self.random(tokens, HEADS, layer.head_dim)
        pairs = [self._new_rows(new[i]) for i in self.order]
        for i, (k, v) in zip(self.order, pairs, strict=True):
            held_k, held_v = self.rows[i][layer.layer_id]
            self.rows[i][layer.layer_id] = torch.cat([held_k, k]), torch.cat([held_v, v])
        k, v = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        if sinks is not None:
            more["sinks"] = sinks
        given = (q.flatten(1), k, v)
        if self.kind == "mla" and apart:
            more |= {"q_rope": q[..., RANK:], "k_rope": k[..., RANK:]}
            given = (q[..., :RANK], k[..., :RANK], k[..., :RANK])
        before = [x.clone() for x in given]
        with never_waits(self.device):
            result = self.backend.forward(*given, layer, batch, **more)
        assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))  # the caller's rows
        kept = [self.rows[i][layer.layer_id] for i in self.order]
        kv_dtype = self.kv_dtype or self.dtype

        def statement(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            outs, lses, row = [], [], 0
            for i, (k, v) in zip(self.order, kept, strict=True):
                k, v = ((x / f).to(kv_dtype).to(dtype) * f for x, f in zip((k, v), factors, strict=True))
                n = new[i]
                out, lse = one_sequence(
                    q[row : row + n], k, v, layer.scaling, dtype,
                    causal=causal, window_left=layer.sliding_window_size, softcap=layer.logit_cap,
                )  # fmt: skip
                if sinks is not None:
                    whole = torch.logaddexp(lse, sinks.to(dtype))
                    out, lse = out * torch.exp(lse - whole)[..., None], whole
                outs.append(out)
                lses.append(lse)
                row += n
            return torch.cat(outs), torch.cat(lses)

        return result, statement


def make_layer(world: World, layer_id: int = 1, **more: Any) -> Any:
    if world.kind == "mla":
        return RadixAttention(HEADS, RANK + ROPE, 0.15, 1, layer_id, v_head_dim=RANK, **more)
    return RadixAttention(HEADS, D, 0.3, KV_HEADS, layer_id, **more)


def check(world: World, result: Tensor, statement: Any, dtype: torch.dtype | None = None) -> None:
    width = RANK if world.kind == "mla" else D
    assert result.shape == (result.shape[0], HEADS * width)
    assert_as_stated(statement, result.unflatten(1, (HEADS, width)), None, dtype or world.dtype)


def decoded(world: World, q: Tensor, layer: Any) -> Callable[[torch.dtype], tuple[Tensor, Tensor]]:
    """What a row of each request must return over all that the request holds."""

    def statement(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        both = [
            one_sequence(
                q[b : b + 1], world.rows[i][layer.layer_id][0], world.rows[i][layer.layer_id][1],
                layer.scaling, dtype, causal=True, window_left=layer.sliding_window_size,
            )
            for b, i in enumerate(world.order)
        ]  # fmt: skip
        return torch.cat([out for out, _ in both]), torch.cat([lse for _, lse in both])

    return statement


def step(world: World, layer: Any, new: list[int], mode: Any = ForwardMode.EXTEND, **more: Any) -> Tensor:
    batch = world.batch(new, mode)
    with never_waits(world.device):
        world.backend.init_forward_metadata(batch)
    result, statement = world.run(layer, batch, new, **more)
    check(world, result, statement)
    assert isinstance(result, Tensor)
    return result


@pytest.mark.parametrize("strided", [True, False], ids=["strided", "packed"])
@pytest.mark.parametrize("page", [1, 3, 64])
@pytest.mark.parametrize("kind", ["mha", "mla"])
@pytest.mark.parametrize("device", DEVICES)
def test_prompts_prefixes_and_decoding(device: str, kind: str, page: int, strided: bool) -> None:
    world = World(kind, page, device, strided=strided, context=130 if page == 64 else 40)
    layer = make_layer(world)
    step(world, layer, list(world.lengths))  # prompts
    step(world, layer, [3, 1, 7])  # what follows a cached prefix, and a row that decodes among it
    for _ in range(3):
        step(world, layer, [1, 1, 1], ForwardMode.DECODE)


@pytest.mark.parametrize("device", DEVICES)
def test_mla_rows_may_come_whole(device: str) -> None:
    world = World("mla", 4, device)
    layer = make_layer(world)
    step(world, layer, list(world.lengths), apart=False)
    step(world, layer, [1, 1, 1], ForwardMode.DECODE, apart=False)
    step(world, layer, [1, 1, 1], ForwardMode.DECODE, apart=True)


@pytest.mark.parametrize("kind", ["mha", "mla"])
@pytest.mark.parametrize("device", DEVICES)
def test_windows_caps_and_sinks(device: str, kind: str) -> None:
    world = World(kind, 2, device)
    sinks = torch.linspace(-1, 1, HEADS, device=device)
    layer = make_layer(world, logit_cap=2.0, sliding_window_size=3)
    step(world, layer, list(world.lengths), sinks=sinks)
    step(world, layer, [2, 1, 4], sinks=sinks)
    step(world, layer, [1, 1, 1], ForwardMode.DECODE, sinks=sinks)


@pytest.mark.parametrize("page", [1, 4])
@pytest.mark.parametrize("device", DEVICES)
def test_layers_with_a_window_live_in_a_pool_of_their_own(device: str, page: int) -> None:
    world = World("mha", page, device, window_layer=1)
    window, full = make_layer(world, 1, sliding_window_size=5), make_layer(world, 2)
    for new, mode in (
        ([5, 1, 12], ForwardMode.EXTEND), ([2, 1, 4], ForwardMode.EXTEND), ([1, 1, 1], ForwardMode.DECODE)
    ):  # fmt: skip
        batch = world.batch(new, mode)
        with never_waits(device):
            world.backend.init_forward_metadata(batch)
        for layer in (window, full):
            check(world, *world.run(layer, batch, new))
    # What has left the window is given back: its pages lead to slot 0 or nowhere, and hold others' tokens.
    for i, held in enumerate(world.held):
        gone = world.own[i][: max(held - 5 - 1, 0) // page * page].to(device)
        where = world.pool.full_to_swa_index_mapping[gone]
        for buffer in (world.pool.swa_kv_pool.k_buffer[0], world.pool.swa_kv_pool.v_buffer[0]):
            buffer[where] = float("nan")
        world.pool.full_to_swa_index_mapping[gone] = -1 if i == 2 else 0
    new = [1, 1, 1]
    batch = world.batch(new, ForwardMode.DECODE)
    with never_waits(device):
        world.backend.init_forward_metadata(batch)
    check(world, *world.run(window, batch, new))


@pytest.mark.parametrize("kind", ["mha", "mla"])
@pytest.mark.parametrize("device", DEVICES)
def test_requests_may_be_empty(device: str, kind: str) -> None:
    world = World(kind, 2, device, lengths=(5, 0, 12))
    result = step(world, make_layer(world), [5, 0, 12])
    assert result.shape[0] == 17
    batch = world.batch([0, 0, 0], ForwardMode.DECODE)  # lengths 12, 0, 5, as padding has
    world.backend.init_forward_metadata(batch)
    q = world.random(3, HEADS * make_layer(world).head_dim)
    out = world.backend.forward(q, None, None, make_layer(world), batch)
    assert out[1].eq(0).all()
    assert not out.isnan().any()


@pytest.mark.parametrize("device", DEVICES)
def test_a_layer_may_read_what_an_earlier_layer_stored(device: str) -> None:
    world = World("mha", 2, device)
    step(world, make_layer(world), list(world.lengths))
    batch = world.batch([0, 0, 0], ForwardMode.DECODE)
    world.backend.init_forward_metadata(batch)
    q = world.random(3, HEADS, D)
    before = [buffer.clone() for buffers in world.buffers for buffer in buffers]
    out = world.backend.forward(q, None, None, make_layer(world), batch)
    check(world, out, decoded(world, q, make_layer(world)))
    k, v = (world.random(3, KV_HEADS, D) for _ in range(2))
    again = world.backend.forward(q, k, v, make_layer(world), batch, False)
    assert torch.equal(again, out)
    after = [buffer for buffers in world.buffers for buffer in buffers]
    assert all(
        torch.equal(x.view(torch.int16), y.view(torch.int16)) for x, y in zip(before, after, strict=True)
    )


@pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("device", DEVICES)
def test_fp8_pools_have_a_scale_for_keys_and_one_for_values(device: str, kv_dtype: torch.dtype) -> None:
    world = World("mha", 4, device, kv_dtype=kv_dtype)
    layer = make_layer(world)
    layer.k_scale, layer.v_scale = (torch.tensor([x], device=device) for x in (0.5, 0.25))
    for on_host in ((None, None), (0.5, 0.25)):
        layer.k_scale_float, layer.v_scale_float = on_host
        step(world, layer, [3, 1, 4], factors=(0.5, 0.25))
        step(world, layer, [1, 1, 1], ForwardMode.DECODE, factors=(0.5, 0.25))
    assert world.pool.k_buffer[1].dtype == torch.uint8


@pytest.mark.parametrize("device", DEVICES)
def test_fp8_rows_of_mla_are_stored_and_read_as_they_are(device: str) -> None:
    # The pool's own writer, which SGLang's model calls as well, has no argument for a scale.
    world = World("mla", 4, device, kv_dtype=torch.float8_e4m3fn)
    layer = make_layer(world)
    layer.k_scale, layer.k_scale_float = torch.tensor([0.5], device=device), 0.5
    step(world, layer, list(world.lengths))
    step(world, layer, [1, 1, 1], ForwardMode.DECODE)


@pytest.mark.parametrize("device", DEVICES)
def test_heads_may_come_before_tokens(device: str) -> None:
    world = World("mha", 4, device)
    layer = make_layer(world)
    step(world, layer, list(world.lengths))
    for buffers in world.buffers:  # the same tokens as [pages, heads, tokens, d], SGLang's hnd
        paged = buffers[1].unflatten(0, (-1, 4))
        buffers[1] = paged.transpose(1, 2).contiguous()
        assert buffers[1].shape[1:] == (KV_HEADS, 4, D)
    batch = world.batch([0, 0, 0], ForwardMode.DECODE)
    world.backend.init_forward_metadata(batch)
    q = world.random(3, HEADS, D)
    out = world.backend.forward(q, None, None, layer, batch)
    check(world, out, decoded(world, q, make_layer(world)))


@pytest.mark.parametrize("device", DEVICES)
def test_a_pool_that_moves_its_pages_translates_its_own_table(device: str) -> None:
    world = World("mha", 4, device)
    layer = make_layer(world)
    step(world, layer, list(world.lengths))
    pages = world.size // 4 + 1
    moved = torch.randperm(pages, generator=torch.Generator().manual_seed(9)).to(device)
    for buffers in world.buffers:
        old = buffers[1].unflatten(0, (-1, 4))
        new = torch.full_like(old, float("nan"))
        new[moved] = old[:pages]
        buffers[1] = new.flatten(0, 1)
    batch = world.batch([0, 0, 0], ForwardMode.DECODE)
    batch.kv_loc_plan = "the step's plan"
    asked = []

    def copy_page_table(plan: object, *, out: Tensor) -> None:
        asked.append(plan)
        rows = world.slots.req_to_token[batch.req_pool_indices, ::4][:, : out.shape[1]]
        out.copy_(moved[(rows // 4).clamp(max=pages - 1).long()])

    world.backend.kv_index_translator = SimpleNamespace(
        reads_are_translated=True, copy_page_table=copy_page_table
    )
    world.backend.init_forward_metadata(batch)
    assert asked == ["the step's plan"]
    q = world.random(3, HEADS, D)
    out = world.backend.forward(q, None, None, layer, batch)
    check(world, out, decoded(world, q, make_layer(world)))


@pytest.mark.parametrize("kind", ["mha", "mla"])
@pytest.mark.parametrize("device", DEVICES)
def test_drafted_tokens_are_verified_as_a_causal_extend(device: str, kind: str) -> None:
    world = World(kind, 2, device)
    layer = make_layer(world)
    step(world, layer, list(world.lengths))
    held = list(world.held)
    batch = world.batch(
        [3, 3, 3], ForwardMode.TARGET_VERIFY, spec_info=SimpleNamespace(draft_token_num=3, topk=1)
    )
    batch.seq_lens = torch.tensor([held[i] for i in world.order], device=device)  # without the drafted ones
    batch.seq_lens_cpu = batch.seq_lens.cpu()
    batch.extend_seq_lens = batch.extend_seq_lens_cpu = None
    with never_waits(device):
        world.backend.init_forward_metadata(batch)
    check(world, *world.run(layer, batch, [3, 3, 3]))


@pytest.mark.parametrize("device", DEVICES)
def test_an_encoder_sees_both_ways(device: str) -> None:
    world = World("mha", 2, device)
    layer = make_layer(world, attn_type=AttentionType.ENCODER_ONLY)
    step(world, layer, list(world.lengths), causal=False)


@pytest.mark.parametrize("way", ["new tokens", "all tokens", "a chunk of the prefix"])
@pytest.mark.parametrize("device", DEVICES)
def test_prompts_of_mla_may_come_with_rows_of_each_head(device: str, way: str) -> None:
    world = World("mla", 2, device)
    step(world, make_layer(world), list(world.lengths))
    prefix = [world.held[i] for i in world.order]
    new = [3, 1, 7]
    counts = [new[i] for i in world.order]
    batch = world.batch(new)
    layer = RadixAttention(HEADS, 24, 0.2, HEADS, 1, v_head_dim=D)
    keys = {"new tokens": counts, "a chunk of the prefix": [9, 0, 5]}.get(
        way, [a + b for a, b in zip(prefix, counts, strict=True)]
    )
    q, k, v = (
        world.random(11, HEADS, 24),
        world.random(sum(keys), HEADS, 24),
        world.random(sum(keys), HEADS, D),
    )
    batch.attn_attend_prefix_cache = way == "a chunk of the prefix"
    batch.mha_one_shot = way == "all tokens"
    batch.mha_return_lse = way != "all tokens"
    if batch.attn_attend_prefix_cache:
        starts = torch.tensor([[0, 1, 2, 3], [0, 9, 9, 14]], dtype=torch.int32, device=device)
        batch.prefix_chunk_idx, batch.prefix_chunk_cu_seq_lens = 1, starts
        batch.prefix_chunk_max_seq_lens = [1, 9]
    causal = not batch.attn_attend_prefix_cache

    def statement(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        parts = zip(q.split(counts), k.split(keys), v.split(keys), strict=True)
        both = [one_sequence(*three, 0.2, dtype, causal=causal) for three in parts]
        return torch.cat([o for o, _ in both]), torch.cat([x for _, x in both])

    with never_waits(device):
        world.backend.init_forward_metadata(batch)
        result = world.backend.forward(q.flatten(1), k, v, layer, batch, False)
    lse: Any = None
    if way == "all tokens":
        out = result.unflatten(1, (HEADS, D))
    else:
        out, lse = result
    assert_as_stated(statement, out, lse, torch.bfloat16)
    if way == "a chunk of the prefix":
        assert lse.is_contiguous()
        assert (lse[7] == float("-inf")).all()  # the one new token of the request without a key


@pytest.mark.parametrize("device", DEVICES)
def test_the_result_goes_where_a_prefill_graph_wants_it(device: str) -> None:
    world = World("mha", 2, device)
    batch = world.batch(list(world.lengths))
    batch._attn_output = torch.full((18, HEADS * D), float("nan"), dtype=torch.bfloat16, device=device)
    world.backend.init_forward_metadata(batch)
    result, statement = world.run(make_layer(world), batch, list(world.lengths))
    assert result.data_ptr() == batch._attn_output.data_ptr()
    check(world, batch._attn_output, statement)


@pytest.mark.parametrize("device", DEVICES)
def test_an_extend_returns_its_lse_token_by_token(device: str) -> None:
    world = World("mha", 2, device)
    batch = world.batch(list(world.lengths))
    world.backend.init_forward_metadata(batch)
    (out, lse), statement = world.run(make_layer(world), batch, list(world.lengths), return_lse=True)
    assert lse.shape == (18, HEADS)
    assert lse.is_contiguous()
    assert_as_stated(statement, out.unflatten(1, (HEADS, D)), lse, torch.bfloat16)


def test_the_host_narrows_a_table_where_it_knows_the_lengths() -> None:
    world = World("mha", 4)
    layer = make_layer(world)
    step(world, layer, list(world.lengths))
    new = [1, 1, 1]
    for known, pages in ((True, 4), (False, 10)):
        batch = world.batch(new, ForwardMode.DECODE)
        batch.seq_lens_cpu = batch.seq_lens.clone() if known else None
        world.backend.init_forward_metadata(batch)
        assert world.backend.forward_metadata.table.shape == (3, pages)
        check(world, *world.run(layer, batch, new))


def test_the_work_is_shared_out_once_for_layers_that_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World("mha", 2)
    made: list[Tensor] = []
    used: list[Any] = []
    schedule, attention = ours.get_scheduler_metadata, ours.flash_attn_varlen_func

    def get_scheduler_metadata(*args: Any, **options: Any) -> Tensor:
        made.append(schedule(*args, **options))
        return made[-1]

    def flash_attn_varlen_func(*args: Any, **options: Any) -> Any:
        used.append(options["scheduler_metadata"])
        return attention(*args, **options)

    monkeypatch.setattr(ours, "get_scheduler_metadata", get_scheduler_metadata)
    monkeypatch.setattr(ours, "flash_attn_varlen_func", flash_attn_varlen_func)
    batch = world.batch(list(world.lengths))
    world.backend.init_forward_metadata(batch)
    for layer in (make_layer(world, 0), make_layer(world, 1, sliding_window_size=3), make_layer(world, 2)):
        check(world, *world.run(layer, batch, list(world.lengths)))
    assert len(made) == 2
    assert [id(x) for x in used] == [id(made[0]), id(made[1]), id(made[0])]


def test_deterministic_inference_asks_for_bits_that_do_not_hang_on_neighbours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[Any, Any]] = []
    attention = ours.flash_attn_varlen_func

    def flash_attn_varlen_func(*args: Any, **options: Any) -> Any:
        asked.append((options["batch_invariant"], options["scheduler_metadata"]))
        return attention(*args, **options)

    monkeypatch.setattr(ours, "flash_attn_varlen_func", flash_attn_varlen_func)
    world = World("mha", 2, server={"deterministic": True})
    step(world, make_layer(world), list(world.lengths))
    assert asked == [(True, None)]


# ---- CUDA graphs


@pytest.mark.parametrize("window_layer", [None, 1])
@pytest.mark.parametrize("kind", ["mha", "mla"])
@pytest.mark.parametrize("device", DEVICES)
def test_graphs_are_replayed_at_other_lengths_and_padded(
    device: str, kind: str, window_layer: int | None
) -> None:
    if kind == "mla" and window_layer is not None:
        pytest.skip("hybrid pools here are of MHA")
    world = World(kind, 2, device, window_layer=window_layer)
    layer = make_layer(world, 1, sliding_window_size=-1 if window_layer is None else 4)
    prompts = world.batch(list(world.lengths))
    world.backend.init_forward_metadata(prompts)
    check(world, *world.run(layer, prompts, list(world.lengths)))

    rows, fill = 4, world.backend.get_cuda_graph_seq_len_fill_value()
    world.backend.init_cuda_graph_state(rows, rows)
    d = layer.head_dim
    kv = (1, RANK + ROPE) if kind == "mla" else (KV_HEADS, D)
    q, k, v = (
        torch.zeros(rows, *shape, dtype=torch.bfloat16, device=device) for shape in ((HEADS, d), kv, kv)
    )
    static = world.batch([0, 0, 0], ForwardMode.DECODE)
    static.batch_size = rows
    static.req_pool_indices = torch.zeros(rows, dtype=torch.int64, device=device)
    static.seq_lens = torch.full((rows,), fill, dtype=torch.int64, device=device)
    static.out_cache_loc = torch.zeros(rows, dtype=torch.int64, device=device)
    static.seq_lens_cpu = torch.full((rows,), 1)  # stale, as where the engine does not keep it
    world.translator.bind_own_plan(static)

    def forward() -> Tensor:
        world.backend.init_forward_metadata_in_graph(static)
        more: dict[str, Any] = {"q_rope": q[..., RANK:], "k_rope": k[..., RANK:]} if kind == "mla" else {}
        given = (q[..., :RANK], k[..., :RANK], k[..., :RANK]) if kind == "mla" else (q, k, v)
        result: Tensor = world.backend.forward(*given, layer, static, **more)
        return result

    world.backend.init_forward_metadata_out_graph(static, in_capture=True)
    captured = world.backend.forward_metadata
    replay: Callable[[], Tensor] = forward
    if device == "cuda":
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            forward()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = forward()

        def replay() -> Tensor:
            graph.replay()
            return kept

    addresses = [captured.lengths.data_ptr(), captured.table.data_ptr(), captured.starts.data_ptr()]
    for _ in range(3):
        live = world.batch([1, 1, 1], ForwardMode.DECODE)
        static.req_pool_indices[:3], static.seq_lens[:3] = live.req_pool_indices, live.seq_lens
        static.out_cache_loc[:3] = live.out_cache_loc
        world.translator.bind_own_plan(static)
        fresh_q = world.random(3, HEADS, d)
        pairs = [world._new_rows(1) for _ in world.order]
        for i, pair in zip(world.order, pairs, strict=True):
            held = world.rows[i][1]
            world.rows[i][1] = torch.cat([held[0], pair[0]]), torch.cat([held[1], pair[1]])
        q[:3], k[:3] = fresh_q, torch.cat([pair[0] for pair in pairs])
        if kind == "mha":
            v[:3] = torch.cat([pair[1] for pair in pairs])
        with never_waits(device):
            world.backend.init_forward_metadata_out_graph(static)
        step_ = world.backend.forward_metadata
        assert [step_.lengths.data_ptr(), step_.table.data_ptr(), step_.starts.data_ptr()] == addresses
        out = replay()
        assert out[3].eq(0).all()  # the padding
        check(world, out[:3], decoded(world, fresh_q, layer))


@pytest.mark.parametrize("device", DEVICES)
def test_graphs_verify_drafted_tokens(device: str) -> None:
    world = World("mha", 2, device)
    layer = make_layer(world)
    step(world, layer, list(world.lengths))
    world.backend.init_cuda_graph_state(3, 6)
    held = list(world.held)
    batch = world.batch(
        [2, 2, 2], ForwardMode.TARGET_VERIFY, spec_info=SimpleNamespace(draft_token_num=2, topk=1)
    )
    batch.seq_lens = torch.tensor([held[i] for i in world.order], device=device)
    with never_waits(device):
        world.backend.init_forward_metadata_out_graph(batch, in_capture=True)
    assert world.backend.forward_metadata.starts.tolist() == [0, 2, 4, 6]
    check(world, *world.run(layer, batch, [2, 2, 2]))


# ---- what is refused


@pytest.mark.parametrize(
    ("name", "server", "model"),
    [
        ("attn_dcp_size", {"dcp": 2}, {}),
        ("attn_cp_size", {"cp": 2}, {}),
        ("speculative_eagle_topk", {"topk": 4}, {}),
        ("is_encoder_decoder", {}, {"model_config": SimpleNamespace(is_encoder_decoder=True)}),
        ("attention_chunk_size", {}, {"attention_chunk_size": 8192}),
        ("kv_cache_dtype", {}, {"kv_cache_dtype": torch.uint8, "kv_cache_dtype_str": "fp4_e2m1"}),
        ("kv_cache_dtype", {}, {"kv_cache_dtype_str": "mxfp8"}),
    ],
)
def test_models_and_servers_are_refused_by_name(
    name: str, server: dict[str, Any], model: dict[str, Any]
) -> None:
    runner = SimpleNamespace(**(vars(World().runner) | model))

    def make(**_: Any) -> None:
        with published(**server):
            ours.AnystrideBackend(runner)

    assert_refused(ours.MODEL_REFUSED, name, None, make)


def test_a_layout_that_cuts_dimensions_is_refused() -> None:
    world = World()
    world.pool.kv_cache_layout = "vectorized_5d"

    def make(**_: Any) -> None:
        with published():
            ours.AnystrideBackend(world.runner)

    assert_refused(ours.MODEL_REFUSED, "kv_cache_layout", None, make)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("is_cross_attention", True),
        ("attn_type", AttentionType.DECODER_BIDIRECTIONAL),
        ("pos_encoding_mode", "ROPE_LLAMA"),
        ("logit_capping_method", "other"),
        ("xai_temperature_len", 1024),
    ],
)
def test_layers_are_refused_by_name(name: str, value: object) -> None:
    world = World()
    layer = make_layer(world, logit_cap=3.0)
    setattr(layer, name, value)
    assert_refused(ours.LAYER_REFUSED, name, value, lambda **_: step(world, layer, list(world.lengths)))


@pytest.mark.parametrize("name", [*ours.CALL_REFUSED, "of_another_version"])
def test_arguments_of_a_call_are_refused_by_name(name: str) -> None:
    world = World()
    batch = world.batch(list(world.lengths))
    world.backend.init_forward_metadata(batch)
    run: Any = functools.partial(world.run, make_layer(world), batch, list(world.lengths))
    with pytest.raises(UnsupportedError) as caught:
        run(**{name: 7})
    assert list(caught.value.refusals) == [name]
    assert ours.CALL_REFUSED.get(name, "has no counterpart here") in str(caught.value)
    run(**{name: None})


@pytest.mark.parametrize(
    ("name", "mode", "more"),
    [
        ("forward_mode", ForwardMode.DRAFT_EXTEND_V2, {}),
        ("forward_mode", ForwardMode.DLLM_EXTEND, {}),
        ("spec_info", ForwardMode.DECODE, {"spec_info": SimpleNamespace()}),
        ("encoder_lens", ForwardMode.DECODE, {"encoder_lens": torch.ones(3)}),
        ("topk", ForwardMode.TARGET_VERIFY, {"spec_info": SimpleNamespace(topk=4, draft_token_num=2)}),
        (
            "ragged_verify_layout",
            ForwardMode.TARGET_VERIFY,
            {"spec_info": SimpleNamespace(ragged_verify_layout=object(), draft_token_num=2)},
        ),
    ],
)
def test_steps_are_refused_by_name(name: str, mode: Any, more: dict[str, Any]) -> None:
    world = World()
    world.backend.init_cuda_graph_state(3, 3)
    batch = world.batch([1, 1, 1], mode, **more)
    for start in (world.backend.init_forward_metadata, world.backend.init_forward_metadata_out_graph):
        assert_refused(ours.STEP_REFUSED, name, None, lambda start=start, **_: start(batch))


def test_graphs_of_prompts_are_refused() -> None:
    world = World()
    world.backend.init_cuda_graph_state(3, 18)
    batch = world.batch(list(world.lengths))
    assert_refused(
        ours.GRAPH_REFUSED,
        "forward_mode",
        None,
        lambda **_: world.backend.init_forward_metadata_out_graph(batch),
    )


def test_an_idle_rank_needs_no_step() -> None:
    world = World()
    batch = world.batch([0, 0, 0], ForwardMode.IDLE)
    world.backend.init_forward_metadata(batch)
    assert world.backend.forward(world.random(0, HEADS * D), None, None, make_layer(world), batch).shape == (
        0,
        HEADS * D,
    )


def test_the_plugin_makes_a_choice_of_itself() -> None:
    with sglang_stand_in.installed():
        from sglang.srt.arg_groups import choices
        from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
        from sglang.srt.models.deepseek_common import attention_backend_handler as handler
        from sglang.srt.models.deepseek_common.utils import FORWARD_ABSORB_CORE_ATTENTION_BACKENDS as absorb

        for _ in range(2):  # every process calls it, some twice
            plugin.register()
        for known in (
            choices.ATTENTION_BACKEND_CHOICES,
            choices.DETERMINISTIC_ATTENTION_BACKEND_CHOICES,
            choices.CHUNKED_PREFIX_CACHE_SUPPORTED_ATTENTION_BACKENDS,
        ):
            assert known.count("anystride") == 1
        make = ATTENTION_BACKENDS["anystride"]
        with published():
            assert isinstance(make(World("mha").runner), backend.AnystrideBackend)
            assert "anystride" not in absorb
            for _ in range(2):
                assert isinstance(make(World("mla").runner), ours.AnystrideBackend)
        assert absorb.count("anystride") == 1
        assert handler.AttentionBackendRegistry.get_handler("anystride") is handler.handle_attention_fa3


def test_the_example_decodes_as_plain_pytorch_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--device", "cpu", "--steps", "2"])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    printed = capsys.readouterr().out
    assert done.value.code == 0, printed
    assert "a layer's keys: [144, 2, 64], strides (1024, 64, 1), pages of 16" in printed


@pytest.mark.skipif(sglang_stand_in.IS_REAL, reason="SGLang is installed")
def test_the_example_says_what_it_needs() -> None:
    command = [sys.executable, str(EXAMPLE), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "needs SGLang 0.5.23: No module named 'sglang'" in done.stderr


# ---- what needs SGLang itself

needs_sglang = pytest.mark.skipif(not sglang_stand_in.IS_REAL, reason="needs SGLang: make test-sglang")


@needs_sglang
def test_a_radix_attention_of_sglang_finds_the_back_end_and_its_result() -> None:
    from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

    world = World("mha", 4)
    layer = make_layer(world)
    step(world, layer, list(world.lengths))
    batch = world.batch([0, 0, 0], ForwardMode.DECODE)
    world.backend.init_forward_metadata(batch)
    q = world.random(3, HEADS, D)
    with forward_context(ForwardContext(attn_backend=world.backend)):
        out = layer(q, None, None, batch)
    check(world, out, decoded(world, q, layer))


@needs_sglang
def test_sglang_finds_the_plugin_by_its_entry_point() -> None:
    from sglang.srt.plugins import GENERAL_PLUGINS_GROUP, load_plugins_by_group

    assert load_plugins_by_group(GENERAL_PLUGINS_GROUP)["anystride"] == (plugin.register, "anystride")


@needs_sglang
def test_the_version_that_was_read_is_the_version_that_is_run() -> None:
    from importlib.metadata import version

    assert version("sglang") == plugin.READ_IN
