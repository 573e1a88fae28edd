"""vLLM's two Triton kernels give NaN for a sequence without keys; right is 0. Argument: folder of peers."""

import sys
from pathlib import Path

import torch

from anystride.peers.vllm_triton import load_file

folder = Path(sys.argv[1])
decode = load_file(folder, "triton_decode_attention").decode_attention_fwd
load_file(folder, "triton_attention_helpers")
unified = load_file(folder, "triton_unified_attention").unified_attention
torch.set_default_device("cuda")

q = torch.randn(2, 8, 128, dtype=torch.bfloat16)
k, v = torch.randn(2, 3, 16, 2, 128, dtype=torch.bfloat16)
table, lengths = torch.tensor([[1], [2]], dtype=torch.int32), torch.tensor([9, 0], dtype=torch.int32)

of_decode, lse = torch.empty_like(q), torch.empty(2, 8)
decode(q, k, v, of_decode, lse, table, lengths, torch.empty(2, 8, 1, 129), 1, 128**-0.5, 16)

of_unified, starts = torch.empty_like(q), torch.arange(3, dtype=torch.int32)
segments = [torch.empty(64, 8, 16, *width) for width in ((128,), (), ())]  # as TRITON_ATTN has them
unified(q, k, v, of_unified, starts, 1, lengths, 9, 128**-0.5, True, (-1, -1), table, 0, None, None, None,
        64, 16, *segments)  # fmt: skip

for name, out in (("decode", of_decode), ("unified", of_unified)):
    print(f"{name}: the sequence without keys has {out[1].isnan().sum()} NaN of {out[1].numel()}; right is 0")
sys.exit(int(bool(of_decode[1].any() or of_unified[1].any())))
