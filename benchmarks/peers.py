"""The peers' kernels, each called as its own project calls it.

``../shared/peers/get_peers DIR`` puts them into a folder, which is given to what loads them. Each maker
returns a callable without arguments that runs one call, or raises ``Absent`` with the reason.
"""

from __future__ import annotations

import enum
import functools
import importlib.util
import lzma
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], Any]  # the output


class Absent(Exception):
    """The peer cannot be had here, or does not take this case."""


class KVQuantMode(enum.Enum):
    """In place of vLLM's: what its store kernels ask for."""

    INT4_PER_TOKEN_HEAD = enum.auto()
    FP8_PER_TOKEN_HEAD = enum.auto()


def load(peers: Path, without: Collection[str] = ()) -> dict[str, str]:
    """Load the compiled peers and the one Triton file; a reason for each that is not there."""
    absent = dict.fromkeys(without, "left out")
    for name, do in (
        ("FlashMLA", lambda: torch.ops.load_library(str(peers / "_flashmla_C.abi3.so"))),
        ("FA3", lambda: _load_fa3(peers / "_vllm_fa3_C.abi3.so.xz")),
        ("vLLM Triton", lambda: _load_vllm_file(peers, "triton_decode_attention.py", "vllm_triton_decode")),
        ("FlashInfer", lambda: _load_flashinfer(peers / "wheels")),
    ):
        if name not in absent:
            try:
                do()
            except (OSError, ImportError, subprocess.CalledProcessError) as error:
                absent[name] = str(error)
    return absent


def _load_fa3(packed: Path) -> None:
    unpacked = Path("/tmp") / packed.stem
    if packed.exists() and not unpacked.exists():
        unpacked.write_bytes(lzma.decompress(packed.read_bytes()))
    torch.ops.load_library(str(unpacked))


def _load_flashinfer(wheels: Path) -> None:
    """Install FlashInfer from its wheels beside nothing else; it builds its kernels at their first call.

    One version always into the same folder: what one process has built serves the next.
    """
    files = sorted(str(path) for path in wheels.glob("*.whl"))
    if not files:
        raise OSError(f"no wheels in {wheels}")
    versions = "-".join(path.stem for path in wheels.glob("flashinfer_python-*.whl"))
    folder = str(Path(tempfile.gettempdir()) / f"anystride-{versions}")
    if not Path(folder, "flashinfer").exists():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        subprocess.run([*install, "--target", folder, *files], check=True)
    sys.path.append(folder)
    importlib.import_module("flashinfer.mla")
    importlib.import_module("flashinfer.decode")


def _flashinfer_pages(kwargs: dict[str, Any], block: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where each sequence's blocks begin among all block ids in use, these ids, and a workspace."""
    lengths, table = kwargs["seqused_k"], kwargs["block_table"]
    counts = (lengths + block - 1) // block
    starts = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=table.device)
    starts[1:] = counts.cumsum(0)
    there = torch.arange(table.shape[1], device=table.device) < counts[:, None]
    return starts, table[there], torch.empty(512 << 20, dtype=torch.int8, device=table.device)


def flashinfer_gqa(kwargs: dict[str, Any]) -> Call:
    """FlashInfer's decode wrapper with tensor cores; planned once, as a model's layers share it."""
    q, k, v = kwargs["q"], kwargs["k"], kwargs["v"]
    if kwargs["max_seqlen_q"] > 1:
        raise Absent("one query token only")
    if "s_aux" in kwargs or "window_size" in kwargs:
        raise Absent("called here without sinks and without a window")
    lengths, block = kwargs["seqused_k"], k.shape[1]
    starts, ids, workspace = _flashinfer_pages(kwargs, block)
    decode = sys.modules["flashinfer.decode"]
    wrapper = decode.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    wrapper.plan(
        starts, ids, (lengths - 1) % block + 1, q.shape[1], k.shape[2], q.shape[2], block,
        q_data_type=q.dtype, kv_data_type=k.dtype, sm_scale=kwargs["softmax_scale"],
    )  # fmt: skip
    scales = {f"{name}_scale": kwargs[f"{name}_descale"] for name in "kv" if f"{name}_descale" in kwargs}
    return lambda: wrapper.run(q, (k, v), **scales)


