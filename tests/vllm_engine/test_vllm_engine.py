"""vLLM itself, on a CPU, generates on anystride what Hugging Face generates: `make test-vllm`.

Each case is an engine in a process of its own (serve.py), in float32, with prompts of mixed lengths in one
batch.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vllm is not installed: make test-vllm", allow_module_level=True)

HERE = Path(__file__).parent
LENGTHS = [5, 37, 70, 1]  # and a fifth that begins as the longest
COUNT = 24
MODULES = {"deepseek": "anystride.adapters.vllm.mla"}
CHUNKED = {"budget": 32, "prefix_caching": True, "passes": 2}  # prompts in pieces, then out of the cache
OLD = version("vllm").startswith("0.25.")  # how its caches are laid out is chosen in another way since 0.29
LAYOUTS = ("NHD", "HND") if OLD else ("LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC")

if OLD:
    CASES: list[tuple[str, str, dict[str, Any]]] = [
        ("llama", "NHD", {"block_size": 16}),
        ("llama", "NHD", {"block_size": 1, **CHUNKED}),
        ("llama", "HND", {"block_size": 1}),
        ("llama", "HND", {"block_size": 64, **CHUNKED}),
        ("llama", "NHD", {"block_size": 16, "cross_layer": True, **CHUNKED}),
        ("llama", "HND", {"block_size": 64, "cross_layer": True}),
        ("llama", "NHD", {"block_size": 7}),
        ("deepseek", "NHD", {"block_size": 64}),
        ("deepseek", "NHD", {"block_size": 1, **CHUNKED}),
        ("deepseek", "NHD", {"block_size": 16, "threshold": 8}),
        ("deepseek", "NHD", {"block_size": 16, "cross_layer": True, **CHUNKED}),
        ("deepseek", "NHD", {"block_size": 16, "cross_layer": True, "threshold": 8}),
        ("gpt-oss", "NHD", {"block_size": 16}),
        ("gpt-oss", "HND", {"block_size": 1, **CHUNKED}),
        ("gemma", "NHD", {"block_size": 16, **CHUNKED}),
        ("gemma", "HND", {"block_size": 64}),
    ]
else:  # gpt-oss: its experts want vLLM's C++ library
    CASES = [
        (kind, layout, {"block_size": block_size, **(CHUNKED if layout[0] == "B" else {})})
        for kind, block_size in (("llama", 16), ("deepseek", 64), ("gemma", 1))
        for layout in LAYOUTS
    ]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def run(script: str, *arguments: str, **environment: str) -> tuple[dict[str, Any], str]:
    """Run one of the scripts here; its result, and all that it said."""
    command = [sys.executable, str(HERE / script), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "2", **environment}
    process = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    results = [line for line in process.stdout.splitlines() if line.startswith("RESULT ")]
    assert (process.returncode, len(results)) == (0, 1), process.stdout[-8000:]
    found: dict[str, Any] = json.loads(results[0].removeprefix("RESULT "))
    return found, process.stdout


@cache
def dense(folder: Path, kind: str) -> dict[str, Any]:
    """The model, saved below ``folder``, its prompts, and what Hugging Face generates."""
    asked = {"kind": kind, "lengths": LENGTHS, "count": COUNT}
    return run("models.py", str(folder / kind), json.dumps(asked))[0]


def serve(folder: Path, kind: str, layout: str, asked: dict[str, Any]) -> tuple[dict[str, Any], str]:
    prompts = dense(folder, kind)["prompts"]
    asked = asked | {"prompts": prompts, "count": COUNT}
    return run("serve.py", str(folder / kind), json.dumps(asked), VLLM_KV_CACHE_LAYOUT=layout)


def told(log: str) -> set[str]:
    """What the log says that anystride runs: ``cpu runs MLA, one query token``."""
    lines = [line.partition("anystride ")[2] for line in log.splitlines() if ": cpu runs " in line]
    return {line.partition(": ")[2].partition(":")[0] for line in lines}


def physical_order(shape: list[int], strides: list[int]) -> list[int]:
    """Axes by descending strides, without those of one element."""
    axes = [axis for axis, n in enumerate(shape) if n > 1]
    return sorted(axes, key=lambda axis: -strides[axis])


def name_of(case: tuple[str, str, dict[str, Any]]) -> str:
    kind, layout, asked = case
    return "-".join([kind, layout, *(f"{name}={value}" for name, value in asked.items())])


@pytest.mark.parametrize(("kind", "layout", "asked"), CASES, ids=[name_of(case) for case in CASES])
def test_greedy_tokens_are_those_of_hugging_face(
    models: Path, kind: str, layout: str, asked: dict[str, Any]
) -> None:
    found, log = serve(models, kind, layout, asked)
    assert found["passes"] == [dense(models, kind)["tokens"]] * asked.get("passes", 1)
    assert found["backends"] == [MODULES.get(kind, "anystride.adapters.vllm.gqa")]
    what = "MLA" if kind == "deepseek" else "attention"
    expected = {f"cpu runs {what}, one query token", f"cpu runs {what}, several query tokens"}
    if "threshold" in asked:
        expected.add("cpu runs prefill of MLA, several query tokens")
    assert told(log) == expected
    if asked.get("prefix_caching"):
        assert sum(found["cached_tokens"]) > 0
    assert found["budget"] == asked.get("budget", 2048)
    for shape, strides in found["caches"]:
        assert asked["block_size"] == shape[1 if len(shape) == 3 else 2]
        if asked.get("cross_layer"):  # all layers of a block side by side, in one buffer
            assert found["storages"] == 1
            assert strides[0] == len(found["caches"]) * math.prod(shape[1:])
        if OLD and len(shape) == 5:
            heads_first = [0, 1, 3, 2, 4] if not asked.get("cross_layer") else [0, 3, 1, 2, 4]
            order = heads_first if layout == "HND" else [0, 1, 2, 3, 4]
            assert physical_order(shape, strides) == [axis for axis in order if shape[axis] > 1]
        elif len(shape) == 4:  # B, H, N, C
            order = ["BHNC".index(axis) for axis in layout if axis != "L"]
            assert physical_order(shape, strides) == [axis for axis in order if shape[axis] > 1]


@pytest.mark.parametrize("kind", ["llama", "deepseek"])
def test_an_fp8_cache_generates_the_same_tokens_in_every_layout(models: Path, kind: str) -> None:
    # Dense tokens are no measure here: fp8 rounds a difference in the last bit of float32 to one of 6%.
    asked = {"block_size": 16, "kv_cache_dtype": "fp8"}
    packed, log = serve(models, kind, LAYOUTS[0], asked)
    assert " e4m3 [" in log
    other, _ = serve(models, kind, LAYOUTS[-1], asked | ({"cross_layer": True} if OLD else {}))
    assert packed["caches"] != other["caches"]
    assert other["passes"] == packed["passes"]
    assert packed["passes"] != [dense(models, kind)["tokens"]]


def test_a_cache_of_another_16_bit_dtype_is_refused_with_the_reason(models: Path) -> None:
    with pytest.raises(AssertionError, match=r"a cache of torch.bfloat16 under queries of torch.float32"):
        serve(models, "llama", LAYOUTS[0], {"block_size": 16, "kv_cache_dtype": "bfloat16"})


CHANGES = {
    "gemma": ({"sliding_window": 1000}, {"attn_logit_softcapping": None}, {"query_pre_attn_scalar": 16}),
    "gpt-oss": ({"sliding_window": 1000}, {"sinks": 0.0}),
    "llama": ({"attention_dropped": True},),
    "deepseek": ({"attention_dropped": True},),
}


@pytest.mark.parametrize("kind", list(CHANGES))
def test_the_tokens_depend_on_all_that_attention_does(models: Path, kind: str) -> None:
    # Otherwise the tests above would pass without it.
    tokens = dense(models, kind)["tokens"]
    for change in CHANGES[kind]:
        asked = {"kind": kind, "lengths": LENGTHS, "count": COUNT, "change": change}
        other, _ = run("models.py", str(models / kind), json.dumps(asked))
        assert all(row != changed for row, changed in zip(tokens, other["tokens"], strict=True))


EXAMPLE = """
import json, sys
import serve
from cpu_platform import stand_in
import vllm_custom
from vllm import LLM
stand_in()
asked = json.loads(sys.argv[2])
tokens = vllm_custom.generate(
    sys.argv[1], asked["prompts"], asked["count"], dtype="float32", enforce_eager=True, max_model_len=1024,
    max_num_seqs=8, compilation_config={"custom_ops": ["none"]}, block_size=1,
)
print("RESULT " + json.dumps({"tokens": tokens}))
"""


def test_the_example_generates_the_same_tokens(models: Path, tmp_path: Path) -> None:
    wanted = dense(models, "llama")
    script = tmp_path / "example.py"
    script.write_text(EXAMPLE)
    asked = json.dumps({"prompts": wanted["prompts"], "count": COUNT})
    examples = HERE.parents[1] / "examples"
    found, log = run(str(script), str(models / "llama"), asked, PYTHONPATH=f"{HERE}{os.pathsep}{examples}")
    assert found["tokens"] == wanted["tokens"]
    assert "cpu runs attention, one query token" in told(log)
