"""A paged-attention kernel in another style than ours, and what becomes of it with one fault each.

It knows no view: it computes the address of every element that it reads in the flat memory behind the
cache, as a kernel does that has pointers and strides. It goes through the keys of a sequence in tiles of 64,
with masked loads, and sums in float32 with a running maximum. A fault is a word that one line looks for.
"""

from __future__ import annotations

import functools
import math
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["FAULTS", "crashes", "hangs", "kernel", "mutant", "refuses"]

TILE = 64

# What each fault is, in the words of who might make it.
FAULTS = {
    "packed page": "a block takes block_size * num_kv_heads * d",
    "page from token": "a block takes block_size times the stride of a token",
    "packed token": "a token takes num_kv_heads * d",
    "packed head": "a head takes d",
    "packed row": "the elements of a row are neighbours",
    "32 bits": "an offset fits into 32 bits",
    "V as K": "V has the strides of K",
    "tail scores": "rows of the last block past the end have a score like any other",
    "tail values": "a weight of zero makes any value harmless",
    "null block": "a weight of zero makes the values of any block harmless that the table names",
    "checks all ids": "every id of the table must name a block",
    "table from shape": "a row of the table is as long as its shape says",
    "table columns": "the ids of a row of the table are neighbours",
    "power of two": "a block size is a power of two",
    "empty unwritten": "a sequence without keys has nothing to write",
    "empty divides": "there is a largest score",
    "wide rows": "a row may be read in pieces of 16 elements more than it has",
    "base 2": "an lse is a logarithm to base 2",
    "lse +inf": "the lse of nothing is +inf",
    "lse transposed": "an lse is [total_q, num_q_heads]",
    "causal top": "the first query sees the first key",
    "one block stride": "the blocks of all pages are a stride apart",
    "contiguous": "a cache can be made contiguous first",
    "gathers": "the blocks of a sequence can be put side by side first",
    "writes padded rows": "all rows of out are ours",
    "writes the cache": "the rest of the last block is ours",
    "adds to out": "out begins with zeros",
    "packed out": "out is packed",
    "packed q": "q is packed",
}


def mutant(fault: str) -> Callable[..., Any]:
    """The kernel with a fault, a key of ``FAULTS``; without one for ""."""
    if fault and fault not in FAULTS:
        raise KeyError(fault)
    return functools.partial(kernel, fault)


def refuses(**kwargs: Any) -> Any:
    raise NotImplementedError("no KV cache <of this kind>\nsee the manual")


def crashes(**kwargs: Any) -> Any:
    """Crashes at pages of several blocks, with 8 query heads."""
    if kwargs["k"].dim() == 5 and kwargs["q"].shape[1] == 8:
        os.kill(os.getpid(), signal.SIGSEGV)
    return kernel("", **kwargs)


def hangs(**kwargs: Any) -> Any:
    """Hangs at pages of several blocks."""
    if kwargs["k"].dim() == 5:
        time.sleep(3600)
    return kernel("", **kwargs)


def kernel(fault: str, **a: Any) -> Any:
    """Attention over a paged cache: causal, q_v, lse, out, pages of several blocks."""
    given, table, num_blocks = a.get("out"), a["block_table"], math.prod(a["k"].shape[:-3])
    if fault == "contiguous":
        a |= {name: a[name].contiguous() for name in "kv"}
    if fault == "gathers":
        ids = table.long().clamp(0, num_blocks - 1)
        a |= {name: _gathered(a[name], ids) for name in "kv"}
        table = torch.arange(ids.numel()).view(ids.shape)
    if fault == "checks all ids" and not 0 <= int(table.min()) <= int(table.max()) < num_blocks:
        raise ValueError("an id of the table names no block")
    q, d_v = a["q"], a["v"].shape[-1]
    if fault == "packed q":
        q = q.as_strided(q.shape, torch.empty(q.shape, device="meta").stride(), q.storage_offset())
    starts, lengths = a["cu_seqlens_q"].tolist(), a["seqused_k"].tolist()
    out = given if given is not None else q.new_full((*q.shape[:2], d_v), math.nan)
    target = out
    if fault == "packed out":
        target = out.as_strided(
            out.shape, torch.empty(out.shape, device="meta").stride(), out.storage_offset()
        )
    lse = torch.full((q.shape[1], q.shape[0]), math.nan)
    for seq, length in enumerate(lengths):
        rows = slice(starts[seq], starts[seq + 1])
        result, logs = _sequence(fault, a, q[rows], rows, _ids(fault, table, seq, num_blocks), length)
        if length == 0 and fault == "empty unwritten":
            continue
        if fault == "adds to out" and given is not None:
            result = result + target[rows]
        target[rows] = result.to(out.dtype)
        lse[:, rows] = logs
    if fault == "writes padded rows":
        target[starts[-1] :] = 0
    if fault == "writes the cache":
        a["k"][..., -1:, :, :].fill_(0)
    if fault == "base 2":
        lse = lse / math.log(2)
    if fault == "lse +inf":
        lse = lse.masked_fill(lse.isneginf(), math.inf)
    if fault == "lse transposed":
        lse = lse.t()
    return (out, lse) if a["return_softmax_lse"] else out


