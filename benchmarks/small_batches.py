"""Time small batches of both families beside the peers on one GPU: the method of anchors.md.

    python benchmarks/small_batches.py --peers .peers --json results.jsonl

What these calls must read is little: what counts is what a call costs besides. The pure read pays for its
launch, too, and for what the flush of the L2 left to be written. The last lines are the host's time: a call
starts at once, and the device is behind.
"""

from __future__ import annotations

import torch
from decode import (
    ALONE,
    Bench,
    Row,
    best_peer,
    build,
    host_medians,
    main,
    makers,
    print_ratios,
    pure_read_of,
    ratios_of,
)

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
        alone = next((r.us for r in results if r.kernel.endswith(ALONE)), us)
        print(
            f"{row.name}: {us / peer:.3f} of the best peer's time (target 0.6), {alone / peer:.3f}{ALONE}, "
            f"{us / read:.3f} of that of a pure read, which is {read / peer:.3f} of the peer's"
        )


def host_times(bench: Bench) -> None:
    """What a call takes of the host's time: medians, and PyTorch's for one kernel as a yardstick."""
    one = torch.zeros(64, device="cuda")
    for row, results in bench.rows:
        if row.batch > 1 or row.keys > 1024:
            continue
        timed = {result.kernel for result in results if result.us > 0}
        kwargs = build(row)
        found = makers(row, kwargs, ["hopper", "hopper" + ALONE, "triton"], {})
        calls = {name: make() for name, make in found.items() if name in timed or name == "anystride triton"}
        calls["torch add_"] = lambda: one.add_(1)
        cells = [f"{name} {us:.1f}" for name, us in host_medians(calls).items()]
        print(f"host, {row.name}: {' | '.join(cells)} us")


if __name__ == "__main__":
    done = main(ROWS, __doc__ or "", ("hopper", "hopper" + ALONE))
    summary(done)
    host_times(done)
