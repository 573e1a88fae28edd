"""What other projects export, in plain PyTorch: the same arguments, an answer in float64, and a record.

Strides are read as PyTorch reads them, so that a call that is prepared well comes out right.
"""

from __future__ import annotations

import importlib.machinery
import itertools
import math
import types
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["FlashAttn", "FlashInfer", "FlashMla", "VllmDecode", "VllmUnified"]


@dataclass
class Record:
    """Arguments of each call, in order, by position and by name."""

    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    def add(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append((args, kwargs))


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, q_v: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One sequence: ``[n, heads, d_v]``, and its lse to base e, ``[n, heads]``, -inf without a key."""
    group, (n, m) = q.shape[1] // k.shape[1], (len(q), len(k))
    k, v = (rows.double().repeat_interleave(group, 1) for rows in (k, v))
    scores = torch.einsum("nhd,mhd->nhm", q.double(), k)
    if q_v is not None:
        scores = scores + torch.einsum("nhd,mhd->nhm", q_v.double(), v)
    scores = scores * scale
    if causal:
        hidden = torch.arange(m) > torch.arange(n)[:, None] + m - n
        scores = scores.masked_fill(hidden[:, None], -math.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    return torch.einsum("nhm,mhd->nhd", weights, v).to(q.dtype), scores.logsumexp(-1).float()


def rows_of(cache: Tensor, ids: Tensor, length: int) -> Tensor:
    """The first tokens of the blocks ``ids`` of ``[num_blocks, block_size, ...]``."""
    return cache[ids[: -(-length // cache.shape[1])].long()].flatten(0, 1)[:length]


def each(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, lengths: Tensor, table: Tensor, scale: float,
    causal: bool, q_v: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """All sequences of a call: ``out`` ``[total_q, heads, d_v]`` and ``lse`` ``[total_q, heads]``."""
    out, lse = q.new_full((*q.shape[:2], v.shape[-1]), math.nan), torch.full(q.shape[:2], math.nan)
    for seq, length in enumerate(lengths.tolist()):
        own = slice(int(starts[seq]), int(starts[seq + 1]))
        keys, values = (rows_of(cache, table[seq], length) for cache in (k, v))
        parts = None if q_v is None else q_v[own]
        out[own], lse[own] = attend(q[own], keys, values, scale, causal, parts)
    return out, lse


class FlashMla(Record):
    """``torch.ops._flashmla_C``."""

    def dense_decode_fwd(self, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        self.add(*args)
        q, k, d_v, lengths, table, scale, causal, _metadata, _splits, _given = args
        starts = torch.arange(len(q) + 1) * q.shape[1]
        out, lse = each(q.flatten(0, 1), k, k[..., :d_v], starts, lengths, table, scale, causal)
        lse = lse.masked_fill(lse == -math.inf, math.inf).unflatten(0, q.shape[:2]).transpose(1, 2)
        return out.unflatten(0, q.shape[:2]), lse, torch.tensor([7]), torch.tensor([8])


class FlashAttn(Record):
    """``torch.ops._vllm_fa3_C``."""

    def get_scheduler_metadata(self, *args: Any) -> tuple[Any, ...]:
        return args

    def fwd(self, *args: Any) -> tuple[Tensor, Tensor, None, None]:
        self.add(*args)
        q, k, v, q_v, given, starts, lengths, table = (args[at] for at in (0, 1, 2, 5, 6, 7, 11, 14))
        out, lse = each(q, k, v, starts, lengths, table, args[23], args[24], q_v)
        return out if given is None else given.copy_(out), lse.t(), None, None


class VllmDecode(Record):
    """``triton_decode_attention.py``."""

    def decode_attention_fwd(self, *args: Any, **kwargs: Any) -> None:
        self.add(*args, **kwargs)
        q, k, v, out, lse, table, lengths, logits, splits, scale, block = args
        assert (block, splits) == (k.shape[1], logits.shape[2])
        made = each(q, k, v, torch.arange(len(q) + 1), lengths, table, scale, False)
        for mine, theirs in zip((out, lse), made, strict=True):
            mine[: len(q)].copy_(theirs)


class VllmUnified(Record):
    """``triton_unified_attention.py``."""

    def unified_attention(self, *args: Any, **kwargs: Any) -> None:
        self.add(*args, **kwargs)
        q, k, v, out, starts, _most, lengths, _longest, scale, causal, _window, table = args[:12]
        made, _lse = each(q, k, v, starts, lengths, table, scale, causal)
        out[: int(starts[-1])].copy_(made[: int(starts[-1])])


class FlashInfer(Record):
    """The package, its wrappers recorded as ``plan``, then ``run``. Log-sum-exps are to base 2."""

    def modules(self) -> dict[str, types.ModuleType]:
        """What goes into ``sys.modules``."""
        record = self

        class Wrapper:
            decodes = False

            def __init__(self, _workspace: Tensor, *_layout: str, **options: Any) -> None:
                self.options = options

            def plan(self, *args: Any, **kwargs: Any) -> None:
                record.add(*args, **kwargs)
                self.lists = [torch.arange(len(args[0])), *args[:3]] if self.decodes else list(args[:4])
                self.block = args[6 if self.decodes else 7]
                self.scale, self.causal = kwargs["sm_scale"], kwargs.get("causal", False)

            def lengths(self) -> list[int]:
                _starts, blocks, _ids, last = self.lists
                counts = zip(blocks.diff().tolist(), last.tolist(), strict=True)
                return [(count - 1) * self.block + rest if count else 0 for count, rest in counts]

            def run(self, q: Tensor, cache: tuple[Tensor, Tensor], return_lse: bool, **more: Any) -> Any:
                record.add(q, *cache, **more)
                return self.answer(q, *cache, return_lse)

            def answer(
                self, q: Tensor, k: Tensor, v: Tensor, return_lse: bool, q_v: Tensor | None = None
            ) -> Any:
                starts, blocks, ids, _last = self.lists
                sequences = [ids[begin:end] for begin, end in itertools.pairwise(blocks.tolist())]
                lengths = torch.tensor(self.lengths())
                padded = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
                out, lse = each(q, k, v, starts, lengths, padded, self.scale, self.causal, q_v)
                return (out, lse / math.log(2)) if return_lse else out

        class Decode(Wrapper):
            decodes = True

        class Mla(Wrapper):
            def plan(self, *args: Any, **kwargs: Any) -> None:
                record.add(*args, **kwargs)
                starts, blocks, ids, lengths, *_sizes, self.block, self.causal, self.scale, _q, _k = args
                self.lists = [starts, blocks, ids, lengths]

            def lengths(self) -> list[int]:
                return list(self.lists[3].tolist())

            def run(self, *args: Any, return_lse: bool = False, **_more: Any) -> Any:
                record.add(*args)
                q_v, q, v, k = args
                return self.answer(q, k[:, :, None], v[:, :, None], return_lse, q_v)

        names: dict[str, dict[str, Any]] = {
            "flashinfer": {"__version__": "0.0"},
            "flashinfer.mla": {"BatchMLAPagedAttentionWrapper": Mla},
            "flashinfer.prefill": {"BatchPrefillWithPagedKVCacheWrapper": Wrapper},
            "flashinfer.decode": {"BatchDecodeWithPagedKVCacheWrapper": Decode},
        }
        made = {}
        for name, content in names.items():
            module = made[name] = types.ModuleType(name)
            module.__dict__.update(content)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        return made
