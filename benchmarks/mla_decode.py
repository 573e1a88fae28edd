"""Time MLA decoding beside the peers on one GPU: cases and method of anchors.md.

    python benchmarks/mla_decode.py --peers .peers --json results.jsonl --plot roofline.png
    python benchmarks/mla_decode.py --backend triton

Peers are FlashMLA and FlashAttention-3 as vLLM 0.25.0 ships them, FlashInfer, and vLLM's Triton kernel, each
called as its own project calls it. The last lines say which targets are met.
"""

from __future__ import annotations

from decode import (
    Bench,
    Row,
    main,
    must_move,
    operations,
    print_layouts,
    print_ratios,
    pure_read_of,
    ratios_of,
)

# fmt: off
ROWS = [
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
    Row("b 64, hq 128, kv 8k, layer of 8", 64, 128, 1, 576, 512, 8192, layers=8),
    Row("b 64, hq 16, kv 8k, padded", 64, 16, 1, 576, 512, 8192, pad=64 * 17),
]
LAYOUTS = [  # against PACKED
    Row("b 64, hq 16, kv 8k, padded by 64 bytes", 64, 16, 1, 576, 512, 8192, pad=32),
    Row("b 64, hq 16, kv 8k, padded by 16 bytes", 64, 16, 1, 576, 512, 8192, pad=8),
    *(
        Row(f"b 64, hq 16, kv 8k, block {block}", 64, 16, 1, 576, 512, 8192, block=block)
        for block in (1, 3, 16, 48, 528, 784, 1056)
    ),
]
# fmt: on
PACKED = "b 64, hq 16, kv 8k"


def summary(bench: Bench) -> None:
    """The targets, and what was measured."""
    mine = {row.name: results[0].us for row, results in bench.rows}
    ratios = ratios_of(bench, {row.name for row in ROWS})
    print_ratios(ratios, " (target 1.15)")
    for row, results in bench.rows:
        print(f"{row.name}: {results[0].us / pure_read_of(results):.3f} of the time of a pure read")
    for name, share in (("b 128, hq 16, kv 16k", 0.97), (PACKED, 0.90)):
        if name in mine:
            row = next(row for row in ROWS if row.name == name)
            reached = must_move(row) / mine[name] * 1e6 / bench.facts["read"]
            print(f"{name}: {reached:.3f} of the read ceiling (target {share})")
    for row in ROWS:
        if row.q_heads == 128 and row.batch >= 64 and row.name in mine:
            reached = operations(row) / mine[row.name] * 1e6 / bench.facts["product"]
            print(f"{row.name}: {reached:.3f} of the matrix ceiling (target 0.88)")
    for name, share in (("b 1, hq 16, kv 8k", 0.55), ("b 1, hq 16, kv 128k", 0.70)):
        if name in ratios:
            print(f"{name}: {1 / ratios[name]:.3f} of the best peer's time (target {share})")
    print_layouts(bench, PACKED)


if __name__ == "__main__":
    summary(main(ROWS + LAYOUTS, __doc__ or "", ("hopper",)))
