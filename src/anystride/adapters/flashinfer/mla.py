"""``flashinfer.mla.BatchMLAPagedAttentionWrapper``."""

from __future__ import annotations

import torch
from torch import Tensor

from anystride import flash_attn_varlen_func, get_scheduler_metadata
from anystride.adapters.flashinfer.page_lists import (
    PagedBatch,
    all_given,
    check_planned,
    copy_lists,
    lse_by_rows,
)
from anystride.adapters.translation import LOG2_E, Refusal, refuse

__all__ = ["BatchMLAPagedAttentionWrapper"]

_PROFILE = "asks for a profile of a kernel that does not run here"
_PLANNED = "belongs to the cutlass back end; here it comes from plan"
REFUSED = {
    "backend": Refusal(
        "auto", "names a call of another shape with a scale of its own", "anystride.adapters.cutlass_mla"
    ),
    "use_profiler": Refusal(False, _PROFILE, "torch.profiler"),
    "profiler_buffer": Refusal(None, _PROFILE, "torch.profiler"),
    "o_scale": Refusal(
        None, "asks for a result in fp8, and results have the dtype of q here", "quantise the result"
    ),
    "kv_len": Refusal(None, _PLANNED, "plan(..., kv_len_arr, ...)"),
    "page_table": Refusal(None, _PLANNED, "plan(..., kv_indptr, kv_indices, ...)"),
}


