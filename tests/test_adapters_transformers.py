"""``anystride.adapters.transformers``: greedy tokens of tiny random models equal to those of ``eager``.

Everything that must not be read is NaN: rows of padding, what a static cache does not hold yet, fresh pages.
"""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from originals import assert_refused, never_waits, one_sequence
from tiny_models import (
    NEW_TOKENS,
    PROMPTS,
    batch_of,
    generate,
    generate_batch,
    make_model,
    poison_pages,
    poison_static_caches,
    recorded,
)
from torch import Tensor
from transformers import CompileConfig, DynamicCache, PreTrainedModel
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

import anystride
from anystride import UnsupportedError
from anystride.adapters.transformers import PAGED_REFUSED, REFUSED, absorb, attend, attend_paged, list_keys

PAGED = ["llama", "qwen3", "gemma2", "gemma3", "gpt_oss"]  # what PagedAttentionCache has a place for
KINDS = [*PAGED, "deepseek_v3", "deepseek_v3 absorbed"]
WHERE = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LAYERS = {"llama": 2, "qwen3": 2, "gemma2": 2, "gemma3": 6, "gpt_oss": 4, "deepseek_v3": 2}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The models are far too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def model_of(kind: str, device: str = "cpu") -> PreTrainedModel:
    name, _, absorbed = kind.partition(" ")
    model = make_model(name, device)
    return absorb(model) if absorbed else model


@cache
def expected(name: str) -> tuple[list[list[int]], Tensor]:
    """The tokens of ``eager`` on the CPU, and their logits."""
    return generate(make_model(name), "eager")


def rounding(logits: Tensor) -> float:
    return torch.finfo(torch.float32).eps * logits.abs().max().item()


@pytest.mark.parametrize("name", LAYERS)
def test_eager_never_chooses_between_near_equals(name: str) -> None:
    # Otherwise equal tokens would hang on the last bits of float32, and differ from machine to machine.
    tokens, logits = expected(name)
    first, second = logits.topk(2).values.unbind(-1)
    assert (first - second).min() > 1000 * rounding(logits)
    assert len({token for row in tokens for token in row}) > 30


@pytest.mark.parametrize("cached", ["dynamic", "static"])
@pytest.mark.parametrize("device", WHERE)
@pytest.mark.parametrize("kind", KINDS)
def test_generate_gives_the_tokens_of_eager(kind: str, device: str, cached: str) -> None:
    name = kind.split()[0]
    model = model_of(kind, device)
    with torch.no_grad():  # what padding leaves in the cache
        model.get_input_embeddings().weight[0] = math.nan
    options = {"cache_implementation": "static"} if cached == "static" else {}
    with recorded() as calls, poison_static_caches():
        tokens, logits = generate(model, "anystride", **options)
    assert tokens == expected(name)[0]
    right = expected(name)[1]
    assert (logits.cpu() - right).abs().max() < 200 * rounding(right)
    assert len(calls) == LAYERS[name] * NEW_TOKENS
    assert all(call["block_table"] is not None for call in calls)
    assert all(("q_v" in call) == (kind != name) for call in calls)


