"""FlashInfer reads every last dimension as packed. Arguments: folder of peers, backends (fa2 decode fa3)."""

import sys
from pathlib import Path

import torch

from anystride.peers.folder import load_wheels

load_wheels(Path(sys.argv[1]), "flashinfer")
import flashinfer  # noqa: E402  # importable only now

torch.set_default_device("cuda")
q, space = torch.randn(1, 8, 128).bfloat16(), torch.empty(1 << 28, dtype=torch.int8)
cache = torch.randn(2, 3, 16, 2, 256, dtype=torch.bfloat16)[..., ::2]  # stride 2 in the last dimension
rows, starts, last, ids = (torch.tensor(x, dtype=torch.int32) for x in ([0, 1], [0, 2], [9], [2, 1]))
keys, values = (x[[2, 1]].flatten(0, 1)[:25].repeat_interleave(4, 1).double() for x in cache)
weights = torch.einsum("hd,khd->hk", q[0].double(), keys).mul(128**-0.5).softmax(-1)
right, bad = torch.einsum("hk,khd->hd", weights, values), list[bool]()
for backend in sys.argv[2:] or ["fa2", "decode"]:
    if backend == "decode":
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(space, "NHD", use_tensor_cores=True)
    else:
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(space, "NHD", backend=backend)
    lists = (starts, ids, last) if backend == "decode" else (rows, starts, ids, last)
    wrapper.plan(*lists, 8, 2, 128, 16, q_data_type=q.dtype, kv_data_type=q.dtype)
    off = [float((wrapper.run(q, tuple(c))[0] - right).abs().max()) for c in (cache, cache.contiguous())]
    print(f"{backend}: largest error {off[0]:.3g} with a last stride of 2, {off[1]:.3g} packed")
    bad.append(not off[0] <= 2 * off[1])
sys.exit(int(any(bad)))
