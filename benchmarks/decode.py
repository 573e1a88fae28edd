"""What the GPU benchmarks share: a case, its checks, its floors, the clock, and the table.

Device time by CUDA events, the L2 cache flushed before each call, median of many; kernels take turns, and the
least of their rounds counts, as a busy host only adds time. The first round does not count: a device that was
idle is cool, and runs whoever comes first at a higher clock. Nothing is timed before it agrees with plain
PyTorch in float32; a wrong answer is shown as wrong. The ceilings are measured in the same process.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peers
import torch
import triton

import anystride
from anystride.problem import BITS

PURE_READ = "pure read"
ALONE = " without a schedule"  # behind the name of a back end
E4M3 = torch.float8_e4m3fn
SCALE = 0.05  # of fp8 rows, or the mean of many
GROUPS = 4  # with a scale each, of a mixed row's latent part


class Row(NamedTuple):
    """One row of the table."""

    name: str
    batch: int
    q_heads: int
    kv_heads: int
    d_qk: int
    d_v: int
    keys: int
    block: int = 64
    varied: bool = False
    q_len: int = 1
    layers: int = 1
    pad: int = 0  # elements between blocks
    layout: str = "halves"  # or "heads first" within each, "interleaved" by token, "rows" of K|V
    window: int = -1  # keys before a query's own that it sees; -1: all
    sinks: bool = False
    kv: str = ""  # bf16; or "e4m3"; "e4m3 rows" with a scale each; "mixed", MLA's 656 bytes


def is_mla(row: Row) -> bool:
    """Whether V lies in K's row."""
    return row.kv_heads == 1 and row.d_v < row.d_qk


def lengths_of(row: Row) -> list[int]:
    """All ``keys``, or normal with a standard deviation of half the mean, as anchors.md has it."""
    if not row.varied:
        return [row.keys] * row.batch
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(row.batch, generator=generator)
    return (row.keys * (1 + 0.5 * noise)).clamp(row.q_len, 2 * row.keys).int().tolist()


def fill(cache: torch.Tensor) -> None:
    """Normal numbers with a standard deviation of 0.5, in fp8 once they are scaled; a part at a time."""
    for part in cache.split(4096):
        if cache.dtype == E4M3:
            part.copy_(torch.empty_like(part, dtype=torch.bfloat16).normal_(std=0.5 / SCALE))
        else:
            part.normal_(std=0.5)


