"""vLLM on a machine without a GPU, from the wheel that is built for CUDA.

vLLM's own CPU platform refuses back ends from outside, and wants its C++ library, which that wheel does not
have. The platform that this module names takes the attention back end that was asked for, by the checks that
vLLM's CUDA platform makes; the few operators that an engine needs are written in PyTorch. Nothing of
attention is here.
"""

from __future__ import annotations

from typing import Any

import torch


def path() -> str:
    """The entry point of the group ``vllm.platform_plugins``, in ``cpu_platform-1.dist-info`` beside this."""
    return "cpu_platform_class.TestPlatform"


def compute_slot_mapping(
    self: Any, num_reqs: int, query_start_loc: torch.Tensor, positions: torch.Tensor
) -> None:
    """In place of ``BlockTable.compute_slot_mapping``, which is a kernel in C++ or in Triton."""
    starts = query_start_loc[: num_reqs + 1].long()
    n = int(starts[-1])
    request = torch.repeat_interleave(torch.arange(num_reqs), starts.diff())
    where = positions[:n].long()
    blocks = self.block_table.gpu[request, where // self.block_size].long()
    self.slot_mapping.gpu.fill_(-1)
    self.slot_mapping.gpu[:n] = blocks * self.block_size + where % self.block_size


def gelu_tanh_and_mul(out: torch.Tensor, x: torch.Tensor) -> None:
    """An activation of Gemma."""
    gate, up = x.chunk(2, -1)
    out.copy_(torch.nn.functional.gelu(gate, approximate="tanh") * up)


def stand_in() -> None:
    """Put what stands in for C++ and Triton where vLLM looks for it."""
    library = torch.library.Library("_C", "FRAGMENT")
    library.define("init_cpu_memory_env(int[] nodes) -> ()")
    library.impl("init_cpu_memory_env", lambda nodes: None, "CompositeExplicitAutograd")
    library.define("gelu_tanh_and_mul(Tensor(a!) out, Tensor x) -> ()")
    library.impl("gelu_tanh_and_mul", gelu_tanh_and_mul, "CompositeExplicitAutograd")
    library.define("greedy_argmax(Tensor logits) -> Tensor")
    library.impl("greedy_argmax", lambda logits: logits.argmax(-1), "CompositeExplicitAutograd")
    globals()["_LIBRARY"] = library  # operators live as long as it does
    from vllm.v1.attention.backends.mla.prefill.registry import (
        MLAPrefillBackendEnum,
        register_mla_prefill_backend,
    )
    from vllm.v1.worker.block_table import BlockTable

    BlockTable.compute_slot_mapping = compute_slot_mapping
    # Without a device capability vLLM 0.25 asks no further and takes this one, which a CPU cannot import.
    register_mla_prefill_backend(MLAPrefillBackendEnum.FLASH_ATTN, "anystride.adapters.vllm.prefill.Prefill")
