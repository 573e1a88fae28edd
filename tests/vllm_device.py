"""vLLM on a GPU: our back end beside vLLM's own, in the engine. Tokens, logprobs, time of a decode step.

    python tests/vllm_device.py --json vllm.json           # every run of RUNS, a process each: some 6 minutes
    python tests/vllm_device.py --more --json more.json    # fp8 caches, speculation, sinks and windows
    python tests/vllm_device.py --only llama --json vllm.json
    python tests/vllm_device.py --ranks 2 --json vllm2.json  # context parallelism, on a host with two GPUs
    python tests/vllm_device.py --run '{"kind": "llama", "backend": "CUSTOM", "graphs": true}' --work FOLDER

Random models in bf16, 8 layers with the attention of DeepSeek-V3, of Llama, or of MiMo-V2 (windows and sinks
in six layers of eight). Each run generates greedily for prompts of mixed lengths, then scores fixed prompts
token by token, where nothing can drift apart; then the others wait, and it times decode steps of 64 sequences
of some 2k tokens: wall time, synchronised before and after, then what kernels take, by PyTorch's profiler.
Not collected by pytest. How it was packed and run on a machine without a network: docs/vllm.md.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

LENGTHS = [
    5,
    37,
    70,
    1,
    130,
    300,
    600,
    17,
]  # prompts to continue; 600: beyond what MLA takes in absorbed form
SCORED = [400, 900]  # prompts whose own tokens are scored
COUNT = 32
BATCH, CONTEXT, STEPS, WARM, PROFILED = 64, 2048, 64, 8, 16
VOCABULARY = 2048
LOOP = 4  # tokens that follow each other in a circle, in models with loops
TOGETHER = 7  # processes that start at a time, of some 8 GiB each; one at a time is timed

MLA = ("CUSTOM", "FLASH_ATTN_MLA", "FLASHMLA", "TRITON_MLA")
RUNS: list[dict[str, Any]] = [
    *(
        {"kind": "deepseek", "backend": name, "graphs": graphs, "block_size": 64}
        for graphs in (True, False)
        for name in MLA
    ),
    *(
        {"kind": "llama", "backend": name, "graphs": graphs, "block_size": 16}
        for graphs in (True, False)
        for name in ("CUSTOM", "FLASH_ATTN")
    ),
    {"kind": "deepseek", "backend": "CUSTOM", "graphs": True, "block_size": 16, "cross_layer": True},
    {"kind": "llama", "backend": "CUSTOM", "graphs": True, "block_size": 1, "cross_layer": True},
]
# A drafter that looks for n-grams needs a model that repeats itself.
MORE: list[dict[str, Any]] = [
    *(
        {"kind": kind, "backend": name, "graphs": True, "block_size": block_size, "kv_cache_dtype": "fp8"}
        for kind, own, block_size in (("llama", "FLASH_ATTN", 16), ("deepseek", "TRITON_MLA", 64))
        for name in ("CUSTOM", own)
    ),
    *(
        {"kind": kind, "backend": "CUSTOM", "graphs": True, "block_size": block_size, **drafts}
        for kind, block_size in (("llama-loops", 16), ("deepseek-loops", 64))
        for drafts in ({}, {"drafts": 3})
    ),
    *(
        {"kind": "mimo", "backend": name, "graphs": True, "block_size": 32}
        for name in ("CUSTOM", "FLASH_ATTN")
    ),
]
# Decode context parallelism, stretches of tokens on either rank. vLLM wants fewer KV heads than ranks.
SHARDED: list[dict[str, Any]] = [
    {"kind": kind, "backend": name, "graphs": False, "block_size": 64, "ranks": 2, "interleave": interleave}
    for kind, own in (("deepseek", "FLASH_ATTN_MLA"), ("mqa", "FLASH_ATTN"))
    for name, interleave in (("CUSTOM", 1), (own, 1), ("CUSTOM", 16))
]
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # it would compile at run time
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DISABLE_COMPILE_CACHE": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
# Kernels that attend, combine what was split, or share the work out; not those that write the cache.
ATTENTION = re.compile(
    r"^(mla_(narrow|wide)(_fp8)?|gqa|decode|combine|merge|schedule)_kernel"  # ours
    r"|\bflash::|\bflash_fwd_|\bget_mla_metadata"  # FlashAttention and FlashMLA
    r"|^_fwd_(grouped_)?kernel_stage[12]|^kernel_unified_attention|^reduce_segments"  # vLLM's in Triton
)


def name_of(run: dict[str, Any]) -> str:
    parts = [run["kind"], run["backend"], "graphs" if run["graphs"] else "eager", f"block{run['block_size']}"]
    more = ["cross-layer"] if run.get("cross_layer") else []
    more += [run["kv_cache_dtype"]] if "kv_cache_dtype" in run else []
    more += [f"drafts{run['drafts']}"] if "drafts" in run else []
    if "ranks" in run:
        more.append(f"ranks{run['ranks']}-interleave{run['interleave']}")
    return "-".join([*parts, *more])


def make_config(kind: str) -> Any:
    """The attention of DeepSeek-V3, Llama-3 or MiMo-V2-Flash in a small model without experts."""
    import transformers as hf

    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 1024,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if kind in ("llama", "mqa"):
        heads = 8 if kind == "llama" else 1
        return hf.LlamaConfig(**common, num_attention_heads=32, num_key_value_heads=heads, head_dim=128)
    if kind == "mimo":
        heads = 4  # KV heads; twice as many under windows. From "hybrid" on, vLLM's names for the same
        layers = common["num_hidden_layers"]
        types = ["full_attention" if i % 6 == 0 else "sliding_attention" for i in range(layers)]
        rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
        return hf.MiMoV2FlashConfig(
            **common,
            num_attention_heads=32,
            num_key_value_heads=heads,
            head_dim=128,
            v_head_dim=128,
            sliding_window=128,
            layer_types=types,
            mlp_layer_types=["dense"] * layers,
            rope_parameters=dict.fromkeys(("full_attention", "sliding_attention"), rope),
            n_routed_experts=4,  # of no layer
            hybrid_layer_pattern=[int(name == "sliding_attention") for name in types],
            moe_layer_freq=[0] * layers,
            layernorm_epsilon=1e-5,
            sliding_window_size=128,
            add_swa_attention_sink_bias=True,
            swa_num_attention_heads=32,
            swa_num_key_value_heads=2 * heads,
            swa_head_dim=128,
            swa_v_head_dim=128,
            rope_theta=10000.0,
            swa_rope_theta=10000.0,
        )
    return hf.DeepseekV3Config(
        **common,
        num_attention_heads=16,
        num_key_value_heads=16,
        q_lora_rank=512,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        first_k_dense_replace=common["num_hidden_layers"],
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        rope_interleave=True,
    )


def save_model(kind: str, folder: Path) -> None:
    """Random weights, the same each time; large enough that logits are well apart."""
    import torch
    import transformers as hf

    torch.manual_seed(7)
    config = make_config(kind.removesuffix("-loops"))
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                continue
            fixed = {"sinks": 1.0, "embed_tokens.weight": 0.5}
            deviation = next((std for end, std in fixed.items() if name.endswith(end)), None)
            parameter.normal_(0.0, deviation or 2.0 * parameter.shape[-1] ** -0.5)
        if kind.endswith("-loops"):
            make_loops(model)
    model.to(torch.bfloat16).save_pretrained(folder)


def make_loops(model: Any) -> None:
    """Let a token call for the next one of its circle; in one of ten attention has it another way."""
    import torch

    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    embeddings.mul_(5.0)
    before = torch.arange(VOCABULARY).view(-1, LOOP).roll(1, 1).flatten()
    head.copy_(embeddings[before] * (0.8 * head.shape[-1] ** -0.5))


def make_prompts(lengths: list[int], seed: int) -> list[dict[str, list[int]]]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    return [{"prompt_token_ids": row} for row in rows]


def run_one(run: dict[str, Any], work: Path) -> None:
    """One engine: its results go to ``work/NAME.json``."""
    import torch
    import vllm
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = {}
    if run["graphs"]:
        sizes = [1, 2, 4, 8, 16, 32, 64]
        if "drafts" in run:
            sizes = [(1 + run["drafts"]) * size for size in sizes]
        options["compilation_config"] = {"cudagraph_capture_sizes": sizes}  # FULL_AND_PIECEWISE by default
    if "kv_cache_dtype" in run:
        options["kv_cache_dtype"] = run["kv_cache_dtype"]
    if "drafts" in run:
        options["speculative_config"] = {
            "method": "ngram",
            "num_speculative_tokens": run["drafts"],
            "prompt_lookup_min": 1,
            "prompt_lookup_max": 4,
        }
        options["disable_log_stats"] = False  # they count the drafts
    if run.get("cross_layer"):
        options["kv_transfer_config"] = {
            "kv_connector": "NoConnector",
            "kv_connector_module_path": "vllm_connector",
            "kv_role": "kv_both",
        }
    if "ranks" in run:
        options["tensor_parallel_size"] = options["decode_context_parallel_size"] = run["ranks"]
        options["cp_kv_cache_interleave_size"] = run["interleave"]
        options["disable_custom_all_reduce"] = True
    began = time.perf_counter()
    llm = LLM(
        model=str(work / run["kind"]),
        attention_backend=run["backend"],
        dtype="bfloat16",
        enforce_eager=not run["graphs"],
        skip_tokenizer_init=True,
        block_size=run["block_size"],
        max_model_len=4096,
        max_num_seqs=BATCH,
        max_num_batched_tokens=8192,
        enable_prefix_caching=False,
        gpu_memory_utilization=0.1,  # what must be free at the start
        kv_cache_memory_bytes=6 << 30,  # so that runs beside each other do not measure each other's memory
        seed=0,
        **options,
    )
    started = time.perf_counter() - began
    greedy = SamplingParams(temperature=0.0, max_tokens=COUNT, ignore_eos=True, detokenize=False, logprobs=2)
    outputs = llm.generate(make_prompts(LENGTHS, 11), greedy, use_tqdm=False)
    rows = [output.outputs[0] for output in outputs]
    scoring = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False, prompt_logprobs=0)
    prompts = make_prompts(SCORED, 12)
    scored = llm.generate(prompts, scoring, use_tqdm=False)
    result: dict[str, Any] = {
        **run,
        "name": name_of(run),
        "vllm": vllm.__version__,
        "device": torch.cuda.get_device_name(),
        "start_s": round(started, 1),
        "tokens": [list(row.token_ids) for row in rows],
        "logprobs": [
            [entry[token].logprob for token, entry in zip(row.token_ids, row.logprobs, strict=True)]
            for row in rows
        ],
        "leads": [[lead(entry) for entry in row.logprobs] for row in rows],
        "scores": [
            [entry[token].logprob for token, entry in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]
            for ids, output in zip([p["prompt_token_ids"] for p in prompts], scored, strict=True)
        ],
    }
    context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    caches = [layer.kv_cache for layer in context.values() if hasattr(layer, "impl")]
    if caches:  # several ranks are processes of their own
        result["cache"] = {"shape": list(caches[0].shape), "strides": list(caches[0].stride())}
    if "drafts" in run:
        counts = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
        result["draft_tokens"] = {
            "proposed": counts["vllm:spec_decode_num_draft_tokens"],
            "accepted": counts["vllm:spec_decode_num_accepted_tokens"],
        }
    result["cudagraph_mode"] = str(llm.llm_engine.vllm_config.compilation_config.cudagraph_mode)
    (work / f"{name_of(run)}.ready").touch()
    while not (work / f"{name_of(run)}.go").exists():
        time.sleep(0.05)
    with (work / "timing.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result["step_us"], result["device_us"] = time_steps(llm)
    (work / f"{name_of(run)}.json").write_text(json.dumps(result))


def lead(entry: dict[int, Any]) -> float:
    """How far the best token is ahead of the next, in logprobs."""
    first, second = sorted((candidate.logprob for candidate in entry.values()), reverse=True)[:2]
    return float(first - second)


def time_steps(llm: Any) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Decode steps of a full batch: the mean of ``STEPS``, the quartiles of the single ones, the device's."""
    import torch
    from torch.profiler import ProfilerActivity, profile
    from vllm import SamplingParams

    engine = llm.llm_engine
    sampling = SamplingParams(temperature=0.0, max_tokens=1024, ignore_eos=True, detokenize=False)
    for number, prompt in enumerate(make_prompts([CONTEXT - number for number in range(BATCH)], 13)):
        engine.add_request(str(number), prompt, sampling)
    seen: set[str] = set()
    while len(seen) < BATCH:  # until all have their first token
        seen |= {output.request_id for output in engine.step() if output.outputs[0].token_ids}
    for _ in range(WARM):
        engine.step()
    torch.cuda.synchronize()
    marks = [time.perf_counter()]
    for _ in range(STEPS):
        engine.step()
        marks.append(time.perf_counter())
    torch.cuda.synchronize()
    whole = time.perf_counter() - marks[0]
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED):
            engine.step()
        torch.cuda.synchronize()
    kernels = [
        (event.name, event.time_range.elapsed_us())
        for event in profiler.events()
        if event.device_type.name == "CUDA" and not event.is_user_annotation
    ]
    engine.abort_request([str(number) for number in range(BATCH)])
    single = [1e6 * (after - before) for before, after in pairwise(marks)]
    low, median, high = statistics.quantiles(single, n=4)
    host = {
        "batch": BATCH,
        "context": CONTEXT,
        "steps": STEPS,
        "mean": round(1e6 * whole / STEPS, 1),
        "quartiles": [round(low, 1), round(median, 1), round(high, 1)],
    }
    return host, add_up(kernels, PROFILED)