class BatchMLAPagedAttentionWrapper:
    """MLA over lists of pages, latent and rope part given apart: two tensors, or two views of one row.

    Args:
        float_workspace_buffer: Says the device; not used.
        use_cuda_graph: ``run`` may be captured, and replays with what was planned last. The next four are
            then written by ``plan`` as in the original, and their sizes count: ``kv_len_arr`` has an element
            for each request, and no request may have more pages than an equal share of ``kv_indices``, nor
            more query tokens than at the first ``plan``.
        qo_indptr: ``[batch + 1]`` int32.
        kv_indptr: ``[batch + 1]`` int32.
        kv_indices: int32, for the pages of all requests.
        kv_len_arr: ``[batch]`` int32.
        backend: ``auto``, ``fa2`` or ``fa3``, which are the same here; ``cutlass`` is refused.

    Raises:
        UnsupportedError: For ``cutlass``.
        InvalidInputError: A buffer is missing.
    """

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        use_cuda_graph: bool = False,
        qo_indptr: Tensor | None = None,
        kv_indptr: Tensor | None = None,
        kv_indices: Tensor | None = None,
        kv_len_arr: Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        name = type(self).__name__
        if backend not in ("fa2", "fa3"):
            refuse(name, REFUSED, backend=backend)
        self.device = float_workspace_buffer.device
        self._buffers: tuple[Tensor, ...] = ()
        frozen = None
        if use_cuda_graph:
            buffers = (qo_indptr, kv_indptr, kv_indices, kv_len_arr)
            self._buffers = all_given(name, "qo_indptr, kv_indptr, kv_indices and kv_len_arr", buffers)
            frozen = (len(self._buffers[3]), len(self._buffers[2]))
        self._batch = PagedBatch(f"{name}.plan", self.device, frozen)
        self._causal = False
        self._sm_scale: float | None = None
        self._q_data_type = torch.bfloat16

    def plan(
        self,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        kv_indices: Tensor,
        kv_len_arr: Tensor,
        num_heads: int,
        head_dim_ckv: int,
        head_dim_kpe: int,
        page_size: int,
        causal: bool,
        sm_scale: float,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
        use_profiler: bool = False,
    ) -> None:
        """Prepare a step.

        Args:
            qo_indptr: ``[batch + 1]`` int32, on any device, as the next three: where each request's rows of q
                begin.
            kv_indptr: ``[batch + 1]`` int32, or longer: where its pages begin in ``kv_indices``.
            kv_indices: int32: pages, one request after the other; longer than needed is allowed.
            kv_len_arr: ``[batch]`` int32: tokens in the cache of each request.
            num_heads: Query heads.
            head_dim_ckv: Width of the latent part.
            head_dim_kpe: Width of the rope part, 0 if there is none.
            page_size: Tokens of a page.
            causal: Mask keys after the query's own position, aligned to the bottom right.
            sm_scale: Of the scores, by the dimension before absorption.
            q_data_type: dtype of the queries that ``run`` gets.
            kv_data_type: Not used: ``run`` sees what it gets.
            use_profiler: Refused unless False.

        Raises:
            UnsupportedError: For ``use_profiler``.
            InvalidInputError: With ``use_cuda_graph``, a step that does not fit.
        """
        refuse("BatchMLAPagedAttentionWrapper.plan", REFUSED, use_profiler=use_profiler)
        size = qo_indptr.shape[0]
        batch = self._batch
        starts, lengths = batch.fill(qo_indptr, kv_indptr[:size], kv_indices, kv_len_arr, page_size)
        copy_lists(self._buffers, (qo_indptr, kv_indptr[:size], kv_indices, kv_len_arr))
        self._causal, self._sm_scale, self._q_data_type = causal, sm_scale, q_data_type
        batch.keep_schedule(
            get_scheduler_metadata(
                size - 1, batch.max_query_len, batch.longest, num_heads, 1, head_dim_kpe or head_dim_ckv,
                lengths, q_data_type, head_dim_ckv, starts, causal=causal,
            )
        )  # fmt: skip

    def run(
        self,
        q_nope: Tensor,
        q_pe: Tensor,
        ckv_cache: Tensor,
        kpe_cache: Tensor,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        profiler_buffer: Tensor | None = None,
        kv_len: Tensor | None = None,
        page_table: Tensor | None = None,
        return_lse_base_on_e: bool = False,
        o_scale: float | None = None,
        *,
        ckv_scale: float | None = None,
        ckv_scale_arr: Tensor | None = None,
        kpe_scale: float | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run a layer.

        Args:
            q_nope: ``[total_q, num_heads, head_dim_ckv]``, the absorbed query, any strides.
            q_pe: ``[total_q, num_heads, head_dim_kpe]``, any strides.
            ckv_cache: ``[num_pages, page_size, head_dim_ckv]``, dtype of q or fp8, any strides, never copied.
            kpe_cache: ``[num_pages, page_size, head_dim_kpe]``, strides of its own.
            out: ``[total_q, num_heads, head_dim_ckv]`` in the dtype of q: written and returned.
            lse: ``[total_q, num_heads]`` float32: written and returned if ``return_lse``.
            return_lse: Also return ``lse``.
            profiler_buffer, kv_len, page_table, o_scale: Refused unless None.
            return_lse_base_on_e: The natural logarithm, instead of that of base 2.
            ckv_scale, kpe_scale: Factors of the values of an fp8 cache.
            ckv_scale_arr: float32 ``[num_pages, page_size, groups]``: a factor for each token, and each of so
                many groups of dimensions of ``ckv_cache``.

        Returns:
            ``out``, and with ``return_lse`` also ``lse`` ``[total_q, num_heads]`` float32, **base 2** unless
            asked otherwise. A row that sees no key has out 0 and lse -inf.

        Raises:
            UnsupportedError: For what has no counterpart here.
            InvalidInputError: Without ``plan``, and as :func:`anystride.flash_attn_varlen_func`.
        """
        name = "BatchMLAPagedAttentionWrapper.run"
        refuse(
            name,
            REFUSED,
            profiler_buffer=profiler_buffer,
            kv_len=kv_len,
            page_table=page_table,
            o_scale=o_scale,
        )
        batch = self._batch
        check_planned(name, batch, q_nope, self._q_data_type)
        latent = ckv_cache.unsqueeze(-2)  # one KV head
        if q_pe.shape[-1]:
            q, k, q_v, k_scale, k_scales = q_pe, kpe_cache.unsqueeze(-2), q_nope, kpe_scale, None
        else:
            q, k, q_v, k_scale, k_scales = q_nope, latent, None, ckv_scale, ckv_scale_arr
        result = flash_attn_varlen_func(
            q,
            k,
            latent,
            batch.max_query_len,
            batch.starts,  # type: ignore[arg-type]  # there was a plan
            batch.longest,
            seqused_k=batch.lengths,
            q_v=q_v,
            softmax_scale=self._sm_scale,
            causal=self._causal,
            block_table=batch.table,
            return_softmax_lse=return_lse,
            out=out,
            scheduler_metadata=batch.schedule,
            k_descale=k_scale,
            v_descale=ckv_scale,
            k_scale_cache=k_scales,
            v_scale_cache=ckv_scale_arr,
        )
        if not isinstance(result, tuple):
            return result
        return result[0], lse_by_rows(result[1], lse, 1.0 if return_lse_base_on_e else LOG2_E)
