"""vLLM's Triton decode reads every last dimension as packed. Argument: folder of peers."""

import sys
from pathlib import Path

import torch

from anystride.peers.vllm_triton import load_file

decode = load_file(Path(sys.argv[1]), "triton_decode_attention").decode_attention_fwd
torch.set_default_device("cuda")
torch.manual_seed(0)

q = torch.randn(1, 8, 128, dtype=torch.bfloat16)
cache = torch.randn(2, 3, 16, 2, 256, dtype=torch.bfloat16)[..., ::2]  # stride 2 in the last dimension
table, lengths = torch.tensor([[2, 1]], dtype=torch.int32), torch.tensor([25], dtype=torch.int32)


def error(k: torch.Tensor, v: torch.Tensor) -> float:
    out, lse, partial = torch.empty_like(q), torch.empty(1, 8), torch.empty(1, 8, 1, 129)
    decode(q, k, v, out, lse, table, lengths, partial, 1, 128**-0.5, 16)
    keys, values = (x[table[0].long()].flatten(0, 1)[:25].repeat_interleave(4, 1).double() for x in (k, v))
    weights = torch.einsum("hd,khd->hk", q[0].double(), keys).mul(128**-0.5).softmax(-1)
    return float((out[0].double() - torch.einsum("hk,khd->hd", weights, values)).abs().max())


strided, packed = error(*cache), error(*cache.contiguous())
print(f"largest error: {strided:.3g} with a last stride of 2, {packed:.3g} with the same values packed")
sys.exit(int(not strided <= 2 * packed))
