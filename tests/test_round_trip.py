"""What the write side quantises, the attention reads: ``store_kv`` and ``store_mla``, then decode.

Twice held to account: to the law over what is stored, and to attention over what was to be stored, from which
it may be off by twice what plain PyTorch is off that quantises the same rows. Caches are poisoned: every byte
is 0xFF before, which is NaN in all of their dtypes, as cache and as scale.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any, NamedTuple

import pytest
import torch
from formula import second_formula
from interpreted import INTERPRETED, assert_passes_interpreted, only_compiled
from torch import Tensor

from anystride import flash_attn_varlen_func
from anystride.cache import store_kv, store_mla
from anystride.testing.judgement import assert_close_as_plain
from anystride.testing.law import dequantised, law

BACKEND = "triton" if INTERPRETED else "cpu"
DTYPE = torch.float16 if INTERPRETED else torch.bfloat16  # Triton's interpreter cannot multiply bfloat16
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2

BLOCKS, BLOCK_SIZE = 12, 8
LENGTHS, QUERIES = (5, 33, 16), (1, 2, 1)
HEADS, GROUP, D = 2, 3, 128
RANK, ROPE = 512, 64


@only_compiled
def test_under_the_interpreter() -> None:
    assert_passes_interpreted(__file__, "-k", "comes_back")


class Cache(NamedTuple):
    """Views of one or two poisoned buffers."""

    buffers: tuple[Tensor, ...]  # bytes
    k: Tensor
    v: Tensor
    k_scales: Tensor | None
    v_scales: Tensor
    groups: int  # of a row of V


def poisoned(*size: int, device: str) -> Tensor:
    return torch.full(size, 0xFF, dtype=torch.uint8, device=device)


def rows_of_132_bytes(dtype: torch.dtype, device: str, *pages: int) -> Cache:
    """Each row and its scale are neighbours; ``pages`` of several blocks are padded."""
    raw = poisoned(*(pages or (BLOCKS,)), 2, BLOCK_SIZE, HEADS, D + 4, device=device)
    if pages:
        raw = poisoned(pages[0], raw[0].numel() + 64, device=device)[:, :-64].view(raw.shape)
    k, v = raw[..., :D].view(dtype).unbind(-4)
    k_scales, v_scales = raw[..., D:].view(torch.float32)[..., 0].unbind(-3)
    return Cache((raw,), k, v, k_scales, v_scales, 1)


def beside(dtype: torch.dtype, device: str) -> Cache:
    """Heads before tokens in a cache, tokens before blocks in its scales."""
    raw = poisoned(BLOCKS, 2, HEADS, BLOCK_SIZE, D, device=device)
    scales = poisoned(2, BLOCK_SIZE, HEADS, BLOCKS, 8, device=device)
    k, v = raw.view(dtype).transpose(2, 3).unbind(1)
    k_scales, v_scales = scales.view(torch.float32)[..., 0].permute(0, 3, 1, 2)  # every other number
    return Cache((raw, scales), k, v, k_scales, v_scales, 1)


def latents(dtype: torch.dtype, device: str, groups: int) -> Cache:
    """DeepSeek-V3.2's row: the latent part in fp8, its scales, the rope part; 656 bytes with 4 groups."""
    raw = poisoned(BLOCKS, BLOCK_SIZE, 1, RANK + 4 * groups + 2 * ROPE, device=device)
    latent, scales, rope = raw.split((RANK, 4 * groups, 2 * ROPE), -1)
    return Cache(
        (raw,), rope.view(DTYPE), latent.view(dtype), None, scales[:, :, 0].view(torch.float32), groups
    )


CACHES = {
    "132-bytes-e4m3": lambda device: rows_of_132_bytes(E4M3, device),
    "132-bytes-e5m2": lambda device: rows_of_132_bytes(E5M2, device),
    "132-bytes-pages": lambda device: rows_of_132_bytes(E4M3, device, 4, 3),
    "beside": lambda device: beside(E4M3, device),
    "656-bytes": lambda device: latents(E4M3, device, 4),
    "one-scale-of-a-latent": lambda device: latents(E4M3, device, 1),
}


