"""FlexAttention weighs NaN behind a sequence's end, in its last page, with 0: 0 x NaN is NaN."""

import sys

import torch
from torch.nn.attention.experimental._paged_attention import PagedAttention
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_default_device(device)
attend = torch.compile(flex_attention, dynamic=False) if device == "cuda" else flex_attention
pages, length = PagedAttention(4, 16, 1, device=device), torch.tensor([20])
first = torch.tensor([0])
pages.reserve(first, length)  # two pages of 16: twelve places of the second stay as they are
q, k, v = torch.randn(1, 8, 1, 64), torch.randn(1, 2, 20, 64), torch.randn(1, 2, 20, 64)


def filled_with(rest: float) -> torch.Tensor:
    k_cache, v_cache = torch.full((2, 1, 2, 64, 64), rest)
    pages.assign(first, torch.arange(20)[None], k, v, k_cache, v_cache)
    logical = create_block_mask(lambda _b, _h, _q, key: key < 20, 1, None, 1, 20, device, (128, 16))
    mask = pages.convert_logical_block_mask(logical, kv_len=length)
    out: torch.Tensor = attend(q, k_cache, v_cache, block_mask=mask, enable_gqa=True)
    return out


wrong = int(filled_with(torch.nan).isnan().sum())
print(f"{wrong} of {q.numel()} are NaN where the rest of the page is NaN, "
      f"{int(filled_with(0.0).isnan().sum())} where it is 0; right is 0")  # fmt: skip
sys.exit(int(wrong > 0))