def new_store(row: Row, blocks: int, on: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """A buffer for all layers, and the part of each block that is the middle layer's."""
    dtype = {"": torch.bfloat16, "mixed": torch.uint8}.get(row.kv, E4M3)
    width = row.kv_heads * row.block * (row.d_qk if is_mla(row) else row.d_qk + row.d_v)
    if row.kv == "mixed":
        width = row.block * bytes_of_key(row)
    store = torch.empty(blocks, row.layers, width + row.pad, dtype=dtype, device=on)
    return store, store[:, row.layers // 2, :width]


def halves_of(row: Row, page: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V in the row's layout, views."""
    if row.kv == "mixed":  # the latent part, its scales, the rope part
        page = page.unflatten(1, (row.block, 1, -1))
        return page[..., row.d_v + 4 * GROUPS :].view(torch.bfloat16), page[..., : row.d_v].view(E4M3)
    if is_mla(row):
        page = page.unflatten(1, (row.block, 1, row.d_qk))
        return page, page[..., : row.d_v]
    if row.layout == "rows":
        page = page.unflatten(1, (row.block, row.kv_heads, row.d_qk + row.d_v))
        return page[..., : row.d_qk], page[..., row.d_qk :]
    if row.layout == "interleaved":
        k, v = page.unflatten(1, (row.block, 2, row.kv_heads, row.d_qk)).unbind(2)
        return k, v
    shape = (row.block, row.kv_heads, row.d_qk)
    if row.layout == "heads first":
        shape = (row.kv_heads, row.block, row.d_qk)
    k, v = (half.unflatten(1, shape) for half in page.chunk(2, 1))
    if row.layout == "heads first":
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    return k, v


def scales_of(row: Row, page: torch.Tensor) -> dict[str, Any]:
    """The scales of fp8 as arguments: beside the cache, or within a mixed row."""
    if row.kv == "e4m3":
        return {"k_descale": SCALE, "v_descale": SCALE}
    found: dict[str, Any] = {}
    if row.kv == "mixed":
        scales = page.unflatten(1, (row.block, -1))[..., row.d_v : row.d_v + 4 * GROUPS]
        found["v_scale_cache"] = scales.view(torch.float32)
    if row.kv == "e4m3 rows":
        k, v = torch.empty(2, len(page), row.block, row.kv_heads, device=page.device)
        found = {"k_scale_cache": k, "v_scale_cache": k if is_mla(row) else v}
    for scales in found.values():
        scales.uniform_(0.5 * SCALE, 1.5 * SCALE)
    return found


def build(row: Row, on: str = "cuda") -> dict[str, Any]:
    """The arguments of a call: permuted blocks in a cache with the row's layout."""
    device, dtype = torch.device(on), torch.bfloat16
    torch.manual_seed(0)
    lengths = lengths_of(row)
    blocks = [-(-n // row.block) for n in lengths]
    total = sum(blocks)
    table = torch.zeros(row.batch, max(blocks), dtype=torch.int32)
    ids, at = torch.randperm(total, dtype=torch.int32), 0
    for seq, n in enumerate(blocks):
        table[seq, :n] = ids[at : at + n]
        at += n
    store, page = new_store(row, total, device)
    k, v = halves_of(row, page)
    more = scales_of(row, page)
    q = torch.randn(row.batch * row.q_len, row.q_heads, row.d_qk, dtype=dtype, device=device)
    if row.kv == "mixed":
        fill(v)
        fill(k)
        more["q_v"], q = q[..., : row.d_v], q[..., row.d_v :]
    else:
        fill(store)
    if row.window >= 0:
        more["window_size"] = (row.window, 0)
    if row.sinks:
        more["s_aux"] = torch.randn(row.q_heads, dtype=dtype, device=device)
    return {
        "q": q, "k": k, "v": v, "max_seqlen_q": row.q_len,
        "cu_seqlens_q": torch.arange(row.batch + 1, dtype=torch.int32, device=device) * row.q_len,
        "max_seqlen_k": max(lengths), "seqused_k": torch.tensor(lengths, dtype=torch.int32, device=device),
        "block_table": table.to(device), "softmax_scale": (192 if is_mla(row) else row.d_qk) ** -0.5,
        "causal": row.q_len > 1,
    } | more  # fmt: skip


def rows_of(kwargs: dict[str, Any], name: str, ids: torch.Tensor) -> torch.Tensor:
    """Some blocks' rows of K or V as float32 ``[tokens, heads, d]``, by their scales."""
    cache: torch.Tensor = kwargs[name]
    rows = cache.view(BITS[cache.itemsize])[ids].view(cache.dtype)  # PyTorch moves no fp8 by index
    rows = rows.flatten(0, 1).float()
    factors: torch.Tensor | float = kwargs.get(f"{name}_descale", 1.0)
    scales: torch.Tensor | None = kwargs.get(f"{name}_scale_cache")
    if scales is not None:
        factors = scales[ids].flatten(0, 1)[..., None]  # of a head, or of groups of the only one
        if rows.shape[1] == 1:
            factors = factors.repeat_interleave(rows.shape[2] // scales.shape[-1], 1).transpose(1, 2)
    return rows * factors


def plain(row: Row, kwargs: dict[str, Any], sequences: list[int]) -> dict[int, torch.Tensor]:
    """Plain float32 attention for some sequences."""
    results = {}
    for seq in sequences:
        n = int(kwargs["seqused_k"][seq])
        ids = kwargs["block_table"][seq, : -(-n // row.block)].long()
        keys, values = (rows_of(kwargs, name, ids)[:n] for name in ("k", "v"))
        scores = torch.zeros((), device=ids.device)
        for name, rows in (("q", keys), ("q_v", values)):
            if name in kwargs:
                q = kwargs[name][seq * row.q_len : (seq + 1) * row.q_len].float()
                q = q.unflatten(1, (row.kv_heads, -1))
                scores = scores + torch.einsum("qhgd,nhd->hgqn", q, rows) * kwargs["softmax_scale"]
        where = torch.arange(n, device=q.device)
        last = n - row.q_len + torch.arange(row.q_len, device=q.device)[:, None]
        hidden = where > last
        if row.window >= 0:
            hidden |= where < last - row.window
        scores = scores.masked_fill(hidden, float("-inf"))
        if row.sinks:  # one more score, of a key whose value is nothing
            sinks = kwargs["s_aux"].float().view(row.kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
            scores = torch.cat((scores, sinks), -1)
        probs = scores.softmax(-1)[..., :n]
        results[seq] = torch.einsum("hgqn,nhd->qhgd", probs, values).flatten(1, 2)
    return results


def error(row: Row, out: torch.Tensor, wanted: dict[int, torch.Tensor]) -> float:
    """Largest relative error (2-norm) over the checked sequences; NaN if there is one."""
    worst = 0.0
    for seq, right in wanted.items():
        got = out[seq * row.q_len : (seq + 1) * row.q_len].float()
        e = float((got - right).norm() / right.norm())
        worst = e if math.isnan(e) else max(worst, e)
    return worst


def keys_seen(row: Row) -> int:
    """Keys that some query token sees, over all sequences."""
    most = row.window + row.q_len if row.window >= 0 else 2 * row.keys
    return sum(min(n, most) for n in lengths_of(row))


def bytes_of_key(row: Row) -> int:
    """Bytes of a key's rows in all heads, shared bytes once, with the scales that lie with them."""
    if row.kv == "mixed":
        return row.d_v + 4 * GROUPS + 2 * (row.d_qk - row.d_v)
    numbers, scales = (row.d_qk, 1) if is_mla(row) else (row.d_qk + row.d_v, 2)
    a_head = numbers * (1 if row.kv else 2) + 4 * (scales if row.kv == "e4m3 rows" else 0)
    return row.kv_heads * a_head


def must_move(row: Row) -> int:
    """Bytes: each valid row once (shared bytes once), q and out."""
    return keys_seen(row) * bytes_of_key(row) + 2 * row.q_len * row.batch * row.q_heads * (row.d_qk + row.d_v)


def operations(row: Row) -> int:
    """Floating-point operations of the two products."""
    return 2 * keys_seen(row) * row.q_len * row.q_heads * (row.d_qk + row.d_v)


def microseconds(call: peers.Call, rep: int = 60) -> float:
    """Median device time of a call with a cold L2 cache."""
    return float(1e3 * triton.testing.do_bench(call, warmup=10, rep=rep, return_mode="median"))


def ceilings() -> dict[str, float]:
    """Bytes a second of a read and of a copy, and bf16 operations a second, measured now."""
    x = torch.empty(1 << 32, dtype=torch.uint8, device="cuda").view(torch.int64)
    x.random_()
    read = x.numel() * 8 / (1e-6 * microseconds(lambda: x.max(), 200))
    half = x[: x.numel() // 2]
    rest = x[x.numel() // 2 :]
    copy = x.numel() * 8 / (1e-6 * microseconds(lambda: rest.copy_(half), 200))
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    product = 2 * 8192**3 / (1e-6 * microseconds(lambda: a @ b, 200))
    return {"read": read, "copy": copy, "product": product}


def host_microseconds(call: peers.Call, ahead: int = 200) -> float:
    """What the host takes for a call: of calls in a row, fewer than the device queues."""
    torch.cuda.synchronize()
    begin = time.perf_counter_ns()
    for _ in range(ahead):
        call()
    return (time.perf_counter_ns() - begin) / ahead / 1000


def host_medians(calls: dict[str, peers.Call], rounds: int = 15) -> dict[str, float]:
    """What calls take of the host's time, in turn: the median of the rounds of each."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(host_microseconds(call))
    return {name: sorted(some)[rounds // 2] for name, some in times.items()}


def take_turns(calls: dict[str, peers.Call], rounds: int = 3) -> dict[str, float]:
    """Device times of calls that take turns: the least of the rounds of each, the first of which is lost."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for nth in range(rounds + 1):
        for name, call in calls.items():
            us = microseconds(call, 30)
            if nth:
                times[name].append(us)
    return {name: min(us) for name, us in times.items()}


def ours(kwargs: dict[str, Any], row: Row, backend: str) -> peers.Call:
    """Our call, its schedule made once and shared, as a model's layers do; or without one."""
    if backend.endswith(ALONE):
        backend = backend.removesuffix(ALONE)
        return lambda: anystride.flash_attn_varlen_func(**kwargs, backend=backend)
    metadata = anystride.get_scheduler_metadata(
        row.batch, row.q_len, kwargs["max_seqlen_k"], row.q_heads, row.kv_heads, kwargs["q"].shape[-1],
        kwargs["seqused_k"], torch.bfloat16, row.d_v, kwargs["cu_seqlens_q"], causal=kwargs["causal"],
        window_size=kwargs.get("window_size", (-1, -1)),
    )  # fmt: skip
    return lambda: anystride.flash_attn_varlen_func(**kwargs, scheduler_metadata=metadata, backend=backend)


class Result(NamedTuple):
    """What one kernel did on one row."""

    kernel: str
    us: float  # NaN if it was not timed
    note: str  # why not: its refusal in its own words, or how wrong it was


def makers(row: Row, kwargs: dict[str, Any], backends: list[str], absent: dict[str, str]) -> dict[str, Any]:
    """Every kernel that may take the row."""
    mla = is_mla(row)
    found: dict[str, Callable[[], peers.Call]] = {
        f"anystride {backend}": lambda backend=backend: ours(kwargs, row, backend)  # type: ignore[misc]
        for backend in backends
    }
    if row.kv in ("", "e4m3"):  # one scale is all that peers know
        if not mla:
            found["FlashInfer"] = lambda: peers.flashinfer_gqa(kwargs)
        found["vLLM Triton"] = lambda: peers.vllm_triton(kwargs, mla)
    if not row.kv:
        if mla:
            found["FlashMLA"] = lambda: peers.flash_mla(kwargs, row.d_v)
            found["FlashInfer"] = lambda: peers.flashinfer_mla(kwargs, row.d_v)
        found["FA3"] = lambda: peers.fa3(kwargs, mla)
    return {name: make for name, make in found.items() if name not in absent}


def measure(row: Row, backends: list[str], absent: dict[str, str]) -> list[Result]:
    """Check and time every kernel on a row; those that are right take turns."""
    kwargs = build(row)
    wanted = plain(row, kwargs, sorted({0, row.batch // 2, row.batch - 1}))
    results, calls = [], {}
    for name, make in makers(row, kwargs, backends, absent).items():
        try:
            call = make()
            off = error(row, call(), wanted)
        except Exception as failure:  # a refusal, in its own words
            results.append(Result(name, math.nan, f"refused: {str(failure).splitlines()[0][:60]}"))
            continue
        if off < 1e-2:
            calls[name] = call
        else:
            results.append(Result(name, math.nan, f"WRONG ({off:.1e})"))
    # A yardstick and no peer: PyTorch reads as many bytes, one after the other, and keeps their maximum.
    data = torch.zeros(must_move(row) // 8, dtype=torch.int64, device="cuda")
    calls[PURE_READ] = data.max
    done = [Result(name, us, "") for name, us in take_turns(calls).items()]
    return done[:-1] + results + done[-1:]  # ours first, the pure read last


def commit() -> str:
    """The commit that runs, as far as git can tell."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


class Bench(NamedTuple):
    """A finished table."""

    facts: dict[str, Any]  # device, versions, ceilings
    rows: list[tuple[Row, list[Result]]]


def options_parser(description: str) -> argparse.ArgumentParser:
    """The options of every benchmark here."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--peers", type=Path, default=Path(".peers"), help="from ../shared/peers/get_peers")
    parser.add_argument("--json", type=Path, help="append one line a measurement to this file")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--commit", default=commit(), help="where git cannot tell")
    return parser


def start(commit: str, absent: dict[str, str]) -> dict[str, Any]:
    """Measure the ceilings and print the head of the table; device, versions, ceilings."""
    for name, why in absent.items():
        print(f"absent: {name}: {why}")
    top = ceilings()
    facts = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "anystride": anystride.__version__, "commit": commit, **top,
    }  # fmt: skip
    print(
        f"{facts['device']}, torch {facts['torch']}, Triton {facts['triton']}, commit {facts['commit']}: "
        f"read {top['read'] / 1e9:.0f} GB/s, copy {top['copy'] / 1e9:.0f} GB/s, "
        f"bf16 product {top['product'] / 1e12:.0f} TFLOP/s\n"
    )
    return facts


def append(path: Path, facts: dict[str, Any], name: str, results: list[Result], **more: int) -> None:
    """One JSON line a measurement of a row."""
    with path.open("a") as file:
        for result in results:
            line = {**facts, "case": name, "kernel": result.kernel}
            line |= {"us": result.us if result.us > 0 else None, "note": result.note, **more}
            file.write(json.dumps(line) + "\n")


def main(
    rows: list[Row], description: str, backends: tuple[str, ...], without: tuple[str, ...] = ()
) -> Bench:
    """Read the command line, print the table as it is measured, append one JSON line a measurement."""
    parser = options_parser(description)
    parser.add_argument("--backend", nargs="+", default=list(backends), help="ours to time")
    parser.add_argument(
        "--without", nargs="+", action="extend", default=list(without), help="peers to leave out"
    )
    parser.add_argument("--plot", type=Path, help="draw the roofline into this file")
    options = parser.parse_args()
    absent = peers.load(options.peers, options.without)
    facts = start(options.commit, absent)
    done = []
    for row in rows:
        if options.only not in row.name:
            continue
        results = measure(row, options.backend, absent)
        done.append((row, results))
        print(line_of(row, results, facts), flush=True)
        if options.json:
            append(options.json, facts, row.name, results, bytes=must_move(row), flop=operations(row))
        torch.cuda.empty_cache()
    bench = Bench(facts, done)
    if options.plot:
        plot(bench, options.plot)
    return bench


def in_words(result: Result) -> str:
    """A cell of the table: a time in us, or why there is none."""
    return f"{result.kernel} {result.us:.1f}" if result.us > 0 else f"{result.kernel} {result.note}"


def line_of(row: Row, results: list[Result], top: dict[str, Any]) -> str:
    """One row of the table: times, and for the first kernel its rates and shares of the ceilings."""
    cells = [f"{row.name:<40}", *map(in_words, results)]
    first = results[0]
    if first.us > 0:
        rate, flops = must_move(row) / first.us * 1e6, operations(row) / first.us * 1e6
        cells.append(
            f"{rate / 1e9:.0f} GB/s ({rate / top['read']:.0%}), "
            f"{flops / 1e12:.0f} TFLOP/s ({flops / top['product']:.0%})"
        )
    return " | ".join(cells)


def best_peer(results: list[Result]) -> float:
    """The least time of a kernel that is not ours."""
    others = [r.us for r in results if not r.kernel.startswith("anystride") and r.kernel != PURE_READ]
    return min((us for us in others if us > 0), default=math.nan)


def pure_read_of(results: list[Result]) -> float:
    """The time of the pure read."""
    return next(r.us for r in results if r.kernel == PURE_READ)


def ratios_of(bench: Bench, names: set[str]) -> dict[str, float]:
    """The best peer's time by ours, on these rows, where there is a peer."""
    ratios = {row.name: best_peer(results) / results[0].us for row, results in bench.rows}
    return {name: ratio for name, ratio in ratios.items() if name in names and ratio > 0}


def print_ratios(ratios: dict[str, float], target: str) -> None:
    """Their mean, and where a peer is faster."""
    if ratios:
        mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
        print(f"\ngeometric mean over the rows: {mean:.3f} of the best peer's speed{target}")
    for name, ratio in ratios.items():
        if ratio < 1:
            print(f"  slower than the best peer: {name}: {ratio:.3f}")


def print_layouts(bench: Bench, packed: str) -> None:
    """The time of each layout of a row by that of the packed one."""
    mine = {row.name: results[0].us for row, results in bench.rows}
    for row, _results in bench.rows:
        if row.name.startswith(f"{packed}, ") and packed in mine:
            most = 1.25 if row.block < 16 else 1.03
            print(f"{row.name}: {mine[row.name] / mine[packed]:.3f} of packed (target {most})")


def plot(bench: Bench, path: Path) -> None:
    """The roofline: what each kernel reached, under the two ceilings of the same run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    read, product = bench.facts["read"], bench.facts["product"]
    figure, axes = plt.subplots(figsize=(9, 5))
    low, knee, high = 10.0, product / read, 700.0
    axes.plot([low, knee, high], [low * read / 1e12, product / 1e12, product / 1e12], color="0.3", lw=1)
    axes.text(45, 45 * read / 1e12 * 1.1, f"{read / 1e9:.0f} GB/s read", fontsize=8, ha="right")
    axes.text(high, product / 1e12 * 1.04, f"{product / 1e12:.0f} TFLOP/s bf16", fontsize=8, ha="right")
    kernels = dict.fromkeys(r.kernel for _, results in bench.rows for r in results if r.kernel != PURE_READ)
    for nth, kernel in enumerate(kernels):
        points = [
            (operations(row) / must_move(row), operations(row) / r.us * 1e-6)
            for row, results in bench.rows
            for r in results
            if r.kernel == kernel and r.us > 0
        ]
        if points:
            intensity, rate = zip(*points, strict=True)
            axes.plot(intensity, rate, "os^vD*P"[nth % 7], ms=8 - nth, mfc="none", label=kernel)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations a byte that must move")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(f"{bench.facts['device']}, commit {bench.facts['commit']}", fontsize=10)
    axes.grid(True, which="both", lw=0.2)
    axes.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
