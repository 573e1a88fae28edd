"""The layers of the plugin, without an engine, where a CPU engine does not go: context parallelism."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vllm is not installed: make test-vllm", allow_module_level=True)

from anystride.merge import merge

pytestmark = pytest.mark.filterwarnings("default")  # vLLM's imports warn
LATENT, ROPE, HEADS = 32, 16, 4
LENGTHS, QUERIES = [37, 5, 64, 1], [1, 3, 2, 1]


def shard(rows: Tensor, world: int, rank: int, interleave: int) -> Tensor:
    """The tokens of a sequence that live on a rank."""
    position = torch.arange(len(rows))
    return rows[(position // interleave) % world == rank]


def paged(sequences: list[Tensor], block_size: int) -> tuple[Tensor, Tensor]:
    """Rows in the middle of three layers, NaN all around, and the block table."""
    blocks = [max(1, -(-len(rows) // block_size)) for rows in sequences]
    cache = torch.full((sum(blocks), 3, block_size, LATENT + ROPE), float("nan"))[:, 1]
    table = torch.full((len(sequences), max(blocks)), 10**6, dtype=torch.int32)
    ids = torch.randperm(sum(blocks)).int().split(blocks)
    for sequence, (rows, own) in enumerate(zip(sequences, ids, strict=True)):
        table[sequence, : len(own)] = own
        for index, row in enumerate(rows):
            cache[int(own[index // block_size]), index % block_size] = row
    return cache, table


def make_layer(world: int, rank: int, interleave: int) -> Any:
    """A layer as vLLM's constructor would leave it."""
    from anystride.adapters.vllm.mla import Impl

    layer = Impl.__new__(Impl)
    layer.kv_lora_rank, layer.qk_rope_head_dim, layer.scale = LATENT, ROPE, 0.2
    layer.kv_cache_dtype, layer.told = "auto", set()
    layer.dcp_world_size, layer.dcp_rank = world, rank
    layer.cp_kv_cache_interleave_size = interleave
    layer.need_to_return_lse_for_decode = world > 1
    return layer


def run(q: Tensor, sequences: list[Tensor], world: int, rank: int, interleave: int) -> Any:
    from types import SimpleNamespace

    from vllm.v1.attention.backends.utils import get_dcp_local_seq_lens

    from anystride.adapters.vllm.mla import DecodeMetadata

    cache, table = paged([shard(rows, world, rank, interleave) for rows in sequences], 8)
    total = torch.tensor(LENGTHS, dtype=torch.int32)
    local = get_dcp_local_seq_lens(total, world, rank, interleave) if world > 1 else total
    decode = DecodeMetadata(
        block_table=table,
        seq_lens=local.int(),
        dcp_tot_seq_lens=total if world > 1 else None,
        query_start_loc=torch.tensor([0, *QUERIES], dtype=torch.int32).cumsum(0).int(),
        max_query_len=max(QUERIES),
        max_seq_len=64,
        schedule=None,
    )
    return make_layer(world, rank, interleave).forward_mqa(q, cache, SimpleNamespace(decode=decode), None)


