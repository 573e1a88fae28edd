"""One table of named cases: the shapes of real models, and the edges where kernels break.

Tests, the demo and the benchmark read the same table. A case says what a call asks; a layout
(``layouts.py``) says where the cache lies; ``inputs.py`` makes tensors of the two. Tags that follow
from a case's numbers are computed, so that they cannot be wrong. The file is as long as the table.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch

from anystride.testing.storage import Form

__all__ = ["CASES", "TAGS", "Case", "Parallel", "find_case", "select"]

TAGS = {
    "quick": "a small share of the table that shows most faults",
    "full": "every case that is no benchmark",
    "cpu": "small enough for a CPU: at most 4200 tokens a sequence",
    "tiny": "small enough for an interpreted kernel: at most 40 tokens, 8 query heads, 2 splits",
    "bench": "a row of the benchmark: needs a GPU's memory",
    "suite-mla": "timed in this suite",
    "suite-gqa": "timed in this suite",
    "suite-small": "timed in this suite",
    "suite-fp8": "timed in this suite",
    "suite-layouts": "timed in this suite",
    "suite-blocks": "timed packed, in the suite layouts",
    "suite-prefill": "timed in this suite",
    "model": "the attention of a model that people run",
    "edge": "made to break something",
    "gqa": "K and V of their own",
    "mla": "V is a part of K's row, or the row is given in two parts",
    "q_v": "MLA with the latent part as q_v and v",
    "prefill": "a sequence has 32 query tokens or more",
    "fp8": "an fp8 cache",
    "cp": "decode context parallelism",
    "pages": "pages of several blocks: a 5-D cache",
    "dense": "no block table",
}


class Parallel(NamedTuple):
    """Decode context parallelism: token p lives on rank (p // interleave) % world_size."""

    world_size: int
    interleave: int


@dataclass(frozen=True)
class Case:
    """What one call asks, without the layout of its cache.

    Attributes:
        name: Unique, readable in a test id.
        source: The model, or the edge.
        tags: Keys of ``TAGS``.
        seqused_k: Keys of each sequence, in tokens; under context parallelism over all ranks.
        q_lens: Query tokens of each sequence; one number is repeated for all.
        num_q_heads: Query heads.
        num_kv_heads: KV heads.
        d_qk: Elements in a row of K.
        d_v: Elements in a row of V.
        form: ``kv``, ``row`` or ``q_v``, as in ``CacheShape``.
        block_size: Tokens.
        blocks_per_page: Above 1 the cache is 5-D.
        paged: False: no block table, 3-D K and V.
        slack: Not paged: rows after each sequence that its ``cu_seqlens_k`` range has and
            ``seqused_k`` leaves out.
        padded_q: Rows of q that belong to no sequence, as in a padded CUDA graph.
        dtype: Name of the dtype of q and out.
        kv_dtype: Name of the dtype of the cache, "" for that of q.
        rope_as_q: Whether K, the rope part of a ``q_v`` form, has the dtype of q all the same.
        causal: Masks keys after the query.
        window: Left and right, in tokens, -1 unbounded.
        softcap: 0.0 for none.
        alibi: "", slopes by ``heads``, or by ``batch`` and heads.
        sinks: Whether ``s_aux`` is given.
        lse: Whether ``lse`` is asked for.
        descales: "", Python ``floats``, ``scalar`` tensors, one scalar ``expanded``, or
            ``per_head`` (``[batch, num_kv_heads]``); for q, k and v.
        scale_caches: "", a scale for each token and head by ``rows``, or one for each of ``GROUPS`` runs of
            a row's dimensions by ``groups``; for those of k and v that are fp8.
        cp: World size and interleave, None without.
        num_splits: 0 for the backend's choice.
        batch_invariant: As in the entry.
        softmax_scale: None for one over the root of the row that the scores see.
    """

    name: str
    source: str
    seqused_k: tuple[int, ...]
    q_lens: tuple[int, ...] = (1,)
    num_q_heads: int = 4
    num_kv_heads: int = 2
    d_qk: int = 64
    d_v: int = 64
    form: Form = "kv"
    block_size: int = 16
    blocks_per_page: int = 1
    paged: bool = True
    slack: int = 0
    padded_q: int = 0
    dtype: str = "bfloat16"
    kv_dtype: str = ""
    rope_as_q: bool = False
    causal: bool = True
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi: Literal["", "heads", "batch"] = ""
    sinks: bool = False
    lse: bool = True
    descales: Literal["", "floats", "scalar", "expanded", "per_head"] = ""
    scale_caches: Literal["", "rows", "groups"] = ""
    cp: Parallel | None = None
    num_splits: int = 0
    batch_invariant: bool = False
    softmax_scale: float | None = None
    tags: frozenset[str] = frozenset()

    @property
    def batch(self) -> int:
        """Sequences."""
        return len(self.seqused_k)

    @property
    def group_size(self) -> int:
        """Query heads to a KV head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def total_q(self) -> int:
        """Rows of q that belong to a sequence."""
        return sum(self.q_lens)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of q and out."""
        return _dtype(self.dtype)

    @property
    def torch_kv_dtype(self) -> torch.dtype:
        """Of the cache."""
        return _dtype(self.kv_dtype or self.dtype)

    @property
    def torch_k_dtype(self) -> torch.dtype:
        """Of K."""
        return self.torch_dtype if self.rope_as_q else self.torch_kv_dtype

    @property
    def scale(self) -> float:
        """The softmax scale that is passed."""
        if self.softmax_scale is not None:
            return self.softmax_scale
        seen = self.d_qk + (self.d_v if self.form == "q_v" else 0)
        return float(seen**-0.5)


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)  # the names are this file's own
    return dtype


