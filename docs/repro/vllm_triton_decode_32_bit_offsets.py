"""vLLM's Triton decode multiplies token and stride in 32 bits. Needs 5 GB. Argument: folder of peers."""

import sys
from pathlib import Path

import torch

from anystride.peers.vllm_triton import load_file

decode = load_file(Path(sys.argv[1]), "triton_decode_attention").decode_attention_fwd
torch.set_default_device("cuda")
torch.manual_seed(0)

stride = 2**31 // 15 + 64  # from token to token: the last of a block of 16 lies beyond 2^31 elements
memory = torch.empty(15 * stride + 512, dtype=torch.bfloat16)
k, v = (memory.as_strided((1, 16, 2, 128), (16 * stride, stride, 128, 1), at) for at in (0, 256))
k.copy_(torch.randn(k.shape)), v.copy_(torch.randn(v.shape))
q, table = torch.randn(1, 8, 128, dtype=torch.bfloat16), torch.zeros(1, 1, dtype=torch.int32)
keys, values = (x[0].repeat_interleave(4, 1).double() for x in (k, v))
weights = torch.einsum("hd,khd->hk", q[0].double(), keys).mul(128**-0.5).softmax(-1)
right, out, lse = torch.einsum("hk,khd->hd", weights, values), torch.empty_like(q), torch.empty(1, 8)
lengths = torch.tensor([16], dtype=torch.int32)
try:
    decode(q, k, v, out, lse, table, lengths, torch.empty(1, 8, 1, 129), 1, 128**-0.5, 16)
    error = float((out[0].double() - right).abs().max())
except RuntimeError as failure:
    sys.exit(f"the device is lost: {str(failure).splitlines()[0]}")
print(f"largest error {error:.3g}, of values up to {float(right.abs().max()):.3g}")
sys.exit(int(not error <= torch.finfo(q.dtype).eps * float(right.abs().max())))
