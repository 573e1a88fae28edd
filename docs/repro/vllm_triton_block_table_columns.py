"""vLLM's two Triton kernels read a block table's rows as packed. Argument: folder of peers."""

import sys
from pathlib import Path

import torch

from anystride.peers.vllm_triton import load_file

decode = load_file(Path(sys.argv[1]), "triton_decode_attention").decode_attention_fwd
load_file(Path(sys.argv[1]), "triton_attention_helpers")
unified = load_file(Path(sys.argv[1]), "triton_unified_attention").unified_attention
torch.set_default_device("cuda")
torch.manual_seed(0)

q, (k, v) = torch.randn(1, 8, 128).bfloat16(), torch.randn(2, 4, 16, 2, 128).bfloat16()
lengths, starts = torch.tensor([32], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
table = torch.tensor([[1, 3, 2, 3]], dtype=torch.int32)[:, ::2]  # blocks 1 and 2; block 3 is not asked for
keys, values = (x[1:3].flatten(0, 1).repeat_interleave(4, 1).double() for x in (k, v))
weights = torch.einsum("hd,khd->hk", q[0].double(), keys).mul(128**-0.5).softmax(-1)
right, errors = torch.einsum("hk,khd->hd", weights, values), []
for ids in (table, table.contiguous()):
    out, last = torch.empty_like(q), torch.empty_like(q)
    decode(q, k, v, out, torch.empty(1, 8), ids, lengths, torch.empty(1, 8, 1, 129), 1, 128**-0.5, 16)
    unified(q, k, v, last, starts, 1, lengths, 32, 128**-0.5, True, (-1, -1), ids, 0, None, None, None)
    errors.append([float((got[0].double() - right).abs().max()) for got in (out, last)])
for name, strided, packed in zip(("decode", "unified"), *errors, strict=True):
    print(f"{name}: largest error {strided:.3g} with every other column, {packed:.3g} with the ids packed")
sys.exit(int(any(not strided <= 2 * packed for strided, packed in zip(*errors, strict=True))))
