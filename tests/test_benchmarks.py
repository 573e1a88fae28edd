"""What the GPU benchmarks build and compare with, at sizes that a CPU can do."""

from __future__ import annotations

import importlib
import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

pytest.importorskip("triton")
if TYPE_CHECKING:
    import decode
    import fp8_decode
    import store
else:
    with pytest.MonkeyPatch.context() as path:
        path.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
        decode, store, fp8_decode, _mla, _gqa, _small = map(
            importlib.import_module,
            ("decode", "store", "fp8_decode", "mla_decode", "gqa_decode", "small_batches"),
        )

ROWS = [
    decode.Row("mla", 3, 8, 1, 576, 512, 300),
    decode.Row("uneven", 3, 8, 2, 64, 64, 300, 16, varied=True),
    decode.Row("halves", 3, 8, 2, 64, 64, 300, 16, layers=2, pad=8, q_len=2),
    decode.Row("heads first", 3, 8, 2, 64, 64, 300, 16, layout="heads first"),
    decode.Row("interleaved", 3, 8, 2, 64, 64, 300, 16, layout="interleaved"),
    decode.Row("rows", 3, 8, 2, 64, 64, 300, 16, layout="rows"),
    decode.Row("window", 3, 8, 2, 64, 64, 300, 16, window=127, sinks=True),
    decode.Row("window of several", 3, 8, 2, 64, 64, 300, 16, window=20, sinks=True, q_len=3),
    decode.Row("mla, e4m3", 3, 8, 1, 576, 512, 300, kv="e4m3"),
    decode.Row("mla, e4m3 rows", 3, 8, 1, 576, 512, 300, kv="e4m3 rows"),
    decode.Row("mla, mixed", 3, 8, 1, 576, 512, 300, layers=2, pad=48, varied=True, kv="mixed"),
    decode.Row("e4m3", 3, 8, 2, 64, 64, 300, 16, layout="rows", kv="e4m3"),
    decode.Row("e4m3 rows", 3, 8, 2, 64, 64, 300, 16, q_len=2, kv="e4m3 rows"),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_row_is_built_and_its_check_knows_right_from_wrong(row: decode.Row) -> None:
    kwargs = decode.build(row, "cpu")
    wanted = decode.plain(row, kwargs, list(range(row.batch)))
    out = decode.ours(kwargs, row, "cpu")()
    assert torch.equal(decode.ours(kwargs, row, "cpu" + decode.ALONE)(), out)
    assert decode.error(row, out, wanted) < 1e-2
    assert decode.error(row, out.roll(1, 0), wanted) > 0.1


def test_a_window_counts_the_keys_in_it() -> None:
    plain = decode.Row("plain", 3, 8, 2, 64, 64, 300, 16)
    window = plain._replace(window=127)
    assert decode.must_move(plain) - decode.must_move(window) == 3 * (300 - 128) * 2 * 2 * 64 * 2
    assert decode.operations(window) * 300 == decode.operations(plain) * 128


@pytest.mark.parametrize(
    ("row", "a_key"),
    [
        (decode.Row("mla", 3, 8, 1, 576, 512, 300), {"": 1152, "e4m3": 576, "e4m3 rows": 580, "mixed": 656}),
        (decode.Row("gqa", 3, 8, 2, 64, 64, 300), {"": 512, "e4m3": 256, "e4m3 rows": 256 + 16}),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_an_fp8_key_counts_its_numbers_and_its_scales(row: decode.Row, a_key: dict[str, int]) -> None:
    for kv, size in a_key.items():
        less = decode.must_move(row) - decode.must_move(row._replace(kv=kv))
        assert less == 3 * 300 * (a_key[""] - size)


def test_what_fp8_gains_is_summed_up(capsys: pytest.CaptureFixture[str]) -> None:
    def results(hopper: float, triton: float) -> list[decode.Result]:
        times = {
            "anystride triton": triton,
            "anystride hopper": hopper,
            "FlashInfer": 60.0,
            decode.PURE_READ: 40.0,
        }
        return [decode.Result(name, us, "") for name, us in times.items()]

    nan = float("nan")
    times = {"": (100.0, 120.0), "e4m3": (50.0, 80.0), "mixed": (nan, 80.0)}
    rows = [row for row in fp8_decode.ROWS if row.name.startswith(fp8_decode.MATRIX_BOUND)]
    done = [(row, results(*times[row.kv])) for row in rows]
    fp8_decode.summary(decode.Bench({"product": 1e15}, done))
    told = capsys.readouterr().out
    assert "hopper: bf16 100.0 | e4m3 50.0 (2.00 times as fast) | mixed nan" in told
    assert "triton: bf16 120.0 | e4m3 80.0 (1.50 times as fast) | mixed 80.0 (1.50" in told
    assert "e4m3: 2.000 of the speed of bf16 (target 1.0), 1.250 of the time of a pure read" in told
    assert "mixed: 1.250 of the speed of bf16" in told
    assert told.count("of the matrix ceiling (target 0.80)") == 2


def test_rows_have_names_of_their_own() -> None:
    modules = [sys.modules[name] for name in ("mla_decode", "gqa_decode", "small_batches", "fp8_decode")]
    rows = [row for module in modules for row in (*module.ROWS, *getattr(module, "LAYOUTS", ()))]
    assert len({row.name for row in rows}) == len(rows) > 60
    assert len({row.name for row in store.ROWS}) == len(store.ROWS) > 60


STORES = [
    *(store.Row(kind, 24, blocks=8, **fields) for kind, fields in store.KINDS.items()),
    *(row._replace(tokens=24, blocks=8) for row in store.LAYOUTS),
    *(row._replace(tokens=5 * store.BLOCK, blocks=8) for row in store.BLOCKS),
]


@pytest.mark.parametrize("row", STORES, ids=lambda row: row.name)
def test_a_store_is_built_and_its_check_knows_right_from_wrong(row: store.Row) -> None:
    case = store.build(row, "cpu", "cpu")
    calls, refused = store.right_calls(case, {store.VLLM: "needs a GPU"})
    assert store.OURS in calls
    assert not refused
    assert "numbers off" in store.fault_of(case, lambda: None)
    view, _wanted = case.places[-1]
    taken = set(zip(*(index.tolist() for index in case.where), strict=True))
    places = itertools.product(*map(range, view.shape[: len(case.where)]))
    free = next((place for place in places if place not in taken), None)
    if free is not None:

        def also_beside() -> None:
            calls[store.OURS]()
            store.bits(view)[free] ^= 1

        assert "beside" in store.fault_of(case, also_beside)
    assert store.fault_of(case, calls[store.OURS]) == ""
    store.plain_copy(case)()


def test_a_store_counts_what_it_reads_and_what_it_writes() -> None:
    kinds = (
        "bf16",
        "e4m3, scale a number",
        "e4m3, scales written",
        "MLA, bf16",
        "MLA, e4m3",
        "MLA, 656 bytes",
    )
    moved = [
        store.must_move(store.build(store.Row(kind, 3, blocks=4, **store.KINDS[kind]), "cpu"))
        for kind in kinds
    ]
    gqa, mla = 2 * 8 * 128, 576
    a_token = [gqa * 4, gqa * 3, gqa * 3 + 2 * 8 * 4, mla * 4, mla * 3, mla * 2 + 656]
    assert moved == [3 * n for n in a_token]


def test_fp8_numbers_are_counted() -> None:
    numbers = torch.tensor([-448.0, -1.0, -0.0, 0.0, 0.001953125, 1.0, 448.0]).to(torch.float8_e4m3fn)
    assert store.steps(numbers, numbers) == 0
    assert store.steps(numbers[2:4], numbers[3:5]) == 1
    assert store.steps(numbers[:1], numbers[-1:]) == 2 * 0x7E


def test_what_was_stored_is_summed_up(capsys: pytest.CaptureFixture[str]) -> None:
    row = store.Row("one", 4096)
    results = [
        decode.Result(store.OURS, 10.0, ""),
        decode.Result(store.VLLM, 9.0, ""),
        decode.Result(store.COPY, 8.0, ""),
    ]
    assert "anystride triton 10.0" in store.line_of(row, results, 4000, 1e9)
    store.summary([(row, results), (row, [decode.Result(store.OURS, float("nan"), "WRONG"), results[-1]])])
    told = capsys.readouterr().out
    assert "0.800 of a copy's speed (target 0.85), 0.900 of vLLM's" in told
    assert "slower than the best peer: one: 0.900" in told
