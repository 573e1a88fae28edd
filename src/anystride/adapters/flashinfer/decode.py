"""``flashinfer.BatchDecodeWithPagedKVCacheWrapper``."""

from __future__ import annotations

import functools

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
from anystride.adapters.translation import LOG2_E, Refusal, invalid, refuse

__all__ = ["BatchDecodeWithPagedKVCacheWrapper"]

_VARIANT = "asks for a variant of the original's kernel to be compiled"
REFUSED = {
    "jit_args": Refusal(None, _VARIANT, "leave it out"),
    "args": Refusal((), _VARIANT, "leave them out"),
    "pos_encoding_mode": Refusal(
        "NONE",
        "asks to turn rows or to slope scores on their way, and rows are read here as they are",
        "rotate q, and k before it is stored; or anystride.flash_attn_varlen_func(..., alibi_slopes=slopes)",
    ),
    "skip_softmax_threshold_scale_factor": Refusal(
        None, "asks to leave small weights out, and every key counts here", "leave it out"
    ),
    "kv_cache_sf": Refusal(
        None, "belongs to an NVFP4 cache, and caches have the dtype of q or are fp8", "an fp8 cache"
    ),
}


class BatchDecodeWithPagedKVCacheWrapper:
    """Decode with K and V over lists of pages.

    Args:
        float_workspace_buffer: Says the device; not used.
        kv_layout: ``NHD``: ``[..., page_size, num_kv_heads, head_dim]``, or ``HND``: heads before tokens.
        use_cuda_graph: As in :class:`BatchMLAPagedAttentionWrapper`, with the next three.
        use_tensor_cores: Remembered, and otherwise ignored.
        paged_kv_indptr_buffer: ``[batch + 1]`` int32.
        paged_kv_indices_buffer: int32, for the pages of all requests.
        paged_kv_last_page_len_buffer: ``[batch]`` int32.
        backend: Ignored: who runs a call is chosen by :func:`anystride.flash_attn_varlen_func`.
        jit_args: Refused unless None.

    Raises:
        UnsupportedError: For ``jit_args``.
        InvalidInputError: A buffer is missing, or an unknown ``kv_layout``.
    """

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: Tensor | None = None,
        paged_kv_indices_buffer: Tensor | None = None,
        paged_kv_last_page_len_buffer: Tensor | None = None,
        backend: str = "auto",
        jit_args: list[object] | None = None,
    ) -> None:
        name = type(self).__name__
        refuse(name, REFUSED, jit_args=jit_args)
        if kv_layout not in ("NHD", "HND"):
            raise invalid(
                name,
                "kv_layout is not known.",
                repr(kv_layout),
                "NHD or HND",
            )
        self.device = float_workspace_buffer.device
        self.is_cuda_graph_enabled, self.use_tensor_cores = use_cuda_graph, use_tensor_cores
        self._kv_layout = kv_layout
        self._buffers: tuple[Tensor, ...] = ()
        frozen = None
        if use_cuda_graph:
            buffers = (paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer)
            self._buffers = all_given(name, "the three paged_kv buffers", buffers)
            frozen = (len(self._buffers[2]), len(self._buffers[1]))
        self._batch = PagedBatch(f"{name}.plan", self.device, frozen)
        self._window = (-1, -1)
        self._softcap = 0.0
        self._sm_scale: float | None = None
        self._q_data_type = self._o_data_type = torch.float16
        self._splits: dict[str, int | bool] = {}

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype | str = "float16",
        kv_data_type: torch.dtype | str | None = None,
        o_data_type: torch.dtype | str | None = None,
        data_type: torch.dtype | str | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
        block_tables: Tensor | None = None,
        seq_lens: Tensor | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        q_len_per_req: int = 1,
        *,
        window_right: int = 0,
    ) -> None:
        """Prepare a step.

        Args:
            indptr: ``[batch + 1]`` int32, on any device, as the next two: where each request's pages begin.
            indices: int32: pages, one request after the other.
            last_page_len: ``[batch]`` int32: tokens in the last page of each request; without effect for a
                request without pages.
            num_qo_heads, num_kv_heads, head_dim: Heads, and their width.
            page_size: Tokens of a page.
            pos_encoding_mode: Refused unless ``NONE``.
            window_left: Keys before the query's own position that it sees, -1 for all.
            logits_soft_cap: ``cap * tanh(s / cap)`` on the scaled scores; None or 0 for none.
            q_data_type: dtype of the queries that ``run`` gets, or its name.
            kv_data_type, data_type: Not used: ``run`` sees what it gets.
            o_data_type: dtype of the result; None: that of q.
            sm_scale: Default ``head_dim ** -0.5``.
            rope_scale, rope_theta: Without effect: there is no rotary embedding.
            non_blocking: Without effect.
            block_tables, seq_lens: Without effect: the lists say it all.
            fixed_split_size: Given: shares have a fixed size, which is chosen here, so that the bits of a
                request do not depend on its neighbours.
            disable_split_kv: Keep each request in one piece.
            q_len_per_req: Query tokens of a request.
            window_right: Keys after the query's own position that it sees, -1 for all.

        Raises:
            UnsupportedError: For ``pos_encoding_mode``.
            InvalidInputError: With ``use_cuda_graph``, a step that does not fit.
        """
        name = "BatchDecodeWithPagedKVCacheWrapper.plan"
        refuse(name, REFUSED, pos_encoding_mode=pos_encoding_mode)
        size = last_page_len.shape[0]
        pages = indptr.to(self.device).diff()
        last = last_page_len.to(self.device)
        lengths = torch.where(pages > 0, (pages - 1) * page_size + last, 0)
        steps = torch.arange(size + 1) * q_len_per_req
        batch = self._batch
        starts, lengths = batch.fill(steps, indptr, indices, lengths, page_size)
        copy_lists(self._buffers, (indptr, indices, last_page_len))
        self._window, self._softcap = (window_left, window_right), logits_soft_cap or 0.0
        self._sm_scale = sm_scale
        self._q_data_type = _dtype(q_data_type)
        self._o_data_type = self._q_data_type if o_data_type is None else _dtype(o_data_type)
        self._splits = (
            {"batch_invariant": True} if fixed_split_size else {"num_splits": int(disable_split_kv)}
        )
        batch.keep_schedule(
            get_scheduler_metadata(
                size, batch.max_query_len, batch.longest, num_qo_heads, num_kv_heads, head_dim, lengths,
                self._q_data_type, None, starts, window_size=self._window,
            )
        )  # fmt: skip

    begin_forward = plan

    def run(
        self,
        q: Tensor,
        paged_kv_cache: Tensor | tuple[Tensor, Tensor],
        *args: object,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: Tensor | None = None,
        q_len_per_req: int | None = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        kv_cache_sf: Tensor | tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run a layer.

        Args:
            q: ``[batch * q_len_per_req, num_qo_heads, head_dim]``, any strides.
            paged_kv_cache: ``(k, v)``, each ``[num_pages, page_size, num_kv_heads, head_dim]`` (``HND``:
                heads before tokens), or one tensor ``[num_pages, 2, ...]``, K at 0 and V at 1. With three and
                four dimensions, pages of one token. Any strides, those of V its own; never copied.
            *args: Refused if there are any.
            q_scale, k_scale, v_scale: Factors of the values of q, K and V.
            out: ``[batch * q_len_per_req, num_qo_heads, head_dim]``: written and returned.
            lse: ``[batch * q_len_per_req, num_qo_heads]`` float32: written and returned if ``return_lse``.
            return_lse: Also return ``lse``.
            enable_pdl: Ignored.
            window_left: None, or as in ``plan``.
            sinks: ``[num_qo_heads]``: one more logit of each row; ``lse`` counts it in.
            q_len_per_req: None, or as in ``plan``.
            skip_softmax_threshold_scale_factor, kv_cache_sf: Refused unless None.

        Returns:
            ``out``, and with ``return_lse`` also ``lse`` ``[batch * q_len_per_req, num_qo_heads]`` float32,
            **base 2**. A row that sees no key has out 0 and lse -inf.

        Raises:
            UnsupportedError: For what has no counterpart here.
            InvalidInputError: Without ``plan``, for what differs from it, and as
                :func:`anystride.flash_attn_varlen_func`.
        """
        name = "BatchDecodeWithPagedKVCacheWrapper.run"
        refuse(
            name, REFUSED, args=args, kv_cache_sf=kv_cache_sf,
            skip_softmax_threshold_scale_factor=skip_softmax_threshold_scale_factor,
        )  # fmt: skip
        batch = self._batch
        check_planned(name, batch, q, self._q_data_type)
        for what, given, planned in (
            ("window_left", window_left, self._window[0]),
            ("q_len_per_req", q_len_per_req, batch.max_query_len),
        ):
            if given not in (None, planned):
                raise invalid(
                    name,
                    f"{what} must be that of plan.",
                    f"{given}",
                    f"{planned}",
                )
        k, v = _k_and_v(paged_kv_cache, self._kv_layout)
        written = out if out is not None and out.dtype == q.dtype else None
        result = flash_attn_varlen_func(
            q,
            k,
            v,
            batch.max_query_len,
            batch.starts,  # type: ignore[arg-type]  # there was a plan
            batch.longest,
            seqused_k=batch.lengths,
            softmax_scale=self._sm_scale,
            window_size=self._window,
            softcap=self._softcap,
            block_table=batch.table,
            return_softmax_lse=return_lse,
            out=written,
            scheduler_metadata=batch.schedule,
            q_descale=q_scale,
            k_descale=k_scale,
            v_descale=v_scale,
            s_aux=sinks,
            **self._splits,  # type: ignore[arg-type]  # num_splits or batch_invariant
        )
        rows = result[0] if isinstance(result, tuple) else result
        if out is None:
            out = rows.to(self._o_data_type)  # the same tensor, if it has this dtype
        elif written is None:
            out.copy_(rows)
        return (out, lse_by_rows(result[1], lse, LOG2_E)) if return_lse else out

    run_return_lse = functools.partialmethod(run, return_lse=True)


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    named = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert isinstance(named, torch.dtype)
    return named


def _k_and_v(cache: Tensor | tuple[Tensor, Tensor], kv_layout: str) -> tuple[Tensor, Tensor]:
    """Views ``[..., page_size, num_kv_heads, head_dim]`` of a cache in one or two tensors."""
    pages_of_one = cache.dim() == 4 if isinstance(cache, Tensor) else cache[0].dim() == 3
    k, v = cache.unbind(1) if isinstance(cache, Tensor) else cache
    if pages_of_one:
        return k.unsqueeze(-3), v.unsqueeze(-3)
    return (k, v) if kv_layout == "NHD" else (k.transpose(-3, -2), v.transpose(-3, -2))