def _finish(case: Case, *tags: str) -> Case:
    """Repeat a single query length, and add the tags that follow from the numbers."""
    q_lens = case.q_lens * case.batch if len(case.q_lens) == 1 else case.q_lens
    holds = {
        "full": "bench" not in tags,
        "cpu": "bench" not in tags,
        "gqa": case.form == "kv",
        "mla": case.form != "kv",
        "q_v": case.form == "q_v",
        "prefill": max(q_lens, default=0) >= 32,
        "fp8": case.torch_kv_dtype.itemsize == 1,
        "cp": case.cp is not None,
        "pages": case.blocks_per_page > 1,
        "dense": not case.paged,
    }
    follow = {tag for tag, is_so in holds.items() if is_so}
    return replace(case, q_lens=q_lens, tags=frozenset(tags) | follow)


GROUPS = 4  # scales of a row: DeepSeek-V3.2 has as many

DEEPSEEK_SCALE = (128 + 64) ** -0.5  # the head dimension before absorption, not 576
GLM_SCALE = (192 + 64) ** -0.5
MISTRAL_SCALE = (64 + 64) ** -0.5


def _row(name: str, source: str, heads: int, lens: tuple[int, ...], q: int = 1) -> Case:
    """A DeepSeek-shaped MLA row."""
    return Case(
        name,
        source,
        lens,
        (q,),
        num_q_heads=heads,
        num_kv_heads=1,
        d_qk=576,
        d_v=512,
        form="row",
        block_size=64,
        softmax_scale=DEEPSEEK_SCALE,
    )


def _split(case: Case, name: str, rope: int = 64) -> Case:
    """The same attention, latent and rope parts given apart."""
    return replace(case, name=name, form="q_v", d_qk=rope, softmax_scale=case.scale)


def _gqa(name: str, source: str, heads: tuple[int, int], d: int, lens: tuple[int, ...], bs: int = 16) -> Case:
    return Case(name, source, lens, (1,), *heads, d, d, block_size=bs)