def add_up(kernels: list[tuple[str, float]], steps: int) -> dict[str, Any] | None:
    """Microseconds of a step: of all kernels, of those of attention, and of the 12 that take the most.

    None where the profiler saw no kernel: without CUPTI, or where several ranks are processes of their own.
    """
    times: defaultdict[str, float] = defaultdict(float)
    for name, us in kernels:
        if not name.startswith(("Memcpy", "Memset")):
            times[name] += us / steps
    if not times:
        return None
    return {
        "steps": steps,
        "all": round(sum(times.values()), 1),
        "attention": round(sum(us for name, us in times.items() if ATTENTION.search(name)), 1),
        "most": [
            {"name": name[:120], "us": round(us, 1), "attention": bool(ATTENTION.search(name))}
            for name, us in sorted(times.items(), key=lambda item: -item[1])[:12]
        ],
    }


def run_all(runs: list[dict[str, Any]], work: Path, budget: float, together: int) -> list[dict[str, Any]]:
    """Each run in its own process, a few at a time; the first of a kind is what others are compared with."""
    began = time.perf_counter()
    for kind in dict.fromkeys(run["kind"] for run in runs):
        if not (work / kind).exists():
            save_model(kind, work / kind)
    results = []
    for first in range(0, len(runs), together):
        group = runs[first : first + together]
        if time.perf_counter() - began > budget:
            results += [{**run, "name": name_of(run), "error": "no time was left"} for run in group]
            continue
        results += run_group(group, work, began + budget + 120)
    return results


