"""Time the write side beside vLLM's Triton kernels and a plain copy on one GPU.

    python benchmarks/store.py --peers .peers --json results.jsonl
    python benchmarks/store.py --only bf16

Device time as decode.py measures it. A copy is PyTorch's between contiguous tensors, of as many bytes read
and written: a yardstick and no peer. Nothing is timed before the cache holds what plain PyTorch computes, bit
for bit, and not a byte beside it has changed; vLLM may be one fp8 number off, as it divides less exactly. The
last lines are the targets, and the host's time for one token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import peers
import torch
from decode import Result, append, host_medians, in_words, options_parser, print_ratios, start, take_turns
from torch import Tensor

from anystride import cache
from anystride.problem import BITS

HEADS, D = 8, 128
LATENT, ROPE, GROUPS = 512, 64, 4
BLOCK = 16  # tokens
E4M3 = torch.float8_e4m3fn
OURS, VLLM, COPY = "anystride triton", "vLLM Triton", "copy"


class Row(NamedTuple):
    """One row of the table."""

    name: str
    tokens: int
    form: str = "gqa"  # or "mla": one row; "mixed": its row of 656 bytes; "blocks": copied, gathered
    fp8: bool = False
    scale: str = ""  # "number", "one" on the device, one for each of the "heads"; of the "rows": written
    layout: str = "apart"  # K and V; or "halves" of a block, "heads first" within each half
    layers: int = 1
    pad: int = 0  # elements behind each half of a block
    blocks: int = 2048


KINDS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "e4m3, scale a number": {"fp8": True, "scale": "number"},
    "e4m3, scale a tensor": {"fp8": True, "scale": "one"},
    "e4m3, scales of heads": {"fp8": True, "scale": "heads"},
    "e4m3, scales written": {"fp8": True, "scale": "rows"},
    "MLA, bf16": {"form": "mla"},
    "MLA, e4m3": {"form": "mla", "fp8": True, "scale": "number"},
    "MLA, 656 bytes": {"form": "mixed", "fp8": True, "scale": "rows"},
}
TOKENS = (1, 8, 64, 256, 1024, 4096, 16384)
# fmt: off
LAYOUTS = [
    Row("bf16, 4096, layer of 4", 4096, layout="halves", layers=4),
    Row("bf16, 4096, heads first", 4096, layout="heads first"),
    Row("bf16, 4096, halves of a block", 4096, layout="halves"),
    Row("bf16, 4096, padded by 64 bytes", 4096, pad=32),
]
BLOCKS = [Row(f"{what} 256 blocks", 256 * BLOCK, "blocks", layout=what) for what in ("copy", "gather")]
# fmt: on
ROWS = [
    *(Row(f"{kind}, {tokens}", tokens, **fields) for kind, fields in KINDS.items() for tokens in TOKENS),
    *LAYOUTS,
    *BLOCKS,
]


class Case(NamedTuple):
    """A row's tensors, what must become of them, and who can do it."""

    where: tuple[Tensor, ...]  # indices of what is written
    places: list[tuple[Tensor, Tensor]]  # a view of a cache, or of scales, and what is wanted there
    buffers: list[Tensor]  # all memory behind them, as bytes
    read: int  # bytes of the rows
    makers: dict[str, Callable[[], peers.Call]]


def must_move(case: Case) -> int:
    """Bytes: each row read and written once, scales that are written, too."""
    return case.read + sum(wanted.numel() * wanted.itemsize for _view, wanted in case.places)


def filled(*shape: int, dtype: torch.dtype, on: str | torch.device) -> Tensor:
    """A buffer full of any bytes."""
    bits = torch.empty(*shape, dtype=dtype, device=on).view(BITS[dtype.itemsize])
    bits.view(torch.uint8).random_()
    return bits.view(dtype)


