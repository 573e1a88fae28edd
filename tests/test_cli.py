"""The command line: what it prints, what it draws, how it fails, and that the demonstration can fail."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from typer.testing import CliRunner

import anystride
from anystride import collect_env
from anystride.backends import cpu
from anystride.cli import app
from anystride.cli import demo as demonstration
from anystride.cli.catalogue import text_lines
from anystride.cli.demo import SCENES, LayerResult, Size, run_scene
from anystride.cli.drawing import COLOURS, DPI, WIDTH, draw
from anystride.cli.memory_map import gaps_of, map_memory, sample_shape, strides_of
from anystride.problem import Call, Problem
from anystride.testing import LAYOUTS, Layout, Storage, find_layout, occupancy
from anystride.testing.cases import varied_lengths

SMALL = Size(layers=2, batch=2, tokens=40, repeats=1)
CPU = torch.device("cpu")


def ask(*arguments: str, width: int = 200) -> tuple[int, str]:
    """Exit code and everything that was printed, as one line without the lines of boxes."""
    done = CliRunner(env={"COLUMNS": str(width)}).invoke(app, list(arguments))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    text = "".join(" " if letter in "│┃╭╮╰╯─━" else letter for letter in done.output)
    return done.exit_code, " ".join(text.split())


def in_a_process(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ | variables
    )


# The map of memory, from which text and pictures are made.


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda layout: layout.name)
def test_the_map_agrees_with_the_catalogue_element_by_element(layout: Layout) -> None:
    storage = layout.build(sample_shape(layout))
    codes = {"k": 1, "v": 2, "both": 3, "layer": 4, "cache": 4}
    found = map_memory(storage)
    lines = found.lines
    if storage.lazy:  # its map would be larger than memory: count the elements
        drawn = sum(run.end - run.begin for line in lines for run in line.runs)
        assert drawn == storage.k.numel() + storage.v.numel()
    else:
        parts = [torch.zeros(flat.numel(), dtype=torch.uint8) for flat in storage.buffers]
        for line in lines:
            for run in line.runs:
                parts[line.buffer][run.begin : run.end] = codes[run.kind]
        assert torch.equal(torch.cat(parts), occupancy(storage))
    for line in lines:
        ruler = found.rulers[line.buffer]
        edges = [edge for run in line.runs for edge in (run.begin, run.end)]
        assert edges == sorted(edges)
        places = [ruler.place(edge - line.begin) for edge in (line.begin, *edges, line.end)]
        assert places == sorted(places)
        assert places[0] == 0
        assert places[-1] <= 1
        assert sum(end - begin for begin, end in gaps_of(line)) == line.end - line.begin - sum(
            run.end - run.begin for run in line.runs
        )


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda layout: layout.name)
def test_the_strides_shown_are_those_of_the_views(layout: Layout) -> None:
    storage = layout.build(sample_shape(layout))
    shown: dict[str, int] = {stride.name: stride.elements for stride in strides_of(layout, storage)}
    axes = ["page"] * (storage.k.dim() == 5) + ["block", "token", "head", "dim"]
    sizes = zip(axes, storage.k.shape, storage.k.stride(), strict=True)
    expected = {name: stride for name, size, stride in sizes if size > 1}
    if len(storage.buffers) == 1:
        expected["V"] = int(storage.v.storage_offset() - storage.k.storage_offset())
    assert shown == expected


def text_map(name: str, width: int) -> list[str]:
    layout = find_layout(name)
    return text_lines(map_memory(layout.build(sample_shape(layout))), width)


def test_a_text_map_is_exact_where_characters_fit() -> None:
    # 3 layers of 4 rows of 9 characters, 8 of them latent.
    assert text_map("M2", 110) == ["o" * 36 + "BBBBBBBBK" * 4 + "o" * 36] * 3
    assert text_map("G14", 100) == [("K" * 12 + "V" * 12) * 4] * 3


def test_a_text_map_shows_what_is_narrower_than_a_character() -> None:
    lines = text_map("M2", 62)
    assert [line.count("K") for line in lines] == [4, 4, 4]
    assert all(line.count(".") == 16 for line in text_map("G12", 80))


def test_a_text_map_folds_what_is_longer_than_all_the_rest() -> None:
    first, _, last = text_map("A-huge-blocks", 80)
    assert first.strip("KV") == "~" * first.count("~") != ""
    assert set(last) == {"K", "V"}
    found = map_memory(find_layout("A-huge-values").build(sample_shape(find_layout("A-huge-values"))))
    assert [line.skipped for line in found.lines] == [0, 0, 0, 2**31 - 3 * 1024, 0, 0]


# layouts


def test_all_layouts_are_listed() -> None:
    code, text = ask("layouts")
    assert code == 0
    words = text.split()
    assert all(name in words for name in LAYOUTS)
    assert f"{len(LAYOUTS)} layouts." in text


def test_one_layout_is_shown_by_number() -> None:
    code, text = ask("layouts", "m2")
    assert code == 0
    assert text.startswith("M2-cross-layer all layers of a block together used by vLLM cross-layer")
    assert "order B L T H R (B block, or page of blocks, L layer, T token, H head, R MLA row)" in text
    assert "strides block L*bs*h*r = 6,912 token h*r = 576" in text
    assert "v_in_k: V at element 0 of K's row" in text
    assert "B keys and values, the same bytes" in text


def test_a_layout_in_two_allocations_is_shown_as_such() -> None:
    code, text = ask("layouts", "G16")
    assert code == 0
    assert "the second allocation: 0 VVV" in text
    assert "K to V" not in text


@pytest.mark.parametrize(
    ("name", "near"), [("M33", "M3, M3b"), ("cross", "G4-cross-layer-nhd"), ("sglnag-pool", "sglang-pool")]
)
def test_an_unknown_layout_is_an_error_that_lists_what_is_near(name: str, near: str) -> None:
    code, text = ask("layouts", name)
    assert code == 2
    assert f"there is no layout '{name}'" in text
    assert near in text


def test_what_is_near_nothing_gets_all_names() -> None:
    code, text = ask("layouts", "zzz", width=3000)
    assert code == 2
    assert all(name in text for name in LAYOUTS)


def test_a_picture_needs_a_name() -> None:
    code, text = ask("layouts", "--png", "x.png")
    assert code == 2
    assert "anystride layouts M2 --png m2.png" in text


def share_of(picture: Any, colour: str) -> float:
    """Share of the pixels that have a colour."""
    distance = abs(picture[..., :3] - to_rgb(colour)).max(-1)
    return float((distance < 0.01).mean())


def test_the_picture_of_a_layout_shows_latent_and_rope_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "new" / "m2.png"
    code, text = ask("layouts", "M2", "--png", str(file))
    assert code == 0
    assert text == f"M2-cross-layer is drawn in {file}"
    assert file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    picture = imread(file)
    assert picture.shape[1] == round(WIDTH * DPI)
    assert 500 < picture.shape[0] < 1000
    latent, rope, layers = (share_of(picture, COLOURS[kind]) for kind in ("both", "k", "layer"))
    assert latent > 0.02
    assert 6 < latent / rope < 9  # 512 to 64, but for labels, edges and the legend
    assert 1.7 < layers / (latent + rope) < 2.4  # two other layers of the same size
    assert share_of(picture, COLOURS["v"]) == 0


@pytest.mark.parametrize(
    "name", ["G11", "G10", "M8", "G16", "A-huge-values", "A-inner-step-2", "A-expanded-heads"]
)
def test_pictures_of_all_kinds_of_layouts_are_drawn(name: str, tmp_path: Path) -> None:
    layout = find_layout(name)
    kinds = {run.kind for line in map_memory(layout.build(sample_shape(layout))).lines for run in line.runs}
    draw([layout], tmp_path / "x.png")
    picture = imread(tmp_path / "x.png")
    for kind, colour in COLOURS.items():
        if kind in kinds or colour in (
            COLOURS["k"],
            COLOURS["v"],
            COLOURS["both"],
        ):  # greys are in letters too
            assert (share_of(picture, colour) > 0.001) == (kind in kinds)


# explain


def test_explain_tells_who_runs_a_case() -> None:
    code, text = ask("explain", "--case", "d-row-96-64", "--layout", "M3", "--backend", "reference")
    assert code == 0
    assert "d-row-96-64 (a small MLA row) in M3-hybrid-page (rows in padded pages)" in text
    assert "backend reference" in text
    assert "relation v_in_k, V at element 0 of K's row" in text
    assert "triton refuses tensors are on cpu" in text


def test_explain_tells_what_an_unable_backend_refuses() -> None:
    code, text = ask("explain", "--backend", "triton")
    assert code == 0
    assert "backend none" in text
    assert "triton refuses tensors are on cpu" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--case", "deepseek-v3"),
            "there is no case 'deepseek-v3'; near: deepseek-v3-h128, deepseek-v3-h16",
        ),
        (("--layout", "M22"), "there is no layout 'M22'; near: M2"),
        (("--layout", "G2"), "G2-vllm-nhd does not hold V in K's row; deepseek-v3-h16 fits M1-combined,"),
        (("--device", "nowhere"), "'nowhere' cannot be used"),
        (("--case", "bench-mla-b128-h128-kv16k"), "has a cache of 5.1 GB; pass --device cuda"),
        (("--backend", "cuda"), "backend names no back end."),
    ],
)
def test_explain_leaves_with_2_when_it_is_asked_wrong(arguments: tuple[str, ...], message: str) -> None:
    code, text = ask("explain", *arguments)
    assert code == 2
    assert message in text


# env


def test_env_tells_what_a_bug_report_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYSTRIDE_LOG", "info")
    code, text = ask("env")
    assert code == 0
    assert f"anystride {anystride.__version__} in " in text
    assert f"torch {torch.__version__} (" in text
    assert "cpu on cpu available" in text
    assert "triton on cpu tensors are on cpu; needs a GPU" in text or "triton on cpu triton is not" in text
    assert "ANYSTRIDE_LOG info" in text
    assert "ANYSTRIDE_BACKEND not set" in text


WITHOUT = """
import sys
for name in ("rich", "typer", "matplotlib"):
    sys.modules[name] = None
