"""Attention over a KV cache that is sharded over the ranks of a process group.

Each rank holds some tokens of every sequence, attends over those alone, and the partial rows are merged by
their lse (:mod:`anystride.merge`). A call takes one collective for that, and one more where each rank has
query heads of its own: they are gathered first. Works with NCCL on GPUs and with gloo on the CPU.

    decode = ShardedDecode(group, num_q_heads=4, num_kv_heads=1, d_qk=576, d_v=512, softmax_scale=scale)
    lengths = shard_lengths(total_lengths, decode.world_size, decode.rank, interleave=1)
    out = decode(q, k, v, 1, cu_seqlens_q, max_seqlen_k, seqused_k=lengths,
                 cp_tot_seqused_k=total_lengths, block_table=block_table)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from anystride import __version__, flash_attn_varlen_func, get_scheduler_metadata, memory
from anystride.errors import Fault, InvalidInputError
from anystride.merge import merge
from anystride.plan import backend_named
from anystride.problem import Q_DTYPES, Faults, in_words

__all__ = ["ShardedDecode", "shard_lengths"]

# Under its new name, if it has one: torch 2.13 warns of the old one. A torch without collectives has neither.
_all_gather: Any = getattr(dist, "all_gather_single", getattr(dist, "all_gather_into_tensor", None))

# A shard is one run of tokens where no shard is as long as the interleave: positions within it are those of
# rank 0 of 2, and the length over all ranks, less the shard's start, says where the queries stand.
WHOLE_SHARD = 1 << 29  # tokens; twice as many are still an int32


class ShardedDecode:
    """Attention over a sharded cache, for the ranks of one group.

    What all ranks must agree on is given here, once, and compared: the constructor is a collective, which
    every rank of the group must call, outside of a CUDA graph. Calls then carry tensors only.

    Args:
        group: The ranks that share the cache; None is all of them.
        num_q_heads: Query heads of a call on one rank.
        num_kv_heads: KV heads of the cache, which are the same on every rank.
        d_qk, d_v: Elements in a row of K, of V.
        dtype: Of ``q`` and ``out``.
        q_v: Whether calls use the ``q_v`` form.
        softmax_scale, causal, window_size, softcap: As in :func:`anystride.flash_attn_varlen_func`.
        cp_interleave: Token ``p`` lives on rank ``(p // cp_interleave) % world_size``. None: each rank holds
            one run of tokens of each sequence, of any length, and calls say where it begins
            (``shard_starts``).
        gather_heads: True: ``num_q_heads`` are a rank's own, as under tensor parallelism; the heads of the
            group are those of rank 0, then those of rank 1, and so on, and each rank gets its own rows back.
            False: every rank passes the same queries, and every rank gets the whole result.

    Attributes:
        group: The process group.
        world_size: Its ranks.
        rank: This one, counted in the group.

    Raises:
        InvalidInputError: On every rank, if they disagree; or if there is no process group here.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        num_q_heads: int,
        num_kv_heads: int,
        d_qk: int,
        d_v: int,
        dtype: torch.dtype = torch.bfloat16,
        q_v: bool = False,
        softmax_scale: float | None = None,
        causal: bool = True,
        window_size: Sequence[int] | None = None,
        softcap: float = 0.0,
        cp_interleave: int | None = 1,
        gather_heads: bool = True,
    ) -> None:
        _check_surroundings(group)
        self.group = group
        self.world_size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self.window = (-1, -1) if window_size is None else tuple(window_size)
        self.facts = {
            "num_q_heads": num_q_heads,
            "num_kv_heads": num_kv_heads,
            "d_qk": d_qk,
            "d_v": d_v,
            "dtype": dtype,
            "q_v": q_v,
            "softmax_scale": softmax_scale,
            "causal": causal,
            "window_size": self.window,
            "softcap": softcap,
            "cp_interleave": cp_interleave,
            "gather_heads": gather_heads,
        }
        self.num_q_heads, self.num_kv_heads, self.d_qk, self.d_v = num_q_heads, num_kv_heads, d_qk, d_v
        self.dtype, self.has_q_v, self.softmax_scale, self.softcap = dtype, q_v, softmax_scale, softcap
        self.causal, self.cp_interleave, self.gather_heads = causal, cp_interleave, gather_heads
        _agree(self.facts | {"anystride.__version__": __version__}, group)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        max_seqlen_q: int,
        cu_seqlens_q: Tensor,
        max_seqlen_k: int,
        *,
        seqused_k: Tensor | None = None,
        cp_tot_seqused_k: Tensor | None = None,
        shard_starts: Tensor | None = None,
        q_v: Tensor | None = None,
        s_aux: Tensor | None = None,
        out: Tensor | None = None,
        return_softmax_lse: bool = False,
        **local: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend over this rank's tokens and merge with the other ranks: a collective.

        All ranks must call with the same query tokens, in the same order of calls.

        Args:
            q: ``[total_q, num_q_heads, d_qk]``, any strides.
            k, v: This rank's cache, as :func:`anystride.flash_attn_varlen_func` takes it: paged or not, any
                strides, fp8 or not; block sizes may differ from rank to rank. Read in place.
            max_seqlen_q, cu_seqlens_q: As there; the same on every rank.
            max_seqlen_k: Upper bound on the tokens of a sequence on this rank.
            seqused_k: ``[batch]`` int32: tokens on this rank, 0 allowed (:func:`shard_lengths`).
            cp_tot_seqused_k: ``[batch]`` int32: tokens on all ranks. May be left out where nothing is masked
                by position: no window, no alibi, and ``causal`` False or one query token a sequence.
            shard_starts: ``[batch]`` int32, with ``cp_interleave=None`` only: where in the sequence this
                rank's run of tokens begins. Needed where ``cp_tot_seqused_k`` is.
            q_v: ``[total_q, num_q_heads, d_v]``.
            s_aux: ``[num_q_heads]``: sinks of this rank's heads. They count once, in the merged row.
            out: ``[total_q, num_q_heads, d_v]``, any strides that do not overlap: written and returned.
            return_softmax_lse: Also return ``lse``, of the merged rows.
            **local: What else the call over this rank's tokens takes: ``block_table``, ``cu_seqlens_k``,
                descales, scale caches, ``scheduler_metadata``, ``num_splits``, ``batch_invariant``,
                ``backend``; ``alibi_slopes`` of all heads of the group if they are gathered.

        Returns:
            ``out`` ``[total_q, num_q_heads, d_v]``; with ``return_softmax_lse`` also ``lse``
            ``[num_q_heads, total_q]`` float32. Rows of ``q`` that belong to no sequence hold anything.

        Raises:
            InvalidInputError, UnsupportedError: On this rank. The others wait for it in their collective
                until the group's timeout ends them: treat it as fatal, as every error between collectives.
        """
        self._check_call(q, k, v, q_v, s_aux, out, local)
        masked = self._masked(max_seqlen_q, local.get("alibi_slopes"))
        positions = self._positions(cp_tot_seqused_k, shard_starts) if masked else {}
        if self.gather_heads:
            q, q_v = self._gather_queries(q, q_v)
        send, partial_out, partial_lse = self._partial_rows(q)
        _, lse = flash_attn_varlen_func(
            q, k, v, max_seqlen_q, cu_seqlens_q, max_seqlen_k, seqused_k=seqused_k, q_v=q_v,
            softmax_scale=self.softmax_scale, softcap=self.softcap, return_softmax_lse=True, out=partial_out,
            **positions, **local,
        )  # fmt: skip
        partial_lse.copy_(lse)
        outs, lses = self._exchange(send, q.shape[0])
        out, lse = _merged(outs, lses, s_aux, out)
        return (out, lse) if return_softmax_lse else out

    def scheduler_metadata(
        self,
        seqused_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        cu_seqlens_q: Tensor | None = None,
    ) -> Tensor:
        """Share out the work of a step on this rank, once for all layers; not a collective.

        Use this one: the schedule is that of all heads that are gathered, and, as shards are visited whole,
        it knows no window.

        Args:
            seqused_k: ``[batch]`` int32: tokens on this rank, as in the calls.
            max_seqlen_q, max_seqlen_k, cu_seqlens_q: As in the calls.

        Returns:
            int32, for the ``scheduler_metadata`` of calls.
        """
        heads = self.num_q_heads * (self.world_size if self.gather_heads else 1)
        return get_scheduler_metadata(
            seqused_k.shape[0], max_seqlen_q, max_seqlen_k, heads, self.num_kv_heads, self.d_qk, seqused_k,
            self.dtype, self.d_v, cu_seqlens_q, causal=self.causal and max_seqlen_q > 1,
        )  # fmt: skip

    def _check_call(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_v: Tensor | None,
        s_aux: Tensor | None,
        out: Tensor | None,
        local: dict[str, Any],
    ) -> None:
        """What would break a collective, or the agreement, is found before the first collective."""
        faults = Faults()
        wanted = (self.num_q_heads, self.d_qk)
        faults.need(
            q.dim() == 3 and q.shape[1:] == wanted and q.dtype == self.dtype,
            "q must be as the ranks have agreed.",
            in_words(q),
            f"{self.dtype} [total_q, {wanted[0]}, {wanted[1]}]",
        )
        faults.need(
            k.shape[-2] == self.num_kv_heads and v.shape[-1] == self.d_v,
            "the cache must be as the ranks have agreed.",
            f"k {list(k.shape)}, v {list(v.shape)}",
            f"num_kv_heads = {self.num_kv_heads}, d_v = {self.d_v}",
        )
        form = "q_v is given" if self.has_q_v else "q_v is not given"
        faults.need(
            (q_v is not None) == self.has_q_v,
            "q_v must be given if and only if the ranks have agreed on it.",
            "q_v = None" if q_v is None else f"q_v {in_words(q_v)}",
            form,
        )
        rows = (*q.shape[:2], self.d_v)
        for name, tensor, shape, dtypes in (
            ("q_v", q_v, rows, (self.dtype,)),
            ("out", out, rows, (self.dtype,)),
            ("s_aux", s_aux, q.shape[1:2], (torch.float32, *Q_DTYPES)),
        ):
            faults.need(
                tensor is None
                or (tensor.shape == shape and tensor.dtype in dtypes and tensor.device == q.device),
                f"{name} must fit q.",
                "" if tensor is None else in_words(tensor),
                f"{' or '.join(map(str, dtypes))} {list(shape)} on {q.device}",
            )
        for name in sorted(local.keys() & {*self.facts, *COMPUTED}):
            faults.need(
                False,
                f"{name} is not an argument of a call: all ranks agree on it at construction.",
                f"{name} = {local[name]!r}",
            )
        if faults:
            raise InvalidInputError("ShardedDecode", faults)

    def _masked(self, max_seqlen_q: int, alibi_slopes: Tensor | None) -> bool:
        """Whether it matters where in the sequence a key stands.

        The last token of a sequence sees all of its keys: with one query token, causal hides nothing.
        """
        left, right = self.window
        bounded = left >= 0 or (right >= 0 and not self.causal)
        return bounded or alibi_slopes is not None or (self.causal and max_seqlen_q > 1)

    def _positions(self, total: Tensor | None, starts: Tensor | None) -> dict[str, Any]:
        """The arguments of the local call that say where this rank's tokens stand in their sequences."""
        if total is None or (starts is None) != (self.cp_interleave is not None):
            raise InvalidInputError("ShardedDecode", [_missing(total, starts, self.cp_interleave)])
        masks = {"causal": self.causal, "window_size": self.window}
        if self.cp_interleave is None:
            assert starts is not None  # just checked
            return masks | {
                "cp_world_size": 2,
                "cp_rank": 0,
                "cp_interleave": WHOLE_SHARD,
                "cp_tot_seqused_k": total - starts,
            }
        return masks | {
            "cp_world_size": self.world_size,
            "cp_rank": self.rank,
            "cp_interleave": self.cp_interleave,
            "cp_tot_seqused_k": total,
        }

    def _gather_queries(self, q: Tensor, q_v: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The queries of all heads of the group, as views of what was received: heads are outermost in it."""
        total_q, heads, d_qk = q.shape
        width = d_qk + (0 if q_v is None else q_v.shape[-1])
        own = memory.allocate((heads, total_q, width), q.dtype, q.device)
        own[..., :d_qk].copy_(q.transpose(0, 1))
        if q_v is not None:
            own[..., d_qk:].copy_(q_v.transpose(0, 1))
        gathered = memory.allocate((self.world_size * heads, total_q, width), q.dtype, q.device)
        _all_gather(gathered.view(torch.uint8), own.view(torch.uint8), self.group)
        rows = gathered.transpose(0, 1)
        return rows[..., :d_qk], None if q_v is None else rows[..., d_qk:]

    def _partial_rows(self, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What this rank sends, ``[heads, numbers]``, and the views of it that its results are written to.

        A head has its rows of ``out``, ``[total_q, d_v]``, then its ``lse``, ``[total_q]`` float32, in the
        same memory: one collective moves both, and a rank's heads are neighbours.
        """
        total_q, heads, _ = q.shape
        send = memory.allocate(
            (heads, _head_bytes(total_q, self.d_v, q.dtype) // q.itemsize), q.dtype, q.device
        )
        return send, *self._views(send, total_q)

    def _views(self, buffer: Tensor, total_q: int) -> tuple[Tensor, Tensor]:
        """``out`` ``[..., total_q, heads, d_v]`` and ``lse`` ``[..., heads, total_q]`` in a buffer."""
        out = buffer[..., : total_q * self.d_v].unflatten(-1, (total_q, self.d_v)).transpose(-2, -3)
        first = _out_bytes(total_q, self.d_v, buffer.dtype) // 4
        return out, buffer.view(torch.float32)[..., first : first + total_q]

    def _exchange(self, send: Tensor, total_q: int) -> tuple[Tensor, Tensor]:
        """The partial rows of every rank, for this rank's heads, or for all: as :func:`merge` takes them."""
        shape = (self.world_size, self.num_q_heads, send.shape[1])
        received = memory.allocate(shape, send.dtype, send.device)
        to, come_from = received.flatten(0, 1).view(torch.uint8), send.view(torch.uint8)
        if self.gather_heads:
            dist.all_to_all_single(to, come_from, group=self.group)
        else:
            _all_gather(to, come_from, self.group)
        return self._views(received, total_q)


# Arguments of the entry that a call computes itself.
COMPUTED = ("cp_world_size", "cp_rank")


def shard_lengths(cp_tot_seqused_k: Tensor, world_size: int, rank: int, interleave: int) -> Tensor:
    """How many of each sequence's tokens live on a rank; computed where the lengths are, without waiting.

    Token ``p`` lives on rank ``(p // interleave) % world_size``, as its token
    ``p // (interleave * world_size) * interleave + p % interleave`` of that sequence.

    Args:
        cp_tot_seqused_k: ``[batch]`` int32: tokens on all ranks.
        world_size: Ranks.
        rank: Which.
        interleave: Neighbouring tokens on one rank.

    Returns:
        ``[batch]`` int32.
    """
    turn = interleave * world_size
    rest = cp_tot_seqused_k % turn - rank * interleave
    return cp_tot_seqused_k // turn * interleave + rest.clamp(0, interleave)


def _out_bytes(total_q: int, d_v: int, dtype: torch.dtype) -> int:
    """Of a head's rows of ``out``, up to where its ``lse`` begins."""
    return _rounded(total_q * d_v * dtype.itemsize)


def _head_bytes(total_q: int, d_v: int, dtype: torch.dtype) -> int:
    """Of all that is sent of a head."""
    return _rounded(_out_bytes(total_q, d_v, dtype) + 4 * total_q)


def _rounded(size: int) -> int:
    """Up to 16 bytes, so that rows of every head can be moved 16 bytes at a time."""
    return -(-size // 16) * 16


def _merged(outs: Tensor, lses: Tensor, s_aux: Tensor | None, out: Tensor | None) -> tuple[Tensor, Tensor]:
    """The merged rows, in ``out`` if it is given."""
    if _merges_in_triton(outs.device):
        if out is None:
            out = memory.allocate(tuple(outs.shape[1:]), outs.dtype, outs.device)
        lse = memory.allocate(tuple(lses.shape[1:]), lses.dtype, lses.device)
        backend_named("triton_merge").run(outs, lses, s_aux, out, lse)
        return out, lse
    merged, lse = merge(outs, lses, s_aux)
    return (merged if out is None else out.copy_(merged)), lse


@cache
def _merges_in_triton(device: torch.device) -> bool:
    """Whether one kernel merges, in place of a dozen of PyTorch's."""
    if device.type == "cpu":
        return False
    backend = backend_named("triton_merge")
    return backend is not None and not backend.refusals(device)


def _missing(total: Tensor | None, starts: Tensor | None, cp_interleave: int | None) -> Fault:
    got = f"cp_tot_seqused_k {'is' if total is None else 'is not'} None, "
    got += f"shard_starts {'is' if starts is None else 'is not'} None, cp_interleave = {cp_interleave}"
    return Fault(
        "masks by position need to know where this rank's tokens stand.",
        got,
        "cp_tot_seqused_k, and shard_starts if and only if cp_interleave is None",
    )


def _check_surroundings(group: dist.ProcessGroup | None) -> None:
    """Raise InvalidInputError where there is no group to agree in."""
    if not dist.is_available() or not dist.is_initialized():
        fault = Fault(
            "there is no process group.",
            "torch.distributed is not initialised",
            do='torch.distributed.init_process_group("nccl")',
        )
    elif dist.get_rank(group) < 0:
        fault = Fault("this rank is not in the group.", f"rank {dist.get_rank()} of all")
    elif torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        fault = Fault(
            "ranks cannot agree while a CUDA graph is captured.",
            "the current stream is being captured",
            "one ShardedDecode, made before the capture; its calls may be captured",
        )
    else:
        return
    raise InvalidInputError("ShardedDecode", [fault])


def _agree(facts: dict[str, Any], group: dist.ProcessGroup | None) -> None:
    """Raise the same InvalidInputError on every rank unless all have the same facts."""
    mine = {name: str(fact) for name, fact in facts.items()}
    told: list[dict[str, str] | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(told, mine, group)
    faults = []
    for name in mine:
        values: dict[str, list[int]] = {}
        for rank, other in enumerate(told):
            values.setdefault("nothing" if other is None else other.get(name, "nothing"), []).append(rank)
        if len(values) > 1:
            got = "; ".join(f"{value} on rank {', '.join(map(str, who))}" for value, who in values.items())
            faults.append(Fault(f"the ranks disagree about {name}.", got, "the same on every rank"))
    if faults:
        raise InvalidInputError("ShardedDecode", faults)
