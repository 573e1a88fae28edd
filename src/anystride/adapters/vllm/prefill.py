"""Long prefills of MLA in vLLM: keys and values of all heads, expanded from latent rows, not paged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backends.mla.prefill.base import MLAPrefillBackend

from anystride.adapters.vllm.common import DTYPES, attend, refuse_quantised_output, runs_on

KIND = "prefill of MLA"


class Prefill(MLAPrefillBackend):  # type: ignore[misc]
    """Attention over new tokens, and over parts of their context that vLLM has gathered and expanded."""

    supported_dtypes: ClassVar[list[torch.dtype]] = DTYPES

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.told: set[bool] = set()
        self.told_context: set[bool] = set()

    @staticmethod
    def get_name() -> str:
        """The registry's member."""
        return "CUSTOM"

    @classmethod
    def supports_compute_capability(cls, device_capability: Any) -> bool:
        """From sm_80 on."""
        return runs_on(device_capability)

    def supports_out(self) -> bool:
        """``out`` is written in place."""
        return True

    def run_prefill_new_tokens(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        return_softmax_lse: bool,
        out: Tensor | None = None,
        output_scale: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Each new token sees those before it.

        Args:
            q, k: ``[num_tokens, num_heads, qk_head_dim]``, any strides.
            v: ``[num_tokens, num_heads, v_head_dim]``, any strides.
            return_softmax_lse: Also return the lse, ``[num_heads, num_tokens]``.
            out: ``[num_tokens, num_heads, v_head_dim]``: written, or None.
            output_scale: Refused unless None.
        """
        refuse_quantised_output(output_scale=output_scale)
        m = self._prefill_metadata
        result: Tensor | tuple[Tensor, Tensor] = attend(
            KIND,
            self.told,
            q=q,
            k=k,
            v=v,
            max_seqlen_q=m.max_query_len,
            cu_seqlens_q=m.query_start_loc,
            max_seqlen_k=m.max_query_len,
            cu_seqlens_k=m.query_start_loc,
            softmax_scale=self.scale,
            causal=True,
            return_softmax_lse=return_softmax_lse,
            out=out,
            scheduler_metadata=None,
        )
        return result

    def run_prefill_context_chunk(
        self,
        *,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor | None = None,
        chunk_idx: int | None = None,
        chunk: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """Each new token sees all of the chunk. vLLM passes everything by name.

        Args:
            q: ``[num_tokens, num_heads, qk_head_dim]``, any strides.
            k, v: ``[chunk_tokens, num_heads, qk_head_dim]`` and ``v_head_dim``, any strides.
            out: ``[num_tokens, num_heads, v_head_dim]``: written, or None.
            chunk_idx: The chunk's number; of vLLM 0.25.
            chunk: What is in it; of vLLM 0.32.

        Returns:
            The output, and the lse ``[num_heads, num_tokens]``, -inf for a request without a key in it.
        """
        if chunk_idx is not None:
            m = self._prefill_metadata
            context = m.chunked_context
            starts, longest = context.cu_seq_lens[chunk_idx], context.max_seq_lens[chunk_idx]
            rows, max_query_len = m.query_start_loc, m.max_query_len
        else:
            starts, longest = chunk.cu_seq_lens, chunk.max_seq_len
            rows, max_query_len = chunk.query_start_loc, chunk.max_query_len
        result: tuple[Tensor, Tensor] = attend(
            KIND + " over context",
            self.told_context,
            q=q,
            k=k,
            v=v,
            max_seqlen_q=max_query_len,
            cu_seqlens_q=rows,
            max_seqlen_k=longest,
            cu_seqlens_k=starts,
            softmax_scale=self.scale,
            return_softmax_lse=True,
            out=out,
            scheduler_metadata=None,
        )
        return result


def take_over(layers: Sequence[Any], vllm_config: Any) -> None:
    """Let long prefills of these layers go through :class:`Prefill`, unless the user named another.

    vLLM chooses what prefills MLA apart from the attention back end; ``CUSTOM`` is to mean both.
    """
    if vllm_config.attention_config.mla_prefill_backend is not None:
        return
    for layer in layers:
        old = layer.prefill_backend
        if old is not None and not isinstance(old, Prefill):
            layer.prefill_backend = Prefill(
                num_heads=old.num_heads,
                scale=old.scale,
                kv_lora_rank=old.kv_lora_rank,
                qk_nope_head_dim=old.qk_nope_head_dim,
                qk_rope_head_dim=old.qk_rope_head_dim,
                v_head_dim=old.v_head_dim,
                vllm_config=vllm_config,
            )
