"""Time GQA decoding beside the peers on one GPU: cases and method of anchors.md.

python benchmarks/gqa_decode.py --peers .peers --json results.jsonl
"""

from __future__ import annotations

from decode import Row, main

# fmt: off
ROWS = [
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


if __name__ == "__main__":
    main(ROWS, __doc__ or "", ("triton",))
