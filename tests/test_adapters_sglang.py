"""``anystride.adapters.sglang`` against SGLang's classes, or stand-ins of them where it is not installed.

Pools hold NaN wherever a request has no token, ``req_to_token`` numbers of no slot behind a request's tokens.
Each test states what a layer must return in float64, from the rows that it put into the pool itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
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
    from sglang.srt.runtime_context import get_parallel

    from anystride.adapters.sglang import backend as ours

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LAYERS = 3
GARBAGE = 2**30  # behind a request's tokens: the number of no slot
HEADS, KV_HEADS, D = 4, 2, 16
RANK, ROPE = 32, 16


@pytest.fixture(autouse=True)
def _one_rank() -> Iterator[None]:
    if not sglang_stand_in.IS_REAL:
        yield
        return
    with get_parallel().override(attn_dcp_size=1, attn_dcp_rank=0, dcp_enabled=False, attn_cp_size=1):
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
        with published(**self.server), sglang_stand_in.installed():
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
        """A step in which request ``i`` gets ``new[i]`` tokens; all requests are in it, the last one first."""
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
        state: dict[str, Any] | None = None,
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
                stored = [(x / f).to(kv_dtype).to(dtype) * f for x, f in zip((k, v), factors, strict=True)]
                n = new[i]
                out, lse = one_sequence(
                    q[row : row + n], *stored, layer.scaling, dtype,
                    **({"causal": True, "window_left": layer.sliding_window_size, "softcap": layer.logit_cap}
                       | (state or {})),
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
