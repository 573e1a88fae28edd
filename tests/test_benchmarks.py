"""What the GPU benchmarks build and compare with, at sizes that a CPU can do."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

pytest.importorskip("triton")
if TYPE_CHECKING:
    import decode
else:
    with pytest.MonkeyPatch.context() as path:
        path.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
        decode, _mla, _gqa, _small = map(
            importlib.import_module, ("decode", "mla_decode", "gqa_decode", "small_batches")
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


def test_rows_have_names_of_their_own() -> None:
    modules = [sys.modules[name] for name in ("mla_decode", "gqa_decode", "small_batches")]
    rows = [row for module in modules for row in (*module.ROWS, *getattr(module, "LAYOUTS", ()))]
    assert len({row.name for row in rows}) == len(rows) > 60
