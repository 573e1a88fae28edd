"""Tiny models with random weights, as Hugging Face saves them, and what it generates: JSON on stdout.

python tests/vllm_engine/models.py FOLDER '{"kind": "llama", "lengths": [5, 37], "count": 24}'
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 320
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def make_config(kind: str) -> Any:
    """The configuration of a tiny model of this kind."""
    import transformers as hf

    if kind == "llama":
        return hf.LlamaConfig(**COMMON, num_attention_heads=8, num_key_value_heads=2, head_dim=16)
    if kind == "deepseek":
        return hf.DeepseekV3Config(
            **COMMON,
            num_attention_heads=4,
            num_key_value_heads=4,
            q_lora_rank=48,
            kv_lora_rank=512,
            qk_nope_head_dim=32,
            qk_rope_head_dim=64,
            v_head_dim=32,
            first_k_dense_replace=COMMON["num_hidden_layers"],  # no experts: attention is what counts here
            n_routed_experts=4,
            n_group=1,
            topk_group=1,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            rope_interleave=True,
        )
    if kind == "gemma":  # windows in every second layer, softcap on the scores, a scale of its own
        return hf.Gemma2Config(
            **(COMMON | {"tie_word_embeddings": True}),
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            query_pre_attn_scalar=24,
            sliding_window=16,
            attn_logit_softcapping=5.0,
        )
    if kind == "gpt-oss":  # sinks, and windows in every second layer
        return hf.GptOssConfig(
            **COMMON,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=16,
            sliding_window=16,
            num_local_experts=2,
            num_experts_per_tok=1,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 256,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
            },
        )
    raise ValueError(f"no kind of model {kind!r}")


def save_model(kind: str, folder: Path) -> None:
    """Save a tiny model whose logits are well apart: small random weights would make them nearly equal."""
    import transformers as hf

    torch.manual_seed(7)
    config = make_config(kind)
    config._attn_implementation = "eager"
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "sinks" in name:
                parameter.normal_(0.0, 1.0)
            else:
                # Gemma multiplies its embeddings by 8, and takes them for its logits, too: larger ones would
                # make it repeat its last token, whatever attention says.
                embeddings = 0.03 if kind == "gemma" else 0.5
                parameter.normal_(0.0, embeddings if "embed" in name else 2.0 * parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)


def dense_tokens(
    folder: Path, prompts: list[list[int]], count: int, change: dict[str, Any] | None = None
) -> list[list[int]]:
    """What Hugging Face generates greedily, prompt by prompt; from a model that is changed so, if it is."""
    import transformers as hf

    change = dict(change or {})
    sinks, dropped = change.pop("sinks", None), change.pop("attention_dropped", False)
    config = hf.AutoConfig.from_pretrained(folder, **change)
    model = hf.AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sinks" in name and sinks is not None:
                parameter.fill_(sinks)
            if "o_proj" in name and dropped:
                parameter.zero_()
    model.generation_config.eos_token_id = None  # nothing ends a sequence, and nothing is forbidden
    tokens = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
        tokens.append(out[0, len(prompt) :].tolist())
    return tokens


def make_prompts(lengths: list[int]) -> list[list[int]]:
    """Random prompts; the last begins as the longest before it, for prefix caching."""
    generator = torch.Generator().manual_seed(11)
    prompts = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    longest = max(prompts, key=len)
    shared = len(longest) // 2
    return [*prompts, longest[:shared] + prompts[0]]


def main() -> None:
    folder, asked = Path(sys.argv[1]), json.loads(sys.argv[2])
    if not folder.exists():
        save_model(asked["kind"], folder)
    prompts = make_prompts(asked["lengths"])
    tokens = dense_tokens(folder, prompts, asked["count"], asked.get("change"))
    print("RESULT " + json.dumps({"prompts": prompts, "tokens": tokens}))


if __name__ == "__main__":
    main()
