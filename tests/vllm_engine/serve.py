"""One engine in one process: what vLLM generates from a saved model, and what it ran on, as JSON on stdout.

python tests/vllm_engine/serve.py FOLDER '{"prompts": [[1, 2]], "count": 4, "block_size": 16, ...}'
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

for name, value in {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "OMP_NUM_THREADS": "2",
}.items():
    os.environ.setdefault(name, value)


def main() -> None:
    folder, asked = sys.argv[1], json.loads(sys.argv[2])
    import vllm
    from cpu_platform import stand_in
    from vllm import LLM, SamplingParams

    stand_in()
    if "threshold" in asked:  # which requests of MLA are attended to in the absorbed form
        from anystride.adapters.vllm import mla

        mla.Builder.reorder_batch_threshold = asked["threshold"]
    options: dict[str, Any] = {
        "block_size": asked["block_size"],
        "max_num_batched_tokens": asked.get("budget", 2048),
        "enable_prefix_caching": asked.get("prefix_caching", False),
    }
    if "kv_cache_dtype" in asked:
        options["kv_cache_dtype"] = asked["kv_cache_dtype"]
    if asked.get("cross_layer"):
        sys.path.append(str(Path(__file__).parents[1]))
        options["kv_transfer_config"] = {
            "kv_connector": "NoConnector",
            "kv_connector_module_path": "vllm_connector",
            "kv_role": "kv_both",
        }
    llm = LLM(
        model=folder,
        attention_backend="CUSTOM",
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=1024,
        max_num_seqs=8,
        seed=0,
        compilation_config={"custom_ops": ["none"]},
        **options,
    )
    count = asked["count"]
    sampling = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
    passes = []
    for _ in range(asked.get("passes", 1)):
        prompts = [{"prompt_token_ids": prompt} for prompt in asked["prompts"]]
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        passes.append([list(output.outputs[0].token_ids) for output in outputs])
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    context = runner.compilation_config.static_forward_context
    layers = {name: layer for name, layer in context.items() if hasattr(layer, "impl")}
    result = {
        "version": vllm.__version__,
        "passes": passes,
        "backends": sorted({layer.impl.__class__.__module__ for layer in layers.values()}),
        "caches": [[list(layer.kv_cache.shape), list(layer.kv_cache.stride())] for layer in layers.values()],
        "storages": len({layer.kv_cache.untyped_storage().data_ptr() for layer in layers.values()}),
        "budget": llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens,
        "cached_tokens": [output.num_cached_tokens for output in outputs],
    }
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
