"""The parts of SGLang that its attention back end meets: the real ones where installed, else stand-ins.

The stand-ins state the interface as read in SGLang 0.5.23; each names the file it was read in, under
``sglang/srt``. They hold what ``anystride.adapters.sglang`` and its tests touch and nothing more.
``make test-sglang`` runs the same tests with the real classes.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, IntEnum, auto
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor

__all__ = ["IS_REAL", "installed", "published"]

IS_REAL = importlib.util.find_spec("sglang") is not None


class ForwardMode(IntEnum):  # model_executor/forward_batch_info.py
    EXTEND = auto()
    DECODE = auto()
    MIXED = auto()
    IDLE = auto()
    TARGET_VERIFY = auto()
    DRAFT_EXTEND_V2 = auto()
    PREBUILT = auto()
    SPLIT_PREFILL = auto()
    DLLM_EXTEND = auto()

    def is_extend(self) -> bool:
        return self.name in ("EXTEND", "MIXED", "TARGET_VERIFY", "SPLIT_PREFILL", "DLLM_EXTEND")

    def is_decode(self) -> bool:
        return self is ForwardMode.DECODE

    def is_idle(self) -> bool:
        return self is ForwardMode.IDLE

    def is_decode_or_idle(self) -> bool:
        return self.is_decode() or self.is_idle()

    def is_target_verify(self) -> bool:
        return self is ForwardMode.TARGET_VERIFY

    def is_dllm_extend(self) -> bool:
        return self is ForwardMode.DLLM_EXTEND


@dataclass
class ForwardBatch:  # model_executor/forward_batch_info.py
    forward_mode: ForwardMode
    batch_size: int
    input_ids: Tensor
    req_pool_indices: Tensor
    seq_lens: Tensor
    out_cache_loc: Tensor
    seq_lens_sum: int
    kv_loc_plan: Any = None
    out_cache_loc_is_physical: bool = False
    encoder_lens: Tensor | None = None
    seq_lens_cpu: Tensor | None = None
    spec_info: Any = None
    positions: Tensor | None = None
    extend_num_tokens: int | None = None
    extend_seq_lens: Tensor | None = None
    extend_prefix_lens: Tensor | None = None
    extend_seq_lens_cpu: list[int] | None = None
    attn_attend_prefix_cache: bool | None = None
    prefix_chunk_idx: int | None = None
    prefix_chunk_cu_seq_lens: Tensor | None = None
    prefix_chunk_max_seq_lens: list[int] | None = None
    mha_return_lse: bool | None = None
    mha_one_shot: bool | None = None
    _attn_output: Tensor | None = None


class AttentionBackend:  # layers/attention/base_attn_backend.py
    needs_cpu_seq_lens = True
    data_type: torch.dtype | None = None
    kv_cache_dtype: torch.dtype | None = None
    kv_index_translator: Any = None

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        pass

    def forward(
        self,
        q: Tensor,
        k: Any,
        v: Any,
        layer: Any,
        forward_batch: ForwardBatch,
        save: bool = True,
        **more: Any,
    ) -> Any:
        if forward_batch.forward_mode.is_idle():
            return q.new_empty(q.shape[0], layer.tp_q_head_num * layer.v_head_dim)
        run: Any = self
        run = run.forward_decode if forward_batch.forward_mode.is_decode() else run.forward_extend
        return run(q, k, v, layer, forward_batch, save_kv_cache=save, **more)


class AttentionType(Enum):  # layers/radix_attention.py
    DECODER = "decoder"
    DECODER_BIDIRECTIONAL = "decoder_bidirectional"
    ENCODER_ONLY = "encoder_only"


class RadixAttention:  # layers/radix_attention.py
    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        scaling: float,
        num_kv_heads: int,
        layer_id: int,
        logit_cap: float = 0.0,
        v_head_dim: int = -1,
        sliding_window_size: int = -1,
        is_cross_attention: bool = False,
        pos_encoding_mode: str = "NONE",
        logit_capping_method: str = "tanh",
        attn_type: AttentionType = AttentionType.DECODER,
    ) -> None:
        self.tp_q_head_num = num_heads
        self.tp_k_head_num = self.tp_v_head_num = num_kv_heads
        self.head_dim = self.qk_head_dim = head_dim
        self.v_head_dim = v_head_dim if v_head_dim != -1 else head_dim
        self.scaling = scaling
        self.layer_id = layer_id
        self.logit_cap = logit_cap
        self.sliding_window_size = sliding_window_size or -1
        self.is_cross_attention = is_cross_attention
        self.pos_encoding_mode = pos_encoding_mode
        self.logit_capping_method = logit_capping_method
        self.attn_type = attn_type
        self.xai_temperature_len = -1
        self.k_scale: Tensor | None = None
        self.v_scale: Tensor | None = None
        self.k_scale_float: float | None = None
        self.v_scale_float: float | None = None


@dataclass
class KVWriteLoc:  # mem_cache/memory_pool.py
    loc: Tensor
    swa_loc: Tensor | None = None

    @classmethod
    def for_batch(cls, forward_batch: ForwardBatch, *, swa_loc: Tensor | None = None) -> KVWriteLoc:
        return cls(forward_batch.out_cache_loc, swa_loc)


class ReqToTokenPool:  # mem_cache/memory_pool.py
    def __init__(self, size: int, max_context_len: int, device: str, enable_memory_saver: bool) -> None:
        self.req_to_token = torch.zeros((size + 1, max_context_len), dtype=torch.int32, device=device)


class KVCache:  # mem_cache/memory_pool.py
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.store_dtype = torch.uint8 if dtype.itemsize == 1 else dtype


class MHATokenToKVPool(KVCache):  # mem_cache/memory_pool.py
    kv_cache_layout = "nhd"
    is_quantized_kv_cache = False

    def __init__(
        self,
        size: int,
        page_size: int,
        dtype: torch.dtype,
        head_num: int,
        head_dim: int,
        layer_num: int,
        device: str,
        enable_memory_saver: bool,
        v_head_dim: int | None = None,
    ) -> None:
        super().__init__(dtype)
        rows = (size + page_size, head_num)
        more: dict[str, Any] = {"dtype": self.store_dtype, "device": device}
        self.k_buffer = [torch.zeros(*rows, head_dim, **more) for _ in range(layer_num)]
        self.v_buffer = [torch.zeros(*rows, v_head_dim or head_dim, **more) for _ in range(layer_num)]

    def get_kv_buffer(self, layer_id: int) -> tuple[Tensor, Tensor]:
        return self.k_buffer[layer_id].view(self.dtype), self.v_buffer[layer_id].view(self.dtype)

    def set_kv_buffer(
        self,
        layer: Any,
        loc_info: Any,
        cache_k: Tensor,
        cache_v: Tensor,
        k_scale: Any = None,
        v_scale: Any = None,
        layer_id_override: int | None = None,
    ) -> None:
        loc = getattr(loc_info, "loc", loc_info)
        if cache_k.dtype != self.dtype:
            for rows, scale in ((cache_k, k_scale), (cache_v, v_scale)):
                if scale is not None:
                    rows.div_(scale)
        index = layer.layer_id if layer_id_override is None else layer_id_override
        for buffer, rows in ((self.k_buffer[index], cache_k), (self.v_buffer[index], cache_v)):
            buffer[loc] = rows.to(self.dtype).view(self.store_dtype)


class MLATokenToKVPool(KVCache):  # mem_cache/memory_pool.py
    def __init__(
        self,
        size: int,
        page_size: int,
        dtype: torch.dtype,
        kv_lora_rank: int,
        qk_rope_head_dim: int,
        layer_num: int,
        device: str,
        enable_memory_saver: bool,
    ) -> None:
        super().__init__(dtype)
        shape = (size + page_size, 1, kv_lora_rank + qk_rope_head_dim)
        self.kv_buffer = [torch.zeros(shape, dtype=self.store_dtype, device=device) for _ in range(layer_num)]

    def get_key_buffer(self, layer_id: int) -> Tensor:
        return self.kv_buffer[layer_id].view(self.dtype)

    def set_kv_buffer(self, layer: Any, loc_info: Any, cache_k: Tensor, cache_v: Tensor) -> None:
        self.kv_buffer[layer.layer_id][loc_info.loc] = cache_k.to(self.dtype).view(self.store_dtype)

    def set_mla_kv_buffer(
        self, layer: Any, loc_info: Any, cache_k_nope: Tensor, cache_k_rope: Tensor
    ) -> None:
        self.set_kv_buffer(layer, loc_info, torch.cat([cache_k_nope, cache_k_rope], -1), cache_k_nope)


class BaseSWAKVPool(KVCache):  # mem_cache/base_swa_memory_pool.py
    pass


class SWAKVPool(BaseSWAKVPool):  # mem_cache/swa_memory_pool.py
    def __init__(
        self,
        size: int,
        size_swa: int,
        page_size: int,
        dtype: torch.dtype,
        head_num: int,
        head_dim: int,
        swa_attention_layer_ids: list[int],
        full_attention_layer_ids: list[int],
        device: str,
    ) -> None:
        super().__init__(dtype)
        of_all = (page_size, dtype, head_num, head_dim)
        self.full_kv_pool = MHATokenToKVPool(size, *of_all, len(full_attention_layer_ids), device, False)
        self.swa_kv_pool = MHATokenToKVPool(size_swa, *of_all, len(swa_attention_layer_ids), device, False)
        self.layers_mapping = {layer: (i, False) for i, layer in enumerate(full_attention_layer_ids)}
        self.layers_mapping |= {layer: (i, True) for i, layer in enumerate(swa_attention_layer_ids)}

    def register_mapping(self, full_to_swa_index_mapping: Tensor) -> None:
        self.full_to_swa_index_mapping = full_to_swa_index_mapping

    def translate_loc_from_full_to_swa(self, kv_indices: Tensor) -> Tensor:
        return self.full_to_swa_index_mapping[kv_indices]

    def _of(self, layer_id: int) -> tuple[MHATokenToKVPool, int, bool]:
        index, has_window = self.layers_mapping[layer_id]
        return (self.swa_kv_pool if has_window else self.full_kv_pool), index, has_window

    def get_kv_buffer(self, layer_id: int) -> tuple[Tensor, Tensor]:
        pool, index, _ = self._of(layer_id)
        return pool.get_kv_buffer(index)

    def set_kv_buffer(
        self,
        layer: Any,
        loc_info: Any,
        cache_k: Tensor,
        cache_v: Tensor,
        k_scale: Any = 1.0,
        v_scale: Any = 1.0,
    ) -> None:
        pool, index, has_window = self._of(layer.layer_id)
        loc = loc_info.swa_loc if has_window else loc_info.loc
        pool.set_kv_buffer(None, loc, cache_k, cache_v, k_scale, v_scale, layer_id_override=index)


class IdSpaceKind(Enum):  # mem_cache/kv_loc_plan.py
    FULL = auto()
    SLIDING_WINDOW = auto()


class KVIndexTranslator:  # mem_cache/kv_index_translator.py, for pools that do not move their pages
    reads_are_translated = False

    def __init__(
        self,
        *,
        req_to_token: Tensor,
        token_to_kv_pool_allocator: Any,
        token_to_kv_pool: Any,
        page_size: int,
        device: str,
    ) -> None:
        self.pool = token_to_kv_pool

    def bind_own_plan(self, forward_batch: ForwardBatch) -> None:
        pass

    def write_ids(self, forward_batch: ForwardBatch, kind: IdSpaceKind = IdSpaceKind.FULL) -> Tensor:
        slots = forward_batch.out_cache_loc
        if kind is IdSpaceKind.FULL:
            return slots
        ids: Tensor = self.pool.translate_loc_from_full_to_swa(slots)
        return ids


class Settings:  # runtime_context.py
    """The parts of the server's arguments that are read: a fixture for tests, as in the original."""

    def __init__(self, **values: Any) -> None:
        vars(self).update(values)

    @contextmanager
    def override(self, **values: Any) -> Iterator[None]:
        with mock.patch.multiple(self, **values):
            yield


