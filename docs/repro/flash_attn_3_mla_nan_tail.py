"""FlashAttention-3, MLA with 128 heads, NaN in the last page behind the end. Argument: folder of peers."""

import sys
from pathlib import Path

import torch

from anystride.peers import find_peer

find_peer("flash-attn-3").load(Path(sys.argv[1]))
torch.set_default_device("cuda")
cache = torch.randn(3, 64, 1, 576).bfloat16()  # as vLLM keeps it: latent part of 512, rope part of 64
cache[1, 6:] = torch.nan  # block 1 holds tokens 64 to 127 of a sequence of 70
starts, lengths, table = (torch.tensor(x, dtype=torch.int32) for x in ([0, 1], [70], [[2, 1]]))


def attend(heads: int) -> torch.Tensor:  # as vLLM's FLASH_ATTN_MLA calls it
    q = torch.randn(1, heads, 576).bfloat16()
    k, v, q_v = cache[..., 512:], cache[..., :512], q[..., :512]
    more = (None, None, q_v, None, starts, None, None, None, lengths, 1, 70, table, *[None] * 8)
    rest = (192**-0.5, True, -1, -1, 0.0, True, None, 0, None, 0, None, 1, 0, None)
    out: torch.Tensor = torch.ops._vllm_fa3_C.fwd(q[..., 512:], k, v, *more, *rest)[0]
    return out


print({heads: f"{int(attend(heads).isnan().sum())} elements are NaN" for heads in (16, 64, 128)}, "right: 0")
sys.exit(int(bool(attend(128).isnan().any())))
