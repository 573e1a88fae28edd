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
