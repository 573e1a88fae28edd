"""vLLM's two Triton kernels over paged caches, each loaded as one file.

Source: ``decode_attention_fwd`` (vllm/v1/attention/ops/triton_decode_attention.py), called with as many
splits as vLLM's back end for MLA chooses; ``unified_attention`` (triton_unified_attention.py), called as
vLLM's TRITON_ATTN does, with the buffers of its path for decoding.
"""

from __future__ import annotations

import enum
import functools
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anystride.peers.calls import demand, four_dims, query_counts, refuse_but
from anystride.peers.folder import VLLM_VERSION
from anystride.peers.peer import Absent, Call, Peer

__all__ = ["VLLM_TRITON_DECODE", "VLLM_TRITON_UNIFIED", "load_file"]

OPS = "vllm/v1/attention/ops"


class KVQuantMode(enum.IntEnum):
    """In place of vLLM's: the names that its kernels ask for."""

    NONE = 0
    FP8_PER_TENSOR = 1
    INT8_PER_TOKEN_HEAD = 2
    FP8_PER_TOKEN_HEAD = 3
    INT4_PER_TOKEN_HEAD = 4


def _stand_in() -> None:
    """What these files want of vLLM is a few names: modules that have them, where vLLM is not installed."""
    import triton
    import triton.language as tl

    platform = types.SimpleNamespace(
        is_rocm=lambda: False, is_cuda=lambda: True, is_xpu=lambda: False, is_cuda_alike=lambda: True,
        fp8_dtype=lambda: torch.float8_e4m3fn, is_device_capability_family=lambda _: False,
        has_device_capability=functools.cache(lambda n: torch.cuda.get_device_capability() >= divmod(n, 10)),
    )  # fmt: skip
    envs = types.ModuleType("vllm.envs")
    envs.__dict__["VLLM_BATCH_INVARIANT"] = False
    logger = types.SimpleNamespace(
        **dict.fromkeys(
            ("info", "warning", "debug", "info_once", "warning_once", "debug_once"), lambda *_: None
        )
    )
    quantisation = {"FP8_DTYPE": torch.float8_e4m3fn, "get_fp8_min_max": lambda: (-448.0, 448.0)}
    for wanted, content in (
        ("vllm", {"envs": envs}),
        ("vllm.logger", {"init_logger": lambda _name: logger}),
        ("vllm.platforms", {"current_platform": platform}),
        ("vllm.triton_utils", {"tl": tl, "triton": triton}),
        ("vllm.model_executor.layers.quantization.utils.quant_utils", quantisation),
        ("vllm.utils.torch_utils", {"is_quantized_kv_cache": lambda dtype: dtype.startswith("fp8")}),
        ("vllm.v1.kv_cache_interface", {"KVQuantMode": KVQuantMode}),
    ):
        module = types.ModuleType(wanted)
        module.__dict__.update(content)
        sys.modules.setdefault(wanted, module)
    sys.modules.setdefault("vllm.envs", envs)


def load_file(folder: Path | None, file: str) -> Any:
    """One file of vLLM's kernels as a module, from vLLM if it is installed, else from the folder of peers.

    Raises:
        Absent: It is in neither place.
    """
    name = f"{OPS.replace('/', '.')}.{file}"
    if name in sys.modules:
        return sys.modules[name]
    if "vllm" not in sys.modules and importlib.util.find_spec("vllm") is not None:
        return importlib.import_module(name)
    if folder is None or not (path := folder / OPS / f"{file}.py").exists():
        raise Absent(f"vllm is not installed, and the folder of peers has no {OPS}/{file}.py")
    _stand_in()
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        del sys.modules[name]
        raise Absent(str(error)) from None
    return module


def _load_decode(folder: Path | None) -> str:
    load_file(folder, "triton_decode_attention")
    return VLLM_VERSION


def _load_unified(folder: Path | None) -> str:
    load_file(folder, "triton_attention_helpers")
    load_file(folder, "triton_unified_attention")
    return VLLM_VERSION


def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 4