def flashinfer_mla(kwargs: dict[str, Any], d_v: int) -> Call:
    """FlashInfer's MLA wrapper with its kernels for Hopper; planned once, as a model's layers share it."""
    q, k = kwargs["q"], kwargs["k"][:, :, 0]
    lengths, block = kwargs["seqused_k"], k.shape[1]
    starts, ids, workspace = _flashinfer_pages(kwargs, block)
    wrapper = sys.modules["flashinfer.mla"].BatchMLAPagedAttentionWrapper(workspace, backend="fa3")
    wrapper.plan(
        kwargs["cu_seqlens_q"], starts, ids, lengths, q.shape[1], d_v, q.shape[2] - d_v, block,
        kwargs.get("causal", False), kwargs["softmax_scale"], q.dtype, k.dtype,
    )  # fmt: skip

    def run() -> Any:
        return wrapper.run(q[..., :d_v], q[..., d_v:], k[..., :d_v], k[..., d_v:])

    return run


def _load_vllm_file(peers: Path, file: str, name: str) -> None:
    """Import one file of vLLM's kernels alone; what these want of vLLM is a few names."""
    import triton
    import triton.language as tl

    platform = types.SimpleNamespace(
        is_rocm=lambda: False, is_cuda=lambda: True, is_xpu=lambda: False, is_cuda_alike=lambda: True,
        fp8_dtype=lambda: torch.float8_e4m3fn,
        has_device_capability=functools.cache(lambda n: torch.cuda.get_device_capability() >= divmod(n, 10)),
    )  # fmt: skip
    quantisation = {"FP8_DTYPE": torch.float8_e4m3fn, "get_fp8_min_max": lambda: (-448.0, 448.0)}
    for wanted, content in (
        ("vllm", {}),
        ("vllm.platforms", {"current_platform": platform}),
        ("vllm.triton_utils", {"tl": tl, "triton": triton}),
        ("vllm.model_executor.layers.quantization.utils.quant_utils", quantisation),
        ("vllm.utils.torch_utils", {"is_quantized_kv_cache": lambda dtype: dtype.startswith("fp8")}),
        ("vllm.v1.kv_cache_interface", {"KVQuantMode": KVQuantMode}),
    ):
        module = types.ModuleType(wanted)
        module.__dict__.update(content)
        sys.modules.setdefault(wanted, module)
    path = peers / "vllm/v1/attention/ops" / file
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(str(path))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


def load_store(peers: Path) -> dict[str, str]:
    """Load vLLM's store kernels; the reason if they are not there."""
    try:
        _load_vllm_file(peers, "triton_reshape_and_cache_flash.py", "vllm_triton_store")
    except (OSError, ImportError) as error:
        return {"vLLM Triton": str(error)}
    return {}


def vllm_store(
    key: torch.Tensor, value: torch.Tensor, caches: tuple[torch.Tensor, ...], slots: torch.Tensor, scale: Any
) -> Call:
    """vLLM's Triton store kernels through their launchers: K and V with heads, or MLA's row as one.

    MLA's row goes to the kernel for rows of K|V with a head of each width. ``scale``: None, of the whole
    cache, or a pair of float32 ``[num_blocks, block_size, num_kv_heads]`` to be written.
    """
    store = sys.modules["vllm_triton_store"]
    if isinstance(scale, tuple):
        run, more = store.triton_reshape_and_cache_flash_per_token_head_quant, KVQuantMode.FP8_PER_TOKEN_HEAD
        return lambda: run(key, value, *caches, *scale, slots, more)
    if isinstance(scale, torch.Tensor) and scale.dim():
        raise Absent("one scale for the whole cache only")
    dtype = "auto" if caches[0].itemsize > 1 else "fp8"
    one = torch.as_tensor(1.0 if scale is None else scale, dtype=torch.float32, device=key.device)
    if len(caches) == 1:
        run = store.triton_reshape_and_cache_flash_diffkv
    elif caches[0].stride() == caches[1].stride():
        run = store.triton_reshape_and_cache_flash
    else:
        raise Absent("K and V of the same strides only")
    return lambda: run(key, value, *caches, slots, dtype, one, one)


