"""The back end: SGLang's step as block tables and lengths, its pools as views, one call a layer.

SGLang numbers tokens of a pool by slots, and ``req_to_token[request, position]`` is the slot of a token. The
slots of a page are neighbours, so ``req_to_token[request, ::page_size] // page_size`` is a block table, made
once a step on the device. A layer's buffer is viewed as blocks by splitting its first axis: whatever
the distance of two slots is (a unified pool keeps all layers of a token side by side), nothing is copied.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.base_swa_memory_pool import BaseSWAKVPool
from sglang.srt.mem_cache.kv_loc_plan import IdSpaceKind
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.runtime_context import get_exec, get_parallel, get_spec
from torch import Tensor

from anystride import flash_attn_varlen_func, get_scheduler_metadata
from anystride.adapters.translation import Refusal, query_starts, refuse

__all__ = ["AnystrideBackend", "Step"]

OPERATION = "SGLang attention backend 'anystride'"
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)

_OTHER = "--attention-backend triton, or another of SGLang's own"
_SHARDED = "asks for attention over a cache that is sharded across ranks, which this back end does not merge"
MODEL_REFUSED = {
    "attn_dcp_size": Refusal(1, _SHARDED, "--dcp-size 1"),
    "attn_cp_size": Refusal(1, _SHARDED, "--attn-cp-size 1"),
    "is_encoder_decoder": Refusal(False, "asks for cross attention, which reads another cache", _OTHER),
    "attention_chunk_size": Refusal(None, "asks for attention within chunks; windows here slide", _OTHER),
    "kv_cache_dtype": Refusal(
        "16 or 32 bits, fp8_e4m3 or fp8_e5m2", "is a format with scales of its own", "--kv-cache-dtype auto"
    ),
    "kv_cache_layout": Refusal(
        "nhd or hnd", "cuts a head's dimensions into two axes, and one stride does not describe them",
        "SGLANG_AITER_KV_CACHE_LAYOUT=nhd",
    ),
    "speculative_eagle_topk": Refusal(
        1, "asks to verify a tree of tokens, whose mask is not causal", "--speculative-eagle-topk 1"
    ),
}  # fmt: skip
LAYER_REFUSED = {
    "is_cross_attention": Refusal(False, "reads another cache", _OTHER),
    "attn_type": Refusal(
        "decoder or encoder_only", "lets the tokens of an extend see each other both ways", _OTHER
    ),
    "pos_encoding_mode": Refusal("NONE", "asks to rotate while attending; rows are read as they are", _OTHER),
    "logit_capping_method": Refusal("tanh", "is another softcap", _OTHER),
    "xai_temperature_len": Refusal(-1, "scales each query by its position", _OTHER),
}
STEP_REFUSED = {
    "forward_mode": Refusal(
        None, "is no prompt, decode or verify step: a draft model's forward, or a diffusion model's",
        "--speculative-draft-attention-backend triton, or another of SGLang's own",
    ),
    "spec_info": Refusal(
        None, "makes the step one of the draft model, which keeps lengths of its own",
        "--speculative-draft-attention-backend triton",
    ),
    "encoder_lens": Refusal(None, "asks for cross attention, which reads another cache", _OTHER),
    "topk": Refusal(
        1, "asks to verify a tree of tokens, whose mask is not causal", "--speculative-eagle-topk 1"
    ),
    "ragged_verify_layout": Refusal(
        None, "asks to verify as many tokens of each request as it says", "a fixed number of draft tokens"
    ),
}  # fmt: skip
GRAPH_REFUSED = {
    "forward_mode": Refusal(
        None, "is a prompt, whose shapes differ from step to step", "--cuda-graph-backend-prefill disabled"
    )
}
# Arguments of a layer's call that other back ends know. One that is not listed is refused as well.
CALL_REFUSED = {
    "score_mod": "changes the scores by a function",
    "aux_tensors": "are a score_mod's",
    "rel_bias": "adds a bias to the scores",
    "rel_bias_event": "is a rel_bias's",
    "topk_indices": "asks for sparse attention",
    "attn_sink": "is a sink of sparse attention; sinks are taken as sinks",
    "cos_sin_cache": "asks to rotate while attending",
    "is_neox": "asks to rotate while attending",
    "llama_4_scaling": "asks to rotate while attending",
    "q_descale": "is a factor of an fp8 query",
    "k_descale": "is a scale of a format of its own",
    "v_descale": "is a scale of a format of its own",
}


@dataclass
class Step:
    """What all layers of a forward share.

    Attributes:
        lengths: ``[batch]`` int32: keys of each request, new ones included.
        starts: ``[batch + 1]`` int32: where each request's query tokens begin.
        longest_query: Upper bound on the query tokens of a request.
        table: ``[batch, pages]`` int32: block table.
        window_table: The same in the sub-pool of the layers with a window, if there is one.
        window_slots: ``[num_tokens]``: where that sub-pool stores the new tokens.
        key_starts: ``[batch + 1]`` int32: where each request's keys begin, if all lie side by side.
        schedules: For each kind of layer how the work is shared out.
    """

    lengths: Tensor
    starts: Tensor
    longest_query: int
    table: Tensor
    window_table: Tensor | None = None
    window_slots: Tensor | None = None
    key_starts: Tensor | None = None
    schedules: dict[tuple[object, ...], Tensor] = field(default_factory=dict)


class AnystrideBackend(AttentionBackend):  # type: ignore[misc]  # SGLang is not there when mypy is run
    """Attention over SGLang's token pools, read in place.

    MHA, GQA, MQA and MLA; pages of any size; pools of any strides, unified and hybrid ones too.
    New tokens are stored by the pool's own methods: which slot of which sub-pool a token goes to, and in what
    format, is the pool's to know, and others write through the same methods.

    Args:
        runner: SGLang's ``ModelRunner``, its pools allocated.

    Raises:
        UnsupportedError: Names everything that the model or the server's arguments ask for and that is not
            here.
    """

    # Lengths are read on the device. The host's copy narrows an eager step's table where it is there.
    needs_cpu_seq_lens = False

    def __init__(self, runner: Any) -> None:
        super().__init__()
        self.pool = runner.token_to_kv_pool
        self.req_to_token = runner.req_to_token_pool.req_to_token
        self.page_size = runner.page_size
        self.kv_index_translator = runner.kv_index_translator
        self.is_mla = runner.use_mla_backend
        self.is_hybrid = isinstance(self.pool, BaseSWAKVPool)
        self.data_type = self.kv_cache_dtype = runner.kv_cache_dtype
        self.batch_invariant = bool(get_exec().deterministic.enable_deterministic_inference)
        self.forward_metadata: Step | None = None
        self._graph_steps: dict[tuple[object, int], Step] = {}
        self._checked: set[int] = set()
        _check_model(runner)

    # ---- what a step shares

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Make the tables of an eager step.

        Args:
            forward_batch: SGLang's ``ForwardBatch``.

        Raises:
            UnsupportedError: It is a kind of forward that is not here.
        """
        if forward_batch.forward_mode.is_idle():
            self.forward_metadata = None
            return
        more = _check_step(forward_batch)
        batch = forward_batch.batch_size
        lengths = (forward_batch.seq_lens + more if more else forward_batch.seq_lens).to(torch.int32)
        if forward_batch.forward_mode.is_extend() and not more:
            starts = lengths.new_zeros(batch + 1)
            torch.cumsum(forward_batch.extend_seq_lens, 0, dtype=torch.int32, out=starts[1:])
            host = forward_batch.extend_seq_lens_cpu
            longest_query = forward_batch.positions.shape[0] if host is None else max(host)
        else:
            longest_query = more or 1
            starts = query_starts(batch, longest_query, lengths.device)
        step = Step(
            lengths, starts, longest_query, lengths.new_empty((batch, self._width(forward_batch, more)))
        )
        if self.is_hybrid:
            step.window_table = step.table.new_empty(step.table.shape)
            step.window_slots = self._window_slots(forward_batch)
        self._fill_tables(step, forward_batch)
        self.forward_metadata = step

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Allocate what captured steps read.

        Args:
            max_bs: Requests of the largest graph.
            max_num_tokens: Query tokens of the largest graph.
        """
        device = self.req_to_token.device
        self._lengths = torch.zeros(max_bs, dtype=torch.int32, device=device)
        pages = -(-self.req_to_token.shape[1] // self.page_size)
        self._tables = torch.zeros((1 + self.is_hybrid, max_bs, pages), dtype=torch.int32, device=device)
        self._slots = torch.zeros(max_num_tokens if self.is_hybrid else 0, dtype=torch.int64, device=device)
        self._graph_steps.clear()

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Length of a request that only pads a graph: 0, so that its row reads no key and is 0."""
        return 0

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Fill the buffers of a graph's step, before it is captured and before each replay.

        Args:
            forward_batch: The runner's batch, padded.
            in_capture: Whether the graph is about to be captured.

        Raises:
            UnsupportedError: It is a kind of forward that is not here, or not in a graph.
        """
        mode = forward_batch.forward_mode
        more = 0 if mode.is_idle() else _check_step(forward_batch)
        if not (mode.is_decode_or_idle() or mode.is_target_verify()):
            refuse(OPERATION, GRAPH_REFUSED, forward_mode=mode)
        batch = forward_batch.batch_size
        step = self._graph_steps.get((mode, batch))
        if step is None or in_capture:
            step = self._graph_steps[mode, batch] = Step(
                self._lengths[:batch],
                query_starts(batch, more or 1, self._lengths.device),
                more or 1,
                self._tables[0, :batch],
                self._tables[1, :batch] if self.is_hybrid else None,
            )
        step.lengths.copy_(forward_batch.seq_lens[:batch])
        if more:
            step.lengths.add_(more)
        if self.is_hybrid:
            slots = self._window_slots(forward_batch)
            used = 0 if slots is None else slots.shape[0]
            self._slots[used:].zero_()  # slot 0 holds what nobody reads
            if slots is not None:
                self._slots[:used].copy_(slots)
            if in_capture:
                self._slots.zero_()  # a capture must not write over tokens
            step.window_slots = self._slots[:used]
        self._fill_tables(step, forward_batch)
        self.forward_metadata = step

    def _width(self, forward_batch: Any, more: int) -> int:
        """Pages of a table that is wide enough, by what the host knows."""
        slots, host = self.req_to_token.shape[1], forward_batch.seq_lens_cpu
        if host is not None and host.numel():
            slots = min(slots, int(host.max()) + more)
        pages: int = -(-slots // self.page_size)
        return pages

    def _fill_tables(self, step: Step, forward_batch: Any) -> None:
        batch, pages = step.table.shape
        reader, plan = self.kv_index_translator, forward_batch.kv_loc_plan
        if reader is not None and reader.reads_are_translated:  # a unified pool moves its pages about
            reader.copy_page_table(plan, out=step.table)
            if step.window_table is not None:
                reader.copy_page_table(plan, out=step.window_table, kind=IdSpaceKind.SLIDING_WINDOW)
            return
        first = self.req_to_token[:, :: self.page_size][:, :pages]  # the slot that begins each page
        torch.index_select(first, 0, forward_batch.req_pool_indices[:batch], out=step.table)
        if step.window_table is not None:
            # Behind a request's tokens the row holds anything, and must not be looked up.
            position = torch.arange(0, pages * self.page_size, self.page_size, device=step.table.device)
            used = position < step.lengths[:, None]
            slots = self.pool.translate_loc_from_full_to_swa(step.table.where(used, 0))
            step.window_table.copy_(slots.clamp_(min=0)).div_(self.page_size, rounding_mode="floor")
        if self.page_size != 1:
            step.table.div_(self.page_size, rounding_mode="floor")

    def _window_slots(self, forward_batch: Any) -> Tensor | None:
        if forward_batch.out_cache_loc is None:
            return None
        slots: Tensor = self.kv_index_translator.write_ids(forward_batch, IdSpaceKind.SLIDING_WINDOW)
        return slots

    # ---- what a layer does

    def forward_decode(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        q_rope: Tensor | None = None,
        k_rope: Tensor | None = None,
        sinks: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        """Store a new token of each request, then attend to all of its tokens.

        Args:
            q: ``[batch, num_q_heads * d_qk]`` or ``[batch, num_q_heads, d_qk]``, any strides between heads
                and tokens; absorbed MLA with ``q_rope``: the latent part.
            k, v: New rows, ``[batch, num_kv_heads, d]``; absorbed MLA with ``k_rope``: the latent part,
                twice. None: an earlier layer stored them.
            layer: SGLang's ``RadixAttention``.
            forward_batch: SGLang's ``ForwardBatch``.
            save_kv_cache: False: they are stored already.
            q_rope, k_rope: The rope parts of absorbed MLA, where they are apart.
            sinks: ``[num_q_heads]``: one more logit of each head.
            **others: Refused unless None or False.

        Returns:
            ``[batch, num_q_heads * d_v]`` in the dtype of ``q``.

        Raises:
            UnsupportedError: The layer, or an argument, asks for what is not here.
        """
        step = self._begin(layer, k, v, k_rope, forward_batch, save_kv_cache, others)
        out, _ = self._attend(q, q_rope, layer, step, sinks, _given_out(forward_batch, layer), False)
        return out.flatten(1)

    def forward_extend(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        q_rope: Tensor | None = None,
        k_rope: Tensor | None = None,
        sinks: Tensor | None = None,
        return_lse: bool = False,
        **others: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Store new tokens, then attend to the cached prefix and to them, aligned to the bottom right.

        Verifying drafted tokens is an extend, too. A prompt of an MLA model may come with keys and values of
        each head instead (``forward_batch.attn_attend_prefix_cache``): then the new tokens, or all, or one
        chunk of the prefix are in ``k`` and ``v``, and the pool is not read.

        Args:
            q: ``[num_tokens, num_q_heads * d_qk]`` or ``[num_tokens, num_q_heads, d_qk]``.
            k, v, layer, forward_batch, save_kv_cache, q_rope, k_rope, sinks, **others: As in
                :meth:`forward_decode`.
            return_lse: Also return the log-sum-exp.

        Returns:
            ``[num_tokens, num_q_heads * d_v]`` in the dtype of ``q``. Where the log-sum-exp is asked for, by
            the argument or by ``forward_batch.mha_return_lse``, also float32 ``[num_tokens, num_q_heads]``,
            natural logarithm, -inf for a row that sees no key; and with the latter the first is
            ``[num_tokens, num_q_heads, d_v]``.

        Raises:
            UnsupportedError: The layer, or an argument, asks for what is not here.
        """
        step = self._begin(layer, k, v, k_rope, forward_batch, save_kv_cache, others)
        given = _given_out(forward_batch, layer)
        mode = forward_batch.forward_mode
        if self.is_mla and forward_batch.attn_attend_prefix_cache is not None and not mode.is_target_verify():
            return self._attend_rows(q, k, v, layer, forward_batch, step, given)
        out, lse = self._attend(q, q_rope, layer, step, sinks, given, return_lse)
        return out.flatten(1) if lse is None else (out.flatten(1), _token_major(lse))

    def _begin(
        self,
        layer: Any,
        k: Tensor | None,
        v: Tensor | None,
        k_rope: Tensor | None,
        forward_batch: Any,
        save_kv_cache: bool,
        others: dict[str, Any],
    ) -> Step:
        if layer.layer_id not in self._checked:
            _check_layer(layer)
            self._checked.add(layer.layer_id)
        if others:
            _check_call(others)
        step = self.forward_metadata
        assert step is not None  # init_forward_metadata comes first
        if save_kv_cache and k is not None:
            self._store(k, v, k_rope, layer, KVWriteLoc.for_batch(forward_batch, swa_loc=step.window_slots))
        return step

    def _store(self, k: Tensor, v: Tensor | None, k_rope: Tensor | None, layer: Any, where: Any) -> None:
        if k_rope is not None:
            self.pool.set_mla_kv_buffer(layer, where, k, k_rope)
        elif self.is_mla:
            self.pool.set_kv_buffer(layer, where, k, v)
        else:
            k_scale, v_scale = self._scales(layer)
            # Divided here: the pool would divide in place, and the caller may go on with its rows.
            self.pool.set_kv_buffer(
                layer,
                where,
                k if k_scale is None else k / k_scale,
                v if v_scale is None or v is None else v / v_scale,
            )

    def _scales(self, layer: Any) -> tuple[Any, Any]:
        """What stored keys and values are to be multiplied with, or None.

        Only MHA's rows in fp8 have a scale: an MLA pool stores rows as they are, whoever calls it.
        """
        if self.is_mla or self.kv_cache_dtype not in FP8:
            return None, None
        return _factor(layer.k_scale, layer.k_scale_float), _factor(layer.v_scale, layer.v_scale_float)

    def _attend(
        self,
        q: Tensor,
        q_rope: Tensor | None,
        layer: Any,
        step: Step,
        sinks: Tensor | None,
        out: Tensor | None,
        wants_lse: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Over the pool: ``[num_tokens, heads, d_v]``, and lse ``[heads, num_tokens]``."""
        heads, rank = layer.tp_q_head_num, layer.v_head_dim
        q, q_v = _heads(q, heads), None
        if self.is_mla:
            rows = self._blocks(self.pool.get_key_buffer(layer.layer_id))
            k, v = rows, rows[..., :rank]
            if q_rope is not None:
                q, q_v, k = _heads(q_rope, heads), q, rows[..., rank:]
        else:
            k, v = map(self._blocks, self.pool.get_kv_buffer(layer.layer_id))
        table = step.table
        if self.is_hybrid and self.pool.layers_mapping[layer.layer_id][1]:
            assert step.window_table is not None
            table = step.window_table
        causal = layer.attn_type != AttentionType.ENCODER_ONLY
        left = layer.sliding_window_size
        window = (left, 0 if causal else left) if left is not None and left >= 0 else (-1, -1)
        k_scale, v_scale = self._scales(layer)
        longest = table.shape[1] * self.page_size
        result = flash_attn_varlen_func(
            q,
            k,
            v,
            step.longest_query,
            step.starts,
            longest,
            seqused_k=step.lengths,
            q_v=q_v,
            softmax_scale=layer.scaling,
            causal=causal,
            window_size=window,
            softcap=layer.logit_cap,
            block_table=table,
            return_softmax_lse=wants_lse,
            out=out,
            scheduler_metadata=self._schedule(step, q, k, v, causal, window, longest),
            k_descale=k_scale,
            v_descale=v_scale,
            s_aux=sinks,
            batch_invariant=self.batch_invariant,
        )
        return result if isinstance(result, tuple) else (result, None)

    def _schedule(
        self,
        step: Step,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool,
        window: tuple[int, int],
        longest: int,
    ) -> Tensor | None:
        """The work of the step, shared out once for all layers that are alike."""
        if self.batch_invariant:
            return None  # then every request is cut alike, whatever the others are
        # Made outside of a capture, as in its warm-up, it would not be made anew by a replay.
        capturing = q.is_cuda and torch.cuda.is_current_stream_capturing()
        kind = (q.shape[1], k.shape[-2], q.shape[2], v.shape[-1], q.dtype, causal, window, longest, capturing)
        schedule = step.schedules.get(kind)
        if schedule is None:
            schedule = step.schedules[kind] = get_scheduler_metadata(
                step.lengths.shape[0],
                step.longest_query,
                longest,
                q.shape[1],
                k.shape[-2],
                q.shape[2],
                step.lengths,
                q.dtype,
                v.shape[-1],
                step.starts,
                causal=causal,
                window_size=window,
            )
        return schedule

    def _attend_rows(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        layer: Any,
        forward_batch: Any,
        step: Step,
        out: Tensor | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Over ``k`` and ``v``, a row of each head for each token, one request after the other."""
        assert k is not None  # SGLang's MHA path of MLA always passes both
        assert v is not None
        causal, starts, longest = True, step.starts, step.longest_query
        if forward_batch.attn_attend_prefix_cache:
            chunk = forward_batch.prefix_chunk_idx
            causal = False  # the whole prefix comes before the new tokens
            starts = forward_batch.prefix_chunk_cu_seq_lens[chunk]
            longest = forward_batch.prefix_chunk_max_seq_lens[chunk]  # a list
        elif forward_batch.mha_one_shot:
            if step.key_starts is None:
                step.key_starts = step.lengths.new_zeros(step.lengths.shape[0] + 1)
                torch.cumsum(step.lengths, 0, dtype=torch.int32, out=step.key_starts[1:])
            starts, longest = step.key_starts, step.table.shape[1] * self.page_size
        result = flash_attn_varlen_func(
            _heads(q, layer.tp_q_head_num),
            _heads(k, layer.tp_k_head_num),
            _heads(v, layer.tp_v_head_num),
            step.longest_query,
            step.starts,
            longest,
            cu_seqlens_k=starts,
            softmax_scale=layer.scaling,
            causal=causal,
            softcap=layer.logit_cap,
            return_softmax_lse=bool(forward_batch.mha_return_lse),
            out=out,
            batch_invariant=self.batch_invariant,
        )
        if isinstance(result, tuple):
            return result[0], _token_major(result[1])
        return result.flatten(1)

    def _blocks(self, buffer: Tensor) -> Tensor:
        """A layer's buffer as ``[num_pages, page_size, num_kv_heads, d]``: a view, whatever its strides."""
        if buffer.dim() == 4:  # SGLang's hnd: [num_pages, num_kv_heads, page_size, d]
            return buffer.transpose(1, 2)
        pages = buffer.shape[0] // self.page_size
        whole: Tensor = buffer[: pages * self.page_size].unflatten(0, (pages, self.page_size))
        return whole


def _heads(rows: Tensor, heads: int) -> Tensor:
    """``[n, heads * d]`` as ``[n, heads, d]``; what has three axes stays as it is."""
    return rows if rows.dim() == 3 else rows.unflatten(-1, (heads, -1))


def _token_major(lse: Tensor) -> Tensor:
    """``[heads, n]`` as ``[n, heads]`` in memory, too: SGLang's merge counts its addresses from the shape."""
    rows: Tensor = lse.new_empty(lse.shape[::-1])
    rows.copy_(lse.t())
    return rows


def _factor(scale: Tensor | None, on_host: float | None) -> Tensor | float | None:
    return on_host if on_host is not None or scale is None else scale.float().reshape(())


def _given_out(forward_batch: Any, layer: Any) -> Tensor | None:
    """The buffer that SGLang's prefill graphs want the result in."""
    out = getattr(forward_batch, "_attn_output", None)
    return None if out is None else out.view(out.shape[0], layer.tp_q_head_num, layer.v_head_dim)


def _check_model(runner: Any) -> None:
    parallel, pool = get_parallel(), runner.token_to_kv_pool
    dtype, layout = runner.kv_cache_dtype, getattr(pool, "kv_cache_layout", "nhd")
    named = getattr(runner, "kv_cache_dtype_str", "auto")
    own_scales = getattr(pool, "is_quantized_kv_cache", False) or named == "mxfp8"
    plain = dtype in (torch.float16, torch.bfloat16, torch.float32, *FP8) and not own_scales
    refuse(
        OPERATION,
        MODEL_REFUSED,
        attn_dcp_size=parallel.attn_dcp_size,
        attn_cp_size=parallel.attn_cp_size,
        is_encoder_decoder=bool(runner.model_config.is_encoder_decoder),
        attention_chunk_size=runner.attention_chunk_size,
        kv_cache_dtype=MODEL_REFUSED["kv_cache_dtype"].neutral if plain else f"{named} ({dtype})",
        kv_cache_layout=layout if layout == "vectorized_5d" else MODEL_REFUSED["kv_cache_layout"].neutral,
        speculative_eagle_topk=get_spec().speculative_eagle_topk or 1,
    )


def _check_layer(layer: Any) -> None:
    allowed = (AttentionType.DECODER, AttentionType.ENCODER_ONLY)
    scaled = layer.xai_temperature_len is not None and layer.xai_temperature_len > 0
    refuse(
        f"{OPERATION}, layer {layer.layer_id}",
        LAYER_REFUSED,
        is_cross_attention=layer.is_cross_attention,
        attn_type=LAYER_REFUSED["attn_type"].neutral if layer.attn_type in allowed else layer.attn_type,
        pos_encoding_mode=layer.pos_encoding_mode,
        logit_capping_method=layer.logit_capping_method if layer.logit_cap else "tanh",
        xai_temperature_len=layer.xai_temperature_len if scaled else -1,
    )


def _check_call(others: dict[str, Any]) -> None:
    asked = {name: value for name, value in others.items() if value is not None and value is not False}
    why = {name: Refusal(None, CALL_REFUSED.get(name, "has no counterpart here"), _OTHER) for name in asked}
    refuse(OPERATION, why, **asked)


def _check_step(forward_batch: Any) -> int:
    """Refuse what is not here; returns how many keys of a request ``seq_lens`` does not count yet."""
    mode, spec = forward_batch.forward_mode, forward_batch.spec_info
    drafts = mode.is_target_verify()
    known = mode.is_decode() or (mode.is_extend() and not mode.is_dllm_extend())
    refuse(
        OPERATION,
        STEP_REFUSED,
        forward_mode=None if known else mode,
        spec_info=None if drafts or not mode.is_decode() or spec is None else type(spec).__name__,
        encoder_lens=forward_batch.encoder_lens,
        topk=getattr(spec, "topk", 1) if drafts else 1,
        ragged_verify_layout=getattr(spec, "ragged_verify_layout", None),
    )
    return int(spec.draft_token_num) if drafts else 0