class Context:  # runtime_context.py
    @contextmanager
    def override_server_args(self, **fields: Any) -> Iterator[None]:
        EXEC.deterministic.enable_deterministic_inference = fields.get(
            "enable_deterministic_inference", False
        )
        SPEC.speculative_eagle_topk = fields.get("speculative_eagle_topk")
        yield


PARALLEL = Settings(
    tp_size=1, moe_tp_size=1, attn_tp_size=1, attn_dcp_rank=0, attn_dcp_size=1, attn_cp_size=1
)
SPEC = SimpleNamespace(speculative_eagle_topk=None)
EXEC = SimpleNamespace(deterministic=SimpleNamespace(enable_deterministic_inference=False))

ATTENTION_BACKENDS: dict[str, Any] = {}
CHOICES: tuple[list[str], ...] = (["triton"], ["triton"], ["fa3"])
ABSORB = ["fa3"]


class AttentionBackendRegistry:  # models/deepseek_common/attention_backend_handler.py
    handlers: ClassVar[dict[str, Any]] = {}

    @classmethod
    def register(cls, backend_name: str, handler_func: Any) -> None:
        cls.handlers[backend_name] = handler_func

    @classmethod
    def get_handler(cls, backend_name: str) -> Any:
        return cls.handlers[backend_name]


