"""FlashMLA's dense decode, as vLLM ships it.

Source: ``flash_mla_with_kvcache`` of FlashMLA (vllm/third_party/flashmla/flash_mla_interface.py). Documented
there: one KV head, rows of 576 with values of 512, a query count that all sequences share. Blocks of 64
tokens, in the words of vLLM's back end and of the kernel's own check.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anystride.peers.calls import demand, four_dims, query_counts, refuse_but, whole
from anystride.peers.folder import VLLM_VERSION, load_library
from anystride.peers.peer import Call, Peer

__all__ = ["FLASH_MLA"]


def _load(folder: Path | None) -> str:
    if not hasattr(torch.ops._flashmla_C, "dense_decode_fwd"):
        load_library(folder, "_flashmla_C.abi3.so")
    return f"of vLLM {VLLM_VERSION}"


def _prepare(kwargs: dict[str, Any]) -> Call:
    refuse_but(kwargs)
    q, k, v = kwargs["q"], four_dims(kwargs["k"], "k"), four_dims(kwargs["v"], "v")
    counts = query_counts(kwargs)
    demand(
        {
            "rows of 576 with values of 512": (k.shape[3], v.shape[3]) == (576, 512),
            "one KV head": k.shape[2] == 1,
            "V is the first part of K's row": v.data_ptr() == k.data_ptr() and v.stride() == k.stride(),
            "as many query tokens of each sequence": len(set(counts)) == 1,
        }
    )
    batch, count = len(counts), counts[0]
    rows = q[: batch * count].unflatten(0, (batch, count))
    state: dict[str, Any] = {
        "metadata": None,
        "splits": None,
    }  # made by the first call, shared by a step's layers

    def run() -> tuple[Tensor, Tensor]:
        out, lse, state["metadata"], state["splits"] = torch.ops._flashmla_C.dense_decode_fwd(
            rows, k, v.shape[3], kwargs["seqused_k"], kwargs["block_table"], kwargs["softmax_scale"],
            kwargs.get("causal", False), state["metadata"], state["splits"], None,
        )  # fmt: skip
        return whole(out.flatten(0, 1), q.shape[0]), lse

    def answer() -> tuple[Tensor, Tensor | None]:
        out, lse = run()
        if not kwargs.get("return_softmax_lse"):
            return out, None
        # [batch, heads, count]; +inf where there is no key
        lse = lse.masked_fill(lse == float("inf"), float("-inf"))
        return out, whole(lse.transpose(1, 2).flatten(0, 1), q.shape[0]).t()

    return answer


FLASH_MLA = Peer(
    "flash-mla", "FlashMLA", "dense_decode_fwd, what flash_mla_with_kvcache calls", _load, _prepare,
    crashes_off_16_bytes=True,
)  # fmt: skip
