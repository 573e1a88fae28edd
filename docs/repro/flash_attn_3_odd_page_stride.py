"""FlashAttention-3, pages that are no multiple of 16 bytes apart. Argument: folder of peers."""

import sys
from pathlib import Path

import torch

from anystride.peers import find_peer

find_peer("flash-attn-3").load(Path(sys.argv[1]))
torch.set_default_device("cuda")
q, page = torch.randn(1, 8, 128, dtype=torch.bfloat16), 16 * 2 * 128 + 7
cache = [torch.randn(3 * page).bfloat16().as_strided((3, 16, 2, 128), (page, 256, 128, 1)) for _ in "kv"]
starts, lengths, table = (torch.tensor(x, dtype=torch.int32) for x in ([0, 1], [25], [[2, 1]]))


def attend(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:  # as flash_attn_varlen_func calls it
    more = (None, None, None, starts, None, None, None, lengths, 1, 25, table, *[None] * 8)
    rest = (128**-0.5, True, -1, -1, 0.0, True, None, 0, None, 0, None, 1, 0, None)
    out: torch.Tensor = torch.ops._vllm_fa3_C.fwd(q, k, v, None, *more, *rest)[0]
    return out


packed = attend(*(x.contiguous() for x in cache))
torch.cuda.synchronize()
try:
    print("differs by", error := float((attend(*cache) - packed).abs().max()), "from the same values packed")
except RuntimeError as failure:
    sys.exit(f"the device is lost: {str(failure).splitlines()[0]}")
sys.exit(int(error != 0))