def _models() -> Iterator[Case]:
    lens = (1, 64, 65, 203)
    deepseek = "DeepSeek-V3, DeepSeek-R1"
    yield _finish(_row("deepseek-v3-h128", f"{deepseek}, one GPU", 128, lens), "model")
    h16 = _row("deepseek-v3-h16", f"{deepseek}, tensor parallel 8", 16, lens)
    yield _finish(h16, "model", "quick")
    yield _finish(_row("deepseek-v3-h8", f"{deepseek}, tensor parallel 16", 8, lens), "model")
    mtp = _row("deepseek-v3-mtp", f"{deepseek}, one speculative token", 16, (2, 65, 130), 2)
    yield _finish(mtp, "model", "quick")
    yield _finish(_split(h16, "deepseek-v3-q_v"), "model", "quick")
    yield _finish(_row("kimi-k2", "Kimi-K2: MLA, 64 heads", 64, (129, 3, 260)), "model")
    glm = _row("glm-4.7-flash", "GLM-4.7-Flash: MLA, 20 heads", 20, (17, 190, 64))
    yield _finish(replace(glm, softmax_scale=GLM_SCALE, block_size=16), "model")
    glm = _row("glm-5", "GLM-5: MLA, 64 heads", 64, (100, 257))
    yield _finish(replace(glm, softmax_scale=GLM_SCALE), "model")
    mistral = replace(
        _row("mistral-small-4", "Mistral Small 4: MLA, 256 + 64, 32 heads", 32, (33, 150, 64)),
        d_qk=320,
        d_v=256,
        softmax_scale=MISTRAL_SCALE,
    )
    yield _finish(mistral, "model", "quick")
    yield _finish(_split(mistral, "mistral-small-4-q_v"), "model")

    lens = (16, 1, 177, 290)
    yield _finish(_gqa("llama-3-8b", "Llama-3 8B", (32, 8), 128, lens), "model", "quick")
    yield _finish(_gqa("llama-3-70b", "Llama-3 70B", (64, 8), 128, lens), "model")
    llama = "Llama-3 70B, tensor parallel 8"
    yield _finish(_gqa("llama-3-70b-tp8", llama, (8, 1), 128, lens), "model")
    yield _finish(_gqa("qwen3-1.7b", "Qwen3 0.6B and 1.7B", (16, 8), 128, lens), "model")
    yield _finish(_gqa("qwen3-30b-a3b", "Qwen3 30B-A3B", (32, 4), 128, lens, 64), "model")
    glm = _gqa("glm-4.5", "GLM-4.5: 12 query heads to a KV head", (96, 8), 128, lens)
    yield _finish(glm, "model")
    oss = _gqa("gpt-oss", "gpt-oss, its sliding layers", (64, 8), 64, lens)
    oss = replace(oss, sinks=True, window=(127, 0))
    yield _finish(oss, "model", "quick")
    oss = replace(oss, name="gpt-oss-full", source="gpt-oss, its full layers", window=(-1, -1))
    yield _finish(oss, "model")
    gemma = _gqa("gemma-2-9b", "Gemma 2 9B, a window of 64 for its 4096", (16, 8), 256, lens)
    yield _finish(replace(gemma, softcap=50.0, window=(63, 0)), "model", "quick")
    gemma = replace(gemma, name="gemma-2-9b-full", source="Gemma 2 9B, global layers", softcap=50.0)
    yield _finish(gemma, "model")


def _dimensions() -> Iterator[Case]:
    lens = (1, 16, 17, 65, 100)
    for d in (16, 64, 72, 80, 96, 128, 256, 512):
        case = Case(f"d-{d}", "head dimensions", lens, d_qk=d, d_v=d)
        yield _finish(case, "edge", *(["quick"] if d == 80 else []))
    for d_qk, d_v in ((192, 128), (320, 256), (576, 512), (64, 128), (80, 96)):
        case = Case(f"d-{d_qk}-{d_v}", "d_qk unlike d_v", lens, d_qk=d_qk, d_v=d_v)
        yield _finish(case, "edge", *(["quick"] if d_qk == 192 else []))
    odd = Case("d-odd", "head dimensions that are odd numbers", lens, d_qk=33, d_v=27)
    yield _finish(odd, "edge")
    row = Case("d-row-96-64", "a small MLA row", lens, (2,), 4, 1, 96, 64, "row")
    yield _finish(row, "edge", "quick")
    row = Case("d-row-all", "V is the whole of K's row", lens, (1,), 4, 1, 64, 64, "row")
    yield _finish(row, "edge")
    row = Case("d-row-2-heads", "an MLA row with 2 KV heads", lens, (1,), 6, 2, 96, 64, "row")
    yield _finish(row, "edge")
    split = Case("d-q_v-2-heads", "a q_v form with 2 KV heads", lens, (2,), 6, 2, 32, 64, "q_v")
    yield _finish(split, "edge")
    split = Case("d-q_v-even", "a q_v form with equal parts", lens, (1,), 4, 1, 64, 64, "q_v")
    yield _finish(split, "edge")


def _heads() -> Iterator[Case]:
    lens = (1, 30, 65)
    for group in (3, 5, 7, 12):
        case = Case(f"group-{group}", "group sizes", lens, (2,), 2 * group, 2)
        yield _finish(case, "edge", *(["quick"] if group == 7 else []))
    for q_heads, kv_heads in ((1, 1), (128, 8), (8, 8), (16, 1), (128, 1)):
        name = f"heads-{q_heads}-{kv_heads}"
        yield _finish(Case(name, "head counts", lens, (1,), q_heads, kv_heads), "edge")
    row = Case("heads-row-1", "MLA with one head", lens, (1,), 1, 1, 96, 64, "row")
    yield _finish(row, "edge")
    row = Case("heads-row-5", "MLA, 5 heads, 3 query tokens", lens, (3, 3, 3), 5, 1, 96, 64, "row")
    yield _finish(row, "edge")