def quantised(rows: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """Rows as plain PyTorch makes them fp8 and, rounded once to their dtype, numbers again."""
    runs = rows.float().unflatten(-1, (groups, -1))
    scales = runs.abs().amax(-1) / torch.finfo(dtype).max
    stored = (runs / scales[..., None]).to(dtype).flatten(-2)
    return dequantised(stored, scales.flatten(-2), rows.dtype)


def call_over(cache: Cache, device: str) -> tuple[dict[str, Any], Tensor, Tensor]:
    """A decoding step over the cache, and where its tokens are: slots, and which of the table's blocks."""
    torch.manual_seed(0)
    latent = cache.k_scales is None
    needed = [-(-n // BLOCK_SIZE) for n in LENGTHS]
    order = iter(torch.randperm(BLOCKS - 1).add(1).tolist())
    table = torch.full((len(LENGTHS), max(needed) + 1), 2147480000, dtype=torch.int32)
    slots = []
    for seq, count in enumerate(needed):
        table[seq, :count] = torch.tensor([next(order) for _ in range(count)])
        token = torch.arange(LENGTHS[seq])
        slots.append(table[seq, token // BLOCK_SIZE].long() * BLOCK_SIZE + token % BLOCK_SIZE)
    heads = cache.k.shape[-2] * GROUP
    a: dict[str, Any] = {
        "q": torch.randn(sum(QUERIES), heads, cache.k.shape[-1]).to(DTYPE),
        "max_seqlen_q": max(QUERIES),
        "cu_seqlens_q": torch.tensor([0, *accumulate(QUERIES)], dtype=torch.int32),
        "max_seqlen_k": max(LENGTHS),
        "causal": True,
        "seqused_k": torch.tensor(LENGTHS, dtype=torch.int32),
        "block_table": table,
    }
    if latent:
        a["q_v"] = torch.randn(sum(QUERIES), heads, cache.v.shape[-1]).to(DTYPE)
    a = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in a.items()}
    a |= {"k": cache.k, "v": cache.v, "v_scale_cache": cache.v_scales}
    if not latent:
        a["k_scale_cache"] = cache.k_scales
    # Rows of unlike size: one scale for all of them would do badly.
    sizes = torch.logspace(-2, 1, sum(LENGTHS))[torch.randperm(sum(LENGTHS))][:, None, None]
    keys, values = (
        (torch.randn(sum(LENGTHS), x.shape[-2], x.shape[-1]) * sizes).to(DTYPE).to(device)
        for x in (cache.k, cache.v)
    )
    store(cache, keys, values, torch.cat(slots).to(device), "cpu" if device == "cpu" else "triton")
    return a, keys, values


def store(cache: Cache, keys: Tensor, values: Tensor, slots: Tensor, backend: str) -> None:
    """Quantise the rows into the cache; their scales are computed."""
    if cache.k_scales is None:
        parts = (cache.v, cache.k)
        store_mla(values[:, 0], keys[:, 0], parts, slots, cache.v_scales, backend=backend)
    else:
        store_kv(keys, values, cache.k, cache.v, slots, cache.k_scales, cache.v_scales, backend=backend)


def on_cpu(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: x.cpu() if isinstance(x, Tensor) else x for name, x in arguments.items()}


def check(name: str, device: str, backend: str) -> None:
    cache = CACHES[name](device)
    a, keys, values = call_over(cache, device)
    before = [buffer.clone() for buffer in cache.buffers]
    got = flash_attn_varlen_func(**a, return_softmax_lse=True, backend=backend)
    for buffer, old in zip(cache.buffers, before, strict=True):
        assert torch.equal(buffer, old), "the cache was written"

    stored = on_cpu(a)
    # What was to be stored, one sequence after the other.
    dense = {n: x for n, x in stored.items() if "scale_cache" not in n} | {
        "k": keys.cpu(), "v": values.cpu(), "block_table": None, "seqused_k": None,
        "cu_seqlens_k": torch.tensor([0, *accumulate(LENGTHS)], dtype=torch.int32),
    }  # fmt: skip
    dtype = cache.v.dtype
    rounded = dense | {"v": quantised(dense["v"], cache.groups, dtype)}
    if cache.k_scales is not None:
        rounded["k"] = quantised(dense["k"], 1, dtype)
    for arguments, rough in ((stored, stored), (dense, rounded)):
        both = zip(("out", "lse"), got, second_formula(rough, DTYPE), law(arguments), strict=True)
        for what, one, plain, right in both:
            assert_close_as_plain(what, one, plain, right, DTYPE if what == "out" else torch.float32)


@pytest.mark.parametrize("name", CACHES)
def test_what_is_stored_comes_back(name: str) -> None:
    check(name, "cpu", BACKEND)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CACHES)
def test_what_is_stored_comes_back_on_a_device(name: str) -> None:
    check(name, "cuda", "triton")


def decoded(arguments: dict[str, Any]) -> Tensor:
    out = flash_attn_varlen_func(**arguments, backend=BACKEND)
    assert isinstance(out, Tensor)
    return out


@pytest.mark.parametrize("name", CACHES)
def test_scales_of_other_tokens_would_be_noticed(name: str) -> None:
    # Else the above would be about nothing: one block's scales taken for another's.
    cache = CACHES[name]("cpu")
    a, _, _ = call_over(cache, "cpu")
    right = decoded(a)
    scales = a["v_scale_cache"]
    block, other = a["block_table"][1, :2].tolist()
    where = [divmod(x, scales.shape[1]) if scales.dim() == 4 else (x,) for x in (block, other)]
    scales[where[0]] = scales[where[1]].clone()
    wrong = decoded(a)
    assert torch.equal(wrong[0], right[0])
    assert torch.equal(wrong[3], right[3])
    assert not torch.allclose(wrong[1:3], right[1:3], rtol=0.1)
