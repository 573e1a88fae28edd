"""FlashInfer's MLA reads every last dimension as packed. Arguments: folder of peers, backends (fa2 fa3)."""

import sys
from pathlib import Path

import torch

from anystride.peers.folder import load_wheels

load_wheels(Path(sys.argv[1]), "flashinfer")
from flashinfer.mla import BatchMLAPagedAttentionWrapper  # noqa: E402  # importable only now

torch.set_default_device("cuda")
q = torch.randn(1, 16, 576, dtype=torch.bfloat16)
cache = torch.randn(3, 64, 1152, dtype=torch.bfloat16)[..., ::2]  # stride 2 in the last dimension
rows, starts, ids, lengths = (torch.tensor(x, dtype=torch.int32) for x in ([0, 1], [0, 2], [2, 1], [100]))
keys = cache[[2, 1]].flatten(0, 1)[:100].double()
right = (q[0].double() @ keys.T).mul(192**-0.5).softmax(-1) @ keys[:, :512]
bad = False
for backend in sys.argv[2:] or ["fa2"]:
    wrapper = BatchMLAPagedAttentionWrapper(torch.empty(1 << 28, dtype=torch.int8), backend=backend)
    wrapper.plan(rows, starts, ids, lengths, 16, 512, 64, 64, False, 192**-0.5, q.dtype, cache.dtype)
    off = []
    for c in (cache, cache.contiguous()):
        out = wrapper.run(q[..., :512], q[..., 512:], c[..., :512], c[..., 512:])
        off.append(float((out[0] - right).abs().max()))
    print(f"{backend}: largest error {off[0]:.3g} with a last stride of 2, {off[1]:.3g} packed")
    bad |= not off[0] <= 2 * off[1]
sys.exit(int(bad))