@pytest.mark.parametrize("interleave", [1, 4, 16])
@pytest.mark.parametrize("world", [2, 4])
def test_the_shards_of_an_mla_cache_merge_to_the_whole(world: int, interleave: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(sum(QUERIES), HEADS, LATENT + ROPE)
    sequences = [torch.randn(n, LATENT + ROPE) for n in LENGTHS]
    whole, lse = run(q, sequences, 1, 0, 1)
    assert lse is None
    parts = [run(q, sequences, world, rank, interleave) for rank in range(world)]
    assert parts[0][1].shape == (len(q), HEADS)
    outs = torch.stack([out for out, _ in parts])
    merged, _ = merge(outs, torch.stack([lse.transpose(0, 1) for _, lse in parts]))
    torch.testing.assert_close(merged, whole, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(outs[0], whole, atol=1e-2)


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8_e5m2"])
def test_padded_pages_are_written_and_read_without_their_padding(kv_cache_dtype: str) -> None:
    # As vLLM lays out a group whose pages are smaller than another group's: a gap after each block.
    from types import SimpleNamespace

    from anystride.adapters.vllm.gqa import Impl, Metadata

    torch.manual_seed(0)
    blocks, block_size, heads, d, gap = 12, 16, 2, 32, 80
    layer = Impl.__new__(Impl)
    layer.num_heads, layer.num_kv_heads, layer.head_size, layer.scale = 4, heads, d, 0.3
    layer.window, layer.softcap, layer.slopes, layer.sinks = (-1, -1), 0.0, None, None
    layer.kv_cache_dtype, layer.is_fp8, layer.told = kv_cache_dtype, kv_cache_dtype != "auto", set()
    page = 2 * block_size * heads * d
    if layer.is_fp8:
        raw = torch.full((blocks * (page + gap),), 0x7F, dtype=torch.uint8)  # NaN
    else:
        raw = torch.full((blocks * (page + gap),), float("nan"))
    strides = (page + gap, block_size * heads * d, heads * d, d, 1)
    cache = raw.as_strided((blocks, 2, block_size, heads, d), strides)
    key, value = torch.randn(2, sum(LENGTHS), heads, d).unbind(0)
    needed = [-(-n // block_size) for n in LENGTHS]
    table = torch.full((len(LENGTHS), max(needed)), 10**6, dtype=torch.int32)
    slots = []
    for row, (n, own) in enumerate(
        zip(LENGTHS, torch.randperm(sum(needed)).int().split(needed), strict=True)
    ):
        table[row, : len(own)] = own
        slots += [int(own[i // block_size]) * block_size + i % block_size for i in range(n)]
    scales = SimpleNamespace(_k_scale=torch.tensor(0.5), _v_scale=torch.tensor(2.0))
    layer.do_kv_cache_update(scales, key, value, cache, torch.tensor(slots))
    padding = raw.view(blocks, page + gap)[:, page:]
    assert (padding == 0x7F).all() if layer.is_fp8 else padding.isnan().all()
    starts = torch.tensor([0, *QUERIES], dtype=torch.int32).cumsum(0).int()
    metadata = Metadata(
        num_actual_tokens=sum(QUERIES),
        max_query_len=max(QUERIES),
        query_start_loc=starts,
        max_seq_len=64,
        seq_lens=torch.tensor(LENGTHS, dtype=torch.int32),
        total_seq_lens=None,
        block_table=table,
        slot_mapping=torch.empty(0),
        causal=True,
        schedule=None,
    )
    query = torch.randn(sum(QUERIES) + 3, 4, d)  # three rows of padding, as for a graph
    output = torch.full_like(query, 7.0)
    layer.forward(scales, query, key, value, cache, metadata, output)
    assert (output[sum(QUERIES) :] == 7.0).all()
    if layer.is_fp8:
        key = (key / 0.5).to(torch.float8_e5m2).float() * 0.5
        value = (value / 2.0).to(torch.float8_e5m2).float() * 2.0
    begin = 0
    for n, m, start in zip(LENGTHS, QUERIES, starts.tolist(), strict=False):
        k, v = (t[begin : begin + n].repeat_interleave(2, 1) for t in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query[start : start + m], k) * 0.3
        hidden = torch.ones(m, n, dtype=torch.bool).triu(n - m + 1)
        expected = torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)
        torch.testing.assert_close(output[start : start + m], expected, rtol=1e-4, atol=1e-4)
        begin += n


def test_what_cannot_be_passed_on_is_refused_by_name() -> None:
    from types import SimpleNamespace

    from vllm.platforms.interface import DeviceCapability

    from anystride.adapters.vllm.gqa import Backend, Builder, Impl
    from anystride.adapters.vllm.prefill import Prefill
    from anystride.errors import UnsupportedError

    rows = torch.zeros(1, 1, 8)
    with pytest.raises(UnsupportedError, match="a quantised output cannot be written"):
        Impl.__new__(Impl).forward(None, rows, rows, rows, rows, None, rows, output_scale=rows)
    with pytest.raises(UnsupportedError, match="a quantised output cannot be written"):
        Prefill.__new__(Prefill).run_prefill_new_tokens(rows, rows, rows, False, output_scale=rows)
    with pytest.raises(UnsupportedError, match="causality of each sequence by a tensor"):
        Builder.__new__(Builder).build(0, SimpleNamespace(causal=torch.ones(2)))
    asked: dict[str, Any] = {
        "head_size": 64,
        "dtype": torch.bfloat16,
        "kv_cache_dtype": "auto",
        "block_size": 1,
        "use_mla": False,
        "has_sink": True,
        "use_sparse": False,
        "use_mm_prefix": False,
        "use_per_head_quant_scales": False,
        "device_capability": DeviceCapability(9, 0),
        "attn_type": "decoder",
    }
    assert Backend.validate_configuration(**asked) == []
    for change, reason in (
        ({"head_size": 640}, "head_size not supported"),
        ({"kv_cache_dtype": "float16"}, "a cache of torch.float16 under queries of torch.bfloat16"),
        ({"kv_cache_dtype": "nvfp4"}, "kv_cache_dtype not supported"),
        ({"use_mla": True}, "MLA not supported"),
        ({"attn_type": "encoder"}, "attention type encoder not supported"),
        ({"device_capability": DeviceCapability(7, 5)}, "compute capability not supported"),
        ({"use_batch_invariant": True}, "batch invariance not supported"),
    ):
        (found,) = Backend.validate_configuration(**(asked | change))
        assert found.startswith(reason)


def test_a_chunk_of_context_is_passed_as_this_vllm_passes_it() -> None:
    import inspect
    from types import SimpleNamespace

    from vllm.v1.attention.backends.mla.prefill.base import MLAPrefillBackend

    from anystride.adapters.vllm.prefill import Prefill

    torch.manual_seed(0)
    queries, keys = [3, 2], [7, 0]  # the second request has nothing in this chunk
    starts, ends = (torch.tensor([0, *torch.tensor(n).cumsum(0)], dtype=torch.int32) for n in (queries, keys))
    q, k, v = torch.randn(5, HEADS, 24), torch.randn(7, HEADS, 24), torch.randn(7, HEADS, 16)
    backend = Prefill.__new__(Prefill)
    backend.scale, backend.told_context = 0.3, set()
    chunks: dict[str, Any] = {
        "chunk_idx": 1,
        "chunk": SimpleNamespace(
            cu_seq_lens=ends, max_seq_len=7, query_start_loc=starts, max_query_len=3
        ),
    }  # fmt: skip
    context = SimpleNamespace(cu_seq_lens=[None, ends], max_seq_lens=[None, 7])
    backend._prefill_metadata = SimpleNamespace(
        chunked_context=context, query_start_loc=starts, max_query_len=3
    )
    names = inspect.signature(MLAPrefillBackend.run_prefill_context_chunk).parameters
    given: dict[str, Any] = {"q": q, "k": k, "v": v} | {
        name: chunks[name] for name in names if name in chunks
    }
    assert len(given) == 4
    out, lse = backend.run_prefill_context_chunk(**given)
    scores = torch.einsum("nhd,lhd->hnl", q[:3].double(), k.double()) * 0.3
    expected = torch.einsum("hnl,lhd->nhd", scores.softmax(-1), v.double())
    torch.testing.assert_close(out[:3].double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse[:, :3].double(), scores.logsumexp(-1), atol=1e-5, rtol=1e-5)
    assert out[3:].eq(0).all()
    assert lse[:, 3:].isneginf().all()


def test_a_schedule_stays_where_a_graph_has_seen_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    import anystride
    from anystride.adapters.vllm.common import Schedule

    made: list[tuple[Any, ...]] = []

    def get_scheduler_metadata(batch: int, *arguments: Any, **options: Any) -> Tensor:
        made.append((batch, *arguments, options))
        return torch.full((16 * batch,), len(made), dtype=torch.int32)

    monkeypatch.setattr(anystride, "get_scheduler_metadata", get_scheduler_metadata)

    def schedule(
        device: str = "cuda", ranks: int = 1, drafter: Any = None, heads: Any = (8, 2, 64, 64)
    ) -> Any:
        config = SimpleNamespace(
            model_config=SimpleNamespace(dtype=torch.bfloat16, max_model_len=4096),
            speculative_config=drafter,
            parallel_config=SimpleNamespace(decode_context_parallel_size=ranks),
        )
        return Schedule(config, torch.device(device), heads, (15, 0))

    starts, lengths = torch.arange(5, dtype=torch.int32), torch.ones(4, dtype=torch.int32)
    steps = schedule()
    first = steps.make(starts, lengths, 1, causal=True)
    other = steps.make(starts[:3], lengths[:2], 1, causal=True)
    again = steps.make(starts, lengths, 1, causal=True)
    assert again is first
    assert again.unique().tolist() == [3]  # the schedule of the last step
    assert other.unique().tolist() == [2]
    assert made[0][:6] == (4, 1, 4096, 8, 2, 64)  # the model's bound, whatever the step's
    assert made[0][-1] == {"causal": True, "window_size": (15, 0)}
    steps.make(starts, lengths, 1, causal=False)
    assert made[-1][-1] == {"causal": False, "window_size": (15, 15)}
    for without in (
        schedule(device="cpu"),
        schedule(ranks=2),
        schedule(drafter=object()),
        schedule(heads=None),
    ):
        assert without.make(starts, lengths, 1, causal=True) is None
    assert len(made) == 4
