"""What is timed: pairs of a case and a layout, by suite."""

from __future__ import annotations

from typing import NamedTuple

from anystride.bench import store
from anystride.testing import LAYOUTS, Case, Layout, compatible, find_layout, select

__all__ = ["SUITES", "Row", "packed_layouts", "rows_of"]

SUITES = {
    "mla": "MLA decoding: the rows of DeepSeek-V3, one block of 64 tokens after the other",
    "gqa": "GQA and MHA decoding, K and V of a block side by side",
    "small": "batches of 1 to 8",
    "fp8": "fp8 caches beside the same in bfloat16",
    "layouts": "each layout of the catalogue against a packed cache",
    "prefill": "chunks of a prompt after a past, alone and among decoding sequences",
    "cpu": "everything that a CPU can do, against gathering each sequence",
    "store": "the write side, against a plain copy",
}
PACKED = {"kv": "G16", "row": "M1", "q_v": "M9"}
USUAL = {"kv": "G2", "row": "M1", "q_v": "M7"}
CPU_LAYOUTS = ("G2", "M1", "M7", "G11", "M3b", "M9")  # the first that can hold a case


class Row(NamedTuple):
    """One row of the table."""

    suite: str
    case: Case
    layout: Layout

    @property
    def name(self) -> str:
        """As it is asked for by a part of it."""
        return f"{self.case.name} {self.layout.name}"

    @property
    def is_packed(self) -> bool:
        """Whether nothing lies between what the call reads."""
        return self.layout.name in packed_layouts()


def packed_layouts() -> tuple[str, ...]:
    """The names of the layouts that others are compared with."""
    return tuple(find_layout(name).name for name in PACKED.values())


def rows_of(suite: str) -> list[Row] | list[store.Row]:
    """The rows of a suite.

    Raises:
        KeyError: There is none of this name.
    """
    if suite not in SUITES:
        raise KeyError(f"no suite {suite!r}; there are {', '.join(SUITES)}")
    if suite == "store":
        return list(store.ROWS)
    if suite == "cpu":
        return [
            Row(suite, case, next(one for one in map(find_layout, CPU_LAYOUTS) if not compatible(case, one)))
            for case in select("cpu")
            if any(n and length for n, length in zip(case.q_lens, case.seqused_k, strict=True))
        ]
    if suite == "layouts":
        cases = select("suite-layouts")
        rows = [
            Row(suite, case, layout)
            for case in cases
            for layout in LAYOUTS.values()
            if compatible(case, layout) is None and not layout.huge
        ]
        rows += [Row(suite, case, find_layout(PACKED[case.form])) for case in select("suite-blocks")]
        return sorted(rows, key=lambda row: (row.case not in cases, row.case.form, not row.is_packed))
    return [Row(suite, case, _usual(case)) for case in select(f"suite-{suite}")]


def _usual(case: Case) -> Layout:
    two_dtypes = case.torch_k_dtype != case.torch_kv_dtype
    return find_layout("M9" if two_dtypes else USUAL[case.form])