def flash_mla(kwargs: dict[str, Any], d_v: int) -> Call:
    """FlashMLA's dense decode; the schedule is made once and shared, as a model's layers do."""
    q, k = kwargs["q"], kwargs["k"]
    if k.shape[1] != 64 or k.shape[-1] != 576:
        raise Absent("blocks of 64 tokens and rows of 576 only")
    batch = kwargs["seqused_k"].shape[0]
    q4 = q.view(batch, -1, q.shape[1], q.shape[2])
    state = {"metadata": None, "splits": None}

    def run() -> Any:
        out, _lse, state["metadata"], state["splits"] = torch.ops._flashmla_C.dense_decode_fwd(
            q4, k, d_v, kwargs["seqused_k"], kwargs["block_table"], kwargs["softmax_scale"],
            kwargs.get("causal", False), state["metadata"], state["splits"], None,
        )  # fmt: skip
        return out.view(-1, q.shape[1], d_v)

    return run


def fa3(kwargs: dict[str, Any], q_v: bool) -> Call:
    """FlashAttention-3 as vLLM ships it; MLA in its ``q_v`` form."""
    q, k, v = kwargs["q"], kwargs["k"], kwargs["v"]
    latent = None
    if q_v:
        d_v = v.shape[-1]
        latent, q = q[..., :d_v], q[..., d_v:]
        k = k[..., d_v:]
    batch, heads, kv_heads = kwargs["seqused_k"].shape[0], q.shape[1], k.shape[2]
    longest, tokens = kwargs["max_seqlen_k"], kwargs["max_seqlen_q"]
    causal = kwargs.get("causal", False)
    left, right = kwargs.get("window_size", (-1, -1))
    metadata = torch.ops._vllm_fa3_C.get_scheduler_metadata(
        batch, tokens, longest, heads, kv_heads, q.shape[-1], v.shape[-1], q.dtype,
        kwargs["seqused_k"], kwargs["cu_seqlens_q"], None, None, None, None, k.shape[1], 0, causal,
        left, right, False, 0, None, 0,
    )  # fmt: skip

    def run() -> Any:
        out, _lse, _a, _b = torch.ops._vllm_fa3_C.fwd(
            q, k, v, None, None, latent, None, kwargs["cu_seqlens_q"], None, None, None,
            kwargs["seqused_k"], tokens, longest, kwargs["block_table"], None, None, None, None, None,
            None, None, None, kwargs["softmax_scale"], causal, left, right, 0.0, True, metadata, 0, None,
            0, kwargs.get("s_aux"), 1, 0, None,
        )  # fmt: skip
        return out

    return run


def vllm_triton(kwargs: dict[str, Any], is_mla: bool) -> Call:
    """vLLM's Triton decode kernel with the number of splits that vLLM chooses."""
    q, k, v = kwargs["q"], kwargs["k"], kwargs["v"]
    if kwargs["max_seqlen_q"] > 1:
        raise Absent("one query token only")
    if "s_aux" in kwargs or "window_size" in kwargs:
        raise Absent("no sinks and no window")
    decode = sys.modules["vllm_triton_decode"].decode_attention_fwd
    longest = kwargs["max_seqlen_k"]
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    # vllm/v1/attention/backends/mla/triton_mla.py: 512 keys a split, at most two programs a processor.
    wanted = max(1, longest // 512)
    splits = min(1 << (wanted - 1).bit_length(), 2 * processors)
    out = torch.empty(q.shape[0], q.shape[1], v.shape[-1], dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[0], q.shape[1], dtype=q.dtype, device=q.device)
    logits = torch.empty(
        q.shape[0], q.shape[1], splits, v.shape[-1] + 1, dtype=torch.float32, device=q.device
    )
    k_scale, v_scale = (torch.tensor(kwargs.get(f"{name}_descale", 1.0), device=q.device) for name in "kv")

    def run() -> Any:
        decode(
            q, k, v, out, lse, kwargs["block_table"], kwargs["seqused_k"], logits, splits,
            kwargs["softmax_scale"], k.shape[1], k_scale=k_scale, v_scale=v_scale, is_mla=is_mla,
        )  # fmt: skip
        return out

    return run
