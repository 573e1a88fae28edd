"""Poisoned memory with views into it: what a layout builds, a test fills, and a drawing shows.

A :class:`Storage` is one or two flat buffers full of NaN, and the geometry of K and of V in them.
Nothing here knows the catalogue; ``recipe.py`` makes the geometry. Every write goes through an
integer twin of the buffers, so that a NaN, an fp8 value and a canary are moved bit by bit.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from anystride.problem import BITS

__all__ = [
    "BITS",
    "CacheShape",
    "Geometry",
    "Storage",
    "allocate",
    "assert_untouched",
    "canary",
    "fill",
    "occupancy",
    "read",
    "resolve_aliases",
    "slots",
]

Form = Literal["kv", "row", "q_v"]

GAP, K_ONLY, V_ONLY, BOTH, OTHER = range(5)  # codes of ``occupancy``


@dataclass(frozen=True)
class CacheShape:
    """The logical shape of a cache, before a layout gives it strides.

    Attributes:
        num_blocks: Blocks that a table can name; 1 when not paged.
        block_size: Tokens in a block; all rows of ``[total_k, num_kv_heads, d]`` when not paged.
        num_kv_heads: Heads of K and V.
        d_qk: Elements in a row of K.
        d_v: Elements in a row of V.
        dtype: Of K and V.
        k_dtype: Of K, where it is not that of V: only in two buffers.
        form: ``kv``: K and V hold different data. ``row``: MLA, V is a part of K's row. ``q_v``:
            MLA, K is the rope part and V the latent part, disjoint.
        blocks_per_page: 1 gives 4-D views ``[num_blocks, block_size, num_kv_heads, d]``, more gives
            5-D views ``[num_pages, blocks_per_page, block_size, num_kv_heads, d]``.
        paged: False gives 3-D views.
        layers: Layers that share a buffer, in the layouts that keep several together.
    """

    num_blocks: int
    block_size: int
    num_kv_heads: int
    d_qk: int
    d_v: int
    dtype: torch.dtype = torch.bfloat16
    form: Form = "kv"
    blocks_per_page: int = 1
    paged: bool = True
    layers: int = 3
    k_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        """Refuse what no cache can be, with ValueError."""
        if self.num_blocks % self.blocks_per_page:
            raise ValueError(f"{self.num_blocks} blocks do not fill pages of {self.blocks_per_page} blocks")
        if not self.paged and self.num_blocks != 1:
            raise ValueError(f"a cache without a table is one block, not {self.num_blocks}")
        if self.form == "row" and self.d_v > self.d_qk:
            raise ValueError(f"V of {self.d_v} elements is no part of a row of {self.d_qk}")

    @property
    def num_pages(self) -> int:
        """Blocks over blocks per page."""
        return self.num_blocks // self.blocks_per_page


@dataclass(frozen=True)
class Geometry:
    """Where a view lies: buffer, offset, sizes and strides, all in elements."""

    buffer: int
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def view(self, buffers: Sequence[Tensor]) -> Tensor:
        """The view of this geometry in ``buffers``, or in a twin of them of another dtype."""
        return buffers[self.buffer].as_strided(self.size, self.stride, self.offset)


@dataclass(frozen=True)
class Storage:
    """Flat buffers and the geometry of one layer's K and V in them.

    Attributes:
        name: The layout that made it.
        shape: What was asked for.
        buffers: One or two 1-D tensors of the dtypes of ``shape``, NaN wherever nothing was filled in.
        k_geometry: 5-D ``[num_pages, blocks_per_page, block_size, num_kv_heads, d_qk]``.
        v_geometry: The same with ``d_v``.
        others: What else the buffers hold by design: other layers, an indexer's cache.
        lazy: The buffer is larger than 2^31 elements and mostly not backed by memory. Then only the
            rows of K and V are poisoned, and only they are watched by :func:`canary`.
    """

    name: str
    shape: CacheShape
    buffers: tuple[Tensor, ...]
    k_geometry: Geometry
    v_geometry: Geometry
    others: tuple[Geometry, ...] = ()
    lazy: bool = False

    @property
    def k(self) -> Tensor:
        """K as the entry takes it: 5-D if pages have several blocks, else 4-D; 3-D if not paged."""
        return self._as_argument(self.k_geometry)

    @property
    def v(self) -> Tensor:
        """V, with the dimensions of :attr:`k`."""
        return self._as_argument(self.v_geometry)

    def _as_argument(self, geometry: Geometry) -> Tensor:
        drop = set() if self.shape.paged else {0, 1}
        if self.shape.blocks_per_page == 1:
            drop.add(1)
        keep = [i for i in range(5) if i not in drop]
        size = tuple(geometry.size[i] for i in keep)
        stride = tuple(geometry.stride[i] for i in keep)
        return Geometry(geometry.buffer, geometry.offset, size, stride).view(self.buffers)

    def bits(self) -> tuple[Tensor, ...]:
        """The buffers as integers of the same width, sharing memory."""
        return tuple(flat.view(BITS[flat.itemsize]) for flat in self.buffers)


def allocate(num_elements: int, dtype: torch.dtype, device: torch.device | str, lazy: bool) -> Tensor:
    """A flat buffer: full of NaN, or, if ``lazy``, not touched at all.

    A lazy buffer on the CPU is an anonymous mapping that reserves nothing and refuses huge pages: memory
    becomes real by the page of a few KiB that is touched. On an accelerator it is plain uninitialised memory.
    """
    device = torch.device(device)
    if lazy and device.type == "cpu" and sys.platform == "linux":
        no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named in Python 3.13 and later
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
        mapping = mmap.mmap(-1, num_elements * dtype.itemsize, flags=flags)
        with suppress(OSError):  # a kernel that was built without huge pages refuses the advice
            mapping.madvise(mmap.MADV_NOHUGEPAGE)
        return torch.frombuffer(mapping, dtype=torch.uint8).view(dtype)
    flat = torch.empty(num_elements, dtype=dtype, device=device)
    if not lazy:
        poison(flat)
    return flat


def poison(view: Tensor) -> None:
    """Fill with NaN, in place. For both fp8 formats 0x7F is one."""
    if view.itemsize == 1:
        view.view(torch.uint8).fill_(0x7F)
    else:
        view.fill_(float("nan"))


def slots(
    shape: CacheShape, block_table: Tensor | None, seqused_k: Tensor, cu_seqlens_k: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Page, block in the page and token in the block of every valid token: three of [total_k]."""
    pieces = [torch.empty(0, dtype=torch.int64)]
    table = None if block_table is None else block_table.cpu().long()
    starts = None if cu_seqlens_k is None else cu_seqlens_k.tolist()
    for seq, length in enumerate(seqused_k.tolist()):
        token = torch.arange(length)
        if table is not None:
            block, inside = token // shape.block_size, token % shape.block_size
            pieces.append(table[seq, block] * shape.block_size + inside)
        else:
            if starts is None:
                raise ValueError("a cache without a block_table needs cu_seqlens_k")
            pieces.append(starts[seq] + token)
    slot = torch.cat(pieces).to(seqused_k.device)
    block, token = slot // shape.block_size, slot % shape.block_size
    return block // shape.blocks_per_page, block % shape.blocks_per_page, token