def _blocks() -> Iterator[Case]:
    for size in (1, 3, 16, 32, 64, 128, 256, 480, 528, 784, 1056):
        lens = (min(2 * size + 1, 1100), size, size + 1) if size > 1 else (9, 1, 40)
        quick = ["quick"] if size in (3, 528) else []
        case = Case(f"block-{size}", "block sizes", lens, block_size=size)
        yield _finish(case, "edge", *quick)
        row = Case(f"block-row-{size}", "block sizes, MLA", lens, (1,), 4, 1, 96, 64, "row", size)
        yield _finish(row, "edge", *quick)
    tokens = (1, 48, 130, 200)
    pages = Case("pages-4x16", "4 blocks to a page", tokens, block_size=16, blocks_per_page=4)
    yield _finish(pages, "edge", "quick")
    pages = Case("pages-3x176", "a page of 528 in blocks of 176", (529, 176), block_size=176)
    yield _finish(replace(pages, blocks_per_page=3), "edge")
    row = Case("pages-row-2x64", "MLA pages", tokens, (2,), 8, 1, 576, 512, "row", 64, 2)
    yield _finish(row, "edge", "quick")
    yield _finish(replace(_split(row, "pages-q_v-2x32"), block_size=32), "edge")
    dense = Case("dense", "no table", (1, 0, 65, 200), (1, 1, 3, 2), paged=False)
    yield _finish(dense, "edge", "quick")
    yield _finish(replace(dense, name="dense-slack", slack=5), "edge")
    row = Case("dense-row", "no table, MLA", (40, 65), (2,), 4, 1, 96, 64, "row", paged=False)
    yield _finish(row, "edge")
    yield _finish(_split(row, "dense-q_v", 32), "edge")


def _lengths() -> Iterator[Case]:
    lens = (130, 64, 40, 500)
    mixed = Case("mixed", "decode, speculative and prefill rows", lens, (1, 4, 1, 130))
    yield _finish(mixed, "edge", "quick")
    row = Case("mixed-row", "the same, MLA", lens, (1, 4, 2, 70), 4, 1, 96, 64, "row")
    yield _finish(row, "edge")
    yield _finish(_split(row, "mixed-q_v", 32), "edge")
    whole = Case("prefill-whole", "prompts without a past", (300, 65, 16), (300, 65, 16))
    yield _finish(whole, "edge")
    chunk = Case("prefill-chunk", "a chunk of 512 after 588", (1100, 700, 33), (512, 1, 1))
    yield _finish(chunk, "edge")
    chunk = Case("prefill-2048", "a chunk of 2048 after 100", (2148, 40), (2048, 1), 2, 1)
    yield _finish(chunk, "edge")
    for name, source, used in (
        ("length-0", "empty sequences among others", (0, 20, 0)),
        ("length-all-0", "nothing in the cache", (0, 0)),
        ("length-1", "one token", (1,)),
        ("length-block", "exactly one block", (16, 16)),
        ("length-past-block", "one past a block", (17, 33)),
        ("length-past-64", "one past 64", (65, 64, 63)),
        ("length-uneven", "one long sequence among short ones", (1187, 1, 2, 3, 1, 0, 4, 1)),
        ("length-300-sequences", "300 sequences", tuple(7 * n % 61 for n in range(300))),
    ):
        quick = ["quick"] if name in ("length-0", "length-uneven") else []
        yield _finish(Case(name, source, used), "edge", *quick)
    none = Case("q-len-0", "a sequence without queries", (20, 30, 65), (1, 0, 2))
    yield _finish(none, "edge", "quick")
    yield _finish(Case("q-len-all-0", "no queries at all", (20, 30), (0,)), "edge")
    more = Case("more-queries-than-keys", "rows that see no key", (3, 0, 20), (5, 2, 21))
    yield _finish(more, "edge", "quick")
    sinks = replace(more, name="more-queries-with-sinks", sinks=True)
    yield _finish(sinks, "edge")
    row = Case("row-length-0", "MLA, empty and past 64", (0, 65, 1), (2,), 4, 1, 96, 64, "row")
    yield _finish(row, "edge")
    padded = Case("padded-q", "rows of q past the last sequence", (20, 33), (1, 2), padded_q=5)
    yield _finish(padded, "edge", "quick")


