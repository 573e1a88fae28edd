"""FlashMLA, pages that are no multiple of 16 bytes apart. Argument: folder of peers."""

import sys
from pathlib import Path

import torch

from anystride.peers import find_peer

find_peer("flash-mla").load(Path(sys.argv[1]))
torch.set_default_device("cuda")
q, page = torch.randn(1, 1, 16, 576, dtype=torch.bfloat16), 64 * 576 + 7
cache = torch.randn(3 * page).bfloat16().as_strided((3, 64, 1, 576), (page, 576, 576, 1))
lengths, table = torch.tensor([100], dtype=torch.int32), torch.tensor([[2, 1]], dtype=torch.int32)


def attend(k: torch.Tensor) -> torch.Tensor:  # as flash_mla_with_kvcache calls it
    arguments = (lengths, table, 192**-0.5, False, None, None, None)
    return torch.ops._flashmla_C.dense_decode_fwd(q, k, 512, *arguments)[0]  # type: ignore[no-any-return]


packed = attend(cache.contiguous())
torch.cuda.synchronize()
try:
    print("differs by", error := float((attend(cache) - packed).abs().max()), "from the same values packed")
except RuntimeError as failure:
    sys.exit(f"the device is lost: {str(failure).splitlines()[0]}")
sys.exit(int(error != 0))
