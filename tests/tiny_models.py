"""Tiny random models of transformers, and what the tests do to them. No weights are downloaded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GenerationConfig,
    GptOssConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)
from transformers.cache_utils import StaticLayer
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching import PagedAttentionCache

import anystride
from anystride.adapters import transformers as adapter

__all__ = [
    "NEW_TOKENS", "PROMPTS", "Calls", "batch_of", "generate", "generate_batch", "make_model", "poison_pages",
    "poison_static_caches", "recorded",
]  # fmt: skip

PAD, WINDOW, NEW_TOKENS = 0, 8, 24
# Shorter and longer than the window, and than the tokens of a step of continuous batching.
PROMPTS = [
    [5, 6, 7, 5, 9, 10, 11, 5, 13, 14, 15, 5, 17, 18, 19, 20, 21],
    [3],
    [21, 22, 23, 24, 25, 26, 27],
    [9, 3],
]


def config_of(kind: str, head_dim: int) -> PreTrainedConfig:
    layers, window = ["sliding_attention", "full_attention"], {"sliding_window": WINDOW}
    common: dict[str, Any] = {
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": head_dim,
        "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": PAD,
        "tie_word_embeddings": False,
    }  # fmt: skip
    if kind == "llama":
        return LlamaConfig(**common)
    if kind == "qwen3":
        return Qwen3Config(**common)
    if kind == "gemma2":
        changes = {
            "layer_types": layers,
            "query_pre_attn_scalar": 2 * head_dim,
            "attn_logit_softcapping": 1.5,
        }
        return Gemma2Config(**(common | window | changes))
    if kind == "gemma3":  # three groups of two layers in continuous batching
        types = ["sliding_attention", "sliding_attention", "full_attention"] * 2
        changes = {"layer_types": types, "num_hidden_layers": 6, "query_pre_attn_scalar": 2 * head_dim}
        return Gemma3TextConfig(**(common | window | changes))
    if kind == "gpt_oss":
        changes = {"layer_types": layers * 2, "num_hidden_layers": 4, "num_local_experts": 4}
        rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
        return GptOssConfig(**(common | window | changes | rope | {"num_experts_per_tok": 2}))
    assert kind == "deepseek_v3"
    rope_dim = head_dim if head_dim >= 64 else 8
    return DeepseekV3Config(
        **(common | {"num_key_value_heads": 8, "head_dim": rope_dim, "qk_rope_head_dim": rope_dim}),
        q_lora_rank=24, kv_lora_rank=8 * rope_dim, qk_nope_head_dim=16, v_head_dim=16, n_routed_experts=4,
        num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=32, first_k_dense_replace=1,
        n_shared_experts=1,
    )  # fmt: skip


@torch.no_grad()
def make_model(
    kind: str, device: str = "cpu", head_dim: int = 16, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A model whose attention matters: scores far from even, and different tokens one after the other."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config_of(kind, head_dim)).eval()
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "sinks" in name:
            weight.uniform_(1.0, 3.0)
        elif "bias" in name:
            weight.normal_(0, 0.3)
        elif weight.dim() > 1 and "embed_tokens" not in name:
            weight.normal_(0, 1.6 / math.sqrt(weight.shape[-1]))
        elif "embed_tokens" in name:
            weight.normal_(0, 0.06 if "gemma" in kind else 1.0)  # Gemma multiplies them with 8
    model.get_output_embeddings().weight[PAD] = 0  # a logit of 0 is never the largest
    adapter.register()
    return model.to(device=device, dtype=dtype)


def batch_of(prompts: Sequence[Sequence[int]], device: str = "cpu") -> dict[str, Tensor]:
    """Prompts padded on the left."""
    longest = max(map(len, prompts))
    pads = [longest - len(prompt) for prompt in prompts]
    ids = [[PAD] * n + list(prompt) for n, prompt in zip(pads, prompts, strict=True)]
    mask = [[0] * n + [1] * len(prompt) for n, prompt in zip(pads, prompts, strict=True)]
    return {
        "input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)
    }  # fmt: skip


def generate(model: PreTrainedModel, implementation: str, **options: Any) -> tuple[list[list[int]], Tensor]:
    """Greedy tokens of each prompt, and all their logits, ``[prompts, NEW_TOKENS, vocab]``."""
    model.set_attn_implementation(implementation)
    inputs = batch_of(PROMPTS, model.device)
    done: Any = model.generate(
        **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, disable_compile=True, output_logits=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    return done.sequences[:, inputs["input_ids"].shape[1] :].tolist(), torch.stack(done.logits, 1)


def generate_batch(model: PreTrainedModel, implementation: str, **options: Any) -> list[list[int]]:
    """The same tokens by continuous batching, at most 12 of them in a step."""
    model.set_attn_implementation(implementation)
    settings = {"block_size": 4, "num_blocks": 96, "max_batch_tokens": 12} | options
    done = model.generate_batch(
        PROMPTS,
        GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=PAD),
        ContinuousBatchingConfig(**settings),
    )
    for output in done.values():
        if output.error is not None:
            raise RuntimeError(output.error)
    return [output.generated_tokens for output in done.values()]


class Calls(list[dict[str, Any]]):
    """The arguments of every call of the attention, by name."""


@contextmanager
def recorded(**changes: Any) -> Iterator[Calls]:
    """Keep the calls that the adapter makes; with ``changes``, make them with other arguments."""
    calls = Calls()

    def call(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Any:
        calls.append({"q": q, "k": k, "v": v, "rest": rest} | options)
        return anystride.flash_attn_varlen_func(q, k, v, *rest, **(options | changes))

    with mock.patch.object(adapter, "flash_attn_varlen_func", call):
        yield calls


@contextmanager
def poison_static_caches() -> Iterator[None]:
    """A static cache begins as NaN, not as zeros."""
    begin = StaticLayer.lazy_initialization

    def poisoned(self: StaticLayer, *states: Tensor) -> None:
        begin(self, *states)
        self.keys.fill_(math.nan)
        self.values.fill_(math.nan)

    with mock.patch.object(StaticLayer, "lazy_initialization", poisoned):
        yield


@contextmanager
def poison_pages() -> Iterator[None]:
    """The pages of continuous batching begin as NaN, those for padding included."""
    begin = PagedAttentionCache.__init__

    def poisoned(self: PagedAttentionCache, *args: Any, **options: Any) -> None:
        begin(self, *args, **options)
        for whole in (*self.key_cache, *self.value_cache):
            whole.fill_(math.nan)

    with mock.patch.object(PagedAttentionCache, "__init__", poisoned):
        yield
