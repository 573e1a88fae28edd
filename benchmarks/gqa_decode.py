"""Time GQA decoding beside the peers on one GPU: cases and method of anchors.md.

    python benchmarks/gqa_decode.py --peers .peers --json results.jsonl
    python benchmarks/gqa_decode.py --backend triton

Peers are FlashAttention-3 as vLLM 0.25.0 ships it, FlashInfer with tensor cores, and vLLM's Triton kernel.
The last lines say which targets are met.
"""

from __future__ import annotations

from decode import Bench, Row, main, must_move, print_layouts, print_ratios, pure_read_of, ratios_of

# fmt: off
ROWS = [
    Row("b 64, 64/8, d 128, kv 8k", 64, 64, 8, 128, 128, 8192, 16),
    Row("b 64, 32/8, d 128, kv 8k", 64, 32, 8, 128, 128, 8192, 64),
    Row("b 128, 8/1, d 128, kv 8k v", 128, 8, 1, 128, 128, 8192, 16, varied=True),
    Row("b 1, 32/8, d 128, kv 32k", 1, 32, 8, 128, 128, 32768, 16),
    Row("b 32, 64/8, d 64, kv 8k", 32, 64, 8, 64, 64, 8192, 16),
    Row("b 32, 16/8, d 256, kv 8k", 32, 16, 8, 256, 256, 8192, 16),
    Row("b 16, 32/32, d 128, kv 8k", 16, 32, 32, 128, 128, 8192, 16),
]
LAYOUTS = [  # against PACKED
    Row("b 64, 32/8, d 128, kv 8k, layer of 4", 64, 32, 8, 128, 128, 8192, 64, layers=4),
    Row("b 64, 32/8, d 128, kv 8k, padded", 64, 32, 8, 128, 128, 8192, 64, pad=64 * 17),
    Row("b 64, 32/8, d 128, kv 8k, padded by 16 bytes", 64, 32, 8, 128, 128, 8192, 64, pad=8),
    *(
        Row(f"b 64, 32/8, d 128, kv 8k, block {block}", 64, 32, 8, 128, 128, 8192, block)
        for block in (1, 3, 16, 48, 528, 1056)
    ),
    *(
        Row(f"b 64, 32/8, d 128, kv 8k, {layout}", 64, 32, 8, 128, 128, 8192, 64, layout=layout)
        for layout in ("heads first", "interleaved", "rows")
    ),
    Row("b 32, 64/8, d 64, kv 8k, sinks", 32, 64, 8, 64, 64, 8192, 16, sinks=True),
    Row("b 32, 64/8, d 64, kv 8k, sinks, window 128", 32, 64, 8, 64, 64, 8192, 16, window=127, sinks=True),
    Row("b 64, 64/8, d 128, kv 8k, q_len 4", 64, 64, 8, 128, 128, 8192, 16, q_len=4),
]
# fmt: on
PACKED = "b 64, 32/8, d 128, kv 8k"
ONE_TOKEN = "b 64, 64/8, d 128, kv 8k"
LARGE = (ONE_TOKEN, PACKED, "b 32, 16/8, d 256, kv 8k", "b 16, 32/32, d 128, kv 8k")
SHARES = dict.fromkeys(LARGE, 0.975) | {"b 128, 8/1, d 128, kv 8k v": 0.90, "b 32, 64/8, d 64, kv 8k": 0.92}


def summary(bench: Bench) -> None:
    """The targets, and what was measured."""
    mine = {row.name: results[0].us for row, results in bench.rows}
    ratios = ratios_of(bench, {row.name for row in ROWS})
    print_ratios(ratios, "")
    for row, results in bench.rows:
        reached = must_move(row) / mine[row.name] * 1e6 / bench.facts["read"]
        target = f" (target {SHARES[row.name]})" if row.name in SHARES else ""
        print(
            f"{row.name}: {reached:.3f} of the read ceiling{target}, "
            f"{mine[row.name] / pure_read_of(results):.3f} of the time of a pure read"
        )
    one = "b 1, 32/8, d 128, kv 32k"
    if one in ratios:
        print(f"{one}: {1 / ratios[one]:.3f} of the best peer's time (target 0.75)")
    print_layouts(bench, PACKED)
    for row, _results in bench.rows:
        if row.name.startswith(f"{ONE_TOKEN}, q_len") and ONE_TOKEN in mine:
            print(f"{row.name}: {mine[row.name] / mine[ONE_TOKEN]:.3f} of one token (target 1.05)")


if __name__ == "__main__":
    summary(main(ROWS + LAYOUTS, __doc__ or "", ("hopper", "triton")))