@pytest.mark.parametrize("device", WHERE)
@pytest.mark.parametrize("name", PAGED)
def test_continuous_batching_gives_the_tokens_of_eager(
    name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers' own paged|eager cannot be the measure: it leaves out Gemma 2's softcap.
    updates: list[int] = []
    update = PagedAttentionCache.update

    def counted(self: PagedAttentionCache, *args: Any, **options: Any) -> Any:
        updates.append(1)
        return update(self, *args, **options)

    monkeypatch.setattr(PagedAttentionCache, "update", counted)
    model = make_model(name, device)
    settings = {"use_cuda_graph": False, "use_async_batching": False} if device == "cuda" else {}
    with recorded() as calls, poison_pages():
        assert generate_batch(model, "paged|anystride", **settings) == expected(name)[0]
    block_sizes = [call["k"].shape[1] for call in calls if "block_table" in call]
    assert block_sizes.count(4) > 0  # full attention, in its pages
    rings = "gemma" in name or "gpt" in name
    assert (block_sizes.count(1) > 0) == rings
    assert bool(updates) == rings  # only where rings would overwrite what is still to be seen
    assert len(calls) > len(block_sizes) + len(updates)  # new tokens alone
    assert len(calls) % LAYERS[name] == 0


@pytest.mark.gpu
@pytest.mark.parametrize("name", PAGED)
def test_continuous_batching_under_cuda_graphs(name: str) -> None:
    # What transformers does by itself on a GPU: steps are padded, captured, and replayed with others' tables.
    with recorded() as calls, poison_pages():
        assert generate_batch(make_model(name, "cuda"), "paged|anystride") == expected(name)[0]
    assert calls
    assert len(calls) % LAYERS[name] == 0


CHANGES = [
    ("gemma2", {"softcap": 0.0}),
    ("gemma2", {"window_size": (-1, -1)}),
    ("gemma3", {"window_size": (-1, -1)}),
    ("gpt_oss", {"window_size": (-1, -1)}),
    ("gpt_oss", {"s_aux": None}),
    ("llama", {"causal": False}),
    ("llama", {"softmax_scale": 0.3}),
]


@pytest.mark.parametrize(("name", "change"), CHANGES)
def test_tokens_hang_on_every_argument(name: str, change: dict[str, Any]) -> None:
    # What a dropped window or sink would do: the tests above would see it.
    model = make_model(name)
    with recorded(**change):
        assert generate(model, "anystride")[0] != expected(name)[0]
        assert generate_batch(model, "paged|anystride") != expected(name)[0]


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt_oss", "deepseek_v3 absorbed"])
def test_the_cache_is_read_where_it_lies(kind: str) -> None:
    model = model_of(kind)
    model.set_attn_implementation("anystride")
    inputs = batch_of(PROMPTS)
    past = DynamicCache(config=model.config)
    with torch.no_grad(), recorded() as calls:
        model(**inputs, past_key_values=past)
    rows = {part.data_ptr() for layer in past.layers for part in (layer.keys, layer.values)}
    whole = [
        call for call in calls if call["window_size"] == (-1, -1)
    ]  # rings keep the end of what they gave
    assert whole
    for call in whole:
        assert {call["k"].data_ptr(), call["v"].data_ptr()} <= rows


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_turn_reads_the_cache_of_the_first(kind: str) -> None:
    # Several query tokens over a cache, one that is longer than the window.
    def second_turn(implementation: str) -> Tensor:
        model = model_of(kind)
        model.set_attn_implementation(implementation)
        first, second = batch_of(PROMPTS), torch.randint(1, 96, (4, 5), generator=torch.manual_seed(5))
        past = DynamicCache(config=model.config)
        with torch.no_grad():
            model(**first, past_key_values=past)
            mask = torch.cat([first["attention_mask"], torch.ones_like(second)], 1)
            logits: Tensor = model(second, attention_mask=mask, past_key_values=past).logits
        return logits

    right = second_turn("eager")
    assert (second_turn("anystride") - right).abs().max() < 200 * rounding(right)


@pytest.mark.parametrize("kind", ["gemma3", "deepseek_v3 absorbed"])
def test_a_forward_without_a_cache_and_without_a_mask(kind: str) -> None:
    model, ids = model_of(kind), torch.tensor([PROMPTS[0], PROMPTS[0][::-1]])
    with torch.no_grad():
        model.set_attn_implementation("eager")
        right = model(ids, use_cache=False).logits
        model.set_attn_implementation("anystride")
        with recorded() as calls:
            ours = model(ids, use_cache=False).logits
    assert calls
    assert (ours - right).abs().max() < 200 * rounding(right)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("device", WHERE)
def test_a_cache_of_any_strides_is_attended_in_place(device: str, window: int, masked: bool) -> None:
    # transformers' caches are packed; what another cache returns need not be.
    torch.manual_seed(0)
    whole = torch.full((7, 4, 3, 2, 40), math.nan, device=device)  # tokens, sequences, ..., heads, dimensions
    k, v = whole[:6, 1:3, 0, :, 4:20].permute(1, 2, 0, 3), whole[:6, 1:3, 2, :, :32:2].permute(1, 2, 0, 3)
    k.normal_()
    v.normal_()
    q = torch.randn(2, 2, 4, 16, device=device).transpose(1, 2)
    mask, valid = None, torch.ones(2, 6, dtype=torch.bool, device=device)
    if masked:
        valid[0, :5] = False
        k[0, :, :5] = v[0, :, :5] = math.nan
        function = sliding_window_causal_mask_function(window) if window else causal_mask_function
        mask = list_keys(2, 2, 6, 4, 0, function, valid, device=device)
    out, _ = attend(torch.nn.Module(), q, k, v, mask, sliding_window=window or None)
    for row in range(2):
        keys, values = (part[row][:, valid[row]].transpose(0, 1) for part in (k, v))
        left = window - 1 if window else -1
        right = one_sequence(
            q[row].transpose(0, 1), keys, values, 0.25, torch.float64, causal=True, window_left=left
        )[0]
        torch.testing.assert_close(out[row], right.float())


def test_absorbed_layers_compute_as_before_under_other_names() -> None:
    model = absorb(make_model("deepseek_v3"))
    with recorded() as calls:
        tokens, logits = generate(model, "eager")
    assert not calls
    assert tokens == expected("deepseek_v3")[0]
    assert torch.equal(logits, expected("deepseek_v3")[1])


COMPILED = [
    pytest.param("llama", "cpu", {"backend": "eager", "mode": None}),
    pytest.param("deepseek_v3 absorbed", "cpu", {"backend": "eager", "mode": None}),
    *(pytest.param(kind, "cuda", {}, marks=pytest.mark.gpu) for kind in KINDS),
]


@pytest.mark.filterwarnings("default")  # inductor has advice, and its first graph is empty
@pytest.mark.parametrize(("kind", "device", "how"), COMPILED)
def test_compiled_decode_steps_give_the_tokens_of_eager(kind: str, device: str, how: dict[str, Any]) -> None:
    # What generate does by itself on a GPU, with a static cache: every decode step is one graph.
    torch.compiler.reset()
    model = model_of(kind, device)
    model.set_attn_implementation("anystride")
    config = CompileConfig(fullgraph=True, **how)
    config._compile_all_devices = True
    inputs = batch_of(PROMPTS, device)
    done = model.generate(
        **inputs,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        cache_implementation="static",
        compile_config=config,
    )
    assert done[:, inputs["input_ids"].shape[1] :].tolist() == expected(kind.split()[0])[0]


# Lists of keys


def keys_of(table: Tensor, kv_length: int) -> list[list[int]]:
    """What a mask of ours lists for each sequence, as indices of its own keys."""
    rows: list[list[int]] = table[:, 0, 0].tolist()
    return [[key - i * kv_length for key in row[1 : 1 + row[0]]] for i, row in enumerate(rows)]


def masks(seed: int, batch: int, length: int) -> Tensor:
    """Left padding, right padding, holes, or nothing masked."""
    source = random.Random(seed)
    mask = torch.ones(batch, length, dtype=torch.bool)
    for row in mask:
        how = source.choice(["left", "right", "both", "holes", "none", "all"])
        left, right = source.randint(0, length), source.randint(0, length)
        if how in ("left", "both"):
            row[:left] = False
        if how in ("right", "both"):
            row[right:] = False
        if how == "holes":
            row[:] = torch.tensor([source.random() < 0.5 for _ in range(length)])
        if how == "all":
            row[:] = False
    return mask


FUNCTIONS = {
    "causal": causal_mask_function,
    "window": sliding_window_causal_mask_function(5),
    "chunks": chunked_causal_mask_function(4, torch.tensor([0, 1, 2])),
    "both directions": bidirectional_mask_function,
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("device", WHERE)
def test_a_decode_step_lists_what_any_mask_lets_through(device: str, function: str) -> None:
    for seed in range(20):
        sizes = {"q_length": 1, "kv_length": 9, "q_offset": 8 + seed % 4, "kv_offset": seed % 4}
        sizes["q_offset"] -= seed // 10  # a cache that is not full
        mask = masks(seed, 3, sizes["q_offset"] + 1).to(device) if seed % 5 else None
        asked: dict[str, Any] = sizes | {
            "batch_size": 3, "mask_function": FUNCTIONS[function], "attention_mask": mask, "device": device
        }  # fmt: skip
        if function == "chunks":
            asked["mask_function"] = chunked_causal_mask_function(4, torch.tensor([0, 1, 2], device=device))
        with never_waits(device):
            table = list_keys(**asked)
        dense = sdpa_mask(**asked, allow_is_causal_skip=False)
        assert dense is not None
        assert table.shape == (3, 1, 1, 10)
        assert table.dtype == torch.int32
        assert keys_of(table, 9) == [row[0, 0].nonzero().flatten().tolist() for row in dense]


@pytest.mark.parametrize("window", [0, 5, 40])
@pytest.mark.parametrize("q_length", [2, 4, 9])
def test_of_several_query_tokens_each_sees_what_the_mask_lets_through(q_length: int, window: int) -> None:
    function = sliding_window_causal_mask_function(window) if window else causal_mask_function
    served, refused = 0, []
    for seed in range(150):
        past, cut, room = seed % 7, 0, seed % 3
        if window == 5 and past > 4:
            cut = past - 4  # what a cache of a window has dropped
        mask = masks(seed, 2, past + q_length)
        asked: dict[str, Any] = {
            "batch_size": 2, "q_length": q_length, "kv_length": past + q_length - cut + room,
            "q_offset": past, "kv_offset": cut, "mask_function": function, "attention_mask": mask,
        }  # fmt: skip
        try:
            table = list_keys(**asked)
        except UnsupportedError:
            refused.append(mask)
            continue
        served += 1
        dense = sdpa_mask(**asked, allow_is_causal_skip=False)
        assert dense is not None
        left = table.shape[2] - 1 if table.shape[2] > 1 else 1 << 30
        for row, keys in enumerate(keys_of(table, asked["kv_length"])):
            for i in range(q_length):
                if not mask[row, past + i]:
                    continue  # a row of padding means nothing
                centre = len(keys) - q_length + i
                visible = [key for j, key in enumerate(keys) if centre - left < j <= centre]
                assert visible == dense[row, 0, i].nonzero().flatten().tolist(), (seed, row, i)
    assert served > 30
    for mask in refused:  # only what has padding between tokens
        assert (mask.int().diff(dim=1) == 1).any()


@pytest.mark.parametrize("function", ["chunks", "both directions"])
def test_several_query_tokens_with_another_mask_are_refused(function: str) -> None:
    with pytest.raises(UnsupportedError, match="mask_function cannot be passed on") as caught:
        list_keys(3, 4, 9, 5, 0, FUNCTIONS[function])
    assert "lets a token see others than a causal mask" in str(caught.value)


def test_padding_between_tokens_is_refused_in_prefill_and_served_in_decode_steps() -> None:
    model = make_model("llama")
    ids = torch.tensor([PROMPTS[0]])
    mask = torch.ones_like(ids)
    mask[0, 4:6] = 0
    model.set_attn_implementation("anystride")
    with (
        torch.no_grad(),
        pytest.raises(UnsupportedError, match="attention_mask cannot be passed on") as caught,
    ):
        model(ids, attention_mask=mask)
    assert "padding between tokens" in str(caught.value)

    def decode(implementation: str) -> Tensor:
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            past = model(ids[:, :-1]).past_key_values
            logits: Tensor = model(ids[:, -1:], attention_mask=mask, past_key_values=past).logits
        return logits

    right = decode("eager")
    assert (decode("anystride") - right).abs().max() < 200 * rounding(right)


# Refusals


def layer_call(**changes: Any) -> Any:
    q, k = torch.zeros(2, 4, 3, 16), torch.zeros(2, 2, 5, 16)
    if changes.pop("gradients", False):
        q.requires_grad_()
    asked: dict[str, Any] = {
        "module": torch.nn.Module(), "query": q, "key": k, "value": k, "attention_mask": None
    }  # fmt: skip
    return attend(**(asked | changes))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dropout", 0.1),
        ("gradients", True),
        ("output_attentions", True),
        ("is_causal", False),
        ("position_bias", torch.zeros(1)),
        ("head_mask", torch.ones(4)),
        ("cu_seq_lens_q", torch.tensor([0, 3])),
        ("cu_seq_lens_k", torch.tensor([0, 5])),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(name: str, value: object) -> None:
    assert layer_call()[0].shape == (2, 3, 4, 16)
    assert_refused(REFUSED, name, value, layer_call)


def test_every_refusal_is_tested() -> None:
    (marks,) = [
        mark.args[1]
        for mark in test_what_has_no_counterpart_is_refused_by_name.pytestmark  # type: ignore[attr-defined]
    ]
    assert {name for name, _ in marks} == set(REFUSED)
    assert set(PAGED_REFUSED) - set(REFUSED) == {"block_table"}


def test_a_layer_that_looks_ahead_is_refused() -> None:
    module = torch.nn.Module()
    module.is_causal = False  # type: ignore[assignment]
    with pytest.raises(UnsupportedError, match="is_causal cannot be passed on"):
        layer_call(module=module)


@pytest.mark.parametrize(
    "mask", [torch.ones(2, 1, 3, 5, dtype=torch.bool), torch.zeros(2, 1, 3, 5), torch.ones(2, 1, 3, 5).int()]
)
def test_a_dense_mask_is_refused(mask: Tensor) -> None:
    with pytest.raises(UnsupportedError, match="attention_mask cannot be passed on") as caught:
        layer_call(attention_mask=mask)
    assert "[2, 1, 3, 5], a dense mask" in str(caught.value)


def test_a_model_is_told_what_it_asks_for_in_vain() -> None:
    model = make_model("llama")
    model.set_attn_implementation("anystride")
    ids = torch.tensor([PROMPTS[0]])
    with pytest.raises(UnsupportedError, match="gradients cannot be passed on"):
        model(ids)
    with torch.no_grad():
        dense = torch.ones(1, 1, 17, 17, dtype=torch.bool).tril()
        with pytest.raises(UnsupportedError, match="attention_mask cannot be passed on"):
            model(ids, attention_mask=dense)
        packed = torch.tensor([[*range(9), *range(8)]])
        with pytest.raises(UnsupportedError, match="mask_function cannot be passed on"):
            model(ids, position_ids=packed, use_cache=False)
        with pytest.raises(UnsupportedError, match="output_attentions cannot be passed on"):
            model(ids, output_attentions=True)


def paged_call(**changes: Any) -> Any:
    rows = torch.zeros(1, 2, 3, 16)
    asked: dict[str, Any] = {
        "module": torch.nn.Module(), "query": rows, "key": rows, "value": rows, "attention_mask": None
    }  # fmt: skip
    return attend_paged(**(asked | changes))


def test_a_block_table_of_flash_attention_is_refused() -> None:
    assert_refused(PAGED_REFUSED, "block_table", torch.zeros(1, 2, 3).int(), paged_call)


def test_the_paged_name_needs_a_cache_of_continuous_batching() -> None:
    with pytest.raises(UnsupportedError, match="cache cannot be used") as caught:
        paged_call()
    assert "was not given: this name is for continuous batching" in str(caught.value)
    model = make_model("llama")
    model.set_attn_implementation("paged|anystride")
    with torch.no_grad(), pytest.raises(UnsupportedError, match="cache cannot be used"):
        model(torch.tensor([PROMPTS[0]]))


def test_the_cache_of_another_version_is_refused_with_the_version() -> None:
    with pytest.raises(UnsupportedError, match="cache cannot be used") as caught:
        paged_call(cache=SimpleNamespace())
    assert f"is laid out as transformers {transformers.__version__} does it" in str(caught.value)


@pytest.mark.parametrize("kind", ["deepseek_v3", "deepseek_v3 absorbed"])
def test_mla_under_continuous_batching_is_refused_with_the_reason(kind: str) -> None:
    with pytest.raises(RuntimeError, match="has no place for those of MLA"):
        generate_batch(model_of(kind), "paged|anystride")


def test_a_model_without_mla_cannot_be_absorbed() -> None:
    with pytest.raises(UnsupportedError, match="this model cannot be absorbed") as caught:
        absorb(make_model("llama"))
    assert "has no DeepseekV3Attention" in str(caught.value)


def test_a_quantised_projection_cannot_be_absorbed() -> None:
    model = make_model("deepseek_v3")

    class Linear8bit(torch.nn.Linear):
        pass

    model.get_decoder().layers[1].self_attn.kv_b_proj.__class__ = Linear8bit
    with pytest.raises(UnsupportedError, match="this model cannot be absorbed") as caught:
        absorb(model)
    assert "is Linear8bit; needs torch.nn.Linear" in str(caught.value)


# With the dimensions of models in bfloat16, and on a GPU


@pytest.mark.gpu
def test_a_decode_step_never_waits_for_the_device() -> None:
    q, k = torch.randn(2, 4, 1, 64, device="cuda"), torch.randn(2, 2, 5, 64, device="cuda")
    valid = torch.ones(2, 5, dtype=torch.bool, device="cuda")
    for step in range(2):  # the first compiles
        with never_waits("cuda") if step else nullcontext():
            mask = list_keys(2, 1, 5, 4, attention_mask=valid, device="cuda")
            out, none = attend(torch.nn.Module(), q, k, k, mask)
    assert none is None
    right = torch.nn.functional.scaled_dot_product_attention(q, k, k, enable_gqa=True)
    torch.testing.assert_close(out, right.transpose(1, 2))


@pytest.mark.parametrize(
    ("kind", "device"),
    [
        ("llama", "cpu"),
        ("deepseek_v3 absorbed", "cpu"),
        *(pytest.param(kind, "cuda", marks=pytest.mark.gpu) for kind in KINDS),
    ],
)
def test_bfloat16_is_as_close_to_float32_as_eager_is(kind: str, device: str) -> None:
    name = kind.split()[0]
    both = [make_model(name, device, 64, dtype) for dtype in (torch.float32, torch.bfloat16)]
    tokens = torch.tensor(generate(both[0], "eager")[0], device=device)

    def forced(model: PreTrainedModel, implementation: str) -> Tensor:
        """Logits of decode steps over given tokens."""
        model.set_attn_implementation(implementation)
        inputs = batch_of(PROMPTS, device)
        mask, logits = inputs["attention_mask"], []
        with torch.no_grad():
            past = model(**inputs).past_key_values
            for token in tokens.split(1, 1):
                mask = torch.cat([mask, mask[:, -1:]], 1)
                done = model(token, attention_mask=mask, past_key_values=past)
                logits.append(done.logits[:, -1].float())
        return torch.stack(logits, 1)

    right = forced(both[0], "eager")
    plain = (forced(both[1], "eager") - right).abs()
    model = absorb(both[1]) if kind != name else both[1]
    with recorded() as calls:
        ours = (forced(model, "anystride") - right).abs()
    assert ours.mean() < 1.5 * plain.mean()
    last = calls[-1]
    rest = last.pop("rest")
    told = anystride.explain(last.pop("q"), last.pop("k"), last.pop("v"), *rest, **last)
    if device == "cpu":
        assert told.backend == "cpu", told
    else:  # without absorb DeepSeek's keys have 80 dimensions, and its values 16
        hopper = torch.cuda.get_device_capability()[0] == 9 and kind != "deepseek_v3"
        assert told.backend == ("hopper" if hopper else "triton"), told


def test_the_example_runs_each_way() -> None:
    script = Path(__file__).parents[1] / "examples" / "hugging_face.py"
    command, environment = (
        [sys.executable, str(script), "--device", "cpu"],
        os.environ | {"OMP_NUM_THREADS": "1"},
    )
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("the same tokens") == 3
