"""Time decoding from fp8 caches beside the same from bfloat16, of both families, on one GPU.

    python benchmarks/fp8_decode.py --peers .peers --json results.jsonl
    python benchmarks/fp8_decode.py --without FlashInfer "vLLM Triton" --only MLA

``e4m3`` has one scale, ``e4m3 rows`` one for each token and head beside the cache, ``mixed`` is MLA's row of
656 bytes: the latent part in e4m3 with four scales, the rope part in bfloat16, read in the ``q_v`` form.
Queries are bfloat16. FlashMLA and FlashAttention-3 read no such cache and are left out, FlashInfer and vLLM's
Triton kernel read GQA's, the latter MLA's, too, with one scale. The last lines say which targets are met.
"""

from __future__ import annotations

import math

from decode import Bench, Result, Row, best_peer, is_mla, main, operations, pure_read_of

# fmt: off
CASES = [
    Row("MLA, b 64, hq 16, kv 8k", 64, 16, 1, 576, 512, 8192),
    Row("MLA, b 128, hq 16, kv 8k", 128, 16, 1, 576, 512, 8192),
    Row("MLA, b 128, hq 128, kv 16k", 128, 128, 1, 576, 512, 16384),
    Row("MLA, b 16, hq 128, kv 8k", 16, 128, 1, 576, 512, 8192),
    Row("MLA, b 1, hq 16, kv 8k", 1, 16, 1, 576, 512, 8192),
    Row("GQA, b 64, 64/8, d 128, kv 8k", 64, 64, 8, 128, 128, 8192, 16),
    Row("GQA, b 64, 32/8, d 128, kv 8k", 64, 32, 8, 128, 128, 8192, 16),
    Row("GQA, b 128, 8/1, d 128, kv 8k v", 128, 8, 1, 128, 128, 8192, 16, varied=True),
    Row("GQA, b 1, 32/8, d 128, kv 32k", 1, 32, 8, 128, 128, 32768, 16),
    Row("GQA, b 32, 64/8, d 64, kv 8k", 32, 64, 8, 64, 64, 8192, 16),
    Row("GQA, b 32, 16/8, d 256, kv 8k", 32, 16, 8, 256, 256, 8192, 16),
]
# fmt: on
ROWS = [
    row._replace(name=f"{row.name}, {kv}" if kv else row.name, kv=kv)
    for row in CASES
    for kv in ("", "e4m3", "mixed" if is_mla(row) else "e4m3 rows")
]
BACKENDS = ("hopper", "triton")
MEMORY_BOUND = {"MLA, b 64, hq 16, kv 8k", "MLA, b 128, hq 16, kv 8k", "GQA, b 64, 64/8, d 128, kv 8k"}
MATRIX_BOUND = "MLA, b 128, hq 128, kv 16k"


def time_of(results: list[Result], backend: str = "") -> float:
    """Of one of ours, or of the fastest; NaN if there is none."""
    own = [r.us for r in results if r.kernel.startswith("anystride") and r.kernel.endswith(backend)]
    return min((us for us in own if us > 0), default=math.nan)


def summary(bench: Bench) -> None:
    """What fp8 gains in each back end, then the targets, by the fastest of ours."""
    print()
    found = {row.name: results for row, results in bench.rows}
    kernels = {r.kernel for results in found.values() for r in results if r.kernel.startswith("anystride")}
    for row, plain in bench.rows:
        for kernel in sorted(kernels) if not row.kv else ():
            bf16 = time_of(plain, kernel)
            cells = [f"bf16 {bf16:.1f}"]
            for fp8, results in bench.rows:
                if fp8.kv and fp8.name == f"{row.name}, {fp8.kv}":
                    us = time_of(results, kernel)
                    cells.append(f"{fp8.kv} {us:.1f} ({bf16 / us:.2f} times as fast)")
            print(f"{row.name}: {kernel}: {' | '.join(cells)}")
    print()
    for row, results in bench.rows:
        if row.kv:
            name = row.name.removesuffix(f", {row.kv}")
            us, peer = time_of(results), best_peer(results)
            target = 1.75 if name in MEMORY_BOUND else 1.0
            line = (
                f"{row.name}: {time_of(found.get(name, [])) / us:.3f} of the speed of bf16 (target {target})"
            )
            line += f", {us / pure_read_of(results):.3f} of the time of a pure read"
            line += f", {peer / us:.3f} of the best peer's speed" if peer > 0 else ""
            if name == MATRIX_BOUND:
                reached = operations(row) / us * 1e6 / bench.facts["product"]
                line += f", {reached:.3f} of the matrix ceiling (target 0.80)"
            print(line)


if __name__ == "__main__":
    summary(main(ROWS, __doc__ or "", BACKENDS, ("FlashMLA", "FA3")))