def handle_attention_fa3(attn: Any, forward_batch: Any) -> None:
    raise NotImplementedError("which path a forward takes is SGLang's")


def register_attention_backend(name: str) -> Any:  # layers/attention/attention_registry.py
    def decorator(make: Any) -> Any:
        ATTENTION_BACKENDS[name] = make
        return make

    return decorator


MODULES: dict[str, dict[str, Any]] = {
    "arg_groups.choices": {
        "ATTENTION_BACKEND_CHOICES": CHOICES[0],
        "add_attention_backend_choices": CHOICES[0].extend,
        "DETERMINISTIC_ATTENTION_BACKEND_CHOICES": CHOICES[1],
        "add_deterministic_attention_backend_choices": CHOICES[1].extend,
        "CHUNKED_PREFIX_CACHE_SUPPORTED_ATTENTION_BACKENDS": CHOICES[2],
        "add_chunked_prefix_cache_attention_backend": CHOICES[2].append,
    },
    "layers.attention.attention_registry": {
        "ATTENTION_BACKENDS": ATTENTION_BACKENDS,
        "register_attention_backend": register_attention_backend,
    },
    "layers.attention.base_attn_backend": {"AttentionBackend": AttentionBackend},
    "layers.radix_attention": {"AttentionType": AttentionType, "RadixAttention": RadixAttention},
    "mem_cache.base_swa_memory_pool": {"BaseSWAKVPool": BaseSWAKVPool},
    "mem_cache.kv_index_translator": {"KVIndexTranslator": KVIndexTranslator},
    "mem_cache.kv_loc_plan": {"IdSpaceKind": IdSpaceKind},
    "mem_cache.memory_pool": {
        "KVWriteLoc": KVWriteLoc,
        "MHATokenToKVPool": MHATokenToKVPool,
        "MLATokenToKVPool": MLATokenToKVPool,
        "ReqToTokenPool": ReqToTokenPool,
    },
    "mem_cache.swa_memory_pool": {"SWAKVPool": SWAKVPool},
    "model_executor.forward_batch_info": {"ForwardBatch": ForwardBatch, "ForwardMode": ForwardMode},
    "models.deepseek_common.attention_backend_handler": {
        "AttentionBackendRegistry": AttentionBackendRegistry,
        "handle_attention_fa3": handle_attention_fa3,
    },
    "models.deepseek_common.utils": {"FORWARD_ABSORB_CORE_ATTENTION_BACKENDS": ABSORB},
    "runtime_context": {
        "get_context": Context,
        "get_exec": lambda: EXEC,
        "get_parallel": lambda: PARALLEL,
        "get_spec": lambda: SPEC,
    },
}