def fill(
    storage: Storage,
    k_values: Tensor,
    v_values: Tensor,
    block_table: Tensor | None,
    seqused_k: Tensor,
    cu_seqlens_k: Tensor | None = None,
) -> None:
    """Write the valid tokens of every sequence through the views; everything else stays poisoned.

    Args:
        storage: Where to write.
        k_values: ``[total_k, num_kv_heads, d_qk]`` in the storage's dtype, the valid tokens of the
            sequences one after the other.
        v_values: ``[total_k, num_kv_heads, d_v]``. Where K and V share bytes the values must agree.
        block_table: ``[batch, max_blocks]`` int32, None when not paged.
        seqused_k: ``[batch]`` int32.
        cu_seqlens_k: ``[batch + 1]`` int32, when not paged: where each sequence begins.

    Raises:
        ValueError: K and V, or two heads, share bytes in this layout, and their values differ.
    """
    where = slots(storage.shape, block_table, seqused_k, cu_seqlens_k)
    bits = storage.bits()
    for geometry, values in ((storage.k_geometry, k_values), (storage.v_geometry, v_values)):
        view, rows = geometry.view(bits), values.view(BITS[values.itemsize])
        if geometry.stride[3] == 0:  # all heads are one: it may be written only once
            view, rows = view[..., :1, :], rows[:, :1]
        view[where] = rows
    k_back, v_back = read(storage, block_table, seqused_k, cu_seqlens_k)
    for name, back, values in (("k", k_back, k_values), ("v", v_back, v_values)):
        if not torch.equal(back.view(BITS[back.itemsize]), values.view(BITS[values.itemsize])):
            raise ValueError(f"{storage.name}: {name} lost what was written: bytes are shared, values differ")