def _sequence(
    fault: str, a: dict[str, Any], q: Tensor, rows: slice, ids: Tensor, length: int
) -> tuple[Tensor, Tensor]:
    """``out`` ``[n, num_q_heads, d_v]`` and ``lse`` ``[num_q_heads, n]`` of one sequence, in float32."""
    n, num_q_heads, _ = q.shape
    num_kv_heads, block_size = a["k"].shape[-2], a["k"].shape[-3]
    group = num_q_heads // num_kv_heads
    queries = q.float().view(n, num_kv_heads, group, -1)
    top = torch.full((n, num_kv_heads, group), -math.inf)
    total, sums = torch.zeros_like(top), torch.zeros(n, num_kv_heads, group, a["v"].shape[-1])
    seen = -(-length // block_size) * block_size if fault == "tail scores" else length
    for first in range(0, seen, TILE):
        token = torch.arange(first, first + TILE)
        valid = token < seen
        k = _load(fault, a, "k", ids, token, valid, length)
        v = _load(fault, a, "v", ids, token, valid, length)
        scores = torch.einsum("nhgd,thd->nhgt", queries, k[..., : queries.shape[-1]])
        if fault == "wide rows":  # zeros of q meet what lies behind the row
            scores = scores + (k[..., queries.shape[-1] :] * 0).sum(-1).t()[None, :, None]
        if "q_v" in a:
            more = a["q_v"][rows].float().view(n, num_kv_heads, group, -1)
            scores = scores + torch.einsum("nhgd,thd->nhgt", more, v)
        hidden = ~valid[None].expand(n, -1)
        if a["causal"] and n > 1:  # a single query is the last token, and sees all
            last = torch.arange(n) if fault == "causal top" else length - n + torch.arange(n)
            hidden = hidden | (token > last[:, None])
        scores = (scores * a["softmax_scale"]).masked_fill(hidden[:, None, None], -math.inf)
        higher = torch.maximum(top, scores.amax(-1))
        shift = higher.masked_fill(higher.isneginf(), 0)
        weights, decay = torch.exp(scores - shift[..., None]), torch.exp(top - shift)
        total = total * decay + weights.sum(-1)
        weights = weights.to(q.dtype).float()  # as matrix units take them
        sums, top = sums * decay[..., None] + torch.einsum("nhgt,thd->nhgd", weights, v), higher
    safe = total if fault == "empty divides" else total.masked_fill(total == 0, 1)
    out = (sums / safe[..., None]).view(n, num_q_heads, -1)
    return out, (top + total.log()).view(n, num_q_heads).t()


def _load(
    fault: str, a: dict[str, Any], name: str, ids: Tensor, token: Tensor, valid: Tensor, length: int
) -> Tensor:
    """Rows of K or V, ``[TILE, num_kv_heads, d]`` in float32, zeros where ``valid`` is not."""
    cache, block_size = a[name], a[name].shape[-3]
    if fault == "power of two":
        block_size = 1 << (block_size - 1).bit_length()
    column = token // block_size
    loaded = valid
    if fault == "tail values" and name == "v":
        loaded = column <= (length - 1) // block_size
    if fault == "null block" and name == "v":
        loaded = valid | ((column > (length - 1) // block_size) & (column < len(ids)))
    column = column.masked_fill(~loaded, 0)
    block = ids[column].long()
    if fault == "null block":
        block = block.clamp(0, math.prod(cache.shape[:-3]) - 1)
    page, sub, stride_page, stride_sub = block, 0 * block, cache.stride(0), 0
    like = a["k"] if fault == "V as K" else cache
    if cache.dim() == 5:
        page, sub = block // cache.shape[1], block % cache.shape[1]
        stride_sub = cache.stride(1)
        if fault == "one block stride":
            page, sub, stride_page = block, 0 * block, cache.stride(1)
    elif fault == "V as K":
        stride_page = like.stride(0)
    *_, stride_token, stride_head, stride_dim = like.stride()
    num_kv_heads, d = cache.shape[-2:]
    if fault == "packed page":
        stride_page = math.prod(cache.shape[1:])
    if fault == "page from token":
        stride_page = math.prod(cache.shape[1:-2]) * stride_token
    if fault == "packed token":
        stride_token = num_kv_heads * d
    if fault == "packed head":
        stride_head = d
    if fault == "packed row":
        stride_dim = 1
    element = torch.arange(d + 16 * (fault == "wide rows" and name == "k"))
    inside = (token % block_size).masked_fill(~loaded, 0)
    address = page * stride_page + sub * stride_sub + inside * stride_token
    address = (
        address[:, None, None] + torch.arange(num_kv_heads)[:, None] * stride_head + element * stride_dim
    )
    if fault == "32 bits":
        address = (address + 2**31) % 2**32 - 2**31
    address = address + cache.storage_offset()
    elements = cache.untyped_storage().nbytes() // cache.itemsize
    if fault:  # a fault may lead out of memory: it shall be wrong, and not crash the tests
        address = address % elements
    rows: Tensor = cache.as_strided((elements,), (1,), 0)[address].float()
    return rows.masked_fill(~loaded[:, None, None], 0)


def _ids(fault: str, table: Tensor, seq: int, num_blocks: int) -> Tensor:
    """A row of the block table."""
    stride_row, stride_column = table.stride()
    if fault == "table from shape":
        stride_row = table.shape[1]
    if fault == "table columns":
        stride_column = 1
    ids = table.as_strided((table.shape[1],), (stride_column,), table.storage_offset() + seq * stride_row)
    if fault in ("table from shape", "table columns"):
        ids = ids.clamp(0, num_blocks - 1)  # what lies there may be garbage: it shall be wrong, not crash
    return ids


def _gathered(cache: Tensor, ids: Tensor) -> Tensor:
    """The blocks of all sequences, one after the other."""
    blocks = ids.flatten()
    places = (blocks // cache.shape[1], blocks % cache.shape[1]) if cache.dim() == 5 else (blocks,)
    copy: Tensor = cache[places]
    return copy