def _with_all(case: Case, name: str) -> Case:
    """The case with every feature that goes with every other."""
    return replace(case, name=name, window=(20, 0), softcap=3.0, alibi="batch", sinks=True)


def _features() -> Iterator[Case]:
    lens, q_lens = (1, 40, 100, 65), (1, 3, 2, 1)
    plain = Case("plain", "no feature", lens, q_lens)
    for change in (
        replace(plain, name="no-lse", lse=False),
        replace(plain, name="full-mask", causal=False),
        replace(plain, name="window-left", window=(16, -1)),
        replace(plain, name="window-0", window=(0, 0)),
        replace(plain, name="window-both", causal=False, window=(9, 5)),
        replace(plain, name="window-right", causal=False, window=(-1, 2)),
        replace(plain, name="softcap", softcap=1.5),
        replace(plain, name="alibi", alibi="heads"),
        replace(plain, name="alibi-batch", alibi="batch", causal=False),
        replace(plain, name="sinks", sinks=True),
        replace(plain, name="scale", softmax_scale=0.4),
        replace(plain, name="splits-3", num_splits=3),
        replace(plain, name="splits-40", num_splits=40),
        replace(plain, name="splits-1", num_splits=1),
        replace(plain, name="batch-invariant", batch_invariant=True),
        replace(plain, name="float16", dtype="float16"),
        replace(plain, name="float32", dtype="float32"),
    ):
        quick = ["quick"] if change.name in ("window-both", "alibi", "float32") else []
        yield _finish(replace(change, source="a feature alone"), "edge", *quick)
    # Above 2048 keys, the size of a split of batch_invariant.
    long = Case("batch-invariant-long", "several splits of a fixed size", (4200, 30, 2049), (1,), 2, 1)
    yield _finish(replace(long, batch_invariant=True), "edge")
    long = Case("row-batch-invariant-long", "the same, MLA", (2200, 1), (2,), 4, 1, 96, 64, "row", 64)
    yield _finish(replace(long, batch_invariant=True), "edge")
    together = _with_all(plain, "all-features")
    yield _finish(together, "edge", "quick")
    yield _finish(replace(together, name="all-features-splits", num_splits=3), "edge")
    row = Case("row-all-features", "MLA", lens, q_lens, 4, 1, 96, 64, "row")
    yield _finish(_with_all(row, row.name), "edge")
    yield _finish(_with_all(_split(row, "q_v-all-features", 32), "q_v-all-features"), "edge")
    yield _finish(replace(row, name="row-splits-3", num_splits=3), "edge")
    yield _finish(replace(row, name="row-batch-invariant", batch_invariant=True), "edge")
    yield _finish(replace(row, name="row-float32", dtype="float32"), "edge")
    yield _finish(replace(row, name="row-float16", dtype="float16"), "edge")


def _fp8() -> Iterator[Case]:
    e4m3, e5m2 = "float8_e4m3fn", "float8_e5m2"
    plain = Case("fp8", "an fp8 cache", (1, 40, 100), (1, 2, 1), 8, 2, 128, 128)
    row = _row("fp8-row", "an fp8 MLA row", 8, (1, 65, 100), 2)
    for kv_dtype, short in ((e4m3, "e4m3"), (e5m2, "e5m2")):
        case = replace(plain, name=f"fp8-{short}", kv_dtype=kv_dtype)
        yield _finish(case, "edge", *(["quick"] if short == "e5m2" else []))
        yield _finish(replace(case, name=f"{case.name}-scalar", descales="scalar"), "edge")
        case = replace(case, name=f"{case.name}-per-head", descales="per_head")
        yield _finish(case, "edge", *(["quick"] if short == "e4m3" else []))
    case = replace(plain, kv_dtype=e4m3)
    yield _finish(replace(case, name="fp8-floats", descales="floats"), "edge")
    yield _finish(replace(case, name="fp8-expanded", descales="expanded"), "edge")
    yield _finish(replace(case, name="fp8-float16", dtype="float16", descales="scalar"), "edge")
    yield _finish(replace(case, name="fp8-float32", dtype="float32", descales="scalar"), "edge")
    yield _finish(replace(row, kv_dtype=e4m3, descales="scalar"), "edge", "quick")
    row = replace(row, name="fp8-q_v", kv_dtype=e5m2, descales="per_head")
    yield _finish(_split(row, "fp8-q_v"), "edge")
    capped = replace(plain, name="fp8-all-features", kv_dtype=e4m3, descales="per_head")
    capped = replace(capped, softcap=3.0, window=(30, 0), alibi="heads", sinks=True)
    yield _finish(capped, "edge")
    yield from _scale_caches()


