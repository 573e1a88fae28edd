"""The engine in ``examples/generate.py``: greedy tokens equal to those of the same model without a cache.

``dense`` of the example keeps no cache, forms K and V of every head (MLA is not absorbed there), and calls
nothing of anystride: it is what the engine is held to.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from anystride.testing import LAYOUTS, Layout, find_layout

SCRIPT = Path(__file__).parents[1] / "examples" / "generate.py"


def _load() -> Any:
    """The script as a module; no test should need ``examples`` on its path."""
    spec = importlib.util.spec_from_file_location("anystride_examples_generate", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


generate = _load()

# (tokens of the prompt, tokens to generate, step of arrival): a prompt of one token, prompts longer than a
# chunk, requests that come while others run, and more of them than run at once.
SHAPES = ((37, 10, 0), (1, 20, 0), (9, 12, 2), (50, 8, 3), (17, 9, 5), (16, 10, 9))
POOL = {"num_blocks": 12, "block_size": 8, "max_batch": 4, "chunk": 16}  # too small for all of them

# Layouts that a model's cache cannot be written to, with the reason. What fits no model is not listed.
REFUSED = {
    ("gqa", "A-expanded-heads"): "gives two rows the same bytes",
    ("gqa", "A-same-pointer"): "gives two rows the same bytes",
    ("gqa", "A-overlap"): "gives two rows the same bytes",
    ("mla", "A-same-pointer"): "gives two rows the same bytes",
    ("mla", "A-overlap"): "gives two rows the same bytes",
    ("mla", "A-expanded-heads"): "needs 2 KV heads, not 1",
    ("mla", "A-huge-heads"): "needs 2 KV heads, not 1",
    ("mla", "M14-fp8-row"): "is about fp8 caches",
}

EVERY_PAIR = [
    (model, layout.name)
    for layout in LAYOUTS.values()
    for model in ("gqa", "mla")
    if layout.family in (model, "both")
]


@functools.cache
def make_model(kind: str) -> Any:
    return generate.Model(kind, seed=1)


def make_requests() -> list[Any]:
    generator = torch.Generator().manual_seed(7)
    return [
        generate.Request(torch.randint(512, (n,), generator=generator).tolist(), max_new, arrival)
        for n, max_new, arrival in SHAPES
    ]


@functools.cache
def dense_tokens(kind: str) -> list[list[int]]:
    return [generate.generate_dense(make_model(kind), r.prompt, r.max_new) for r in make_requests()]


def make_engine(kind: str, layout: Layout, **changes: Any) -> Any:
    if layout.absurd and kind == "gqa":  # it needs a dimension of size 1
        changes = {"num_blocks": 96, "block_size": 1} | changes
    return generate.Engine(make_model(kind), layout, **(POOL | changes))


def served(engine: Any) -> list[list[int]]:
    requests = make_requests()
    generate.serve(engine, requests)
    return [request.generated for request in requests]


@pytest.mark.parametrize("kind", ["gqa", "mla"])
def test_the_dense_model_never_chooses_between_near_equals(kind: str) -> None:
    # Otherwise equal tokens would hang on the last bits of float32, and differ from machine to machine.
    model = make_model(kind)
    for request, tokens in zip(make_requests(), dense_tokens(kind), strict=True):
        logits = model.dense(request.prompt + tokens[:-1])[len(request.prompt) - 1 :]
        assert logits.argmax(-1).tolist() == tokens
        first, second = logits.topk(2).values.unbind(-1)
        rounding = torch.finfo(torch.float32).eps * logits.abs().max()
        assert (first - second).min() > 1000 * rounding


@pytest.mark.parametrize(("kind", "name"), [pair for pair in EVERY_PAIR if pair not in REFUSED])
def test_greedy_tokens_are_those_of_the_dense_model_in_every_layout(kind: str, name: str) -> None:
    engine = make_engine(kind, LAYOUTS[name])
    assert served(engine) == dense_tokens(kind)
    assert engine.num_preemptions > 0
    for view in (view for views in engine.cache for view in views):  # all is freed, so all is poison
        assert view.isnan().all()


@pytest.mark.parametrize(("kind", "name"), list(REFUSED))
def test_a_layout_that_cannot_hold_a_model_is_refused_with_the_reason(kind: str, name: str) -> None:
    with pytest.raises(ValueError, match=REFUSED[kind, name]):
        make_engine(kind, LAYOUTS[name])


@pytest.mark.parametrize(("kind", "name"), [("gqa", "G4"), ("mla", "M2"), ("mla", "M9")])
def test_the_reference_generates_the_same_tokens(kind: str, name: str) -> None:
    assert served(make_engine(kind, find_layout(name), backend="reference")) == dense_tokens(kind)


@pytest.mark.parametrize("name", ["M14", "M2", "M3", "M5", "A-inner-step-2"])
def test_an_fp8_cache_generates_the_same_tokens_in_every_layout(name: str) -> None:
    # Dense tokens are no measure here: fp8 rounds a difference in the last bit of float32 to one of 6%.
    packed = served(make_engine("mla", find_layout("M1"), dtype=torch.float8_e4m3fn))
    engine = make_engine("mla", find_layout(name), dtype=torch.float8_e4m3fn)
    assert served(engine) == packed
    assert packed != dense_tokens("mla")


@pytest.mark.parametrize(("kind", "name"), [("gqa", "G6"), ("mla", "M4")])
def test_layers_of_one_buffer_are_views_apart(kind: str, name: str) -> None:
    cache = make_engine(kind, find_layout(name)).cache
    assert len({view.untyped_storage().data_ptr() for views in cache for view in views}) == 1
    for layer, (k, _) in enumerate(cache):
        k.fill_(layer)
    assert [k.unique().tolist() for k, _ in cache] == [[0], [1], [2]]
    assert [k.storage_offset() for k, _ in cache] == sorted(k.storage_offset() for k, _ in cache)


def watch(engine: Any, look: Callable[[Any], None]) -> None:
    """Call ``look`` with each step of the engine, before the model runs."""
    make_step = engine._make_step

    def watched(work: list[tuple[Any, int]]) -> Any:
        step = make_step(work)
        look(step)
        return step

    engine._make_step = watched


@pytest.mark.parametrize("kind", ["gqa", "mla"])
def test_requests_join_midway_share_batches_and_reuse_blocks(kind: str) -> None:
    engine = make_engine(kind, find_layout("A-odd-page"))
    counts: list[list[int]] = []
    owners: dict[int, set[int]] = {}

    def look(step: Any) -> None:
        counts.append(step.cu_seqlens_q.diff().tolist())
        for request in engine.running:
            for block in request.blocks:
                owners.setdefault(block, set()).add(id(request))
        owned = [block for request in engine.running for block in request.blocks]
        assert sorted(owned + engine.manager.free) == list(range(POOL["num_blocks"]))

    watch(engine, look)
    assert served(engine) == dense_tokens(kind)
    assert any(1 in count and max(count) > 1 for count in counts)  # decode rows beside a prefill chunk
    assert len({len(count) for count in counts}) > 2
    assert max(len(count) for count in counts) == POOL["max_batch"]
    assert any(len(users) > 2 for users in owners.values())
    assert len(counts) == engine.num_steps


@pytest.mark.parametrize("kind", ["gqa", "mla"])
def test_the_work_of_a_step_is_shared_out_once_for_all_layers(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Tensor] = []
    used: list[Tensor] = []
    schedule, attention = generate.get_scheduler_metadata, generate.flash_attn_varlen_func

    def get_scheduler_metadata(*args: Any, **options: Any) -> Tensor:
        made.append(schedule(*args, **options))
        return made[-1]

    def flash_attn_varlen_func(*args: Any, **options: Any) -> Tensor:
        used.append(options["scheduler_metadata"])
        result: Tensor = attention(*args, **options)
        return result

    monkeypatch.setattr(generate, "get_scheduler_metadata", get_scheduler_metadata)
    monkeypatch.setattr(generate, "flash_attn_varlen_func", flash_attn_varlen_func)
    engine = make_engine(kind, find_layout({"gqa": "G2", "mla": "M1"}[kind]))
    served(engine)
    layers = make_model(kind).num_layers
    assert len(made) == engine.num_steps
    assert [id(metadata) for metadata in used] == [id(m) for m in made for _ in range(layers)]


@pytest.mark.parametrize("value", [0.0, float("nan")])
@pytest.mark.parametrize(("kind", "name"), [("gqa", "G2"), ("mla", "M1")])
def test_one_wrong_block_in_one_layer_changes_the_tokens(kind: str, name: str, value: float) -> None:
    # What one wrong block id would do: the tests above would see it.
    engine = make_engine(kind, find_layout(name), num_blocks=64)

    def look(step: Any) -> None:
        if engine.num_steps == 4:  # the first request has decoded once or twice
            for view in engine.cache[1]:
                view[engine.running[0].blocks[1]] = value

    watch(engine, look)
    tokens = served(engine)
    changed = [ours != dense for ours, dense in zip(tokens, dense_tokens(kind), strict=True)]
    assert changed == [True, False, False, False, False, False]


def test_a_request_waits_until_there_are_blocks_for_it() -> None:
    engine = make_engine("mla", find_layout("M3"), num_blocks=6)
    first, second = make_requests()[0], make_requests()[2]  # 37 + 10 and 9 + 12 tokens, blocks of 8
    engine.submit(first)
    while not first.generated:
        engine.step()
    engine.submit(second)
    assert len(engine.manager.free) == 1
    while engine.running:
        assert list(engine.waiting) == [second]
        assert not second.blocks
        engine.step()
    generate.serve(engine, [])
    assert engine.num_preemptions == 0
    assert [first.generated, second.generated] == [dense_tokens("mla")[0], dense_tokens("mla")[2]]
    assert sorted(engine.manager.free) == list(range(6))


def test_the_youngest_request_gives_its_blocks_back_when_they_run_out() -> None:
    engine = make_engine("gqa", find_layout("G9"), num_blocks=6)
    first, second = make_requests()[1], make_requests()[5]  # 1 + 20 and 16 + 10 tokens, blocks of 8
    third = make_requests()[4]  # 17 + 9 tokens
    for request in (first, second, third):
        engine.submit(request)
    engine.step()
    assert engine.running == [first, second, third]
    generate.serve(engine, [])
    assert engine.num_preemptions > 0
    assert first.generated == dense_tokens("gqa")[1]
    assert second.generated == dense_tokens("gqa")[5]
    assert third.generated == dense_tokens("gqa")[4]


def test_a_request_that_could_never_run_is_refused() -> None:
    engine = make_engine("gqa", find_layout("G2"), num_blocks=4)
    with pytest.raises(ValueError, match="the request needs 5 blocks; the cache has 4"):
        engine.submit(generate.Request(prompt=[1] * 30, max_new=4))
    with pytest.raises(ValueError, match="needs a prompt, and at least one token to generate"):
        engine.submit(generate.Request(prompt=[], max_new=4))
    assert not engine.waiting
    fits = generate.Request(prompt=[1] * 29, max_new=4)  # the last token is never fed back: 32 rows
    engine.submit(fits)
    generate.serve(engine, [])
    assert fits.generated == generate.generate_dense(make_model("gqa"), fits.prompt, 4)
    assert engine.num_preemptions == 0


def test_an_engine_without_work_waits_for_the_next_arrival() -> None:
    engine = make_engine("mla", find_layout("M1"))
    late = make_requests()[2]
    late.arrival = 1000
    generate.serve(engine, [late])
    assert late.generated == dense_tokens("mla")[2]


def run_script(*options: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), "--device", "cpu", *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("options", "layout"),
    [
        (("--check",), "M1-combined: one row of latent and rope"),
        (("--model", "gqa", "--layout", "g11", "--seed", "3", "--check"), "G11-padded-page-blocks: page p"),
        (("--layout", "M14", "--fp8", "--backend", "reference"), "M14-fp8-row: one fp8 row"),
    ],
)
def test_the_script_prints_its_layout_and_tokens(options: tuple[str, ...], layout: str) -> None:
    result = run_script(*options)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"layout {layout}")
    assert lines[2].startswith("layer 0, K: [")
    assert [line.split(",")[0] for line in lines[4:12]] == [f"request {i}" for i in range(8)]
    assert lines[12].endswith("tokens/s")
    assert lines[13:] == (["the dense model generates the same tokens"] if "--check" in options else [])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--model", "gqa", "--layout", "M1"), "M1-combined does not hold K and V of their own"),
        (("--layout", "nonsense"), "no layout 'nonsense'; there are G1-kv-outermost, "),
        (("--layout", "M14"), "M14-fp8-row is about fp8 caches, not torch.float32"),
        (("--fp8", "--check"), "--check compares float32 with float32"),
    ],
)
def test_the_script_says_why_it_cannot(
    options: tuple[str, ...],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options])
    with pytest.raises(SystemExit) as refusal:
        generate.main()
    assert refusal.value.code == 2
    assert reason in capsys.readouterr().err
