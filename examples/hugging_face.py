"""Hugging Face transformers on anystride: generate, continuous batching, and DeepSeek's compressed cache.

    python examples/hugging_face.py

Three tiny models with random weights, so that nothing is downloaded: a Llama by ``generate``, a gpt-oss with
sinks and windows by ``generate_batch``, a DeepSeek-V3 whose latents are read in place. Each is run a second
time with transformers' own ``eager`` attention, and the script fails if a greedy token differs.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    DeepseekV3Config,
    GenerationConfig,
    GptOssConfig,
    LlamaConfig,
)

from anystride.adapters.transformers import absorb, register

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16], [21, 22, 23], [3, 4, 3, 4, 3, 4, 3]]
SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0, "tie_word_embeddings": False,
    "initializer_range": 0.3,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
LLAMA = LlamaConfig(**SIZES)
GPT_OSS = GptOssConfig(**SIZES, **EXPERTS, num_local_experts=4, sliding_window=6)
DEEPSEEK = DeepseekV3Config(
    **(SIZES | EXPERTS | {"num_key_value_heads": 4, "head_dim": 8}), qk_rope_head_dim=8, qk_nope_head_dim=16,
    v_head_dim=16, kv_lora_rank=32, q_lora_rank=24, n_routed_experts=4, n_group=1, topk_group=1,
    moe_intermediate_size=32, first_k_dense_replace=1,
)  # fmt: skip


def generate(model: Any, implementation: str, new_tokens: int) -> list[list[int]]:
    """Greedy tokens of one padded batch."""
    model.set_attn_implementation(implementation)
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in PROMPTS], device=model.device)
    done = model.generate(ids, attention_mask=(ids != 0).long(), max_new_tokens=new_tokens, do_sample=False)
    tokens: list[list[int]] = done[:, longest:].tolist()
    return tokens


def generate_batch(model: Any, implementation: str, new_tokens: int) -> list[list[int]]:
    """The same by continuous batching, over a cache of pages."""
    model.set_attn_implementation(implementation)
    pages = ContinuousBatchingConfig(block_size=4, num_blocks=64, max_batch_tokens=16)
    greedy = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    done = model.generate_batch(PROMPTS, greedy, pages)
    return [output.generated_tokens for output in done.values()]


def main() -> int:
    parser = argparse.ArgumentParser(description="transformers with attn_implementation='anystride'.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--new-tokens", type=int, default=16)
    a = parser.parse_args()
    register()
    for config, run, implementation in (
        (LLAMA, generate, "anystride"),
        (GPT_OSS, generate_batch, "paged|anystride"),
        (DEEPSEEK, generate, "anystride"),
    ):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval().to(a.device)
        right = generate(model, "eager", a.new_tokens)
        if config is DEEPSEEK:
            absorb(model)
        ours = run(model, implementation, a.new_tokens)
        told = "the same tokens as eager" if ours == right else f"NOT the tokens of eager: {right}"
        print(f"{type(model).__name__:<22} {run.__name__:<15} {implementation:<16} {told}, {ours[0][:8]} ...")
        if ours != right:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
