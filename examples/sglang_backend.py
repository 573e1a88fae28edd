"""SGLang's layers and token pools on anystride, without a server: a prompt, and tokens after it.

    python examples/sglang_backend.py

A server takes ``--attention-backend anystride`` and no code; this shows what then happens in its layers. The
pool is SGLang's, its slots strided as in a pool that keeps all layers of a token side by side, in pages of 16
tokens. The result is held to plain PyTorch, and the script fails if they differ by more than one step of
bfloat16. It needs SGLang's Python package (0.5.23), and no GPU.
"""

from __future__ import annotations

import argparse
import math
import sys
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from anystride.adapters import sglang as plugin

HEADS, KV_HEADS, D, LAYERS, PAGE, PAGES = 8, 2, 64, 4, 16, 8
PROMPT = 37


def make_runner(device: str) -> Any:
    """What SGLang's ``ModelRunner`` has once its pools are allocated, as far as a back end looks."""
    from sglang.srt.mem_cache.kv_index_translator import KVIndexTranslator
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool

    pool = MHATokenToKVPool(PAGES * PAGE, PAGE, torch.bfloat16, KV_HEADS, D, LAYERS, device, False)
    whole = torch.full((PAGES * PAGE + PAGE, LAYERS, 2, KV_HEADS, D), math.nan).to(device, torch.bfloat16)
    pool.k_buffer = [whole[:, layer, 0] for layer in range(LAYERS)]
    pool.v_buffer = [whole[:, layer, 1] for layer in range(LAYERS)]
    requests = ReqToTokenPool(1, PAGES * PAGE, device, False)
    translator = KVIndexTranslator(
        req_to_token=requests.req_to_token, token_to_kv_pool_allocator=None, token_to_kv_pool=pool,
        page_size=PAGE, device=device,
    )  # fmt: skip
    return SimpleNamespace(
        token_to_kv_pool=pool, req_to_token_pool=requests, page_size=PAGE, kv_index_translator=translator,
        use_mla_backend=False, kv_cache_dtype=torch.bfloat16, attention_chunk_size=None,
        model_config=SimpleNamespace(is_encoder_decoder=False),
    )  # fmt: skip


def make_batch(runner: Any, held: int, new: int, device: str) -> Any:
    """A step of one request that gets ``new`` tokens."""
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

    slots = runner.req_to_token_pool.req_to_token[1, held : held + new].long()
    counts = torch.tensor([new], dtype=torch.int32, device=device)
    return ForwardBatch(
        forward_mode=ForwardMode.EXTEND if held == 0 else ForwardMode.DECODE, batch_size=1,
        input_ids=torch.zeros(new, dtype=torch.int64, device=device),
        req_pool_indices=torch.tensor([1], device=device),
        seq_lens=torch.tensor([held + new], device=device), out_cache_loc=slots, seq_lens_sum=held + new,
        extend_seq_lens=counts, extend_seq_lens_cpu=[new],
    )  # fmt: skip


def in_plain_pytorch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of the last rows: ``q`` ``[n, heads, d]`` over ``[length, kv_heads, d]``."""
    k, v = (x.double().repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    scores = torch.einsum("nhd,lhd->hnl", q.double(), k) * D**-0.5
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(len(k) - len(q) + 1)
    return torch.einsum("hnl,lhd->nhd", scores.masked_fill(hidden, -math.inf).softmax(-1), v)


def main() -> int:
    parser = argparse.ArgumentParser(description="SGLang's layers and pools on anystride, without a server.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=5, help="tokens to decode after the prompt")
    a = parser.parse_args()
    try:
        from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
        from sglang.srt.layers.radix_attention import RadixAttention
        from sglang.srt.runtime_context import get_context, get_parallel
    except ModuleNotFoundError as missing:
        print(f"needs SGLang {plugin.READ_IN}: {missing}", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    plugin.register()  # a server calls it by itself
    with get_context().override_server_args(), get_parallel().override(attn_tp_size=1, attn_dcp_rank=0):
        runner = make_runner(a.device)
        backend = ATTENTION_BACKENDS["anystride"](runner)
    pages = torch.randperm(PAGES, device=a.device) + 1  # page 0 is SGLang's own
    slots = (pages[:, None] * PAGE + torch.arange(PAGE, device=a.device)).flatten()
    runner.req_to_token_pool.req_to_token[1] = slots
    buffer = runner.token_to_kv_pool.get_kv_buffer(0)[0]
    print(f"a layer's keys: {list(buffer.shape)}, strides {buffer.stride()}, pages of {PAGE}")

    layers = [RadixAttention(HEADS, D, D**-0.5, KV_HEADS, layer) for layer in range(LAYERS)]
    kept = [torch.empty(2, 0, KV_HEADS, D, device=a.device, dtype=torch.bfloat16) for _ in layers]
    held, worst = 0, 0.0
    for new in (PROMPT, *[1] * a.steps):
        batch = make_batch(runner, held, new, a.device)
        backend.init_forward_metadata(batch)  # once a step, for all layers
        for i, layer in enumerate(layers):
            q, k, v = torch.randn(3, new, HEADS, D, device=a.device).to(torch.bfloat16)
            k, v = k[:, :KV_HEADS], v[:, :KV_HEADS]
            kept[i] = torch.cat([kept[i], torch.stack([k, v])], 1)
            out = backend.forward(q.flatten(1), k, v, layer, batch).view(new, HEADS, D)
            right = in_plain_pytorch(q, *kept[i])
            worst = max(worst, float((out.double() - right).abs().max() / right.abs().max()))
        held += new
    step = torch.finfo(torch.bfloat16).eps
    print(f"a prompt of {PROMPT} and {a.steps} tokens, {LAYERS} layers: off by {worst:.1e} of the largest")
    print(f"allowed: {step:.1e}, one step of bfloat16")
    return 0 if worst <= step else 1


if __name__ == "__main__":
    sys.exit(main())