def _scale_caches() -> Iterator[Case]:
    """fp8 caches with scales of their own for each token and head, or for each group of dimensions."""
    e4m3, e5m2 = "float8_e4m3fn", "float8_e5m2"
    plain = Case("scales", "scales of rows", (1, 40, 100), (1, 2, 1), 8, 2, 128, 128, scale_caches="rows")
    plain = replace(plain, kv_dtype=e4m3)
    row = replace(_row("scales-row", "scales of MLA rows", 8, (1, 65, 100), 2), scale_caches="rows")
    split = _split(replace(row, source="DeepSeek-V3.2: fp8 latent, bfloat16 rope"), "scales-q_v")
    split = replace(split, rope_as_q=True, kv_dtype=e4m3)
    yield _finish(replace(plain, name="scales-e4m3"), "edge", "quick")
    groups = replace(plain, name="scales-groups", num_kv_heads=1, scale_caches="groups", kv_dtype=e5m2)
    yield _finish(groups, "edge", "quick")
    for change in (
        replace(plain, name="scales-e5m2", kv_dtype=e5m2),
        replace(plain, name="scales-window", window=(30, 0)),
        replace(plain, name="scales-descales", descales="per_head"),
        replace(plain, name="scales-float16", dtype="float16"),
        replace(plain, name="scales-pages", blocks_per_page=4),
        replace(plain, name="scales-block-3", block_size=3),
        replace(plain, name="scales-dense", paged=False),
        replace(plain, name="scales-all-features", descales="per_head", softcap=3.0, window=(30, 0),
                alibi="heads", sinks=True),
        replace(row, kv_dtype=e4m3),
        replace(row, name="scales-row-groups", kv_dtype=e4m3, scale_caches="groups"),
        split,
        replace(split, name="scales-q_v-groups", scale_caches="groups"),
        replace(split, name="scales-q_v-descales", scale_caches="groups", descales="scalar"),
    ):  # fmt: skip
        yield _finish(change, "edge")


def _parallel() -> Iterator[Case]:
    lens, q_lens = (0, 1, 65, 200, 33), (1, 1, 3, 2, 1)
    plain = Case("cp-2-1", "context parallelism", lens, q_lens, cp=Parallel(2, 1))
    yield _finish(plain, "edge", "quick")
    yield _finish(replace(plain, name="cp-4-4", cp=Parallel(4, 4)), "edge")
    yield _finish(replace(plain, name="cp-2-16", cp=Parallel(2, 16)), "edge")
    yield _finish(replace(plain, name="cp-3-5", cp=Parallel(3, 5)), "edge")
    yield _finish(replace(plain, name="cp-3-window", cp=Parallel(3, 4), window=(40, 0)), "edge")
    yield _finish(replace(plain, name="cp-2-full-mask", causal=False), "edge")
    yield _finish(replace(plain, name="cp-2-alibi", alibi="heads"), "edge")
    row = Case("cp-row-4-1", "MLA", lens, q_lens, 4, 1, 96, 64, "row", cp=Parallel(4, 1))
    yield _finish(row, "edge", "quick")
    yield _finish(replace(row, name="cp-row-2-16", cp=Parallel(2, 16)), "edge")
    yield _finish(_split(replace(row, cp=Parallel(2, 4)), "cp-q_v-2-4", 32), "edge")


