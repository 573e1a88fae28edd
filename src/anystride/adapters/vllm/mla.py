"""Multi-head latent attention in vLLM: the latent rows of the cache are read in place by all heads.

Requests with up to :attr:`Builder.reorder_batch_threshold` new tokens, decoding or not, are attended to in
the absorbed form, over the cache alone. Longer prefills go through :mod:`anystride.adapters.vllm.prefill`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.model_executor.layers.attention.mla_attention import (
    MLACommonBackend,
    MLACommonDecodeMetadata,
    MLACommonImpl,
    MLACommonMetadata,
    MLACommonMetadataBuilder,
    QueryLenSupport,
)
from vllm.v1.attention.backend import AttentionCGSupport

from anystride.adapters.vllm.common import (
    MOST_DIMENSIONS,
    PLAIN,
    Declared,
    Schedule,
    as_stored,
    attend,
    unsupported,
)
from anystride.adapters.vllm.prefill import take_over
from anystride.cache import store_mla

KIND = "MLA"
FP8 = ("fp8", "fp8_e4m3")  # vLLM gathers the context of long prefills, and knows no e5m2 there


class Backend(Declared, MLACommonBackend):  # type: ignore[misc]
    """What this back end can do, as vLLM asks for it; the cache is a view of any strides."""

    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", *PLAIN, *FP8]

    @staticmethod
    def get_impl_cls() -> type[Impl]:
        """The layer's part."""
        return Impl

    @staticmethod
    def get_builder_cls() -> type[Builder]:
        """The step's part."""
        return Builder

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        """Blocks first, so that vLLM may put all layers of a block together; before 0.29 it asks for this."""
        return (1, 0, 2, 3) if include_num_layers_dimension else (0, 1, 2)

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """Empty, which is all: :meth:`supports_head_size` says more."""
        return []

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """Latent and rope part together."""
        return 2 <= head_size <= MOST_DIMENSIONS


@dataclass
class DecodeMetadata(MLACommonDecodeMetadata):  # type: ignore[misc]
    """The requests that are attended to in the absorbed form, for all layers.

    Attributes:
        query_start_loc: ``[batch + 1]`` int32.
        max_query_len: Upper bound on the query tokens of a sequence, at least 1.
        max_seq_len: Upper bound on the keys of a sequence.
        schedule: Of this step; None where calls go without.
    """

    query_start_loc: Tensor
    max_query_len: int
    max_seq_len: int
    schedule: Tensor | None


class Metadata(MLACommonMetadata[DecodeMetadata]):  # type: ignore[misc]
    """vLLM's, without its check for rows of 320 or 576: any width goes."""

    def __post_init__(self) -> None:
        """Check nothing."""


class Builder(MLACommonMetadataBuilder[Metadata]):  # type: ignore[misc]
    """Makes a step's metadata, and its schedule."""

    # A graph keeps the longest query that it was captured with, so a batch of unlike ones cannot use it.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    query_len_support: ClassVar[QueryLenSupport] = QueryLenSupport.VARLEN
    reorder_batch_threshold: int = 512  # as vLLM has it for FlashAttention's MLA

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        layers = [vllm_config.compilation_config.static_forward_context[name] for name in layer_names]
        take_over(layers, vllm_config)
        super().__init__(
            kv_cache_spec, layer_names, vllm_config, device, Metadata, supports_dcp_with_varlen=True
        )
        heads = {
            (layer.impl.num_heads, 1, layer.impl.qk_rope_head_dim, layer.impl.kv_lora_rank)
            for layer in layers
        }
        self.schedule = Schedule(vllm_config, device, heads.pop() if len(heads) == 1 else None, (-1, -1))

    def _build_decode(
        self,
        block_table_tensor: Tensor,
        seq_lens_device: Tensor,
        max_seq_len: int,
        query_start_loc_cpu: Tensor,
        query_start_loc_device: Tensor,
        num_decode_tokens: int,
        dcp_tot_seq_lens_device: Tensor | None,
        **_: Any,
    ) -> DecodeMetadata:
        longest = max(int(query_start_loc_cpu.diff().max()), 1)  # of a tensor on the host
        return DecodeMetadata(
            block_table=block_table_tensor,
            seq_lens=seq_lens_device,
            dcp_tot_seq_lens=dcp_tot_seq_lens_device,
            query_start_loc=query_start_loc_device,
            max_query_len=longest,
            max_seq_len=self.schedule.max_keys if dcp_tot_seq_lens_device is None else max_seq_len,
            schedule=self.schedule.make(query_start_loc_device, seq_lens_device, longest, causal=True),
        )