def _factors(kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """The scales that are given, for a whole tensor each if the kernel is to take them: float32, by name."""
    given = {name: kwargs.get(f"{name}_descale") for name in "qkv"}
    return {
        name: torch.as_tensor(factor, dtype=torch.float32, device=kwargs["q"].device)
        for name, factor in given.items()
        if factor is not None
    }


def _decode(kwargs: dict[str, Any]) -> Call:
    refuse_but(kwargs, "softcap", "q_descale", "k_descale", "v_descale")
    q, k, v = kwargs["q"], four_dims(kwargs["k"], "k"), four_dims(kwargs["v"], "v")
    is_mla = k.shape[2] == 1 and k.data_ptr() == v.data_ptr() and k.shape[3] > v.shape[3]
    demand({"one query token of each sequence": set(query_counts(kwargs)) == {1}})
    factors = _factors(kwargs)
    demand({"one scale for a whole cache": all(factor.numel() == 1 for factor in factors.values())})
    # It has no argument for the scale of the queries.
    scale = kwargs["softmax_scale"] * float(factors.pop("q", 1.0))
    module = sys.modules[f"{OPS.replace('/', '.')}.triton_decode_attention"]
    rows, total = int(kwargs["cu_seqlens_q"][-1]), q.shape[0]
    q = q[:rows]
    # vllm/v1/attention/backends/mla/triton_mla.py: 512 keys a split, at most two programs a processor.
    wanted = max(1, kwargs["max_seqlen_k"] // 512)
    splits = min(1 << (wanted - 1).bit_length(), 2 * _processors(q.device))
    out = torch.empty(total, q.shape[1], v.shape[3], dtype=q.dtype, device=q.device)
    lse = torch.empty(total, q.shape[1], dtype=torch.float32, device=q.device)
    logits = torch.empty(rows, q.shape[1], splits, v.shape[3] + 1, dtype=torch.float32, device=q.device)
    one = torch.ones((), device=q.device)
    scales = [factors.get(name, one).reshape(()) for name in "kv"]

    def run() -> tuple[Tensor, Tensor | None]:
        module.decode_attention_fwd(
            q, k, v, out, lse, kwargs["block_table"], kwargs["seqused_k"], logits, splits,
            scale, k.shape[1], logit_cap=kwargs.get("softcap", 0.0), k_scale=scales[0],
            v_scale=scales[1], is_mla=is_mla,
        )  # fmt: skip
        return out, lse.t() if kwargs.get("return_softmax_lse") else None

    return run


def _unified(kwargs: dict[str, Any]) -> Call:
    refuse_but(
        kwargs, "window_size", "softcap", "alibi_slopes", "s_aux", "k_descale", "v_descale", "q_descale",
        "k_scale_cache", "v_scale_cache",
    )  # fmt: skip
    q, k, v = kwargs["q"], four_dims(kwargs["k"], "k"), four_dims(kwargs["v"], "v")
    left, right = kwargs.get("window_size") or (-1, -1)
    causal = bool(kwargs.get("causal", False))
    factors = _factors(kwargs)
    demand(
        {
            "one scale for a whole cache": all(factor.numel() == 1 for factor in factors.values()),
            "K and V of one head dimension": k.shape[3] == v.shape[3],
            "no keys after the query's own": right in (-1, 0) or causal,
            "alibi slopes of heads": kwargs.get("alibi_slopes") is None or kwargs["alibi_slopes"].dim() == 1,
        }
    )
    module = sys.modules[f"{OPS.replace('/', '.')}.triton_unified_attention"]
    by_rows = kwargs.get("k_scale_cache") is not None
    mode = KVQuantMode.FP8_PER_TOKEN_HEAD if by_rows else KVQuantMode.NONE
    batch, heads, kv_heads = kwargs["cu_seqlens_q"].shape[0] - 1, q.shape[1], k.shape[2]
    # The scale of queries that are not fp8 is not looked at there: it goes into the softmax's.
    scale = kwargs["softmax_scale"] * float(factors.pop("q", 1.0))
    descales = [factors[name].expand(batch, kv_heads) if name in factors else None for name in "qkv"]
    if not by_rows and k.itemsize == 1:
        mode = KVQuantMode.FP8_PER_TENSOR
    # vllm/v1/attention/backends/triton_attn.py: up to 128 programs are cut into 16 segments.
    segments, width = 16, 1 << (v.shape[3] - 1).bit_length()
    partial = [
        torch.empty(max(128 // kv_heads, 1), heads, segments, *size, dtype=torch.float32, device=q.device)
        for size in ((width,), (), ())
    ]
    out = kwargs.get("out")
    out = torch.empty(q.shape[0], heads, v.shape[3], dtype=q.dtype, device=q.device) if out is None else out

    def run() -> tuple[Tensor, Tensor | None]:
        module.unified_attention(
            q, k, v, out, kwargs["cu_seqlens_q"], kwargs["max_seqlen_q"], kwargs["seqused_k"],
            kwargs["max_seqlen_k"], scale, causal, (left, right), kwargs["block_table"],
            kwargs.get("softcap", 0.0), *descales, seq_threshold_3D=max(128 // kv_heads, 1),
            num_par_softmax_segments=segments, softmax_segm_output=partial[0], softmax_segm_max=partial[1],
            softmax_segm_expsum=partial[2], alibi_slopes=kwargs.get("alibi_slopes"),
            sinks=kwargs.get("s_aux"), kv_quant_mode=mode, k_scale_cache=kwargs.get("k_scale_cache"),
            v_scale_cache=kwargs.get("v_scale_cache"),
        )  # fmt: skip
        return out, None

    return run


VLLM_TRITON_DECODE = Peer(
    "vllm-triton-decode",
    "vLLM Triton decode",
    "decode_attention_fwd, what TRITON_MLA calls",
    _load_decode,
    _decode,
)
VLLM_TRITON_UNIFIED = Peer(
    "vllm-triton-unified",
    "vLLM Triton unified",
    "unified_attention, what TRITON_ATTN calls",
    _load_unified,
    _unified,
)
