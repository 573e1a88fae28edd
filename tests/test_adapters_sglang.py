"""``anystride.adapters.sglang`` against what SGLang 0.5.23 hands to an attention back end.

The pools, batches and layers here are stand-ins: they have the names, shapes and habits of SGLang's own, as
read in memory_pool.py, swa_memory_pool.py, forward_batch_info.py and radix_attention.py. Where SGLang is
installed (``make test-sglang``), ``tests/sglang_engine`` uses the originals.

A pool is a plain tensor of token slots. Every slot that no sequence owns is NaN, slot 0 too, to which SGLang
writes padded rows, and ``req_to_token`` past a sequence's end names no slot.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from originals import assert_as_stated, assert_refused, never_waits, one_sequence
from torch import Tensor

from anystride import UnsupportedError
from anystride.adapters import sglang
from anystride.adapters.sglang import CALL_REFUSED, LAYER_REFUSED, RUNNER_REFUSED, AnystrideBackend

NAN = float("nan")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PAGES = pytest.mark.parametrize("page", [1, 64])
MOST = 3000  # tokens of context
GARBAGE = 2**31 - 1


class WriteLoc(SimpleNamespace):
    """SGLang's ``KVWriteLoc``."""

    @classmethod
    def for_batch(cls, batch: Any, swa_loc: Tensor | None = None) -> WriteLoc:
        return cls(loc=batch.out_cache_loc, swa_loc=swa_loc)


@pytest.fixture(autouse=True)
def _memory_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("sglang.srt.mem_cache.memory_pool")
    module.__dict__["KVWriteLoc"] = WriteLoc
    monkeypatch.setitem(sys.modules, module.__name__, module)