class Impl(MLACommonImpl[Metadata]):  # type: ignore[misc]
    """One layer: stores new rows and attends to the cache, both in place."""

    can_return_lse_for_decode = True
    supports_mtp_with_cp_non_trivial_interleave_size = True
    supports_dcp = True  # asked since vLLM 0.29

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.told: set[bool] = set()
        self.supports_quant_query_input = False  # queries stay as they are over an fp8 cache
        names = ("num_heads", "head_size", "scale", "num_kv_heads", "alibi_slopes", "sliding_window",
                 "kv_cache_dtype", "logits_soft_cap", "attn_type")  # fmt: skip
        given = dict(zip(names, args, strict=False)) | options
        wanted = {n: given[n] for n in ("alibi_slopes", "sliding_window", "logits_soft_cap") if given.get(n)}
        if wanted or given.get("attn_type", "decoder") != "decoder":
            raise unsupported(
                "an MLA layer with more than a causal mask cannot be passed on.",
                f"{wanted}, attn_type = {given.get('attn_type')}",
                "no alibi, no window, no softcap, a decoder",
                "another attention back end for this model",
            )

    def do_kv_cache_update(
        self,
        kv_c_normed: Tensor,
        k_pe: Tensor,
        kv_cache: Tensor,
        slot_mapping: Tensor,
        kv_cache_dtype: str,
        k_scale: Tensor,
    ) -> None:
        """Store new rows, quantised if the cache is."""
        if kv_cache.numel() == 0:  # vLLM measures its memory
            return
        scale = k_scale if kv_cache_dtype in FP8 else None
        store_mla(kv_c_normed, k_pe, as_stored(kv_cache, kv_cache_dtype), slot_mapping.flatten(), scale)

    def forward_mqa(
        self,
        q: Tensor | tuple[Tensor, Tensor],
        kv_c_and_k_pe_cache: Tensor,
        attn_metadata: Metadata,
        layer: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend to the cache, in which new rows are already.

        Args:
            q: ``[num_tokens, heads, kv_lora_rank + qk_rope_head_dim]``, or its two parts, any strides.
            kv_c_and_k_pe_cache: ``[num_blocks, block_size, kv_lora_rank + qk_rope_head_dim]``, any strides.
            attn_metadata: Of the step.
            layer: vLLM's; its scale is that of an fp8 cache.

        Returns:
            ``[num_tokens, heads, kv_lora_rank]``, and under context parallelism the lse
            ``[num_tokens, heads]``, else None.
        """
        latent, m = self.kv_lora_rank, attn_metadata.decode
        assert m is not None  # vLLM calls with requests to decode only
        q_v, q_rope = q if isinstance(q, tuple) else q.split([latent, self.qk_rope_head_dim], -1)
        cache = as_stored(kv_c_and_k_pe_cache, self.kv_cache_dtype).unsqueeze(2)
        arguments: dict[str, Any] = {
            "q": q_rope,
            "k": cache[..., latent:],
            "v": cache[..., :latent],
            "q_v": q_v,
            "max_seqlen_q": m.max_query_len,
            "cu_seqlens_q": m.query_start_loc,
            "max_seqlen_k": m.max_seq_len,
            "seqused_k": m.seq_lens,
            "softmax_scale": self.scale,
            "causal": True,
            "block_table": m.block_table,
            "scheduler_metadata": m.schedule,
        }
        if self.kv_cache_dtype in FP8:
            arguments |= {"k_descale": layer._k_scale, "v_descale": layer._k_scale}
        if not self.need_to_return_lse_for_decode:
            return attend(KIND, self.told, **arguments), None
        out, lse = attend(
            KIND,
            self.told,
            return_softmax_lse=True,
            cp_world_size=self.dcp_world_size,
            cp_rank=self.dcp_rank,
            cp_tot_seqused_k=m.dcp_tot_seq_lens,
            cp_interleave=self.cp_kv_cache_interleave_size,
            **arguments,
        )
        return out, lse.transpose(0, 1)