def run_group(group: list[dict[str, Any]], work: Path, deadline: float) -> list[dict[str, Any]]:
    processes = []
    for run in group:
        name = name_of(run)
        environment = os.environ | ENVIRONMENT
        environment["VLLM_CACHE_ROOT"] = str(work / f"{name}.cache")
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(work / f"{name}.inductor")
        command = [sys.executable, __file__, "--run", json.dumps(run), "--work", str(work)]
        with (work / f"{name}.log").open("w") as log:
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    names = [name_of(run) for run in group]
    waiting = set(range(len(group)))
    while waiting and time.perf_counter() < deadline:
        for index in list(waiting):
            if (work / f"{names[index]}.ready").exists() or processes[index].poll() is not None:
                waiting.discard(index)
        time.sleep(0.1)
    for name in names:
        (work / f"{name}.go").touch()
    results = []
    for run, name, process in zip(group, names, processes, strict=True):
        try:
            process.wait(max(1.0, deadline - time.perf_counter()))
        except subprocess.TimeoutExpired:
            process.kill()
        said = (work / f"{name}.log").read_text(errors="replace")
        path = work / f"{name}.json"
        result = (
            json.loads(path.read_text()) if path.exists() else {**run, "name": name, "error": said[-3000:]}
        )
        lines = [line for line in said.splitlines() if re.search(r"anystride \d|Using .*backend", line)]
        result["log"] = list(dict.fromkeys(line.partition("] ")[2] or line for line in lines))
        results.append(result)
    return results