class Pool:
    """Token slots of one layer: ``k`` and ``v`` ``[slots, heads, d]``, or rows of MLA.

    ``layers`` is how many layers lie side by side in a token's memory, as in a unified pool: the token's
    stride spans them all, and the others' are NaN.
    """

    def __init__(
        self, slots: int, heads: int, d_qk: int, d_v: int, is_mla: bool, dtype: torch.dtype, layers: int,
        device: str,
    ) -> None:  # fmt: skip
        self.is_mla, self.dtype, self.d_v = is_mla, dtype, d_v
        width = heads * (d_qk if is_mla else d_qk + d_v)
        storage = torch.full((slots, layers, width), NAN, dtype=torch.bfloat16, device=device).to(dtype)
        rows = storage[:, layers // 2]
        self.k: Tensor = rows[:, : heads * d_qk].unflatten(1, (heads, d_qk))
        self.v: Tensor = self.k[..., :d_v] if is_mla else rows[:, heads * d_qk :].unflatten(1, (heads, d_v))

    def get_key_buffer(self, layer_id: int) -> Tensor:
        assert layer_id == 7
        return self.k

    def get_value_buffer(self, layer_id: int) -> Tensor:
        assert layer_id == 7
        return self.v

    def set_kv_buffer(
        self, layer: Any, where: WriteLoc, k: Tensor, v: Tensor, k_scale: Any = None, v_scale: Any = None
    ) -> None:
        assert not (self.is_mla and (k_scale is not None or v_scale is not None))
        loc = where.loc if where.swa_loc is None else where.swa_loc
        self.k[loc] = (k if k_scale is None else k / k_scale).to(self.dtype)
        if not self.is_mla:
            self.v[loc] = (v if v_scale is None else v / v_scale).to(self.dtype)

    def set_mla_kv_buffer(self, layer: Any, where: WriteLoc, k_nope: Tensor, k_rope: Tensor) -> None:
        self.k[where.loc] = torch.cat([k_nope, k_rope], -1).to(self.dtype)


class SwaPool(Pool):
    """A pool for windows beside the one of all tokens: slots there have other numbers."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        page = self.k.shape[0] - 8192
        self.layers_mapping = {7: (0, True), 8: (0, False)}
        slots = torch.arange(self.k.shape[0], device=self.k.device)
        self.mapping = (8192 // page - slots // page) * page + slots % page  # pages stay whole

    def translate_loc_from_full_to_swa(self, slots: Tensor) -> Tensor:
        in_swa: Tensor = self.mapping[slots]
        return in_swa


class World:
    """A runner, a layer, and sequences whose past lies in the pool, scattered by pages.

    Args:
        device: Of all tensors.
        page: Tokens in a page.
        is_mla: One KV head of 512 + 64 dimensions, or 2 of 64.
        dtype: Of the pool.
        pool: Its class.
        **layer: Changes of the layer.
    """

    def __init__(
        self, device: str, page: int, is_mla: bool = False, dtype: torch.dtype = torch.bfloat16,
        pool: type[Pool] = Pool, **layer: Any,
    ) -> None:  # fmt: skip
        torch.manual_seed(page + 1000 * is_mla)
        self.device, self.page, self.is_mla = device, page, is_mla
        self.heads, self.d_qk, self.d_v = (8, 576, 512) if is_mla else (8, 64, 64)
        kv_heads = 1 if is_mla else 2
        slots = 8192 + page
        self.pool = pool(slots, kv_heads, self.d_qk, self.d_v, is_mla, dtype, 3, device)
        self.req_to_token = torch.full((16, MOST), GARBAGE, dtype=torch.int32, device=device)
        self.free = (torch.randperm(8192 // page) + 1).tolist()  # page 0 is nobody's
        facts = {
            "tp_q_head_num": self.heads, "tp_k_head_num": kv_heads, "qk_head_dim": self.d_qk,
            "v_head_dim": self.d_v, "scaling": 0.11, "layer_id": 7, "logit_cap": 0.0, "k_scale": None,
            "v_scale": None, "sliding_window_size": -1, "is_cross_attention": False,
            "attn_type": SimpleNamespace(value="decoder"), "logit_capping_method": "tanh",
            "xai_temperature_len": -1,
        }  # fmt: skip
        self.layer = SimpleNamespace(**(facts | layer))
        self.backend = AnystrideBackend(self.runner())
        self.k: dict[int, Tensor] = {}  # of each request: its rows, as they were given
        self.v: dict[int, Tensor] = {}

    def runner(self, **server: Any) -> SimpleNamespace:
        given = {"speculative_algorithm": None, "dcp_size": 1} | server
        return SimpleNamespace(
            server_args=SimpleNamespace(**given), kv_index_translator=None, page_size=self.page,
            use_mla_backend=self.is_mla, token_to_kv_pool=self.pool,
            req_to_token_pool=SimpleNamespace(req_to_token=self.req_to_token),
            model_config=SimpleNamespace(context_len=MOST),
        )  # fmt: skip

    def rows(self, count: int) -> tuple[Tensor, Tensor]:
        heads = self.layer.tp_k_head_num
        k = torch.randn(count, heads, self.d_qk, device=self.device).bfloat16()
        v = torch.randn(count, heads, self.d_v, device=self.device).bfloat16()
        return k, (k[..., : self.d_v] if self.is_mla else v)

    def grow(self, request: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Give a request ``count`` more tokens: their slots, their rows of K and of V."""
        k, v = self.rows(count)
        before = self.k[request].shape[0] if request in self.k else 0
        slots = []
        for position in range(before, before + count):
            if position % self.page == 0:
                first = self.free.pop() * self.page
            else:
                first = int(self.req_to_token[request, position - position % self.page])
            slots.append(first + position % self.page)
            self.req_to_token[request, position] = slots[-1]
        self.k[request] = torch.cat([self.k[request], k]) if before else k
        self.v[request] = torch.cat([self.v[request], v]) if before else v
        return torch.tensor(slots, dtype=torch.int64, device=self.device), k, v

    def lengths(self, requests: list[int]) -> list[int]:
        return [self.k[r].shape[0] if r in self.k else 0 for r in requests]

    def step(self, requests: list[int], counts: list[int], decode: bool) -> tuple[SimpleNamespace, Any]:
        """A batch in which each request gets new tokens, and the rows of q, k and v."""
        new = [self.grow(r, n) for r, n in zip(requests, counts, strict=True)]
        lengths = self.lengths(requests)
        batch = SimpleNamespace(
            batch_size=len(requests),
            req_pool_indices=torch.tensor(requests, dtype=torch.int64, device=self.device),
            seq_lens=torch.tensor(lengths, dtype=torch.int64, device=self.device),
            seq_lens_cpu=torch.tensor(lengths), out_cache_loc=torch.cat([slots for slots, _, _ in new]),
            extend_seq_lens=torch.tensor(counts, dtype=torch.int32, device=self.device),
            extend_seq_lens_cpu=counts,
            forward_mode=SimpleNamespace(is_decode_or_idle=lambda: decode),
        )  # fmt: skip
        q = torch.randn(sum(counts), self.heads, self.d_qk, device=self.device).bfloat16()
        return batch, (q, torch.cat([k for _, k, _ in new]), torch.cat([v for _, _, v in new]))

    def attend(self, batch: Any, q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Tensor:
        """The call of ``RadixAttention``; for MLA in two parts, as DeepSeek's models make it."""
        forward = self.backend.forward_decode if batch.forward_mode.is_decode_or_idle() else None
        forward = forward or self.backend.forward_extend
        if not self.is_mla:
            return forward(q.flatten(1), k, v, self.layer, batch, **more)
        latent = self.d_v
        parts: dict[str, Any] = {"q_rope": q[..., latent:].clone(), "k_rope": k[..., latent:]}
        nope = k[..., :latent]
        return forward(q[..., :latent].clone(), nope, nope, self.layer, batch, **parts, **more)

    def stated(
        self, requests: list[int], counts: list[int], q: Tensor, dtype: torch.dtype, window: int = -1,
        **more: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Causal attention of each request's new tokens to all of its own, aligned to the last."""
        outs, row = [], 0
        for request, count in zip(requests, counts, strict=True):
            k, v = self.k[request], self.v[request]
            outs.append(
                one_sequence(
                    q[row : row + count], k, v, self.layer.scaling, dtype, causal=True, window_left=window,
                    **more,
                )[0]
            )  # fmt: skip
            row += count
        out = torch.cat(outs).flatten(1)
        return out, out.new_zeros(0)

    def check(self, out: Tensor, requests: list[int], counts: list[int], q: Tensor, **more: Any) -> None:
        assert_as_stated(
            lambda dtype: self.stated(requests, counts, q, dtype, **more), out, None, torch.bfloat16
        )


@pytest.mark.parametrize("is_mla", [False, True])
@PAGES
@pytest.mark.parametrize("device", DEVICES)
def test_prefill_chunks_and_decoding(device: str, page: int, is_mla: bool) -> None:
    world = World(device, page, is_mla)
    everybody = [3, 0, 9]
    # A prompt, one token, a long one; then a chunk beside a decoding request; then decoding, in other orders.
    for requests, counts, decode in (
        (everybody, [37, 1, 700], False),
        ([9, 3], [130, 1], False),
        (everybody, [1, 1, 1], True),
        ([9, 3], [1, 1], True),
    ):
        batch, (q, k, v) = world.step(requests, counts, decode)
        with never_waits(device):
            world.backend.init_forward_metadata(batch)
            out = world.attend(batch, q, k, v)
        world.check(out, requests, counts, q)
    assert world.k[9].shape[0] == 832


@pytest.mark.parametrize("device", DEVICES)
def test_mla_in_one_row(device: str) -> None:
    world = World(device, 64, is_mla=True)
    batch, (q, k, v) = world.step([1, 2], [70, 5], decode=False)
    world.backend.init_forward_metadata(batch)
    out = world.backend.forward_extend(q, k, v, world.layer, batch)
    world.check(out, [1, 2], [70, 5], q)


@PAGES
def test_windows_read_their_own_pool(page: int) -> None:
    world = World("cpu", page, pool=SwaPool, sliding_window_size=30)
    for counts, decode in (([90, 5], False), ([1, 1], True)):
        batch, (q, k, v) = world.step([2, 4], counts, decode)
        world.backend.init_forward_metadata(batch)
        out = world.attend(batch, q, k, v)
        world.check(out, [2, 4], counts, q, window=30)


def test_caps_and_sinks() -> None:
    world = World("cpu", 1, logit_cap=2.0)
    batch, (q, k, v) = world.step([2], [40], decode=False)
    world.backend.init_forward_metadata(batch)
    world.check(world.attend(batch, q, k, v), [2], [40], q, softcap=2.0)
    sinks = torch.randn(8)
    with_sinks = world.attend(batch, q, k, v, sinks=sinks).float()
    rows = one_sequence(q, world.k[2], world.v[2], 0.11, torch.float64, causal=True, softcap=2.0)
    share = torch.sigmoid(rows[1] - sinks)[..., None]  # of all but the sink
    expected = (rows[0] * share).flatten(1)
    assert torch.linalg.norm(with_sinks - expected) < 2e-2 * torch.linalg.norm(expected)
    plain = rows[0].flatten(1)
    assert torch.linalg.norm(with_sinks - plain) > 0.1 * torch.linalg.norm(expected)


@pytest.mark.parametrize("is_mla", [False, True])
def test_an_fp8_pool_is_scaled_as_it_was_written(is_mla: bool) -> None:
    scales: dict[str, Any] = {"k_scale": torch.tensor(0.25), "v_scale": torch.tensor(0.5)}
    world = World("cpu", 1, is_mla, torch.float8_e4m3fn, **scales)
    batch, (q, k, v) = world.step([2], [40], decode=False)
    world.backend.init_forward_metadata(batch)
    out = world.attend(batch, q, k, v)

    def stored(rows: Tensor, scale: Tensor) -> Tensor:
        return (rows / scale).to(torch.float8_e4m3fn).float() * scale

    world.k[2] = stored(k, scales["k_scale"])
    world.v[2] = world.k[2][..., :512] if is_mla else stored(v, scales["v_scale"])
    world.check(out, [2], [40], q)


@PAGES
@pytest.mark.parametrize("device", DEVICES)
def test_a_step_of_a_graph_reads_what_was_prepared_last(device: str, page: int) -> None:
    world = World(device, page)
    requests = [5, 6, 0, 0]  # two rows are padded: the runner gives them request 0 and one token
    world.grow(0, 1)
    world.pool.k[world.req_to_token[0, 0]] = 0
    world.pool.v[world.req_to_token[0, 0]] = 0
    batch, (q, k, v) = world.step([5, 6], [100, 3], decode=False)
    world.backend.init_forward_metadata(batch)
    world.attend(batch, q, k, v)
    world.backend.init_cuda_graph_state(4, 4)
    static_q = torch.zeros(4, 8, 64, dtype=torch.bfloat16, device=device)
    static_k, static_v = (torch.zeros(4, 2, 64, dtype=torch.bfloat16, device=device) for _ in "kv")
    static_loc = torch.zeros(4, dtype=torch.int64, device=device)

    def prepare(in_capture: bool) -> tuple[Any, Tensor]:
        batch, (q, k, v) = world.step([5, 6], [1, 1], decode=True)
        fill = world.backend.get_cuda_graph_seq_len_fill_value()
        batch.batch_size = 4
        batch.req_pool_indices = torch.tensor(requests, device=device)
        batch.seq_lens = torch.cat([batch.seq_lens, batch.seq_lens.new_full((2,), fill)])
        batch.seq_lens_cpu = batch.seq_lens.cpu()
        for buffer, new in ((static_q, q), (static_k, k), (static_v, v), (static_loc, batch.out_cache_loc)):
            buffer[:2] = new
        batch.out_cache_loc = static_loc
        world.backend.init_forward_metadata_out_graph(batch, in_capture)
        return batch, q

    batch, q = prepare(in_capture=True)

    def call() -> Tensor:
        world.backend.forward_metadata.schedules.clear()  # type: ignore[union-attr]
        return world.attend(batch, static_q, static_k, static_v)

    replay = call
    if device == "cuda":
        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = call()

        def replay() -> Tensor:
            graph.replay()
            return kept

    for _ in range(3):
        world.check(replay()[:2], [5, 6], [1, 1], q)
        _, q = prepare(in_capture=False)


@pytest.mark.parametrize("name", RUNNER_REFUSED)
def test_a_server_that_asks_for_more_is_refused_by_name(name: str) -> None:
    world = World("cpu", 1)
    value = {"speculative_algorithm": "EAGLE", "dcp_size": 2, "unified_pool": True}[name]

    def start(**given: Any) -> None:
        runner = world.runner(**{key: v for key, v in given.items() if key != "unified_pool"})
        runner.kv_index_translator = SimpleNamespace(is_translating="unified_pool" in given)
        AnystrideBackend(runner)

    assert_refused(RUNNER_REFUSED, name, value, start)


@pytest.mark.parametrize("name", [*LAYER_REFUSED, *CALL_REFUSED])
def test_what_has_no_counterpart_is_refused_by_name(name: str) -> None:
    world = World("cpu", 1)
    batch, (q, k, v) = world.step([2], [4], decode=False)
    world.backend.init_forward_metadata(batch)
    if name in CALL_REFUSED:
        assert_refused(CALL_REFUSED, name, torch.ones(1), lambda **x: world.attend(batch, q, k, v, **x))
        return
    value: Any = {"logit_capping_method": "other", "xai_temperature_len": 5}.get(name, True)
    if name == "attn_type":
        value = "encoder_only"

    def call(**changes: Any) -> None:
        world.layer = SimpleNamespace(**(vars(world.layer) | changes))
        world.attend(batch, q, k, v)

    assert_refused(LAYER_REFUSED, name, value, call)


def test_an_argument_that_is_not_known_is_refused_too() -> None:
    world = World("cpu", 1)
    batch, (q, k, v) = world.step([2], [4], decode=False)
    world.backend.init_forward_metadata(batch)
    with pytest.raises(UnsupportedError, match="idx_q cannot be passed on"):
        world.attend(batch, q, k, v, idx_q=torch.ones(1))
    world.attend(batch, q, k, v, return_lse=False)


def test_a_pool_of_another_shape_is_refused() -> None:
    world = World("cpu", 1)
    batch, (q, k, v) = world.step([2], [4], decode=False)
    world.backend.init_forward_metadata(batch)
    world.pool.k = world.pool.k[:, None]
    with pytest.raises(UnsupportedError, match="the token pool: buffer cannot be passed on"):
        world.attend(batch, q, k, v, save_kv_cache=False)


def test_it_registers_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Any] = {}
    handlers: dict[str, Any] = {}
    modules: dict[str, dict[str, Any]] = {
        "sglang.srt.arg_groups.choices": {"ATTENTION_BACKEND_CHOICES": ["triton"]},
        "sglang.srt.layers.attention.attention_registry": {
            "register_attention_backend": lambda name: lambda make: made.setdefault(name, make)
        },
        "sglang.srt.models.deepseek_common.attention_backend_handler": {
            "AttentionBackendRegistry": SimpleNamespace(register=handlers.__setitem__)
        },
        "sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods": {
            "AttnForwardMethod": SimpleNamespace(MLA="absorbed")
        },
        "sglang.srt.models.deepseek_common.utils": {"FORWARD_ABSORB_CORE_ATTENTION_BACKENDS": ["fa3"]},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    for _ in range(2):
        sglang.register()
    assert made == {"anystride": AnystrideBackend}
    assert handlers["anystride"](None, None) == "absorbed"
    assert modules["sglang.srt.arg_groups.choices"]["ATTENTION_BACKEND_CHOICES"] == ["triton", "anystride"]
    absorbing = modules["sglang.srt.models.deepseek_common.utils"]
    assert absorbing["FORWARD_ABSORB_CORE_ATTENTION_BACKENDS"] == ["fa3", "anystride"]
