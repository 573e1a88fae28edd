"""An attention back end of SGLang: ``--attention-backend anystride``, for MHA, GQA, MQA and MLA.

    pip install anystride sglang==0.5.23
    python -m sglang.launch_server --model ... --attention-backend anystride --page-size 1

SGLang finds :func:`register` by the entry point ``sglang.srt.plugins``. The token pool is read in place at
any page size, strides as they are. New tokens are written by the pool's own ``set_kv_buffer``, because pools
differ in what else they do there (quantise, translate to a sub-pool, wait for a transfer).

Source: ``AttentionBackend`` (sglang/srt/layers/attention/base_attn_backend.py), ``attention_registry.py``,
``memory_pool.py``, ``swa_memory_pool.py`` and ``deepseek_common`` of SGLang 0.5.23.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import anystride
from anystride.adapters.translation import Refusal, refuse

try:
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
except ImportError:  # so that the translation can be tested without SGLang, whose own class it is there
    AttentionBackend = object

__all__ = ["NAME", "AnystrideBackend", "register"]

NAME = "anystride"

_OTHER_IDS = "names tokens by ids that must be translated before they are read"
RUNNER_REFUSED = {
    "speculative_algorithm": Refusal(
        None, "asks for rows that are masked by a tree of drafts, and masks here are causal",
        "serve without --speculative-algorithm",
    ),
    "dcp_size": Refusal(
        1, "deals a sequence out to ranks, which are merged by an lse that this back end does not hand on",
        "--dcp-size 1, or anystride.distributed in an engine of your own",
    ),
    "unified_pool": Refusal(False, _OTHER_IDS, "a pool for each kind of layer"),
}  # fmt: skip
LAYER_REFUSED = {
    "attn_type": Refusal(
        "decoder", "asks for attention to later tokens, which no cache holds yet",
        "another back end for encoders",
    ),
    "is_cross_attention": Refusal(
        False, "reads the tokens of an encoder, which have a pool of their own", "another back end for it"
    ),
    "logit_capping_method": Refusal("tanh", "caps scores by another function than tanh", "tanh"),
    "xai_temperature_len": Refusal(
        -1, "scales a query by its position", "scale q by it before the layer, and set it to -1"
    ),
}  # fmt: skip
CALL_REFUSED = {
    name: Refusal(None, why, do)
    for name, why, do in (
        (
            "score_mod",
            "changes scores by a function, and scores are formed in a compiled kernel",
            "leave it out",
        ),
        ("aux_tensors", "belong to a score_mod", "leave them out"),
        ("topk_indices", "ask for sparse attention", "a back end for DeepSeek's sparse attention"),
        ("cos_sin_cache", "asks for a rotary embedding", "rotate q and k before the call"),
        ("llama_4_scaling", "scales queries by position", "scale q before the call"),
        ("return_lse", "asks for an lse, which SGLang merges under context parallelism only", "--dcp-size 1"),
    )
}
POOL_REFUSED = {
    "buffer": Refusal(
        3, "has its tokens in more dimensions than [slots, heads, dim]", "the pool's plain layout of tokens"
    )
}


def register() -> None:
    """Make ``anystride`` an attention back end of this process. Twice is as once.

    For MLA it registers the absorbed form for prefill as well as decode, so that every call reads the pool.
    """
    from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry
    from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import AttnForwardMethod
    from sglang.srt.models.deepseek_common.utils import FORWARD_ABSORB_CORE_ATTENTION_BACKENDS

    register_attention_backend(NAME)(AnystrideBackend)
    for names in (ATTENTION_BACKEND_CHOICES, FORWARD_ABSORB_CORE_ATTENTION_BACKENDS):
        if NAME not in names:
            names.append(NAME)
    AttentionBackendRegistry.register(NAME, lambda attn, forward_batch: AttnForwardMethod.MLA)


class Kind(NamedTuple):
    """What layers must share to share a schedule."""

    num_q_heads: int
    num_kv_heads: int
    d_qk: int
    d_v: int
    window: tuple[int, int]
    dtype: torch.dtype


class Step:
    """What the layers of a forward share.

    Attributes:
        starts: ``[batch + 1]`` int32: where each sequence's query tokens begin.
        lengths: ``[batch]`` int32: keys of each sequence, new ones included.
        tables: The pages of each sequence ``[batch, max_pages]`` int32, of the pool of all tokens and, where
            there is one, of the pool for windows.
        query_len: The most query tokens of a sequence.
        longest: Bound on the keys of a sequence.
        schedules: Made by the first layer of each kind.
        swa_loc: Where the new tokens go in the pool for windows; None without one.
    """

    def __init__(
        self,
        starts: Tensor,
        lengths: Tensor,
        tables: tuple[Tensor, Tensor | None],
        query_len: int,
        longest: int,
        swa_loc: Tensor | None,
    ) -> None:
        self.starts, self.lengths, self.tables = starts, lengths, tables
        self.query_len, self.longest, self.swa_loc = query_len, longest, swa_loc
        self.schedules: dict[Kind, Tensor] = {}

    def schedule(self, kind: Kind) -> Tensor:
        """The share of work for layers of a kind; in a CUDA graph it is made anew at each replay."""
        if kind not in self.schedules:
            self.schedules[kind] = anystride.get_scheduler_metadata(
                self.lengths.shape[0], self.query_len, self.longest, kind.num_q_heads, kind.num_kv_heads,
                kind.d_qk, self.lengths, kind.dtype, kind.d_v, self.starts, causal=True,
                window_size=kind.window,
            )  # fmt: skip
        return self.schedules[kind]


class AnystrideBackend(AttentionBackend):  # type: ignore[misc]
    """Every prefill and every decode of a model on :func:`anystride.flash_attn_varlen_func`.

    Args:
        runner: SGLang's ``ModelRunner``: its pools, page size and context length are read.

    Raises:
        UnsupportedError: The server is set up for what has no counterpart here, by name.
    """

    def __init__(self, runner: Any) -> None:
        super().__init__()
        server = runner.server_args
        translator = getattr(runner, "kv_index_translator", None)
        refuse(
            "--attention-backend anystride", RUNNER_REFUSED,
            speculative_algorithm=server.speculative_algorithm,
            dcp_size=getattr(server, "dcp_size", 1),
            unified_pool=bool(translator is not None and translator.is_translating),
        )  # fmt: skip
        self.req_to_token: Tensor = runner.req_to_token_pool.req_to_token
        self.pool = runner.token_to_kv_pool
        self.page_size: int = runner.page_size
        self.is_mla: bool = runner.use_mla_backend
        self.max_context: int = runner.model_config.context_len
        # layer id -> (its place in its pool, whether that is the pool for windows)
        self.swa_layers: dict[int, tuple[int, bool]] = getattr(self.pool, "layers_mapping", {})
        self.has_swa_pool = any(is_swa for _, is_swa in self.swa_layers.values())
        self.forward_metadata: Step | None = None
        self._graph: dict[str, Tensor] = {}
        self._graph_steps: dict[int, Step] = {}

    # ---- once a forward -----------------------------------------------------------------------------

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Prepare an eager forward. Never waits for the device: bounds come from the host's own lists."""
        batch, device = forward_batch.batch_size, self.req_to_token.device
        lengths = forward_batch.seq_lens.to(torch.int32)
        if forward_batch.forward_mode.is_decode_or_idle():
            starts, query_len = torch.arange(batch + 1, dtype=torch.int32, device=device), 1
        else:
            counts = forward_batch.extend_seq_lens
            starts = torch.zeros(batch + 1, dtype=torch.int32, device=device)
            torch.cumsum(counts, 0, dtype=torch.int32, out=starts[1:])
            query_len = max(forward_batch.extend_seq_lens_cpu, default=1)
        longest = self._longest(forward_batch)
        pages = -(-longest // self.page_size)
        tables = self._tables(forward_batch.req_pool_indices, lengths, pages)
        self.forward_metadata = Step(
            starts, lengths, tables, query_len, longest, self._swa(forward_batch.out_cache_loc)
        )

    def _longest(self, forward_batch: Any) -> int:
        """A bound on the keys of a sequence: that of the host's copy of the lengths, if there is one."""
        on_host = forward_batch.seq_lens_cpu
        if on_host is None:
            return self.max_context
        return int(on_host.max()) if len(on_host) else 1

    def _tables(self, requests: Tensor, lengths: Tensor, pages: int) -> tuple[Tensor, Tensor | None]:
        """Pages of each sequence: the token at the head of each page names it. Past the end: anything."""
        heads = self.req_to_token[:, : pages * self.page_size : self.page_size][requests]
        table = heads // self.page_size if self.page_size > 1 else heads
        if not self.has_swa_pool:
            return table, None
        # What stands past the end is no index into the translation.
        begins = torch.arange(0, pages * self.page_size, self.page_size, device=heads.device)
        heads = heads.long().masked_fill(begins >= lengths[:, None], 0)
        in_swa = self.pool.translate_loc_from_full_to_swa(heads)
        return table, (in_swa // self.page_size).to(torch.int32)

    def _swa(self, slots: Tensor | None) -> Tensor | None:
        """Slots of the pool of all tokens as slots of the pool for windows."""
        if slots is None or not self.has_swa_pool:
            return None
        in_swa: Tensor = self.pool.translate_loc_from_full_to_swa(slots)
        return in_swa

    # ---- CUDA graphs: decoding steps ----------------------------------------------------------------

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Reserve what captured steps read: lengths and tables for ``max_bs`` sequences of any length."""
        device = self.req_to_token.device
        pages = -(-self.max_context // self.page_size)
        self._graph = {
            "starts": torch.arange(max_bs + 1, dtype=torch.int32, device=device),
            "lengths": torch.ones(max_bs, dtype=torch.int32, device=device),
            "table": torch.zeros(max_bs, pages, dtype=torch.int32, device=device),
        }
        if self.has_swa_pool:
            self._graph["swa_table"] = torch.zeros(max_bs, pages, dtype=torch.int32, device=device)
            self._graph["swa_loc"] = torch.zeros(max_num_tokens, dtype=torch.int64, device=device)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Padded rows count as sequences of one token, whose result nobody reads."""
        return 1

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Fill the buffers of a step that is captured, or replayed; only decoding steps are."""
        batch = forward_batch.batch_size
        pages = -(-self._longest(forward_batch) // self.page_size)
        buffers = self._graph
        lengths = buffers["lengths"][:batch].copy_(forward_batch.seq_lens[:batch])
        table, swa_table = self._tables(forward_batch.req_pool_indices[:batch], lengths, pages)
        buffers["table"][:batch, :pages].copy_(table)
        swa_loc = None
        if swa_table is not None:
            buffers["swa_table"][:batch, :pages].copy_(swa_table)
            slots = forward_batch.out_cache_loc
            swa_loc = buffers["swa_loc"][: len(slots)]
            swa_loc.copy_(self.pool.translate_loc_from_full_to_swa(slots))
        if in_capture or batch not in self._graph_steps:
            whole = buffers["swa_table"][:batch] if swa_table is not None else None
            self._graph_steps[batch] = Step(
                buffers["starts"][: batch + 1], lengths, (buffers["table"][:batch], whole),
                1, self.max_context, swa_loc,
            )  # fmt: skip
        self.forward_metadata = self._graph_steps[batch]

    # ---- once a layer -------------------------------------------------------------------------------

    def forward_decode(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **more: Any,
    ) -> Tensor:
        """One new token of each sequence; see :meth:`forward_extend`."""
        return self.forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **more)

    def forward_extend(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        *,
        q_rope: Tensor | None = None,
        k_rope: Tensor | None = None,
        sinks: Tensor | None = None,
        attn_sink: Tensor | None = None,
        **more: Any,
    ) -> Tensor:
        """Store the new tokens, then attend to the pool.

        Args:
            q: ``[tokens, num_q_heads * d_qk]`` or ``[tokens, num_q_heads, d_qk]``; with ``q_rope`` its latent
                part.
            k: ``[tokens, num_kv_heads, d_qk]``, or None where the pool has the tokens already; with
                ``k_rope`` its latent part.
            v: ``[tokens, num_kv_heads, d_v]``; unused with ``k_rope``.
            layer: SGLang's ``RadixAttention``.
            forward_batch: Its ``ForwardBatch``.
            save_kv_cache: Whether to store ``k`` and ``v``.
            q_rope, k_rope: The rope parts of MLA, ``[tokens, heads, rope]``.
            sinks, attn_sink: ``[num_q_heads]``: one more logit of each head, for MHA and for MLA.
            **more: Refused unless None or False.

        Returns:
            ``[tokens, num_q_heads * d_v]``; rows past those of the sequences are left as they are.

        Raises:
            UnsupportedError: For what has no counterpart here, by name.
        """
        given = {name: value for name, value in more.items() if value is not None and value is not False}
        refuse("forward", CALL_REFUSED | {n: _unknown(n) for n in given if n not in CALL_REFUSED}, **given)
        attn_type = getattr(layer.attn_type, "value", layer.attn_type)
        refuse(
            "RadixAttention", LAYER_REFUSED, attn_type=attn_type, is_cross_attention=layer.is_cross_attention,
            logit_capping_method=layer.logit_capping_method, xai_temperature_len=layer.xai_temperature_len,
        )  # fmt: skip
        step = self.forward_metadata
        assert step is not None, "init_forward_metadata comes before the layers"
        if save_kv_cache and k is not None:
            self._store(k, v, k_rope, layer, forward_batch, step)
        heads, width, values = layer.tp_q_head_num, layer.qk_head_dim, layer.v_head_dim
        is_swa = self.swa_layers.get(layer.layer_id, (0, False))[1]
        table = step.tables[1] if is_swa else step.tables[0]
        assert table is not None
        key_cache = self._paged(self.pool.get_key_buffer(layer.layer_id))
        value_cache = self._paged(self.pool.get_value_buffer(layer.layer_id))
        q_v = None
        if q_rope is not None:  # MLA in two parts
            q_v, q = q.view(-1, heads, values), q_rope.view(-1, heads, width - values)
            value_cache, key_cache = key_cache[..., :values], key_cache[..., values:]
        else:
            q = q.view(-1, heads, width)
            value_cache = value_cache[..., :values]
        left = layer.sliding_window_size
        window = (left, 0) if left is not None and left >= 0 else (-1, -1)
        kind = Kind(heads, key_cache.shape[-2], q.shape[-1], values, window, q.dtype)
        out = q.new_empty(q.shape[0], heads, values)
        anystride.flash_attn_varlen_func(
            q,
            key_cache,
            value_cache,
            step.query_len,
            step.starts,
            step.longest,
            seqused_k=step.lengths,
            q_v=q_v,
            softmax_scale=layer.scaling,
            causal=True,
            window_size=window,
            softcap=layer.logit_cap or 0.0,
            block_table=table,
            out=out,
            scheduler_metadata=step.schedule(kind),
            s_aux=sinks if sinks is not None else attn_sink,
            **self._descales(layer, key_cache),
        )
        return out.view(-1, heads * values)

    def _paged(self, buffer: Tensor) -> Tensor:
        """``[slots, heads, d]`` as ``[pages, page_size, heads, d]``: a view of any strides."""
        refuse("the token pool", POOL_REFUSED, buffer=buffer.dim())
        pages = buffer.shape[0] // self.page_size
        paged: Tensor = buffer[: pages * self.page_size].unflatten(0, (pages, self.page_size))
        return paged

    def _store(
        self, k: Tensor, v: Tensor | None, k_rope: Tensor | None, layer: Any, forward_batch: Any, step: Step
    ) -> None:
        """Write new tokens by the pool's own writer."""
        from sglang.srt.mem_cache.memory_pool import KVWriteLoc

        where = KVWriteLoc.for_batch(forward_batch, swa_loc=step.swa_loc)
        if not self.is_mla:
            self.pool.set_kv_buffer(layer, where, k, v, layer.k_scale, layer.v_scale)
            return
        if self._is_scaled(layer, self.pool.get_key_buffer(layer.layer_id)):
            # These pools take no scale: numbers are divided before.
            k = k / layer.k_scale
            k_rope = None if k_rope is None else k_rope / layer.k_scale
        if k_rope is None:
            self.pool.set_kv_buffer(layer, where, k, v)
        else:
            self.pool.set_mla_kv_buffer(layer, where, k, k_rope)

    @staticmethod
    def _is_scaled(layer: Any, cache: Tensor) -> bool:
        return layer.k_scale is not None and cache.itemsize == 1

    def _descales(self, layer: Any, cache: Tensor) -> dict[str, Any]:
        """The factors of an fp8 pool's numbers, if the checkpoint brings any."""
        if not self._is_scaled(layer, cache):
            return {}
        return {"k_descale": layer.k_scale, "v_descale": layer.k_scale if self.is_mla else layer.v_scale}

    def support_triton(self) -> bool:
        """SGLang asks before it uses Triton kernels of its own to prepare a batch."""
        return bool(self.req_to_token.is_cuda)


def _unknown(name: str) -> Refusal:
    return Refusal(
        None, "is not known to this back end, which was written for SGLang 0.5.23", f"leave {name} out"
    )