def quantised(rows: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Rows as they are stored. The scale is on their device: PyTorch multiplies by what a number inverts."""
    if scale is None:
        return rows.to(dtype)
    most = torch.finfo(dtype).max
    return (rows.float() / scale).clamp(-most, most).to(dtype)


def own_scales(rows: Tensor, groups: int = 1) -> Tensor:
    """``[tokens, heads, groups]``: the largest number of each becomes fp8's largest."""
    most = torch.tensor(torch.finfo(E4M3).max, device=rows.device)
    largest: Tensor = rows.float().unflatten(-1, (groups, -1)).abs().amax(-1)
    return largest / most


def build(row: Row, on: str = "cuda", backend: str = "triton") -> Case:
    """The row's case: slots in a random order."""
    torch.manual_seed(0)
    slots = torch.randperm(row.blocks * BLOCK, device=on)[: row.tokens]
    if row.form == "blocks":
        return build_blocks(row, on, backend)
    return build_gqa(row, slots, backend) if row.form == "gqa" else build_mla(row, slots, backend)


def new_rows(tokens: int, heads: int, d: int, d_too: int, on: torch.device) -> tuple[Tensor, Tensor]:
    """Both halves of new tokens."""
    first, second = (torch.randn(tokens, heads, n, dtype=torch.bfloat16, device=on) for n in (d, d_too))
    return first, second


def given_scale(row: Row, on: torch.device) -> tuple[Any, Tensor | None]:
    """A scale as an argument, and as what ``[tokens, heads, d]`` can be divided by."""
    one = torch.tensor(0.02, device=on)
    heads = torch.linspace(0.02, 0.03, HEADS, device=on)
    return {"number": (0.02, one), "one": (one, one), "heads": (heads, heads[:, None])}.get(
        row.scale, (None, None)
    )


def build_gqa(row: Row, slots: Tensor, backend: str) -> Case:
    """K and V with heads."""
    on = slots.device
    rows = key, value = new_rows(row.tokens, HEADS, D, D, on)
    dtype = E4M3 if row.fp8 else torch.bfloat16
    width = HEADS * BLOCK * D
    if row.layout == "apart":
        store = filled(2, row.blocks, row.layers, width + row.pad, dtype=dtype, on=on)
        halves = store[:, :, row.layers // 2]
    else:
        store = filled(row.blocks, row.layers, 2, width + row.pad, dtype=dtype, on=on)
        halves = store[:, row.layers // 2].transpose(0, 1)
    shape = (HEADS, BLOCK, D) if row.layout == "heads first" else (BLOCK, HEADS, D)
    k, v = (half[:, :width].unflatten(1, shape) for half in halves)
    if row.layout == "heads first":
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    where = (slots // BLOCK, slots % BLOCK)
    read = sum(x.numel() * x.itemsize for x in rows)
    if row.scale == "rows":
        beside = filled(2, row.blocks, BLOCK, HEADS, dtype=torch.float32, on=on)
        scales = (beside[0], beside[1])
        own = [own_scales(x) for x in rows]
        places = [(scale, x[..., 0]) for scale, x in zip(scales, own, strict=True)]
        places += [(view, quantised(x, s, dtype)) for view, x, s in zip((k, v), rows, own, strict=True)]
        return Case(
            where, places, [store.view(torch.uint8), beside.view(torch.uint8)], read,
            {
                OURS: lambda: lambda: cache.store_kv(key, value, k, v, slots, *scales, backend=backend),
                VLLM: lambda: peers.vllm_store(key, value, (k, v), slots, scales),
            },
        )  # fmt: skip
    scale, factors = given_scale(row, on)
    places = [(view, quantised(x, factors, dtype)) for view, x in zip((k, v), rows, strict=True)]
    return Case(
        where, places, [store.view(torch.uint8)], read,
        {
            OURS: lambda: lambda: cache.store_kv(key, value, k, v, slots, scale, scale, backend=backend),
            VLLM: lambda: peers.vllm_store(key, value, (k, v), slots, scale),
        },
    )  # fmt: skip


def build_mla(row: Row, slots: Tensor, backend: str) -> Case:
    """The latent and the rope part in one row of one dtype, or of two with scales between them."""
    on = slots.device
    rows = kv_c, k_pe = new_rows(row.tokens, 1, LATENT, ROPE, on)
    where = (slots // BLOCK, slots % BLOCK)
    read = sum(x.numel() * x.itemsize for x in rows)
    if row.form == "mixed":
        end = LATENT + 4 * GROUPS
        store = filled(row.blocks, BLOCK, end + 2 * ROPE, dtype=torch.uint8, on=on)
        parts = (store[..., :LATENT].view(E4M3), store[..., end:].view(torch.bfloat16))
        scales = store[..., LATENT:end].view(torch.float32)
        own = own_scales(kv_c, GROUPS)[:, 0]
        latent = quantised(kv_c[:, 0], own.repeat_interleave(LATENT // GROUPS, -1), E4M3)
        return Case(
            where, [(scales, own), (parts[0], latent), (parts[1], k_pe[:, 0])], [store], read,
            {OURS: lambda: lambda: cache.store_mla(kv_c, k_pe, parts, slots, scales, backend=backend)},
        )  # fmt: skip
    dtype = E4M3 if row.fp8 else torch.bfloat16
    one = filled(row.blocks, BLOCK, 1, LATENT + ROPE, dtype=dtype, on=on)  # with a head, as vLLM wants it
    scale, factors = given_scale(row, on)
    wanted = quantised(torch.cat(rows, -1), factors, dtype)
    return Case(
        where, [(one, wanted)], [one.view(torch.uint8)], read,
        {
            OURS: lambda: lambda: cache.store_mla(kv_c, k_pe, one, slots, scale, backend=backend),
            VLLM: lambda: peers.vllm_store(kv_c, k_pe, (one,), slots, scale),
        },
    )  # fmt: skip


def build_blocks(row: Row, on: str, backend: str) -> Case:
    """Blocks from a cache into another: one after the other from or to a random order."""
    count = row.tokens // BLOCK
    few, many = (
        filled(n, BLOCK, HEADS, D, dtype=torch.bfloat16, on=on) for n in (count, max(count, row.blocks))
    )
    ids = torch.randperm(len(many), device=on)[:count]
    order = torch.arange(count, device=on)
    read = few.numel() * few.itemsize
    # As integers: PyTorch might take a NaN for another.
    small, large = few.view(torch.int16), many.view(torch.int16)
    if row.layout == "copy":
        mapping = torch.stack([order, ids], 1)
        return Case(
            (ids,), [(many, few)], [many.view(torch.uint8)], read,
            {
                OURS: lambda: lambda: cache.copy_blocks(few, many, mapping, backend=backend),
                "torch index_copy_": lambda: lambda: large.index_copy_(0, ids, small),
            },
        )  # fmt: skip
    return Case(
        (order,), [(few, many[ids])], [few.view(torch.uint8)], read,
        {
            OURS: lambda: lambda: cache.gather_blocks(many, ids, few, backend=backend),
            "torch index_select": lambda: lambda: torch.index_select(large, 0, ids, out=small),
        },
    )  # fmt: skip


def bits(tensor: Tensor) -> Tensor:
    """The same as integers: PyTorch moves no fp8 by index."""
    return tensor.view(BITS[tensor.itemsize])


def steps(got: Tensor, wanted: Tensor) -> int:
    """How many numbers of their dtype lie between two tensors, at most."""
    ordered = []
    for x in (got, wanted):
        sign = 1 << (8 * x.itemsize - 1)
        code = bits(x).long() & (2 * sign - 1)
        ordered.append(torch.where(code >= sign, sign - code, code))
    return int((ordered[0] - ordered[1]).abs().max())


def fault_of(case: Case, call: peers.Call, exact: bool = True) -> str:
    """Run a call: what is wrong with what it stored, or nothing. The caches are as before then."""
    before = [buffer.clone() for buffer in case.buffers]
    old = [bits(view)[case.where] for view, _wanted in case.places]
    call()
    fault = ""
    for (view, wanted), was in zip(case.places, old, strict=True):
        now = bits(view)[case.where]
        off = steps(now.view(view.dtype), wanted)
        # Scales are float32: two divisions, each off by two at most.
        allowed = 0 if exact else {torch.float32: 4, E4M3: 1}.get(view.dtype, 0)
        if off > allowed:
            fault = f"WRONG ({off} numbers off)"
        bits(view)[case.where] = was
    if not all(map(torch.equal, before, case.buffers)):
        fault = fault or "WRONG (wrote beside its rows)"
        for buffer, was in zip(case.buffers, before, strict=True):
            buffer.copy_(was)
    return fault


def right_calls(case: Case, absent: dict[str, str]) -> tuple[dict[str, peers.Call], list[Result]]:
    """The calls that do what they should, and why others do not."""
    calls: dict[str, peers.Call] = {}
    results = []
    for name, make in case.makers.items():
        if name in absent:
            continue
        try:
            call = make()
            fault = fault_of(case, call, exact=name != VLLM)
        except Exception as failure:  # a refusal, in its own words
            fault = f"refused: {str(failure).splitlines()[0][:60]}"
        if fault:
            results.append(Result(name, math.nan, fault))
        else:
            calls[name] = call
    return calls, results


def plain_copy(case: Case) -> peers.Call:
    """PyTorch's copy of as many bytes."""
    half = must_move(case) // 2
    source, target = (torch.zeros(half, dtype=torch.uint8, device=case.buffers[0].device) for _ in "ab")
    return lambda: target.copy_(source)


def measure(row: Row, absent: dict[str, str]) -> tuple[list[Result], int]:
    """Check and time every kernel on a row; those that are right take turns. And its bytes."""
    case = build(row)
    calls, results = right_calls(case, absent)
    calls[COPY] = plain_copy(case)
    done = [Result(name, us, "") for name, us in take_turns(calls).items()]
    return sorted(done[:-1] + results, key=lambda r: r.kernel != OURS) + done[-1:], must_move(case)


def time_of(results: list[Result], kernel: str) -> float:
    """Of a kernel, NaN where there is none."""
    return next((r.us for r in results if r.kernel == kernel), math.nan)


def line_of(row: Row, results: list[Result], moved: int, top: float) -> str:
    """One row of the table."""
    rate = moved / results[0].us * 1e6
    share = f"{rate / 1e9:.0f} GB/s ({rate / top:.0%})" if rate > 0 else ""
    return " | ".join([f"{row.name:<32}", *map(in_words, results), share])


def summary(done: list[tuple[Row, list[Result]]]) -> None:
    """The targets, and what was measured."""
    print()
    ratios = {}
    for row, results in done:
        us, peer = time_of(results, OURS), time_of(results, VLLM)
        line = f"{row.name}: {time_of(results, COPY) / us:.3f} of a copy's speed"
        if row.tokens == 4096 and row.form != "blocks":
            line += " (target 0.85)"
        if peer / us > 0:
            ratios[row.name] = peer / us
            line += f", {peer / us:.3f} of vLLM's (target 1)"
        print(line)
    print_ratios(ratios, "; the peer is vLLM's kernel")


def host_times(rows: list[Row], absent: dict[str, str]) -> None:
    """What a call takes of the host's time, for one token."""
    for row in rows:
        if row.tokens > 1:
            continue
        case = build(row)
        calls, _wrong = right_calls(case, absent)
        calls["torch copy_"] = plain_copy(case)
        cells = [f"{name} {us:.1f}" for name, us in host_medians(calls).items()]
        print(f"host, {row.name}: {' | '.join(cells)} us")


def main(rows: list[Row]) -> None:
    """Read the command line, print the table as it is measured, and what it says."""
    options = options_parser(__doc__ or "").parse_args()
    absent = peers.load_store(options.peers)
    facts = start(options.commit, absent)
    done = []
    for row in rows:
        if options.only in row.name:
            results, moved = measure(row, absent)
            done.append((row, results))
            print(line_of(row, results, moved, facts["copy"]), flush=True)
            if options.json:
                append(options.json, facts, row.name, results, bytes=moved)
    summary(done)
    host_times([row for row, _results in done], absent)


if __name__ == "__main__":
    main(ROWS)