def base_of(result: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What a run is compared with: vLLM's own back end on the same; for one with drafts, ours without."""
    own = "FLASH_ATTN"
    if "drafts" in result:
        own = result["backend"]
    elif result["kind"].startswith("deepseek"):  # of FLASH_ATTN_MLA there is no fp8
        own = "TRITON_MLA" if "kv_cache_dtype" in result else "FLASH_ATTN_MLA"
    for other in results:
        same = all(other.get(key) == result.get(key) for key in ("kind", "graphs", "kv_cache_dtype"))
        if same and other["backend"] == own and "drafts" not in other and "error" not in other:
            return None if other is result else other
    return None


def compare(results: list[dict[str, Any]]) -> list[str]:
    """A line for each run: how fast it is, and how far from what it is compared with."""
    lines = []
    for result in results:
        if "error" in result:
            lines.append(f"{result['name']:48} FAILED: {result['error'].strip().splitlines()[-1:]}")
            continue
        line = f"{result['name']:48} step {result['step_us']['mean']:8.1f} us"
        device = result["device_us"]
        line += (
            ", device unknown: the profiler saw no kernel"
            if device is None
            else f", device {device['all']:7.1f} us, attention {device['attention']:7.1f} us"
        )
        if "draft_tokens" in result:
            line += "   drafts: {proposed} proposed, {accepted} accepted".format(**result["draft_tokens"])
        base = base_of(result, results)
        if base is not None:
            result["against"] = d = {"name": base["name"], **difference(result, base)}
            line += (
                f"   tokens as {base['name']}: {d['equal_tokens']}/{d['tokens']}"
                f" ({d['equal_rows']}/{d['rows']} rows; led by at most {d['lead_max']:.4f} where rows part)"
                f", logprobs up to there within {d['logprob_max']:.4f}"
                f", scores: mean {d['score_mean']:.5f}, max {d['score_max']:.4f}"
            )
        lines.append(line)
    return lines


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Tokens before the first that differs, row by row, their logprobs, and the scores of fixed tokens.

    ``lead_max`` is how far the base's token led where rows part: little, and the two rounded apart.
    """
    equal, gaps, leads = [], [0.0], [0.0]
    for a, b, p, q, ahead in zip(
        ours["tokens"], theirs["tokens"], ours["logprobs"], theirs["logprobs"], theirs["leads"], strict=True
    ):
        same = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
        equal.append(same)
        leads += ahead[same : same + 1]
        gaps += [abs(x - y) for x, y in zip(p[:same], q[:same], strict=True)]
    scores = [
        abs(x - y)
        for row, other in zip(ours["scores"], theirs["scores"], strict=True)
        for x, y in zip(row, other, strict=True)
    ]
    return {
        "equal_tokens": sum(equal),
        "tokens": sum(map(len, ours["tokens"])),
        "equal_rows": sum(n == len(row) for n, row in zip(equal, ours["tokens"], strict=True)),
        "rows": len(equal),
        "lead_max": max(leads),
        "logprob_max": max(gaps),
        "score_mean": sum(scores) / len(scores),
        "score_max": max(scores),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--run", help="one run, as JSON; the others are how this script calls itself")
    parser.add_argument("--more", action="store_true", help="MORE in place of RUNS")
    parser.add_argument("--only", help="runs whose name has this in it, e.g. llama-CUSTOM")
    parser.add_argument("--ranks", type=int, default=1, choices=(1, 2), help="2: context parallelism")
    parser.add_argument("--work", type=Path, default=Path("/tmp/vllm-device"), help="models, logs, results")
    parser.add_argument("--budget", type=float, default=420, help="seconds after which no more runs begin")
    parser.add_argument("--json", type=Path, help="where all results go")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.run:
        run_one(json.loads(options.run), options.work)
        return
    chosen = SHARDED if options.ranks == 2 else MORE if options.more else RUNS
    runs = [run for run in chosen if (options.only or "") in name_of(run)]
    for stale in options.work.glob("*.*"):
        if stale.suffix in (".ready", ".go", ".json"):
            stale.unlink()
    together = TOGETHER if options.ranks == 1 else 1
    results = run_all(runs, options.work, options.budget, together)
    print("\n".join(compare(results)))
    for result in results:
        print(result["name"], *result.get("log", []), sep="\n  ")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