def _tiny() -> Iterator[Case]:
    """For kernels run by an interpreter: every feature once, in a few programs of a few tiles."""
    lens, q_lens = (0, 5, 33), (1, 2, 1)
    plain = Case("tiny-gqa", "tiny", lens, q_lens, 4, 2, 16, 16, block_size=8)
    row = Case("tiny-row", "tiny MLA", lens, q_lens, 4, 1, 48, 32, "row", 8)
    split = _split(row, "tiny-q_v", 16)
    for case in (
        plain,
        row,
        split,
        replace(_with_all(plain, "tiny-all-features"), num_splits=2),
        replace(_with_all(row, "tiny-row-all-features"), num_splits=2),
        replace(_with_all(split, "tiny-q_v-all-features"), num_splits=2),
        replace(plain, name="tiny-uneven-dims", d_qk=24, d_v=40, num_q_heads=6),
        replace(plain, name="tiny-float32", dtype="float32", causal=False, window=(4, 3)),
        replace(plain, name="tiny-fp8", kv_dtype="float8_e4m3fn", descales="per_head"),
        replace(row, name="tiny-row-fp8", kv_dtype="float8_e5m2", descales="scalar"),
        replace(plain, name="tiny-scales", kv_dtype="float8_e4m3fn", scale_caches="rows"),
        replace(row, name="tiny-row-scales", kv_dtype="float8_e5m2", scale_caches="groups"),
        replace(
            split, name="tiny-q_v-scales", kv_dtype="float8_e4m3fn", rope_as_q=True, scale_caches="groups"
        ),
        replace(plain, name="tiny-cp", cp=Parallel(2, 4)),
        replace(row, name="tiny-row-cp", cp=Parallel(2, 1)),
        replace(plain, name="tiny-pages", blocks_per_page=2),
        replace(row, name="tiny-row-pages", blocks_per_page=2),
        replace(plain, name="tiny-block-1", block_size=1),
        replace(plain, name="tiny-one-head", num_q_heads=1, num_kv_heads=1),
        replace(plain, name="tiny-dense", paged=False),
        replace(plain, name="tiny-batch-invariant", batch_invariant=True),
        replace(plain, name="tiny-prefill", q_lens=(0, 5, 33)),
    ):
        yield _finish(case, "edge", "tiny")


def varied_lengths(batch: int, mean: int, seed: int = 0) -> tuple[int, ...]:
    """Lengths from a normal distribution of half the mean's deviation, at least 1 token each."""
    rng = random.Random(seed)
    return tuple(max(1, round(rng.gauss(mean, mean / 2))) for _ in range(batch))


def _timed_row(batch: int, heads: int, kv: int, *, varied: bool = False, q: int = 1, bs: int = 64) -> Case:
    """An MLA row of the benchmark; kv in 1024 tokens."""
    lens = varied_lengths(batch, 1024 * kv) if varied else (1024 * kv,) * batch
    name = f"bench-mla-b{batch}-h{heads}-kv{kv}k{'v' * varied}{f'-q{q}' * (q > 1)}{f'-bs{bs}' * (bs != 64)}"
    return replace(_row(name, "MLA, timed", heads, lens, q), block_size=bs)


def _timed_gqa(
    batch: int, heads: tuple[int, int], d: int, kv: int, *, varied: bool = False, q: int = 1, bs: int = 16
) -> Case:
    """A GQA row of the benchmark; kv in 1024 tokens."""
    lens = varied_lengths(batch, 1024 * kv) if varied else (1024 * kv,) * batch
    name = f"bench-gqa-b{batch}-h{heads[0]}-{heads[1]}-d{d}-kv{kv}k{'v' * varied}"
    name += f"{f'-q{q}' * (q > 1)}{f'-bs{bs}' * (bs != 16)}"
    return replace(_gqa(name, "GQA, timed", heads, d, lens, bs), q_lens=(q,))


def _bench() -> Iterator[Case]:
    """What is timed. A case that several suites time is one case, with a tag of each."""
    suites: dict[Case, list[str]] = {}
    for suite, cases in (
        ("mla", _timed_mla()),
        ("gqa", _timed_gqas()),
        ("small", _timed_small()),
        ("fp8", _timed_fp8()),
        ("layouts", (_timed_row(32, 16, 4), _timed_gqa(32, (32, 8), 128, 4))),
        ("blocks", _timed_blocks()),
        ("prefill", _timed_prefill()),
    ):
        for case in cases:
            suites.setdefault(case, []).append(f"suite-{suite}")
    for case, tags in suites.items():
        yield _finish(case, "bench", *tags)


def _timed_mla() -> Iterator[Case]:
    for batch, heads, kv, varied, q in (
        (1, 16, 8, False, 1),
        (1, 16, 128, False, 1),
        (16, 16, 8, False, 1),
        (64, 16, 8, False, 1),
        (128, 16, 4, False, 1),
        (128, 16, 16, False, 1),
        (32, 32, 8, False, 1),
        (256, 8, 2, True, 1),
        (128, 64, 8, True, 1),
        (1, 128, 128, False, 1),
        (16, 128, 8, False, 1),
        (64, 128, 8, False, 1),
        (128, 128, 16, False, 1),
        (128, 128, 8, True, 1),
        (128, 128, 8, True, 2),
        (128, 16, 8, True, 2),
    ):
        yield _timed_row(batch, heads, kv, varied=varied, q=q)


