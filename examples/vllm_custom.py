"""vLLM on anystride: one argument, and a line in the log that says who runs attention.

    python examples/vllm_custom.py MODEL            # a folder or a name, as vLLM takes it

On the command line of vLLM it is `vllm serve MODEL --attention-backend CUSTOM`. docs/vllm.md says more.
"""

from __future__ import annotations

import argparse
from typing import Any


def generate(model: str, prompts: list[list[int]], count: int, **options: Any) -> list[list[int]]:
    """Continue prompts of token ids greedily."""
    from vllm import LLM, SamplingParams

    llm = LLM(model=model, attention_backend="CUSTOM", skip_tokenizer_init=True, **options)
    sampling = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def main() -> None:
    parser = argparse.ArgumentParser(description="Continue two prompts with vLLM on anystride.")
    parser.add_argument("model")
    model = parser.parse_args().model
    # Blocks of one token: our kernels read any size, and prefixes are shared to the token.
    for tokens in generate(model, [[5, 6, 7], [8]], count=8, block_size=1, max_model_len=1024):
        print(tokens)


if __name__ == "__main__":
    main()
