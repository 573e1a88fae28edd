"""vLLM's unified Triton kernel: NaN for a query before every key; right is 0. Argument: folder of peers."""

import sys
from pathlib import Path

import torch

from anystride.peers.vllm_triton import load_file

folder = Path(sys.argv[1])
load_file(folder, "triton_attention_helpers")
unified = load_file(folder, "triton_unified_attention").unified_attention
torch.set_default_device("cuda")

q = torch.randn(4, 8, 128, dtype=torch.bfloat16)  # 4 query tokens, 2 keys: the first two see none
k, v = torch.randn(2, 3, 16, 2, 128, dtype=torch.bfloat16)
table, lengths, starts = (torch.tensor(x, dtype=torch.int32) for x in ([[1]], [2], [0, 4]))
segments = [torch.empty(64, 8, 16, *width) for width in ((128,), (), ())]  # as TRITON_ATTN has them
out = torch.empty_like(q)
unified(q, k, v, out, starts, 4, lengths, 2, 128**-0.5, True, (-1, -1), table, 0, None, None, None,
        64, 16, *segments)  # fmt: skip
print("NaN of 1024 in each query:", out.isnan().flatten(1).sum(1).tolist(), "right: 0 in all of them")
sys.exit(int(bool(out[:2].any())))
