"""Time the triton back end beside the peers on one GPU: cases and method of anchors.md.

    python benchmarks/gpu_decode.py --peers .peers --json results.jsonl

Device time by CUDA events, the L2 cache flushed before each call, median of many. Nothing is timed
before it agrees with plain PyTorch in float32; a wrong answer is shown as wrong. The ceilings are measured
in the same process.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peers
import torch
import triton

import anystride


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


# fmt: off
MLA = [
    Row("b 1, hq 16, kv 8k", 1, 16, 1, 576, 512, 8192),
    Row("b 1, hq 16, kv 128k", 1, 16, 1, 576, 512, 131072),
    Row("b 16, hq 16, kv 8k", 16, 16, 1, 576, 512, 8192),
    Row("b 64, hq 16, kv 8k", 64, 16, 1, 576, 512, 8192),
    Row("b 128, hq 16, kv 4k", 128, 16, 1, 576, 512, 4096),
    Row("b 128, hq 16, kv 16k", 128, 16, 1, 576, 512, 16384),
    Row("b 32, hq 32, kv 8k", 32, 32, 1, 576, 512, 8192),
    Row("b 256, hq 8, kv 2k v", 256, 8, 1, 576, 512, 2048, varied=True),
    Row("b 128, hq 64, kv 8k v", 128, 64, 1, 576, 512, 8192, varied=True),
    Row("b 1, hq 128, kv 128k", 1, 128, 1, 576, 512, 131072),
    Row("b 16, hq 128, kv 8k", 16, 128, 1, 576, 512, 8192),
    Row("b 64, hq 128, kv 8k", 64, 128, 1, 576, 512, 8192),
    Row("b 128, hq 128, kv 16k", 128, 128, 1, 576, 512, 16384),
    Row("b 128, hq 128, kv 8k v", 128, 128, 1, 576, 512, 8192, varied=True),
    Row("b 128, q_len 2, hq 128, kv 8k v", 128, 128, 1, 576, 512, 8192, varied=True, q_len=2),
    Row("b 128, q_len 2, hq 16, kv 8k v", 128, 16, 1, 576, 512, 8192, varied=True, q_len=2),
    Row("b 64, hq 16, kv 8k, layer of 8", 64, 16, 1, 576, 512, 8192, layers=8),
    Row("b 64, hq 16, kv 8k, padded", 64, 16, 1, 576, 512, 8192, pad=64 * 17),
    Row("b 64, hq 16, kv 8k, padded by 16 bytes", 64, 16, 1, 576, 512, 8192, pad=8),
    Row("b 64, hq 16, kv 8k, padded by 32 bytes", 64, 16, 1, 576, 512, 8192, pad=16),
    Row("b 64, hq 16, kv 8k, block 16", 64, 16, 1, 576, 512, 8192, block=16),
    Row("b 64, hq 128, kv 8k, layer of 8", 64, 128, 1, 576, 512, 8192, layers=8),
]
GQA = [
    Row("b 64, 64/8, d 128, kv 8k", 64, 64, 8, 128, 128, 8192, 16),
    Row("b 64, 32/8, d 128, kv 8k", 64, 32, 8, 128, 128, 8192, 64),
    Row("b 128, 8/1, d 128, kv 8k v", 128, 8, 1, 128, 128, 8192, 16, varied=True),
    Row("b 1, 32/8, d 128, kv 32k", 1, 32, 8, 128, 128, 32768, 16),
    Row("b 32, 64/8, d 64, kv 8k", 32, 64, 8, 64, 64, 8192, 16),
    Row("b 32, 16/8, d 256, kv 8k", 32, 16, 8, 256, 256, 8192, 16),
    Row("b 16, 32/32, d 128, kv 8k", 16, 32, 32, 128, 128, 8192, 16),
    Row("b 64, 32/8, d 128, kv 8k, layer of 4", 64, 32, 8, 128, 128, 8192, 64, layers=4),
    Row("b 64, 32/8, d 128, kv 8k, padded", 64, 32, 8, 128, 128, 8192, 64, pad=64 * 17),
    Row("b 64, 32/8, d 128, kv 8k, padded by 16 bytes", 64, 32, 8, 128, 128, 8192, 64, pad=8),
]
# fmt: on


def lengths_of(row: Row) -> list[int]:
    """All ``keys``, or normal with a standard deviation of half the mean, as anchors.md has it."""
    if not row.varied:
        return [row.keys] * row.batch
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(row.batch, generator=generator)
    return (row.keys * (1 + 0.5 * noise)).clamp(row.q_len, 2 * row.keys).int().tolist()


def build(row: Row) -> dict[str, Any]:
    """The arguments of a call: permuted blocks in a cache with the row's layout."""
    device, dtype = torch.device("cuda"), torch.bfloat16
    torch.manual_seed(0)
    lengths = lengths_of(row)
    blocks = [-(-n // row.block) for n in lengths]
    total = sum(blocks)
    table = torch.zeros(row.batch, max(blocks), dtype=torch.int32)
    ids, at = torch.randperm(total, dtype=torch.int32), 0
    for seq, n in enumerate(blocks):
        table[seq, :n] = ids[at : at + n]
        at += n
    mla = row.kv_heads == 1 and row.d_v < row.d_qk
    width = row.kv_heads * row.block * (row.d_qk if mla else row.d_qk + row.d_v)
    store = torch.empty(total, row.layers, width + row.pad, dtype=dtype, device=device)
    for begin in range(0, total, 4096):
        store[begin : begin + 4096].normal_(std=0.5)
    page = store[:, row.layers // 2, :width]
    if mla:
        k = page.unflatten(1, (row.block, 1, row.d_qk))
        v = k[..., : row.d_v]
    else:
        half = width // 2
        k = page[:, :half].unflatten(1, (row.block, row.kv_heads, row.d_qk))
        v = page[:, half:].unflatten(1, (row.block, row.kv_heads, row.d_v))
    q = torch.randn(row.batch * row.q_len, row.q_heads, row.d_qk, dtype=dtype, device=device)
    return {
        "q": q, "k": k, "v": v, "max_seqlen_q": row.q_len,
        "cu_seqlens_q": torch.arange(row.batch + 1, dtype=torch.int32, device=device) * row.q_len,
        "max_seqlen_k": max(lengths), "seqused_k": torch.tensor(lengths, dtype=torch.int32, device=device),
        "block_table": table.to(device), "softmax_scale": (192 if mla else row.d_qk) ** -0.5,
        "causal": row.q_len > 1,
    }  # fmt: skip


def plain(row: Row, kwargs: dict[str, Any], sequences: list[int]) -> dict[int, torch.Tensor]:
    """Plain float32 attention for some sequences."""
    results = {}
    k, v, table = kwargs["k"], kwargs["v"], kwargs["block_table"]
    for seq in sequences:
        n = int(kwargs["seqused_k"][seq])
        ids = table[seq, : -(-n // row.block)].long()
        keys = k[ids].flatten(0, 1)[:n].float().repeat_interleave(row.q_heads // row.kv_heads, 1)
        values = v[ids].flatten(0, 1)[:n].float().repeat_interleave(row.q_heads // row.kv_heads, 1)
        q = kwargs["q"][seq * row.q_len : (seq + 1) * row.q_len].float()
        scores = torch.einsum("qhd,nhd->hqn", q, keys) * kwargs["softmax_scale"]
        if row.q_len > 1:
            where = torch.arange(n, device=q.device)
            last = n - row.q_len + torch.arange(row.q_len, device=q.device)[:, None]
            scores = scores.masked_fill(where > last, float("-inf"))
        results[seq] = torch.einsum("hqn,nhd->qhd", scores.softmax(-1), values)
    return results


def error(row: Row, out: torch.Tensor, wanted: dict[int, torch.Tensor]) -> float:
    """Largest relative error (2-norm) over the checked sequences; NaN if there is one."""
    worst = 0.0
    for seq, right in wanted.items():
        got = out[seq * row.q_len : (seq + 1) * row.q_len].float()
        e = float((got - right).norm() / right.norm())
        worst = e if math.isnan(e) else max(worst, e)
    return worst


def must_move(row: Row, kwargs: dict[str, Any]) -> int:
    """Bytes: each valid row once (shared bytes once), q and out."""
    per_key = row.kv_heads * (row.d_qk + (0 if row.d_v < row.d_qk else row.d_v)) * 2
    return sum(lengths_of(row)) * per_key + 2 * row.q_len * row.batch * row.q_heads * (row.d_qk + row.d_v)


def operations(row: Row) -> int:
    """Floating-point operations of the two products."""
    return 2 * sum(lengths_of(row)) * row.q_len * row.q_heads * (row.d_qk + row.d_v)


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


def ours(kwargs: dict[str, Any], row: Row) -> peers.Call:
    """Our call, its schedule made once and shared, as a model's layers do."""
    metadata = anystride.get_scheduler_metadata(
        row.batch, row.q_len, kwargs["max_seqlen_k"], row.q_heads, row.kv_heads, row.d_qk,
        kwargs["seqused_k"], torch.bfloat16, row.d_v, kwargs["cu_seqlens_q"], causal=kwargs["causal"],
    )  # fmt: skip
    return lambda: anystride.flash_attn_varlen_func(**kwargs, scheduler_metadata=metadata, backend="triton")


def host_microseconds(call: peers.Call, calls: int = 50) -> float:
    """Median host time of a call among ``calls`` in a row, as the layers of a model make them."""
    times = []
    for _ in range(20):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            call()
        times.append(1e6 * (time.perf_counter() - began) / calls)
    return statistics.median(times)


def makers(row: Row, kwargs: dict[str, Any], absent: dict[str, str]) -> dict[str, peers.Call]:
    """Every kernel that takes the case."""
    mla = row.kv_heads == 1 and row.d_v < row.d_qk
    found: dict[str, Callable[[], peers.Call]] = {"anystride": lambda: ours(kwargs, row)}
    if mla:
        found["FlashMLA"] = lambda: peers.flash_mla(kwargs, row.d_v)
    found["FA3"] = lambda: peers.fa3(kwargs, mla)
    found["vLLM Triton"] = lambda: peers.vllm_triton(kwargs, mla)
    calls = {}
    for name, make in found.items():
        if name not in absent:
            try:
                calls[name] = make()
            except peers.Absent:
                continue
    return calls


def main() -> None:
    """Print the table and write one JSON line a measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", type=Path, default=Path(".peers"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--suite", choices=["mla", "gqa", "all"], default="all")
    parser.add_argument("--ours-only", action="store_true")
    options = parser.parse_args()
    absent = {"FlashMLA": "not asked", "FA3": "not asked", "vLLM Triton": "not asked"}
    if not options.ours_only:
        absent = peers.load(options.peers)
    for name, why in absent.items():
        print(f"absent: {name}: {why}")
    top = ceilings()
    device = torch.cuda.get_device_name()
    facts = {
        "device": device, "torch": torch.__version__, "triton": triton.__version__,
        "anystride": anystride.__version__, **top,
    }  # fmt: skip
    print(
        f"{device}: read {top['read'] / 1e9:.0f} GB/s, copy {top['copy'] / 1e9:.0f} GB/s, "
        f"bf16 product {top['product'] / 1e12:.0f} TFLOP/s"
    )
    lines = []
    rows = {"mla": MLA, "gqa": GQA, "all": MLA + GQA}[options.suite]
    for row in rows:
        kwargs = build(row)
        wanted = plain(row, kwargs, sorted({0, row.batch // 2, row.batch - 1}))
        parts = []
        for name, call in makers(row, kwargs, absent).items():
            try:
                off = error(row, call(), wanted)
            except Exception as failure:  # a peer's refusal, in its own words
                parts.append(f"{name} refused ({str(failure).splitlines()[0][:60]})")
                continue
            if not off < 1e-2:
                parts.append(f"{name} WRONG ({off:.1e})")
                continue
            us = microseconds(call)
            rate = must_move(row, kwargs) / us * 1e-3
            tflops = operations(row) / us * 1e-6
            parts.append(f"{name} {us:.1f} us ({rate:.0f} GB/s, {tflops:.0f} TF)")
            line = {**facts, "case": row.name, "kernel": name, "us": us, "error": off}
            line |= {"bytes": must_move(row, kwargs), "flop": operations(row)}
            if name == "anystride" or row is rows[0]:
                line["host_us"] = host_microseconds(call)
                parts[-1] += f" host {line['host_us']:.0f} us"
            lines.append(line)
        print(f"{row.name:<46}" + " | ".join(parts), flush=True)
        del kwargs, wanted, call
        torch.cuda.empty_cache()
    if options.json:
        with options.json.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


if __name__ == "__main__":
    main()
