"""Attention without MLA in vLLM: GQA, MQA, MHA, with windows, sinks, softcap, alibi, fp8 caches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
)

from anystride.adapters.vllm.common import (
    FP8,
    MOST_DIMENSIONS,
    PLAIN,
    Declared,
    Schedule,
    as_stored,
    attend,
    refuse_quantised_output,
    unsupported,
    window_of,
)
from anystride.cache import store_kv

KIND = "attention"


class Backend(Declared, AttentionBackend):  # type: ignore[misc]
    """What this back end can do, as vLLM asks for it.

    The cache is a view of any strides: layers side by side in one block, padded pages, and since vLLM 0.29
    each of its six orders.
    """

    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", *PLAIN, *FP8]
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_impl_cls() -> type[Impl]:
        """The layer's part."""
        return Impl

    @staticmethod
    def get_builder_cls() -> type[Builder]:
        """The step's part."""
        return Builder

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        """The order in which :func:`halves` expects the axes; vLLM before 0.29 asks for it."""
        return num_blocks, 2, block_size, num_kv_heads, head_size

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        """How vLLM before 0.29 should lay the axes out: as ``VLLM_KV_CACHE_LAYOUT`` says.

        Blocks come first, so that vLLM may put all layers of a block together and pad pages.
        """
        from vllm.v1.attention.backends.utils import get_kv_cache_layout

        heads_first = get_kv_cache_layout() == "HND"
        if include_num_layers_dimension:
            return (1, 4, 0, 2, 3, 5) if heads_first else (1, 0, 2, 3, 4, 5)
        return (0, 1, 3, 2, 4) if heads_first else (0, 1, 2, 3, 4)

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """All that the kernels take."""
        return 1 <= head_size <= MOST_DIMENSIONS

    @classmethod
    def supports_sink(cls) -> bool:
        """As ``s_aux``."""
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Asked since vLLM 0.33."""
        return True

    @classmethod
    def supports_non_causal(cls) -> bool:
        """For the whole batch; not sequence by sequence."""
        return True


@dataclass
class Metadata:
    """A step's batch, for all layers of a group.

    Attributes:
        num_actual_tokens: Rows of the query that count.
        max_query_len: Upper bound on the query tokens of a sequence, at least 1.
        query_start_loc: ``[batch + 1]`` int32.
        max_seq_len: Upper bound on the keys of a sequence.
        seq_lens: ``[batch]`` int32; under context parallelism those of this rank.
        total_seq_lens: ``[batch]`` int32 over all ranks; None on one rank.
        block_table: ``[batch, max_blocks]`` int32.
        slot_mapping: ``[num_tokens]`` int64.
        causal: Whether queries see no later keys.
        schedule: Of this step; None where calls go without.
    """

    num_actual_tokens: int
    max_query_len: int
    query_start_loc: Tensor
    max_seq_len: int
    seq_lens: Tensor
    total_seq_lens: Tensor | None
    block_table: Tensor
    slot_mapping: Tensor
    causal: bool
    schedule: Tensor | None


class Builder(AttentionMetadataBuilder[Metadata]):  # type: ignore[misc]
    """Makes a step's metadata, and its schedule."""

    # A graph keeps the longest query that it was captured with, so a batch of unlike ones cannot use it.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layers = vllm_config.compilation_config.static_forward_context
        shapes = {layers[name].impl.shape for name in layer_names}
        heads, window = next(iter(shapes)) if len(shapes) == 1 else (None, (-1, -1))
        self.schedule = Schedule(vllm_config, device, heads, window)
        self.sharded = vllm_config.parallel_config.decode_context_parallel_size > 1

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Metadata:
        """Take from vLLM's metadata what attention needs. Nothing is read back from the device."""
        m = common_attn_metadata
        if not isinstance(m.causal, bool):
            raise unsupported(
                "causality of each sequence by a tensor cannot be passed on.",
                "causal is a tensor",
                "one causality for the batch",
                "another attention back end for this model",
            )
        max_query_len = max(m.max_query_len, 1)
        lengths, total, longest = m.seq_lens, None, self.schedule.max_keys
        if self.sharded:
            lengths, total, longest = m.dcp_local_seq_lens[: m.num_reqs], m.seq_lens, m.max_seq_len
        return Metadata(
            num_actual_tokens=m.num_actual_tokens,
            max_query_len=max_query_len,
            query_start_loc=m.query_start_loc,
            max_seq_len=longest,
            seq_lens=lengths,
            total_seq_lens=total,
            block_table=m.block_table_tensor,
            slot_mapping=m.slot_mapping,
            causal=m.causal,
            schedule=self.schedule.make(m.query_start_loc, lengths, max_query_len, m.causal),
        )


