"""PyTorch's FlexAttention over a paged cache.

Source: ``torch.nn.attention.experimental._paged_attention.PagedAttention``, whose page table is filled from
the call's, and ``flex_attention`` over the cache as one sequence ``[1, num_kv_heads, num_blocks * block_size,
d]``. That shape is no view of most strided caches: then ``reshape``, as documented for it, copies the cache.
Compiled on a GPU, as its documentation asks for; as it is on a CPU.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anystride.peers.calls import demand, four_dims, query_counts, refuse_but, whole
from anystride.peers.peer import Absent, Call, Peer

__all__ = ["FLEX_ATTENTION"]


def _load(_folder: Path | None) -> str:
    try:
        from torch.nn.attention.experimental import _paged_attention  # noqa: F401  # looked for, used later
    except ImportError as error:
        raise Absent(str(error)) from None
    return torch.__version__


@functools.cache
def _compiled(device_type: str) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False) if device_type == "cuda" else flex_attention


def _prepare(kwargs: dict[str, Any]) -> Call:
    from torch.nn.attention.experimental._paged_attention import PagedAttention
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask

    refuse_but(kwargs, "window_size", "softcap")
    q, k, v = kwargs["q"], four_dims(kwargs["k"], "k"), four_dims(kwargs["v"], "v")
    counts, lengths, table = query_counts(kwargs), kwargs["seqused_k"], kwargs["block_table"]
    demand(
        {
            "as many query tokens of each sequence": len(set(counts)) == 1,
            "queries": max(counts, default=0) > 0,
        }
    )
    batch, count = len(counts), counts[0]
    (num_blocks, block), longest, device = k.shape[:2], int(lengths.max()), q.device
    demand({"a key": longest > 0})
    pages = PagedAttention(num_blocks, block, batch, device=str(device))
    for seq, length in enumerate(lengths.tolist()):
        used = table[seq, : -(-length // block)].long()
        pages.page_table[seq, : len(used)] = used
        pages.physical_to_logical[seq, used] = torch.arange(len(used), device=device)
        pages.capacity[seq] = len(used) * block
    left, right = kwargs.get("window_size") or (-1, -1)
    right = 0 if kwargs.get("causal") else right

    def visible(seq: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = lengths[seq] - count + query
        seen: Tensor = key < lengths[seq]
        if left >= 0:
            seen = seen & (key >= own - left)
        return seen & (key <= own + right) if right >= 0 else seen

    cap = kwargs.get("softcap", 0.0)

    def capped(score: Tensor, *_place: Tensor) -> Tensor:
        result: Tensor = cap * torch.tanh(score / cap)
        return result

    logical = create_block_mask(
        visible, batch, None, count, longest, device=str(device), BLOCK_SIZE=(128, block)
    )
    mask = pages.convert_logical_block_mask(logical)
    score_mod = pages.get_score_mod(capped) if cap else None
    queries = q[: batch * count].unflatten(0, (batch, count)).transpose(1, 2)
    aux = AuxRequest(lse=True) if kwargs.get("return_softmax_lse") else None
    attend = _compiled(device.type)

    def run() -> tuple[Tensor, Tensor | None]:
        one_sequence = [
            cache.permute(2, 0, 1, 3).reshape(1, cache.shape[2], num_blocks * block, cache.shape[3])
            for cache in (k, v)
        ]
        result = attend(
            queries, *one_sequence, score_mod, mask, kwargs["softmax_scale"],
            enable_gqa=q.shape[1] != k.shape[2], return_aux=aux,
        )  # fmt: skip
        out, lse = (result, None) if aux is None else (result[0], result[1].lse)
        out = whole(out.transpose(1, 2).flatten(0, 1), q.shape[0])
        return out, None if lse is None else whole(lse.transpose(1, 2).flatten(0, 1), q.shape[0]).t()

    return run


FLEX_ATTENTION = Peer(
    "flex-attention",
    "torch FlexAttention",
    "flex_attention with PagedAttention, experimental",
    _load,
    _prepare,
)
