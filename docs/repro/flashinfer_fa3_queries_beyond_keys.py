"""FlashInfer fa3 gives a query before every key numbers; right is 0, as of fa2. Argument: folder of peers."""

import sys
from pathlib import Path

import torch

from anystride.peers.folder import load_wheels

load_wheels(Path(sys.argv[1]), "flashinfer")
import flashinfer  # noqa: E402  # importable only now

torch.set_default_device("cuda")
space, kind = torch.empty(1 << 28, dtype=torch.int8), torch.bfloat16
q, (k, v) = torch.randn(8, 8, 128, dtype=kind), torch.randn(2, 10, 16, 2, 128, dtype=kind)
wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(space, "NHD", backend=(sys.argv[2:] or ["fa3"])[0])
# Four queries over 128 keys, and four over two keys: the first two of these see none.
lists = (
    torch.tensor(x, dtype=torch.int32) for x in ([0, 4, 8], [0, 8, 9], [1, 2, 3, 4, 5, 6, 7, 8, 9], [16, 2])
)
wrapper.plan(*lists, 8, 2, 128, 16, causal=True, q_data_type=kind, kv_data_type=kind)
out = wrapper.run(q, (k, v))[4:].float()
print("largest value of each of the four:", out.abs().amax((1, 2)).tolist(), "right: 0 and 0 first")
sys.exit(int(bool(out[:2].any())))
