"""Code written for FlashMLA, over a cache that FlashMLA refuses: one import is changed.

    python examples/flash_mla_drop_in.py

``decode_step`` is what an engine does for each layer: it stores the new token's row and attends. It is
written for ``flash_mla`` and does not know that something else runs it. The cache keeps all layers of a block
together, in blocks of 16 tokens: a strided view for each layer, where the original wants blocks of 64. The
result is held to plain PyTorch, and the script fails if they differ by more than one step of bfloat16.
"""

from __future__ import annotations

import argparse
import math
import sys

import torch
from torch import Tensor

from anystride.adapters.flash_mla import (  # was: from flash_mla import ...
    FlashMLASchedMeta,
    flash_mla_with_kvcache,
    get_mla_metadata,
)

BATCH, LAYERS, HEADS, LATENT, ROPE = 3, 4, 16, 512, 64
BLOCK_SIZE, BLOCKS_EACH = 16, 8
SCALE = (128 + 64) ** -0.5  # DeepSeek's: by the width before absorption


def decode_step(
    q: Tensor, row: Tensor, cache: Tensor, table: Tensor, cache_seqlens: Tensor, metadata: FlashMLASchedMeta
) -> tuple[Tensor, Tensor]:
    """Store a row of each sequence, ``[batch, 576]``, and attend with ``q`` ``[batch, 1, heads, 576]``."""
    position = cache_seqlens.long() - 1
    block = table.gather(1, position[:, None] // BLOCK_SIZE)[:, 0].long()
    cache[block, position % BLOCK_SIZE, 0] = row
    return flash_mla_with_kvcache(
        q, cache, table, cache_seqlens, LATENT, metadata, softmax_scale=SCALE, causal=True
    )


def in_plain_pytorch(q: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """One sequence: ``q`` ``[heads, 576]`` over ``rows`` ``[length, 576]``; ``out`` and natural ``lse``."""
    scores = q.double() @ rows.double().T * SCALE
    return torch.softmax(scores, -1) @ rows[:, :LATENT].double(), torch.logsumexp(scores, -1)


def main() -> int:
    parser = argparse.ArgumentParser(description="FlashMLA's calls over a cache of any strides.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=5, help="tokens to decode; the cache has room for 64")
    a = parser.parse_args()
    torch.manual_seed(0)

    num_blocks = BATCH * BLOCKS_EACH
    whole = torch.full((num_blocks, LAYERS, BLOCK_SIZE, 1, LATENT + ROPE), math.nan, device=a.device)
    whole = whole.to(torch.bfloat16)
    caches = whole.unbind(1)  # a view for each layer
    print(f"a layer's cache: {list(caches[0].shape)}, strides {caches[0].stride()}, blocks of {BLOCK_SIZE}")
    block_table = torch.randperm(num_blocks, device=a.device).int().view(BATCH, BLOCKS_EACH)
    cache_seqlens = torch.tensor([0, 17, 64], dtype=torch.int32, device=a.device)
    kept = [[torch.empty(0, LATENT + ROPE, device=a.device) for _ in range(BATCH)] for _ in range(LAYERS)]
    for layer, cache in enumerate(caches):  # the prompts
        for i, length in enumerate(cache_seqlens.tolist()):
            rows = torch.randn(length, LATENT + ROPE, device=a.device).to(torch.bfloat16)
            token = torch.arange(length, device=a.device)
            cache[block_table[i].long()[token // BLOCK_SIZE], token % BLOCK_SIZE, 0] = rows
            kept[layer][i] = rows

    worst = 0.0
    for _ in range(a.steps):
        cache_seqlens = cache_seqlens + 1
        metadata, _ = get_mla_metadata(cache_seqlens, HEADS, 1)  # once a step, for all layers
        for layer, cache in enumerate(caches):
            q = torch.randn(BATCH, 1, HEADS, LATENT + ROPE, device=a.device).to(torch.bfloat16)
            row = torch.randn(BATCH, LATENT + ROPE, device=a.device).to(torch.bfloat16)
            out, lse = decode_step(q, row, cache, block_table, cache_seqlens, metadata)
            for i in range(BATCH):
                kept[layer][i] = torch.cat([kept[layer][i], row[i : i + 1]])
                right_out, right_lse = in_plain_pytorch(q[i, 0], kept[layer][i])
                for got, right in ((out[i, 0], right_out), (lse[i, :, 0], right_lse)):
                    error = (got.double() - right).abs().max() / right.abs().max()
                    worst = max(worst, error.item())
    step = torch.finfo(torch.bfloat16).eps
    print(f"{a.steps} steps of {LAYERS} layers: off by {worst:.1e} of the largest value or less")
    print(f"allowed: {step:.1e}, one step of bfloat16")
    return 0 if worst <= step else 1


if __name__ == "__main__":
    sys.exit(main())