@contextmanager
def installed() -> Iterator[None]:
    """Make ``import sglang.srt...`` find the stand-ins, unless SGLang is installed."""
    if IS_REAL or "sglang" in sys.modules:
        yield
        return
    made: dict[str, ModuleType] = {}
    for name, members in MODULES.items():
        parts = ["sglang", "srt", *name.split(".")]
        for n in range(1, len(parts) + 1):
            whole = ".".join(parts[:n])
            if whole not in made:
                made[whole] = ModuleType(whole)
                if n > 1:
                    setattr(made[".".join(parts[: n - 1])], parts[n - 1], made[whole])
        vars(made[".".join(parts)]).update(members)
    sys.modules.update(made)
    try:
        yield
    finally:  # other tests, and other libraries, look whether SGLang is there
        for name in made:
            del sys.modules[name]


@contextmanager
def published(
    dcp: int = 1, cp: int = 1, topk: int | None = None, deterministic: bool = False
) -> Iterator[None]:
    """The server's arguments, as the back end reads them when it is made."""
    with installed():
        from sglang.srt.runtime_context import get_context, get_parallel

        ranks = {
            "attn_tp_size": 1,
            "attn_dcp_rank": 0,
            "attn_dcp_size": dcp,
            "attn_cp_size": cp,
            "tp_size": cp,
            "moe_tp_size": cp,
        }
        said = {"speculative_eagle_topk": topk, "enable_deterministic_inference": deterministic}
        with get_context().override_server_args(**said), get_parallel().override(**ranks):
            yield
