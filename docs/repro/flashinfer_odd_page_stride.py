"""FlashInfer, pages that are no multiple of 16 bytes apart. Arguments: folder of peers, backend (fa2)."""

import sys
from pathlib import Path

import torch

from anystride.peers.folder import load_wheels

load_wheels(Path(sys.argv[1]), "flashinfer")
import flashinfer  # noqa: E402  # importable only now

torch.set_default_device("cuda")
space, backend = torch.empty(1 << 28, dtype=torch.int8), (sys.argv[2:] or ["fa2"])[0]
q, page = torch.randn(1, 8, 128, dtype=torch.bfloat16), 16 * 2 * 128 + 7
k, v = (torch.randn(3 * page).bfloat16().as_strided((3, 16, 2, 128), (page, 256, 128, 1)) for _ in "kv")
wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(space, "NHD", backend=backend)
rows, starts, ids, last = (torch.tensor(x, dtype=torch.int32) for x in ([0, 1], [0, 2], [2, 1], [9]))
wrapper.plan(rows, starts, ids, last, 8, 2, 128, 16, q_data_type=q.dtype, kv_data_type=q.dtype)
packed = wrapper.run(q, (k.contiguous(), v.contiguous()))
torch.cuda.synchronize()
try:
    error = float((wrapper.run(q, (k, v)) - packed).abs().max())
except RuntimeError as failure:
    sys.exit(f"{backend}: the device is lost: {str(failure).splitlines()[0]}")
print(f"{backend}: differs by {error:.3g} from the same values packed")
sys.exit(int(error != 0))
