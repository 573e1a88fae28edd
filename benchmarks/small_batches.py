"""Time small batches of both families beside the peers on one GPU: the method of anchors.md.

    python benchmarks/small_batches.py --peers .peers --json results.jsonl

What these calls must read is little: what counts is what a call costs besides. The pure read pays for its
launch, too, and for what the flush of the L2 left to be written.
"""

from __future__ import annotations

from decode import Bench, Row, best_peer, main, print_ratios, pure_read_of, ratios_of

MLA, GQA = (16, 1, 576, 512), (32, 8, 128, 128)
ROWS = [
    Row(f"b {batch}, {name}, kv {keys >> 10}k", batch, *heads, keys, block)
    for name, heads, block in (("MLA, hq 16", MLA, 64), ("GQA, 32/8, d 128", GQA, 16))
    for batch in (1, 2, 4, 8)
    for keys in (1024, 4096, 16384)
]


def summary(bench: Bench) -> None:
    """The target, and what was measured."""
    print_ratios(ratios_of(bench, {row.name for row in ROWS}), "")
    for row, results in bench.rows:
        us, peer, read = results[0].us, best_peer(results), pure_read_of(results)
        print(
            f"{row.name}: {us / peer:.3f} of the best peer's time (target 0.6), "
            f"{us / read:.3f} of that of a pure read, which is {read / peer:.3f} of the peer's"
        )


if __name__ == "__main__":
    summary(main(ROWS, __doc__ or "", ("hopper",)))
