"""The columns of the conformance table: one thing alone, against a tame call that asks for nothing else.

A tame call has a packed cache without a NaN in it, block ids that are all valid, and one query token of each
of two sequences, which fill their blocks, and any tile of keys. Each probe changes one thing of it, so that a
failure has a name. Where the tame call itself fails nothing is claimed, nor of a NaN where the call without
it fails. ``lse`` is asked for only where it is what is probed, and nothing else is judged there. The
column's verdict is the worst of its trials.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from anystride.testing.cases import DEEPSEEK_SCALE, Case
from anystride.testing.layouts import find_layout
from anystride.testing.recipe import Layout
from anystride.testing.trial import Trial

__all__ = ["PROBES", "Probe", "trials_of"]

TAME = (128, 128)  # tokens: whole blocks, and whole tiles of every kernel that is known
PARTIAL = (150, 70)  # the last block and the last tile are not full
GQA = Case(
    "tame-gqa", "a probe", TAME, (1, 1), 8, 2, 128, 128, block_size=16, lse=False, tags=frozenset({"gqa"})
)
MLA = Case(
    "tame-mla", "a probe", TAME, (1, 1), 16, 1, 576, 512, "row", 64, lse=False,
    softmax_scale=DEEPSEEK_SCALE, tags=frozenset({"mla"}),
)  # fmt: skip
PACKED = {"kv": "G16", "row": "M1"}

LONE_TOKEN = Layout(
    "probe-far-tokens", "a probe", "the tokens of a block lie a whole cache apart, all else is packed",
    "B T H D", "B T H R", parts="buffers", lone="T",
)  # fmt: skip
LONE_TOKEN_MLA = replace(LONE_TOKEN, parts="one")
LONE_HEAD = Layout(
    "probe-far-heads", "a probe", "the heads of a token lie a whole cache apart, all else is packed",
    "B T H D", parts="buffers", lone="H",
)  # fmt: skip
HEADS_INNERMOST = Layout(
    "probe-heads-innermost", "a probe", "the heads' elements side by side, blocks and tokens packed",
    "B T D H", parts="buffers",
)  # fmt: skip
V_HEADS_FIRST = Layout(
    "probe-v-heads-first", "a probe", "V alone has heads before tokens", "B T H D", v_order="B H T D",
    parts="buffers",
)  # fmt: skip
K_HEADS_FIRST = Layout(
    "probe-k-heads-first", "a probe", "K alone has heads before tokens", "B H T D", v_order="B T H D",
    parts="buffers",
)  # fmt: skip


@dataclass(frozen=True)
class Probe:
    """One column.

    Attributes:
        name: Its heading.
        about: What a kernel that fails it does wrong.
        trials: Of the tame case of a family, makes what is probed; nothing where there is nothing to probe.
    """

    name: str
    about: str
    trials: Callable[[Case], Iterator[Trial]]


def _tame(case: Case, layout: Layout | str = "", **options: Any) -> Trial:
    where = find_layout(layout or PACKED[case.form]) if isinstance(layout, str) else layout
    return Trial(case, where, poisons=frozenset(options.pop("poisons", ())), **options)


def _named(case: Case, name: str, **changes: Any) -> Case:
    return replace(case, name=f"{case.name}-{name}", **changes)


def _partial(case: Case) -> Case:
    return _named(case, "partial", seqused_k=PARTIAL)


def _baseline(case: Case) -> Iterator[Trial]:
    yield _tame(case)


def _page_stride(case: Case) -> Iterator[Trial]:
    yield _tame(case, "G20" if case.form == "kv" else "M4")
    yield _tame(case, "G4" if case.form == "kv" else "M2")


def _token_stride(case: Case) -> Iterator[Trial]:
    if case.form == "kv":
        yield _tame(case, LONE_TOKEN)
    else:  # in blocks of 16: those of 64 would take much memory
        yield _tame(_named(case, "block-16", block_size=16), LONE_TOKEN_MLA)


def _head_stride(case: Case) -> Iterator[Trial]:
    if case.num_kv_heads > 1:
        yield _tame(case, LONE_HEAD)


def _dim_stride(case: Case) -> Iterator[Trial]:
    yield _tame(case, HEADS_INNERMOST if case.form == "kv" else "A-dim-major")


def _unlike(case: Case) -> Iterator[Trial]:
    if case.form == "kv":
        yield _tame(case, V_HEADS_FIRST)
        yield _tame(case, K_HEADS_FIRST)


def _far(case: Case) -> Iterator[Trial]:
    yield _tame(case, "A-huge-blocks")
    yield _tame(case, "A-huge-tokens")
    if case.form == "kv":
        yield _tame(case, "A-huge-heads")
        yield _tame(case, "A-huge-values")


def _small_blocks(case: Case) -> Iterator[Trial]:
    for size in (1, 8):
        yield _tame(_named(case, f"block-{size}", block_size=size))


def _odd_blocks(case: Case) -> Iterator[Trial]:
    for size in (3, 48, 528):  # full ones, so that no tail is to blame
        lengths = (-(-120 // size) * size,) * 2
        yield _tame(_named(case, f"block-{size}", block_size=size, seqused_k=lengths))


def _padded_pages(case: Case) -> Iterator[Trial]:
    yield _tame(case, "G9" if case.form == "kv" else "M3")


def _alignment(case: Case) -> Iterator[Trial]:
    yield _tame(case, "A-off-by-one")
    yield _tame(case, "A-odd-page")
    if case.form == "kv":
        yield _tame(case, "G12")


def _pages(case: Case) -> Iterator[Trial]:
    size = case.block_size // 2
    pages = _named(case, f"pages-2x{size}", block_size=size, blocks_per_page=2)
    yield _tame(pages, "G11" if case.form == "kv" else "M3b")


def _sliced_table(case: Case) -> Iterator[Trial]:
    yield _tame(case, table="columns_of_wider")


def _strided_table(case: Case) -> Iterator[Trial]:
    for table in ("every_other_column", "transposed"):
        yield _tame(case, table=table)


def _garbage_ids(case: Case) -> Iterator[Trial]:
    yield _tame(_partial(case), poisons=("ids",))


def _nan_tails(case: Case) -> Iterator[Trial]:
    yield _tame(_partial(case), poisons=("tails",))
    if case.form == "row":  # kernels for 128 heads are others than those for 16
        yield _tame(_named(_partial(case), "h128", num_q_heads=128), poisons=("tails",))


def _nan_null_block(case: Case) -> Iterator[Trial]:
    yield _tame(_partial(case), poisons=("unused",))


def _nan_gaps(case: Case) -> Iterator[Trial]:
    for layout in ("G4", "G20", "A-padded-rows") if case.form == "kv" else ("M2", "M3", "A-padded-rows"):
        yield _tame(case, layout, poisons=("gaps",))


def _with_empty(case: Case) -> Case:
    return _named(case, "empty", seqused_k=(128, 0, 128, 0), q_lens=(1,) * 4)


def _empty(case: Case) -> Iterator[Trial]:
    yield _tame(_with_empty(case))


def _padded_q(case: Case) -> Iterator[Trial]:
    padded = _named(case, "padded-q", padded_q=3)
    yield _tame(padded)
    yield _tame(padded, out="packed")


def _uneven(case: Case) -> Iterator[Trial]:
    yield _tame(_named(case, "uneven", seqused_k=(1187, 1, 2, 64, 3, 129), q_lens=(1,) * 6))


def _stale_out(case: Case) -> Iterator[Trial]:
    yield _tame(case, out="packed")
    yield _tame(_with_empty(case), out="packed")


def _strided_out(case: Case) -> Iterator[Trial]:
    for rows in ("padded_rows", "heads_first"):
        yield _tame(case, out=rows)


def _strided_q(case: Case) -> Iterator[Trial]:
    for rows in ("fused_qkv", "heads_first"):
        yield _tame(case, rows=rows)


def _several_queries(case: Case) -> Iterator[Trial]:
    yield _tame(_named(case, "q-3", q_lens=(3, 3)))
    yield _tame(_named(case, "q-uneven", q_lens=(4, 1)))
    yield _tame(_named(case, "q-beyond-keys", q_lens=(4, 4), seqused_k=(128, 2)))  # two see no key


def _lse(case: Case) -> Iterator[Trial]:
    yield _tame(_named(case, "lse", lse=True), of="lse")
    yield _tame(_named(case, "lse-empty", lse=True, seqused_k=(128, 0, 128), q_lens=(1,) * 3), of="lse")


PROBES: tuple[Probe, ...] = (
    Probe("baseline", "cannot do the tame call at all", _baseline),
    Probe("page stride", "takes blocks for packed, or for block_size times the token's stride", _page_stride),
    Probe("token stride", "takes tokens for packed", _token_stride),
    Probe("head stride", "takes heads for packed", _head_stride),
    Probe("last-dim stride", "takes the elements of a row for neighbours", _dim_stride),
    Probe("K and V strides unlike", "takes V's strides from K", _unlike),
    Probe("64-bit offsets", "counts offsets in 32 bits", _far),
    Probe("small blocks", "takes blocks for tiles", _small_blocks),
    Probe("odd blocks", "takes block sizes for powers of two, or multiples of 16", _odd_blocks),
    Probe("padded pages", "takes pages for full", _padded_pages),
    Probe("alignment", "takes rows for aligned to 16 bytes", _alignment),
    Probe(
        "5-D pages", "takes one stride from block to block, where pages of several blocks are padded", _pages
    ),
    Probe("sliced block table", "takes the table's rows for as long as its shape says", _sliced_table),
    Probe("strided block table", "takes the ids of a row for neighbours", _strided_table),
    Probe("garbage ids past the end", "loads or checks ids of blocks that no token needs", _garbage_ids),
    Probe("NaN tails", "multiplies rows past the end by zero instead of leaving them out", _nan_tails),
    Probe(
        "NaN null block",
        "reads block 0, to which padded tables point, or other unused blocks",
        _nan_null_block,
    ),
    Probe("NaN in gaps", "reads outside the view", _nan_gaps),
    Probe("empty sequences", "divides by zero, or leaves the row unwritten, where there is no key", _empty),
    Probe("padded graph rows", "reads or writes rows of q and out that belong to no sequence", _padded_q),
    Probe("uneven lengths", "cuts the work of short sequences as that of long ones", _uneven),
    Probe("stale output", "adds to what was in out, or leaves a part of it", _stale_out),
    Probe("strided out", "takes out for packed", _strided_out),
    Probe("strided q", "takes q for packed", _strided_q),
    Probe("several query tokens", "aligns the causal mask elsewhere than to the last key", _several_queries),
    Probe("lse convention", "returns lse to another base, in another order, or not -inf without keys", _lse),
)


def trials_of(probe: Probe) -> list[Trial]:
    """The trials of a column, of both families, each with the trial without which it says nothing."""
    return [
        replace(trial, probe=probe.name, rests_on=_rests_on(trial, _tame(case)))
        for case in (GQA, MLA)
        for trial in probe.trials(case)
    ]


def _rests_on(trial: Trial, baseline: Trial) -> Trial | None:
    """A poisoned trial rests on the same without poison, any other on the baseline, and that on nothing."""
    if trial == baseline:
        return None
    return replace(trial, poisons=frozenset(), rests_on=baseline) if trial.poisons else baseline
