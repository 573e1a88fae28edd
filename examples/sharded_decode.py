"""Decode over a KV cache that is dealt out over several processes, and compare with one that is not.

    python examples/sharded_decode.py                    # 2 processes on the CPU, gloo
    python examples/sharded_decode.py --ranks 4 --interleave 16
    python examples/sharded_decode.py --device cuda      # 2 GPUs, NCCL

One attention layer of MLA, random numbers. Each rank has some of the query heads, as under tensor
parallelism, and some tokens of each sequence. A step stores one new token a sequence, on the rank that it
belongs to, and attends over all. Every rank also keeps the whole cache, for the comparison only.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from anystride import flash_attn_varlen_func
from anystride.cache import store_mla
from anystride.distributed import ShardedDecode, shard_lengths

HEADS, LATENT, ROPE, BLOCK_SIZE = 8, 64, 32, 8
PROMPTS = (50, 7, 0)  # tokens in the cache before the first step
SCALE = (128 + ROPE) ** -0.5


class Cache:
    """A paged cache of rows of latent and rope, and where each sequence's blocks are."""

    def __init__(self, most_tokens: int, device: torch.device) -> None:
        blocks = -(-most_tokens // BLOCK_SIZE)
        self.rows = torch.zeros(len(PROMPTS) * blocks, BLOCK_SIZE, LATENT + ROPE, device=device)
        self.table = torch.arange(len(PROMPTS) * blocks, dtype=torch.int32, device=device)
        self.table = self.table.view(len(PROMPTS), blocks)

    @property
    def views(self) -> tuple[Tensor, Tensor]:
        """K is the whole row, V the latent part of it: the same memory."""
        k = self.rows.unsqueeze(2)
        return k, k[..., :LATENT]

    def store(self, rows: Tensor, seqs: Tensor, indices: Tensor) -> None:
        """Store rows as tokens ``indices`` of sequences ``seqs``; a negative index is skipped."""
        blocks = self.table[seqs, indices.clamp(min=0) // BLOCK_SIZE].long()
        slots = torch.where(indices < 0, -1, blocks * BLOCK_SIZE + indices % BLOCK_SIZE)
        store_mla(rows[:, :LATENT], rows[:, LATENT:], self.rows, slots)


def local_indices(positions: Tensor, world_size: int, rank: int, interleave: int) -> Tensor:
    """Where on this rank the tokens at ``positions`` of their sequences are, -1 if on another."""
    turn = interleave * world_size
    here = positions // interleave % world_size == rank
    return torch.where(here, positions // turn * interleave + positions % interleave, -1)


def work(rank: int, options: argparse.Namespace, place: str) -> None:
    """What each process does."""
    world_size, on_gpu = options.ranks, options.device == "cuda"
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    backend = "nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, init_method=place, rank=rank, world_size=world_size)
    heads = HEADS // world_size
    decode = ShardedDecode(
        num_q_heads=heads,
        num_kv_heads=1,
        d_qk=LATENT + ROPE,
        d_v=LATENT,
        dtype=torch.float32,
        softmax_scale=SCALE,
        cp_interleave=options.interleave,
    )

    batch, most_tokens = len(PROMPTS), max(PROMPTS) + options.steps
    most_here = -(-most_tokens // (world_size * options.interleave)) * options.interleave
    mine, whole = Cache(most_here, device), Cache(most_tokens, device)
    numbers = torch.Generator().manual_seed(options.seed)  # the same on every rank

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=numbers).to(device)

    def store(rows: Tensor, seqs: Tensor, positions: Tensor) -> None:
        whole.store(rows, seqs, positions)
        mine.store(rows, seqs, local_indices(positions, world_size, rank, options.interleave))

    lengths = torch.tensor(PROMPTS, dtype=torch.int32, device=device)
    seqs = torch.arange(batch, device=device)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device)
    positions = torch.cat([torch.arange(n) for n in PROMPTS]).to(device)
    store(random(sum(PROMPTS), LATENT + ROPE), seqs.repeat_interleave(lengths), positions)
    worst = 0.0
    for _ in range(options.steps):
        store(random(batch, LATENT + ROPE), seqs, lengths.long())
        lengths += 1
        queries = random(batch, HEADS, LATENT + ROPE)
        own_heads = slice(rank * heads, (rank + 1) * heads)
        here = shard_lengths(lengths, world_size, rank, options.interleave)
        out = decode(
            queries[:, own_heads], *mine.views, 1, starts, most_here,
            seqused_k=here, cp_tot_seqused_k=lengths, block_table=mine.table,
        )  # fmt: skip
        right = flash_attn_varlen_func(
            queries, *whole.views, 1, starts, most_tokens, seqused_k=lengths, block_table=whole.table,
            softmax_scale=SCALE, causal=True,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        assert isinstance(right, Tensor)
        step = torch.finfo(out.dtype).eps * right.abs().max()  # of rounding, at the largest number
        worst = max(worst, ((out - right[:, own_heads]).abs().max() / step).item())
    told: list[tuple[list[int], float]] = [([], 0.0)] * world_size
    dist.all_gather_object(told, (here.tolist(), worst))
    if rank == 0:
        print(f"{options.steps} steps, sequences of {lengths.tolist()} tokens")
        for other, (held, difference) in enumerate(told):
            print(f"rank {other} holds {held} of them; off by {difference:.1f} roundings at most")
    dist.destroy_process_group()


def main() -> None:
    """Start the processes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=2, choices=[1, 2, 4, 8])
    parser.add_argument("--interleave", type=int, default=1, help="neighbouring tokens on one rank")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = (Path(folder) / "store").as_uri()
        mp.spawn(work, (options, place), nprocs=options.ranks)  # type: ignore[attr-defined, no-untyped-call]


if __name__ == "__main__":
    main()