def _timed_gqas() -> Iterator[Case]:
    yield _timed_gqa(64, (64, 8), 128, 8)
    yield _timed_gqa(64, (32, 8), 128, 8, bs=64)
    yield _timed_gqa(128, (8, 1), 128, 8, varied=True)
    yield _timed_gqa(1, (32, 8), 128, 32)
    oss = _timed_gqa(32, (64, 8), 64, 8)
    yield oss
    yield replace(oss, name=f"{oss.name}-sinks", sinks=True)
    yield replace(oss, name=f"{oss.name}-sinks-window", sinks=True, window=(127, 0))
    yield _timed_gqa(32, (16, 8), 256, 8)
    yield _timed_gqa(16, (32, 32), 128, 8)
    yield _timed_gqa(64, (64, 8), 128, 8, q=4)


def _timed_small() -> Iterator[Case]:
    for batch in (1, 2, 4, 8):
        for kv in (1, 4, 16):
            yield _timed_row(batch, 16, kv)
            yield _timed_gqa(batch, (32, 8), 128, kv)


def _timed_fp8() -> Iterator[Case]:
    """The same in bfloat16, in e4m3 with one scale, and with scales of rows, or of groups and a bf16 rope."""
    e4m3 = "float8_e4m3fn"
    for batch, heads, kv in ((64, 16, 8), (128, 16, 8), (128, 128, 16), (16, 128, 8), (1, 16, 8)):
        case = _timed_row(batch, heads, kv)
        yield case
        yield replace(case, name=f"{case.name}-e4m3", kv_dtype=e4m3, descales="scalar")
        mixed = _split(case, f"{case.name}-mixed")
        yield replace(mixed, kv_dtype=e4m3, rope_as_q=True, scale_caches="groups")
    for batch, both, d, kv, varied in (
        (64, (64, 8), 128, 8, False),
        (64, (32, 8), 128, 8, False),
        (128, (8, 1), 128, 8, True),
        (1, (32, 8), 128, 32, False),
        (32, (64, 8), 64, 8, False),
        (32, (16, 8), 256, 8, False),
    ):
        case = _timed_gqa(batch, both, d, kv, varied=varied)
        yield case
        yield replace(case, name=f"{case.name}-e4m3", kv_dtype=e4m3, descales="scalar")
        yield replace(case, name=f"{case.name}-e4m3-rows", kv_dtype=e4m3, scale_caches="rows")


def _timed_blocks() -> Iterator[Case]:
    """The cases of the suite ``layouts`` in blocks of other sizes."""
    for bs in (1, 3, 16, 48, 528, 1056):
        yield _timed_row(32, 16, 4, bs=bs)
    for bs in (1, 3, 48, 64, 528, 1056):
        yield _timed_gqa(32, (32, 8), 128, 4, bs=bs)


def _timed_prefill() -> Iterator[Case]:
    """A chunk of 2048 tokens after a past, and eight chunks of 512 among 24 sequences that decode."""
    for past in (0, 8192, 32768):
        used, name = (past + 2048,), f"-past{past >> 10}k"
        yield _row(f"bench-mla-prefill-h16{name}", "MLA, timed", 16, used, 2048)
        case = _gqa(f"bench-gqa-prefill-h32-8{name}", "GQA, timed", (32, 8), 128, used)
        yield replace(case, q_lens=(2048,))
    lens, q_lens = (8192 + 512,) * 8 + (8192,) * 24, (512,) * 8 + (1,) * 24
    row = _row("bench-mla-prefill-h16-mixed", "MLA, timed", 16, lens)
    yield replace(row, q_lens=q_lens)
    case = _gqa("bench-gqa-prefill-h32-8-mixed", "GQA, timed", (32, 8), 128, lens)
    yield replace(case, q_lens=q_lens)


CASES: tuple[Case, ...] = (
    *_models(),
    *_dimensions(),
    *_heads(),
    *_blocks(),
    *_lengths(),
    *_features(),
    *_fp8(),
    *_parallel(),
    *_tiny(),
    *_bench(),
)


def select(*tags: str) -> tuple[Case, ...]:
    """The cases that have all of these tags.

    Raises:
        KeyError: A tag that ``TAGS`` does not know: it would select nothing, silently.
    """
    for tag in tags:
        if tag not in TAGS:
            raise KeyError(f"no tag {tag!r}; there are {', '.join(TAGS)}")
    return tuple(case for case in CASES if case.tags.issuperset(tags))


def find_case(name: str) -> Case:
    """The case of this name.

    Raises:
        KeyError: There is none.
    """
    for case in CASES:
        if case.name == name:
            return case
    raise KeyError(f"no case {name!r}")