def read(
    storage: Storage,
    block_table: Tensor | None,
    seqused_k: Tensor,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gather the valid tokens: ``[total_k, num_kv_heads, d_qk]`` and ``[..., d_v]``, dense."""
    where = slots(storage.shape, block_table, seqused_k, cu_seqlens_k)
    bits = storage.bits()
    k, v = (
        geometry.view(bits)[where].view(storage.buffers[geometry.buffer].dtype)
        for geometry in (storage.k_geometry, storage.v_geometry)
    )
    return k, v


def resolve_aliases(storage: Storage, k_values: Tensor, v_values: Tensor) -> tuple[Tensor, Tensor]:
    """Values that a layout can hold: elements at one address take the value of the first of them.

    K comes before V and head 0 before head 1. The values come back as they are where nothing is
    shared.
    """
    geometries = (storage.k_geometry, storage.v_geometry)
    addresses = []
    for geometry in geometries:
        _, _, _, heads, d = geometry.size
        _, _, _, stride_head, stride_dim = geometry.stride
        row = torch.arange(heads)[:, None] * stride_head + torch.arange(d) * stride_dim
        # Two buffers share nothing: 2^62 keeps their addresses apart.
        addresses.append((row + geometry.offset + (geometry.buffer << 62)).flatten())
    flat = torch.cat(addresses)
    order = flat.argsort(stable=True)  # equal addresses stay in order: the first of them leads
    ordered, index = flat[order], torch.arange(flat.numel())
    leads = ordered.diff(prepend=ordered[:1] - 1) != 0
    source = torch.empty_like(order)
    source[order] = order[torch.where(leads, index, 0).cummax(0).values]
    if torch.equal(source, index):
        return k_values, v_values
    k_width = addresses[0].numel()
    values = torch.cat([k_values.flatten(1), v_values.flatten(1)], dim=1)
    values = values.view(BITS[values.itemsize])[:, source.to(values.device)].view(k_values.dtype)
    k, v = values[:, :k_width], values[:, k_width:]
    return k.reshape(k_values.shape), v.reshape(v_values.shape)


def canary(storage: Storage) -> tuple[Tensor, ...]:
    """A copy of the storage's bytes: all of them, or, if it is lazy, the rows of K and of V."""
    bits = storage.bits()
    if storage.lazy:
        return tuple(g.view(bits).clone() for g in (storage.k_geometry, storage.v_geometry))
    return tuple(flat.clone() for flat in bits)


def assert_untouched(storage: Storage, before: tuple[Tensor, ...]) -> None:
    """Fail if a byte of the storage has changed since :func:`canary` took ``before``."""
    for index, (old, new) in enumerate(zip(before, canary(storage), strict=True)):
        changed = (old != new).flatten().nonzero()
        if changed.numel():
            raise AssertionError(
                f"{storage.name}: {len(changed)} elements of the cache were written, "
                f"the first at {int(changed[0])} of part {index}"
            )


def occupancy(storage: Storage) -> Tensor:
    """What each element of the storage holds, for a drawing.

    Returns:
        ``[elements]`` uint8 on the CPU, the buffers one after the other: 0 nothing, 1 K alone, 2 V
        alone, 3 both, 4 other layers or other caches.

    Raises:
        ValueError: The storage is lazy: its map would be larger than memory.
    """
    if storage.lazy:
        elements = storage.buffers[0].numel()
        raise ValueError(f"{storage.name}: a map of {elements} elements is too large")
    parts = ((storage.k_geometry,), (storage.v_geometry,), storage.others)
    masks = []
    for geometries in parts:
        twins = [torch.zeros(flat.numel(), dtype=torch.uint8) for flat in storage.buffers]
        for geometry in geometries:
            geometry.view(twins).fill_(1)
        masks.append(torch.cat(twins))
    k, v, other = masks
    codes = k * K_ONLY + v * V_ONLY
    return torch.where((codes == GAP) & (other == 1), OTHER, codes)