"""


def test_env_needs_nothing_but_torch() -> None:
    code = WITHOUT + "import runpy; runpy.run_module('anystride.collect_env', run_name='__main__')"
    done = in_a_process(code)
    assert done.returncode == 0, done.stderr
    versions = collect_env.report().partition("devices")[0]
    assert done.stdout.partition("devices")[0] == versions


def test_without_the_extra_packages_the_command_says_what_to_install() -> None:
    done = in_a_process(WITHOUT + "from anystride.cli import app; app()")
    assert done.returncode == 1
    assert done.stderr == (
        "anystride: the command line needs typer, rich, matplotlib, not installed here.\n"
        "  do     pip install 'anystride[cli]'\n"
    )


def test_the_version_is_printed() -> None:
    assert ask("--version") == (0, anystride.__version__)


def test_the_log_names_who_runs_a_problem_once() -> None:
    code = """
import torch, anystride
q, k = torch.zeros(1, 2, 16), torch.zeros(3, 1, 16)
starts = torch.tensor([0, 1], dtype=torch.int32)
for _ in range(2):
    anystride.flash_attn_varlen_func(q, k, k, 1, starts, 3, cu_seqlens_k=starts * 3, backend="reference")
"""
    done = in_a_process(code, ANYSTRIDE_LOG="info")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("anystride: reference runs q fp32 [1, 2, 16]") == 1
    assert in_a_process(code, ANYSTRIDE_LOG="").stderr == ""


def test_a_log_level_that_does_not_exist_is_an_error() -> None:
    done = in_a_process("import anystride", ANYSTRIDE_LOG="loud")
    assert done.returncode == 1
    assert "import anystride: ANYSTRIDE_LOG names no level." in done.stderr
    assert "got    ANYSTRIDE_LOG = 'loud'" in done.stderr


# demo


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Size, "fitting", staticmethod(lambda device: SMALL))


@pytest.mark.usefixtures("_small")
def test_the_demonstration_finds_every_layer_right_and_draws(tmp_path: Path) -> None:
    code, text = ask("demo", "--out", str(tmp_path), "--device", "cpu")
    assert code == 0, text
    assert text.count("2 of 2") == len(SCENES) == 4
    assert "8 of 8 layers are right, and no byte of a cache was copied." in text
    assert "8/8" not in text
    assert "16/16" in text  # the bar: each layer is filled, then decoded
    file = tmp_path / "anystride-demo.png"
    assert f"picture {file}" in text
    picture = imread(file)
    assert picture.shape[1] == round(WIDTH * DPI)
    assert all(share_of(picture, COLOURS[kind]) > 0.005 for kind in ("k", "v", "both", "layer"))


def spoil_out(call: Call) -> None:
    call.out[0, 0, 0] += 1


def write_nan(call: Call) -> None:
    call.out[-1, -1, -1] = float("nan")


def write_to_the_cache(call: Call) -> None:
    call.k[(0,) * call.k.dim()] = 7  # in block 0, which no table names


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (spoil_out, "WRONG M2-cross-layer, layer 1: error"),
        (write_nan, "WRONG M2-cross-layer, layer 1: error nan"),
        (write_to_the_cache, "; the cache was written"),
    ],
)
def test_the_demonstration_leaves_with_1_if_one_layer_is_wrong(
    damage: Callable[[Call], None], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, layers = cpu.run, dict[int, None]()

    def damaged(problem: Problem, config: Any, call: Call) -> None:
        run(problem, config, call)
        layers.setdefault(call.k.data_ptr())
        if list(layers)[1:2] == [call.k.data_ptr()]:  # the second layer that is decoded
            damage(call)

    monkeypatch.setattr(cpu, "run", damaged)
    code, text = ask("demo", "--out", str(tmp_path / "x.png"), "--device", "cpu", "--backend", "cpu")
    assert code == 1
    assert message in text
    assert "7 of 8 layers are right" in text
    assert text.count("1 of 2") == 1


def test_the_demonstration_refuses_a_device_that_it_cannot_measure_on() -> None:
    code, text = ask("demo", "--device", "meta")
    assert code == 2
    assert "meta has no clock here; cpu and cuda have" in text


@pytest.mark.usefixtures("_small")
def test_the_demonstration_obeys_or_refuses_a_backend(tmp_path: Path) -> None:
    code, text = ask("demo", "--out", str(tmp_path), "--device", "cpu", "--backend", "triton")
    assert code == 2
    assert "backend 'triton' was asked for and refuses; nothing else was tried." in text


def small_results(index: int, device: torch.device) -> list[LayerResult]:
    done: list[str] = []
    results = list(run_scene(SCENES[index], SMALL, device, None, done.append))
    assert len(done) == demonstration.steps(SMALL)
    return results


@pytest.mark.parametrize(
    ("index", "relation", "row"),
    [(0, "v_in_k", 576), (1, "separate", 2 * 8 * 128), (3, "neighbours", 2 * 8 * 128)],
)
def test_what_a_gather_copies_is_counted_from_the_blocks_in_use(index: int, relation: str, row: int) -> None:
    results = small_results(index, CPU)
    lengths = varied_lengths(SMALL.batch, SMALL.tokens)
    block_size = 64 if index == 0 else 16
    tokens = sum(-(-length // block_size) * block_size for length in lengths)
    assert [result.copied_bytes for result in results] == [tokens * row * 2] * 2
    assert {result.relation for result in results} == {relation}
    assert all(result.seconds > 0 and result.copy_seconds > 0 for result in results)


def test_the_layers_of_the_demonstration_are_apart_and_hold_other_values(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Storage] = []
    decode = demonstration._decode

    def watched(arguments: dict[str, Any], storage: Storage, *others: Any) -> LayerResult:
        seen.append(storage)
        return decode(arguments, storage, *others)

    monkeypatch.setattr(demonstration, "_decode", watched)
    for index in range(len(SCENES)):
        small_results(index, CPU)
    for first, second in zip(seen[::2], seen[1::2], strict=True):
        assert first.k.data_ptr() != second.k.data_ptr()
        assert not torch.equal(first.k.nan_to_num(), second.k.nan_to_num())
        shared = first.buffers[0].data_ptr() == second.buffers[0].data_ptr()
        assert shared == ("L" in find_layout(first.name).axes(first.shape))


@pytest.mark.gpu
@pytest.mark.usefixtures("_small")
def test_the_demonstration_runs_on_a_gpu(tmp_path: Path) -> None:
    code, text = ask("demo", "--out", str(tmp_path))
    assert code == 0, text
    assert "8 of 8 layers are right" in text
    assert text.count("triton") + text.count("hopper") == 4
