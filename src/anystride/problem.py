"""The frozen facts of one call, the checks of its arguments, and the relation between K and V.

Looks at shapes, strides, dtypes, devices and addresses; never at values, so it never synchronises.
Knows nothing of backends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from anystride.errors import Fault, InvalidInputError

__all__ = ["Call", "Problem", "Relation", "find_relation"]

OPERATION = "flash_attn_varlen_func"

Q_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FP8_NAMES = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
FP8_DTYPES = tuple(FP8_NAMES)
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # integers of the same width, by bytes of an element

SCALE_CACHES = ("k_scale_cache", "v_scale_cache")

MAX_HEAD_DIM = 576  # widest row that the contract names: 512 latent + 64 rope


class Relation(NamedTuple):
    """How V lies in memory, seen from K.

    Attributes:
        kind: ``v_in_k``: V's row is a part of K's row, the same bytes. ``neighbours``: V's row starts
            where K's ends, or ends where K's starts. ``split_latent``: the same, in the ``q_v`` form.
            ``separate``: everything else.
        offset: Where V's row begins, counted in K's row, in units of K's last-dim stride; ``d_qk``
            for a V right after K, ``-d_v`` for a V right before it, 0 for ``separate``.
    """

    kind: Literal["separate", "v_in_k", "neighbours", "split_latent"]
    offset: int


class Call(NamedTuple):
    """The tensors and run-time numbers of one call, checked, in one canonical form.

    ``k`` and ``v`` are 5-D ``[num_pages, blocks_per_page, block_size, num_kv_heads, d]`` when paged, and
    3-D ``[total_k, num_kv_heads, d]`` when not. Descales are None, a Python float, or a float32 view
    ``[batch, num_kv_heads]``; scale caches None or a float32 view ``[num_pages, blocks_per_page, block_size,
    num_kv_heads, groups]``, ``[total_k, num_kv_heads, groups]`` when not paged; ``alibi_slopes`` None or a
    float32 view ``[batch, num_q_heads]``.
    """

    q: torch.Tensor  # [total_q, num_q_heads, d_qk]
    k: torch.Tensor
    v: torch.Tensor
    q_v: torch.Tensor | None  # [total_q, num_q_heads, d_v]
    cu_seqlens_q: torch.Tensor  # [batch + 1] int32
    cu_seqlens_k: torch.Tensor | None  # [batch + 1] int32, only without block_table
    seqused_k: torch.Tensor | None  # [batch] int32; None: lengths are the differences of cu_seqlens_k
    block_table: torch.Tensor | None  # [batch, max_blocks] int32
    alibi_slopes: torch.Tensor | None
    s_aux: torch.Tensor | None  # [num_q_heads]
    q_descale: torch.Tensor | float | None
    k_descale: torch.Tensor | float | None
    v_descale: torch.Tensor | float | None
    k_scale_cache: torch.Tensor | None  # float32, a scale for each token and head, or group of dimensions
    v_scale_cache: torch.Tensor | None
    cp_tot_seqused_k: torch.Tensor | None  # [batch] int32
    scheduler_metadata: torch.Tensor | None
    out: torch.Tensor  # [total_q, num_q_heads, d_v]
    lse: torch.Tensor | None  # [num_q_heads, total_q] float32


@dataclass(frozen=True)
class Problem:
    """Everything that decides how a call is run, and nothing that changes from token to token.

    Strides are in elements. The stride of a dimension of size 1 is written as 0: it is never used, and
    engines leave absurd numbers there. Alignments are in bytes, at most 16: the largest power of two
    that divides the base address.
    """

    device: torch.device
    dtype: torch.dtype  # of q, q_v and out
    k_dtype: torch.dtype
    v_dtype: torch.dtype
    batch: int
    total_q: int
    max_seqlen_q: int  # upper bound, at least 1
    max_keys: int  # upper bound on the keys of a sequence, from max_seqlen_k and the table's width
    num_q_heads: int
    num_kv_heads: int
    d_qk: int
    d_v: int
    has_q_v: bool
    paged: bool
    num_pages: int
    blocks_per_page: int  # 1 for a 4-D cache
    block_size: int  # tokens; 1 without block_table
    relation: Relation
    q_strides: tuple[int, int, int]  # token, head, dim
    q_v_strides: tuple[int, int, int]  # zeros without q_v
    k_strides: tuple[int, int, int, int, int]  # page, block, token, head, dim
    v_strides: tuple[int, int, int, int, int]
    out_strides: tuple[int, int, int]
    table_strides: tuple[int, int]
    q_align: int
    q_v_align: int
    k_align: int
    v_align: int
    out_align: int
    softmax_scale: float
    causal: bool
    window_left: int  # tokens, inclusive; -1 unbounded
    window_right: int  # tokens, inclusive; -1 unbounded; 0 when causal
    softcap: float  # 0.0: none
    has_alibi: bool
    has_sinks: bool
    has_lse: bool
    has_q_descale: bool
    has_k_descale: bool
    has_v_descale: bool
    k_scale_groups: int  # scales of a row of K, each for as many dimensions; 0: no k_scale_cache
    v_scale_groups: int
    k_scale_strides: tuple[int, int, int, int, int]  # page, block, token, head, group; zeros without
    v_scale_strides: tuple[int, int, int, int, int]
    cp_world_size: int
    cp_rank: int
    cp_interleave: int
    num_splits: int  # 0: the backend chooses
    batch_invariant: bool
    deterministic: bool
    metadata_words: int  # length of the scheduler_metadata given; 0: none

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def kv_row_bytes(self) -> int:
        """Bytes of one token and KV head that must be moved, scales included; V's in K's row counted once."""
        k_bytes = self.d_qk * self.k_dtype.itemsize
        v_bytes = 0 if self.relation.kind == "v_in_k" else self.d_v * self.v_dtype.itemsize
        return k_bytes + v_bytes + 4 * (self.k_scale_groups + self.v_scale_groups)


class Numbers(NamedTuple):
    """The arguments of a call that are no tensors, as given (``max_keys`` apart)."""

    max_seqlen_q: int
    max_keys: int  # max_seqlen_k, rounded up to a power of two: its exact value must not matter
    softmax_scale: float | None
    causal: bool
    window: tuple[int, int]
    softcap: float
    num_splits: int
    deterministic: bool
    batch_invariant: bool
    cp_world_size: int
    cp_rank: int
    cp_interleave: int
    wants_lse: bool


def bucket(n: int) -> int:
    """The smallest power of two that is not below ``n``; 1 for ``n`` below 1."""
    return 1 << max(n - 1, 0).bit_length()


def alignment(tensor: torch.Tensor) -> int:
    """The largest power of two, up to 16 bytes, that divides the tensor's address."""
    low = tensor.data_ptr() & 15
    return low & -low or 16