class Impl(AttentionImpl[Metadata]):  # type: ignore[misc]
    """One layer: stores new tokens and attends to the cache, both in place."""

    can_return_lse_for_decode = True
    supports_mtp_with_cp_non_trivial_interleave_size = True

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.window = (-1, -1) if sliding_window is None else (sliding_window - 1, 0)
        self.softcap = logits_soft_cap or 0.0
        self.slopes = None if alibi_slopes is None else torch.tensor(alibi_slopes, dtype=torch.float32)
        self.sinks = sinks
        self.is_fp8 = kv_cache_dtype in FP8
        self.told: set[bool] = set()
        parallel = get_current_vllm_config().parallel_config
        self.interleave = parallel.cp_kv_cache_interleave_size
        self.shape = (num_heads, self.num_kv_heads, head_size, head_size), self.window
        if self.dcp_world_size > 1 and (sinks is not None or self.slopes is not None):
            raise unsupported(
                "sinks and alibi slopes are not gathered over ranks.",
                f"decode_context_parallel_size = {self.dcp_world_size}, "
                f"{'sinks' if self.slopes is None else 'alibi slopes'}",
                "all heads of both on each rank",
                "decode_context_parallel_size=1",
            )

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Store new tokens, quantised if the cache is."""
        k, v = self.halves(kv_cache)
        scales = (layer._k_scale, layer._v_scale) if self.is_fp8 else ()
        store_kv(key, value, k, v, slot_mapping, *scales)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Metadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attend to the cache, in which new tokens are already.

        Args:
            layer: vLLM's; its scales are those of an fp8 cache.
            query: ``[num_tokens, num_heads, head_size]``, any strides.
            key, value: Not read.
            kv_cache: See :meth:`halves`.
            attn_metadata: Of the step; None while vLLM measures its memory: nothing is attended to.
            output: ``[num_tokens, num_heads, head_size]``: written.
            output_scale, output_block_scale: Refused unless None.

        Returns:
            ``output``.
        """
        refuse_quantised_output(output_scale=output_scale, output_block_scale=output_block_scale)
        if attn_metadata is None:
            return output.fill_(0)
        m, n = attn_metadata, attn_metadata.num_actual_tokens
        k, v = self.halves(kv_cache)
        arguments = {
            "k": k,
            "v": v,
            "max_seqlen_q": m.max_query_len,
            "cu_seqlens_q": m.query_start_loc,
            "max_seqlen_k": m.max_seq_len,
            "seqused_k": m.seq_lens,
            "softmax_scale": self.scale,
            "causal": m.causal,
            "window_size": window_of(self.window, m.causal),
            "softcap": self.softcap,
            "alibi_slopes": self.slopes,
            "block_table": m.block_table,
            "scheduler_metadata": m.schedule,
            "s_aux": self.sinks,
        }
        if self.is_fp8:
            arguments |= {"k_descale": layer._k_scale, "v_descale": layer._v_scale}
        if self.dcp_world_size == 1:
            attend(KIND, self.told, q=query[:n], out=output[:n], **arguments)
        else:
            self._attend_sharded(query[:n], output[:n], m, arguments)
        return output

    def halves(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of a layer, ``[num_blocks, block_size, num_kv_heads, head_size]`` each, views of the cache.

        Args:
            kv_cache: ``[num_blocks, 2, block_size, num_kv_heads, head_size]``, or, since vLLM 0.29, with K
                beside V, ``[num_blocks, num_kv_heads, block_size, 2 * head_size]``; any strides.
        """
        cache = as_stored(kv_cache, self.kv_cache_dtype)
        if cache.dim() == 5:
            k, v = cache.unbind(1)
        else:
            k, v = cache.transpose(1, 2).split(self.head_size, -1)
        return k, v

    def _attend_sharded(self, query: Tensor, output: Tensor, m: Metadata, arguments: dict[str, Any]) -> None:
        """Attend to this rank's keys with the heads of all ranks, then merge by the lse."""
        from vllm.distributed.parallel_state import get_dcp_group
        from vllm.v1.attention.ops.common import cp_lse_ag_out_rs

        group = get_dcp_group()
        dense = query.new_empty(query.shape).copy_(query)  # NCCL gathers dense tensors only
        part, lse = attend(
            KIND,
            self.told,
            q=group.all_gather(dense, dim=1),
            return_softmax_lse=True,
            cp_world_size=self.dcp_world_size,
            cp_rank=self.dcp_rank,
            cp_tot_seqused_k=m.total_seq_lens,
            cp_interleave=self.interleave,
            **arguments,
        )
        output.copy_(cp_lse_ag_out_rs(part, lse.transpose(0, 1), group))
