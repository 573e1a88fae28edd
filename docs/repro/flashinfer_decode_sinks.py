"""FlashInfer's decode wrapper leaves out the sinks that it is given. Argument: folder of peers."""

import sys
from pathlib import Path

import torch

from anystride.peers.folder import load_wheels

load_wheels(Path(sys.argv[1]), "flashinfer")
import flashinfer  # noqa: E402  # importable only now

torch.set_default_device("cuda")
space, kind = torch.empty(1 << 28, dtype=torch.int8), torch.bfloat16
wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(space, "NHD", use_tensor_cores=True)
k, v = torch.randn(2, 2, 16, 2, 64, dtype=kind)
lists = (torch.tensor(x, dtype=torch.int32) for x in ([0, 2], [1, 0], [16]))
wrapper.plan(*lists, 8, 2, 64, 16, q_data_type=kind, kv_data_type=kind)
q, sinks = torch.randn(1, 8, 64, dtype=kind), torch.full((8,), 9.0)

keys, values = (x[[1, 0]].flatten(0, 1).float().repeat_interleave(4, 1) for x in (k, v))  # [32, 8, 64]
scores = torch.einsum("hd,khd->hk", q[0].float(), keys) / 8
right = torch.einsum("hk,khd->hd", torch.cat([scores, sinks[:, None]], 1).softmax(1)[:, :-1], values)
with_sinks = wrapper.run(q, (k, v), sinks=sinks)[0].float()
without = wrapper.run(q, (k, v))[0].float()
print("off by", error := float((with_sinks - right).abs().max()), "of", float(right.abs().max()))
print("the same bits as without sinks:", bool((with_sinks == without).all()))
sys.exit(int(error > 0.1 * float(right.abs().max())))