def used_strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Strides with 0 in place of those that no element uses (dimensions of size 1)."""
    return tuple(0 if n == 1 else s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def row_offset(k: torch.Tensor, v: torch.Tensor) -> int | None:
    """Where V's row begins in K's row, in units of the last-dim stride, if their strides agree.

    None where no such number exists: unlike strides or dtypes, or an address between two elements.
    Two tensors that do not share memory can agree in strides by chance; the number then lies far
    outside of the row and means nothing.
    """
    if k.dtype != v.dtype or k.device != v.device or k.dim() != v.dim():
        return None
    for n, s_k, s_v in zip(k.shape[:-1], k.stride(), v.stride(), strict=False):
        if n != 1 and s_k != s_v:
            return None
    dims = [(t.shape[-1], t.stride(-1)) for t in (k, v)]
    steps = {stride for size, stride in dims if size > 1}
    if len(steps) > 1:
        return None
    step = (steps.pop() if steps else 1) * k.dtype.itemsize
    distance = v.data_ptr() - k.data_ptr()
    if step == 0 or distance % step:
        return None
    return distance // step


def find_relation(k: torch.Tensor, v: torch.Tensor, has_q_v: bool) -> Relation:
    """Tell how V lies in memory, seen from K: from addresses and strides alone.

    Args:
        k: ``[..., d_qk]``, any strides.
        v: ``[..., d_v]``, the other dimensions as those of ``k``.
        has_q_v: Whether V also takes part in the scores (the ``q_v`` form of MLA).

    Returns:
        The relation; ``separate`` when in doubt. Strides of dimensions of size 1 are ignored.
    """
    offset = row_offset(k, v)
    d_qk, d_v = k.shape[-1], v.shape[-1]
    if offset is None:
        return Relation("separate", 0)
    if not has_q_v and 0 <= offset <= d_qk - d_v:
        return Relation("v_in_k", offset)
    if offset in (d_qk, -d_v) and _same_row(k, v, offset):
        return Relation("split_latent" if has_q_v else "neighbours", offset)
    return Relation("separate", 0)


def _same_row(k: torch.Tensor, v: torch.Tensor, offset: int) -> bool:
    """Whether ``d_qk + d_v`` elements fit before the next row starts, so that V cannot be another row."""
    width = k.shape[-1] + v.shape[-1]
    step = k.stride(-1) if k.shape[-1] > 1 else v.stride(-1)
    span = (width - 1) * step
    outer = [s for n, s in zip(k.shape[:-1], k.stride(), strict=False) if n > 1 and s > 0]
    if step == 1:
        return all(s >= width for s in outer)
    return all(s > span or s < step for s in outer)


def shares_memory(tensor: torch.Tensor) -> bool:
    """Whether several of its elements are plainly the same: a dimension that was expanded."""
    return any(n > 1 and s == 0 for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def in_words(tensor: object) -> str:
    """A tensor, or what stands in its place, in a message."""
    if not isinstance(tensor, torch.Tensor):
        return f"{type(tensor).__name__} {tensor!r}"
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{dtype} {list(tensor.shape)} strides {tuple(tensor.stride())} on {tensor.device}"


class Faults(list[Fault]):
    """What is wrong with a call, in the order in which it was found."""

    def need(self, holds: bool, what: str, got: str, needs: str = "", do: str = "") -> bool:
        """Note a fault unless something holds; returns whether it does."""
        if not holds:
            self.append(Fault(what, got, needs, do))
        return holds


def make_problem(call: Call, numbers: Numbers) -> Problem:
    """Check the arguments of a call and state its facts.

    Args:
        call: The tensors as the caller gave them: ``k`` and ``v`` with 3, 4 or 5 dimensions, descales as
            floats or tensors, ``out`` possibly not allocated yet (then ``call.out`` is None).
        numbers: The other arguments.

    Returns:
        The frozen facts.

    Raises:
        InvalidInputError: With every fault that was found.
    """
    faults = Faults()
    _check_tensors(call, faults)
    if faults:
        raise InvalidInputError(OPERATION, faults)
    _check_shapes(call, faults)
    _check_extras(call, numbers, faults)
    _check_numbers(call, numbers, faults)
    if faults:
        raise InvalidInputError(OPERATION, faults)

    q, k, v = call.q, call.k, call.v
    paged = call.block_table is not None
    d_qk, d_v = q.shape[2], v.shape[-1]
    left, right = numbers.window
    if numbers.causal:
        right = 0
    max_keys = numbers.max_keys
    block_size = k.shape[-3] if paged else 1
    if call.block_table is not None:
        max_keys = min(max_keys, bucket(call.block_table.shape[1] * block_size))
    else:
        max_keys = min(max_keys, bucket(k.shape[0]))
    scale = numbers.softmax_scale
    if scale is None:
        scale = (d_qk + (d_v if call.q_v is not None else 0)) ** -0.5
    zeros = (0, 0, 0)
    k_scales, v_scales = (scale_rows(x, k.shape[-2]) for x in (call.k_scale_cache, call.v_scale_cache))
    return Problem(
        device=q.device,
        dtype=q.dtype,
        k_dtype=k.dtype,
        v_dtype=v.dtype,
        batch=call.cu_seqlens_q.shape[0] - 1,
        total_q=q.shape[0],
        max_seqlen_q=max(numbers.max_seqlen_q, 1),
        max_keys=max_keys,
        num_q_heads=q.shape[1],
        num_kv_heads=k.shape[-2],
        d_qk=d_qk,
        d_v=d_v,
        has_q_v=call.q_v is not None,
        paged=paged,
        num_pages=k.shape[0],
        blocks_per_page=k.shape[1] if k.dim() == 5 else 1,
        block_size=block_size,
        relation=find_relation(k, v, call.q_v is not None),
        q_strides=used_strides(q),  # type: ignore[arg-type]
        q_v_strides=zeros if call.q_v is None else used_strides(call.q_v),  # type: ignore[arg-type]
        k_strides=_cache_strides(k),
        v_strides=_cache_strides(v),
        out_strides=(q.shape[1] * d_v, d_v, 1) if call.out is None else call.out.stride(),  # type: ignore[arg-type]
        table_strides=(0, 0) if call.block_table is None else used_strides(call.block_table),  # type: ignore[arg-type]
        q_align=alignment(q),
        q_v_align=16 if call.q_v is None else alignment(call.q_v),
        k_align=alignment(k),
        v_align=alignment(v),
        out_align=16 if call.out is None else alignment(call.out),
        softmax_scale=float(scale),
        causal=numbers.causal,
        window_left=left,
        window_right=right,
        softcap=float(numbers.softcap),
        has_alibi=call.alibi_slopes is not None,
        has_sinks=call.s_aux is not None,
        has_lse=numbers.wants_lse,
        has_q_descale=call.q_descale is not None,
        has_k_descale=call.k_descale is not None,
        has_v_descale=call.v_descale is not None,
        k_scale_groups=0 if k_scales is None else k_scales.shape[-1],
        v_scale_groups=0 if v_scales is None else v_scales.shape[-1],
        k_scale_strides=(0,) * 5 if k_scales is None else _cache_strides(k_scales),
        v_scale_strides=(0,) * 5 if v_scales is None else _cache_strides(v_scales),
        cp_world_size=numbers.cp_world_size,
        cp_rank=numbers.cp_rank,
        cp_interleave=numbers.cp_interleave,
        num_splits=numbers.num_splits,
        batch_invariant=numbers.batch_invariant,
        deterministic=numbers.deterministic,
        metadata_words=0 if call.scheduler_metadata is None else call.scheduler_metadata.shape[0],
    )


def _cache_strides(cache: torch.Tensor) -> tuple[int, int, int, int, int]:
    """Strides as (page, block, token, head, dim), 0 where the cache has no such dimension."""
    strides = used_strides(cache)
    if cache.dim() == 3:
        return (0, 0, *strides)  # type: ignore[return-value]
    if cache.dim() == 4:
        return (strides[0], 0, *strides[1:])  # type: ignore[return-value]
    return strides  # type: ignore[return-value]


def canonical(problem: Problem, call: Call) -> Call:
    """The call with its views in one form: see :class:`Call`. Makes views only, never copies."""
    k, v = call.k, call.v
    k_scales, v_scales = (scale_rows(x, k.shape[-2]) for x in (call.k_scale_cache, call.v_scale_cache))
    if problem.paged and k.dim() == 4:
        k, v = k.unsqueeze(1), v.unsqueeze(1)
        k_scales, v_scales = (x if x is None else x.unsqueeze(1) for x in (k_scales, v_scales))
    heads = (problem.batch, problem.num_kv_heads)
    alibi = call.alibi_slopes
    return call._replace(
        k=k,
        v=v,
        alibi_slopes=alibi if alibi is None else alibi.expand(problem.batch, problem.num_q_heads),
        q_descale=_expand_descale(call.q_descale, heads),
        k_descale=_expand_descale(call.k_descale, heads),
        v_descale=_expand_descale(call.v_descale, heads),
        k_scale_cache=k_scales,
        v_scale_cache=v_scales,
    )


def scale_rows(scales: torch.Tensor | None, num_kv_heads: int) -> torch.Tensor | None:
    """The scales of each row and head, ``[..., num_kv_heads, groups]``: a view of ``[..., n]``."""
    return scales if scales is None else scales.unsqueeze(-2 if num_kv_heads == 1 else -1)


def _expand_descale(
    descale: torch.Tensor | float | None, heads: tuple[int, int]
) -> torch.Tensor | float | None:
    if not isinstance(descale, torch.Tensor):
        return descale
    return descale.reshape(()).expand(heads) if descale.numel() == 1 else descale


def _check_tensors(call: Call, faults: Faults) -> None:
    """Kinds, number of dimensions, dtypes and devices: what the later checks rely on."""
    for name, tensor in call._asdict().items():
        if tensor is None and name not in ("q", "k", "v", "cu_seqlens_q"):
            continue
        if isinstance(tensor, float | int) and name.endswith("_descale"):
            continue
        faults.need(
            isinstance(tensor, torch.Tensor),
            f"{name} must be a tensor.",
            f"{type(tensor).__name__}",
            "torch.Tensor",
        )
    if faults:  # the other checks look into them
        return
    device = call.q.device
    for name, tensor in call._asdict().items():
        if not isinstance(tensor, torch.Tensor):
            continue
        faults.need(
            tensor.device == device,
            f"{name} must be on the device of q.",
            f"{in_words(tensor)}",
            f"{device}",
            f"{name} = {name}.to(q.device)" if name not in ("k", "v", "out", *SCALE_CACHES) else "",
        )
    dims = {"q": (3,), "q_v": (3,), "out": (3,), "s_aux": (1,), "alibi_slopes": (1, 2)}
    dims |= {"cu_seqlens_q": (1,), "cu_seqlens_k": (1,), "seqused_k": (1,), "lse": (2,)}
    dims |= {"cp_tot_seqused_k": (1,), "block_table": (2,), "scheduler_metadata": (1,)}
    dims |= dict.fromkeys(("k", "v"), (4, 5) if call.block_table is not None else (3,))
    dims |= dict.fromkeys(SCALE_CACHES, (3, 4) if call.block_table is not None else (2,))
    shapes = {
        "q": "[total_q, num_q_heads, d_qk]",
        "q_v": "[total_q, num_q_heads, d_v]",
        "out": "[total_q, num_q_heads, d_v]",
        "block_table": "[batch, max_blocks]",
    }
    cache = (
        "[num_blocks, block_size, num_kv_heads, d] or "
        "[num_pages, blocks_per_page, block_size, num_kv_heads, d]"
        if call.block_table is not None
        else "[total_k, num_kv_heads, d] (no block_table was given)"
    )
    shapes |= {"k": cache, "v": cache}
    scales = f"the dimensions of its cache but the last: {cache.replace(', d]', ']')}"
    shapes |= {"k_scale_cache": scales, "v_scale_cache": scales}
    for name, allowed in dims.items():
        tensor = getattr(call, name)
        if isinstance(tensor, torch.Tensor):
            words = " or ".join(str(n) for n in allowed)
            faults.need(
                tensor.dim() in allowed,
                f"{name} must have {words} dimensions.",
                in_words(tensor),
                shapes.get(name, f"{words} dimensions"),
            )
    for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_k", "cp_tot_seqused_k", "block_table"):
        tensor = getattr(call, name)
        if isinstance(tensor, torch.Tensor):
            faults.need(
                tensor.dtype == torch.int32,
                f"{name} must be int32.",
                in_words(tensor),
                "int32",
                f"{name} = {name}.to(torch.int32)",
            )
    faults.need(
        call.q.dtype in Q_DTYPES,
        "q must be float16, bfloat16 or float32.",
        in_words(call.q),
        "float16, bfloat16 or float32",
        "q = q.to(torch.bfloat16)",
    )
    for name in ("k", "v"):
        tensor = getattr(call, name)
        faults.need(
            tensor.dtype in (call.q.dtype, *FP8_DTYPES),
            f"{name} must have the dtype of q, or be an fp8 cache.",
            in_words(tensor),
            f"{str(call.q.dtype).removeprefix('torch.')}, float8_e4m3fn or float8_e5m2",
        )
    for name in ("q_v", "out"):
        tensor = getattr(call, name)
        if isinstance(tensor, torch.Tensor):
            faults.need(
                tensor.dtype == call.q.dtype,
                f"{name} must have the dtype of q.",
                in_words(tensor),
                str(call.q.dtype).removeprefix("torch."),
            )
    for name in ("alibi_slopes", "s_aux", "q_descale", "k_descale", "v_descale", *SCALE_CACHES):
        tensor = getattr(call, name)
        if isinstance(tensor, torch.Tensor):
            dtypes = (torch.float32,) if "scale" in name else (torch.float32, *Q_DTYPES)
            faults.need(
                tensor.dtype in dtypes,
                f"{name} must be {'float32' if 'scale' in name else 'a floating-point tensor'}.",
                in_words(tensor),
                "float32",
                f"{name} = {name}.float()" if name not in SCALE_CACHES else "",
            )


def _check_shapes(call: Call, faults: Faults) -> None:
    q, k, v = call.q, call.k, call.v
    num_q_heads, num_kv_heads, d_qk, d_v = q.shape[1], k.shape[-2], q.shape[2], v.shape[-1]
    faults.need(
        k.shape[-1] == d_qk,
        "q and k must have the same last dimension.",
        f"q.shape[2] = {d_qk}, k.shape[{k.dim() - 1}] = {k.shape[-1]}",
        do=f"q = q[..., :{k.shape[-1]}]" if d_qk > k.shape[-1] else "",
    )
    faults.need(
        k.shape[:-1] == v.shape[:-1],
        "k and v must agree in all dimensions but the last.",
        f"k {list(k.shape)}, v {list(v.shape)}",
    )
    faults.need(
        num_kv_heads > 0 and num_q_heads > 0 and num_q_heads % num_kv_heads == 0,
        "num_q_heads must be a multiple of num_kv_heads.",
        f"num_q_heads = {num_q_heads} (q.shape[1]), num_kv_heads = {num_kv_heads} (k.shape[{k.dim() - 2}])",
    )
    for name, d in (("d_qk", d_qk), ("d_v", d_v)):
        faults.need(
            1 <= d <= MAX_HEAD_DIM,
            f"{name} must be between 1 and {MAX_HEAD_DIM}.",
            f"{name} = {d}",
        )
    if call.q_v is not None:
        wanted = [q.shape[0], num_q_heads, d_v]
        faults.need(
            list(call.q_v.shape) == wanted,
            "q_v must be [total_q, num_q_heads, d_v].",
            in_words(call.q_v),
            f"{wanted}",
        )
    if call.out is not None:
        wanted = [q.shape[0], num_q_heads, d_v]
        ok = faults.need(
            list(call.out.shape) == wanted,
            "out must be [total_q, num_q_heads, d_v].",
            in_words(call.out),
            f"{wanted}",
            f"out = torch.empty({wanted}, dtype=q.dtype, device=q.device)",
        )
        if ok:
            faults.need(
                not shares_memory(call.out),
                "out must not be expanded: each of its elements is written once.",
                in_words(call.out),
                "no stride of 0 on a dimension of size above 1",
            )
            faults.need(
                not _overlaps_itself(call.out),
                "out must not overlap itself: each of its elements is written once.",
                in_words(call.out),
                "strides that give each element an address of its own",
            )
    batch = call.cu_seqlens_q.shape[0] - 1
    faults.need(
        batch >= 0, "cu_seqlens_q must have batch + 1 entries.", in_words(call.cu_seqlens_q), "[batch + 1]"
    )
    if call.block_table is not None:
        faults.need(
            call.cu_seqlens_k is None,
            "cu_seqlens_k and block_table exclude each other.",
            f"block_table {in_words(call.block_table)}",
            "seqused_k for a paged cache, cu_seqlens_k without a block_table",
            "cu_seqlens_k=None, seqused_k=cu_seqlens_k.diff()",
        )
        faults.need(
            call.seqused_k is not None,
            "a paged cache needs seqused_k, the tokens in the cache of each sequence.",
            "seqused_k = None",
            f"int32 [{batch}]",
        )
        faults.need(
            call.block_table.shape[0] == batch,
            "block_table must have a row for each sequence.",
            in_words(call.block_table),
            f"[{batch}, max_blocks]     (batch = cu_seqlens_q.shape[0] - 1 = {batch})",
        )
        faults.need(k.shape[-3] > 0, "block_size must be at least 1 token.", f"k {list(k.shape)}")
    else:
        faults.need(
            call.cu_seqlens_k is not None,
            "cu_seqlens_k is needed when there is no block_table.",
            "cu_seqlens_k = None, block_table = None",
            f"int32 [{batch + 1}]",
        )
    for name, wanted_len in (
        ("cu_seqlens_k", batch + 1),
        ("seqused_k", batch),
        ("cp_tot_seqused_k", batch),
    ):
        tensor = getattr(call, name)
        if tensor is not None:
            faults.need(
                tensor.shape[0] == wanted_len,
                f"{name} must have {'batch + 1' if wanted_len > batch else 'batch'} entries.",
                in_words(tensor),
                f"[{wanted_len}]     (batch = cu_seqlens_q.shape[0] - 1 = {batch})",
            )


def _check_extras(call: Call, numbers: Numbers, faults: Faults) -> None:
    batch = call.cu_seqlens_q.shape[0] - 1
    num_q_heads, num_kv_heads = call.q.shape[1], call.k.shape[-2]
    if call.s_aux is not None:
        faults.need(
            call.s_aux.shape[0] == num_q_heads,
            "s_aux must have one logit for each query head.",
            in_words(call.s_aux),
            f"[{num_q_heads}]",
        )
        faults.need(
            numbers.cp_world_size == 1,
            "s_aux cannot be split over ranks: a sink belongs to the merged row.",
            f"s_aux {in_words(call.s_aux)}, cp_world_size = {numbers.cp_world_size}",
            "s_aux = None in each rank's call",
            "out, lse = anystride.merge.merge(outs, lses, s_aux=s_aux)",
        )
    if call.alibi_slopes is not None:
        faults.need(
            list(call.alibi_slopes.shape) in ([num_q_heads], [batch, num_q_heads]),
            "alibi_slopes must be [num_q_heads] or [batch, num_q_heads].",
            in_words(call.alibi_slopes),
            f"[{num_q_heads}] or [{batch}, {num_q_heads}]",
        )
    for name in ("q_descale", "k_descale", "v_descale"):
        descale = getattr(call, name)
        if isinstance(descale, torch.Tensor):
            faults.need(
                descale.numel() == 1 or list(descale.shape) == [batch, num_kv_heads],
                f"{name} must be a scalar or [batch, num_kv_heads].",
                in_words(descale),
                f"[] or [{batch}, {num_kv_heads}]",
                f"{name} = {name}.expand({batch}, {num_kv_heads})",
            )
    for name, cache in zip(SCALE_CACHES, (call.k, call.v), strict=True):
        scales = getattr(call, name)
        if scales is not None:
            faults.need(
                cache.dtype in FP8_DTYPES,
                f"{name} must belong to an fp8 cache.",
                f"{name[0]} is {str(cache.dtype).removeprefix('torch.')}",
                "float8_e4m3fn or float8_e5m2",
                f"{name}=None",
            )
            n, d = scales.shape[-1], cache.shape[-1]
            grouped = num_kv_heads == 1 and n > 0 and d % n == 0
            many = f", or with a divisor of {d} in place of the 1" if num_kv_heads == 1 else ""
            faults.need(
                scales.shape[:-1] == cache.shape[:-2] and (n == num_kv_heads or grouped),
                f"{name} must have a scale for each token and KV head of {name[0]}.",
                in_words(scales),
                f"{list(cache.shape[:-1])}{many}",
            )
    if call.scheduler_metadata is not None:
        metadata = call.scheduler_metadata
        faults.need(
            metadata.dtype == torch.int32 and metadata.stride(0) == 1 and metadata.shape[0] >= 16,
            "scheduler_metadata must come from get_scheduler_metadata.",
            in_words(metadata),
            "int32 [8 * (num_parts + 1)], stride 1",
            "scheduler_metadata = anystride.get_scheduler_metadata(...)",
        )


def _check_numbers(call: Call, numbers: Numbers, faults: Faults) -> None:
    window = numbers.window
    faults.need(
        len(window) == 2 and min(window) >= -1,
        "window_size must be (left, right), in tokens, -1 for unbounded.",
        f"window_size = {window}",
    )
    faults.need(numbers.softcap >= 0.0, "softcap must not be negative.", f"softcap = {numbers.softcap}")
    faults.need(
        numbers.num_splits >= 0,
        "num_splits must not be negative.",
        f"num_splits = {numbers.num_splits}",
        "0 to let the library choose, 1 or more to fix the number",
    )
    faults.need(
        not (numbers.batch_invariant and numbers.num_splits > 0),
        "batch_invariant fixes the size of a split, num_splits their number: give one of them.",
        f"batch_invariant = True, num_splits = {numbers.num_splits}",
        do="num_splits=0",
    )
    faults.need(
        numbers.cp_world_size >= 1
        and 0 <= numbers.cp_rank < numbers.cp_world_size
        and numbers.cp_interleave >= 1,
        "cp_rank must be below cp_world_size, and cp_interleave at least 1.",
        f"cp_world_size = {numbers.cp_world_size}, cp_rank = {numbers.cp_rank}, "
        f"cp_interleave = {numbers.cp_interleave}",
    )
    faults.need(
        numbers.cp_world_size == 1 or call.cp_tot_seqused_k is not None,
        "context parallelism needs cp_tot_seqused_k, the lengths over all ranks.",
        f"cp_world_size = {numbers.cp_world_size}, cp_tot_seqused_k = None",
        f"int32 [{call.cu_seqlens_q.shape[0] - 1}]",
    )


def shape_problem(
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_q_heads: int,
    num_kv_heads: int,
    d_qk: int,
    d_v: int,
    causal: bool,
    window: tuple[int, int],
) -> Problem:
    """The facts of a call of which only the shapes are known: enough to share out its work."""
    packed, page = (0, 0, 1), (0, 0, 0, 0, 1)
    one_row = num_kv_heads == 1 and d_v < d_qk
    return Problem(
        device=device, dtype=dtype, k_dtype=dtype, v_dtype=dtype, batch=batch,
        total_q=batch * max(max_seqlen_q, 1), max_seqlen_q=max(max_seqlen_q, 1),
        max_keys=bucket(max_seqlen_k), num_q_heads=num_q_heads, num_kv_heads=num_kv_heads,
        d_qk=d_qk, d_v=d_v, has_q_v=d_v > d_qk, paged=True, num_pages=0, blocks_per_page=1, block_size=1,
        relation=Relation("v_in_k" if one_row else "separate", 0),
        q_strides=packed, q_v_strides=packed, k_strides=page, v_strides=page, out_strides=packed,
        table_strides=(0, 0), q_align=16, q_v_align=16, k_align=16, v_align=16, out_align=16,
        softmax_scale=1.0, causal=causal, window_left=window[0],
        window_right=0 if causal else window[1], softcap=0.0, has_alibi=False, has_sinks=False,
        has_lse=False, has_q_descale=False, has_k_descale=False, has_v_descale=False,
        k_scale_groups=0, v_scale_groups=0, k_scale_strides=(0, 0, 0, 0, 0), v_scale_strides=(0, 0, 0, 0, 0),
        cp_world_size=1, cp_rank=0, cp_interleave=1, num_splits=0, batch_invariant=False,
        deterministic=False, metadata_words=0,
    )  # fmt: skip


def _overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether two elements may have one address: told from strides sorted by size, as torch does."""
    reach = 0
    for s, n in sorted((s, n) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1):
        if 0 < s <= reach:
            return tensor.numel() > 0
        reach += s * (n - 1)
    return False
