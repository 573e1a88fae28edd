"""A dozen strided calls for compute-sanitizer, each checked against the reference.

    compute-sanitizer --error-exitcode 1 python tests/sanitize.py
    compute-sanitizer --tool racecheck --error-exitcode 1 python tests/sanitize.py hopper

The allocator's cache is off, so that every tensor is an allocation of its own and an access outside of
one is seen. Gaps and unused blocks are inside of an allocation: they are NaN, and a result shows them.
"""

from __future__ import annotations

import os

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import sys
from dataclasses import replace

import torch
from device import by_tma

from anystride import UnsupportedError, get_scheduler_metadata
from anystride.testing import Inputs, find_case, find_layout, make_inputs
from anystride.testing.judgement import assert_right, attend

# Case, layout, strides of q and out, strides of the table, and query tokens where they are to be more than 4.
CALLS = (
    ("tiny-gqa", "G2", "packed", "packed"),
    ("tiny-gqa", "G4", "fused_qkv", "columns_of_wider"),
    ("tiny-gqa", "G5", "heads_first", "transposed"),
    ("tiny-gqa", "G15", "padded_rows", "every_other_column"),
    ("tiny-gqa", "A-inner-step-2", "inner_step_2", "packed"),
    ("tiny-gqa", "A-off-by-one", "off_by_one", "packed"),
    ("tiny-gqa", "A-expanded-heads", "dim_major", "packed"),
    ("tiny-all-features", "A-dim-major", "packed", "packed"),
    ("tiny-uneven-dims", "A-odd-page", "off_by_one", "packed"),
    ("tiny-pages", "G11", "packed", "packed"),
    ("tiny-row", "M3", "packed", "packed"),
    ("tiny-row-fp8", "M14", "packed", "packed"),
    ("tiny-scales", "G12", "packed", "packed"),
    ("fp8-e4m3-per-head", "G12", "fused_qkv", "columns_of_wider"),
    ("fp8-all-features", "G5", "packed", "packed"),
    ("fp8-row", "M14", "packed", "transposed"),
    ("fp8-q_v", "M9", "heads_first", "packed"),
    ("scales-e4m3", "G12", "packed", "packed"),
    ("tiny-row-scales", "A-padded-rows", "packed", "packed"),
    ("scales-q_v-groups", "M9", "packed", "packed"),
    ("fp8-row", "M14", "packed", "packed", 8),  # 64 rows: the kernels for many
    ("fp8-q_v", "M9", "packed", "packed", 8),
    ("scales-q_v-groups", "M9", "packed", "packed", 8),
    ("tiny-q_v", "M8", "heads_first", "packed"),
    ("tiny-q_v-all-features", "M10", "packed", "packed"),
    ("tiny-dense", "G16", "packed", "packed"),
    ("tiny-prefill", "G20", "packed", "packed"),
    ("tiny-cp", "G3", "packed", "packed"),
    ("d-row-96-64", "M1", "fused_qkv", "columns_of_wider"),
    ("d-row-96-64", "M1b", "packed", "transposed"),
    ("heads-row-5", "M2", "heads_first", "packed"),
    ("cp-row-4-1", "M5", "packed", "packed"),
    ("block-row-3", "M3", "packed", "packed"),
    ("block-row-1", "A-padded-rows", "packed", "packed"),
    ("dense-row", "M1", "packed", "packed"),
    ("d-row-2-heads", "A-padded-rows", "packed", "packed"),
    ("d-q_v-2-heads", "M7", "padded_rows", "packed"),
    ("mixed-q_v", "M9", "packed", "every_other_column"),
    ("pages-row-2x64", "M3b", "packed", "packed"),
    ("deepseek-v3-h8", "M1", "packed", "packed"),
    ("deepseek-v3-h16", "M2", "packed", "packed"),
    ("deepseek-v3-mtp", "M4", "packed", "packed"),
    ("deepseek-v3-q_v", "M8", "packed", "packed"),
    ("deepseek-v3-h128", "M1", "packed", "packed"),
    ("llama-3-8b", "G2", "fused_qkv", "columns_of_wider"),
    ("gpt-oss", "G5", "packed", "transposed"),
    ("gemma-2-9b", "A-padded-rows", "heads_first", "packed"),
    ("d-96", "G4", "padded_rows", "every_other_column"),
    ("d-192-128", "G20", "packed", "packed"),
    ("block-3", "G3", "packed", "packed"),
    ("block-1", "A-padded-rows", "packed", "packed"),
    ("group-7", "G7", "packed", "packed"),
    ("alibi", "G9", "packed", "packed"),
    ("pages-4x16", "G11", "packed", "packed"),
    ("dense", "G16", "packed", "packed"),
    ("cp-2-alibi", "A-expanded-heads", "packed", "packed"),
    ("heads-128-1", "G13", "packed", "packed"),
)


def calls(backend: str, inputs: Inputs, metadata: torch.Tensor | None) -> None:
    """Every way to share out the work; and by TMA, which few calls are worth, where it can read the cache."""
    for given in ({}, {"scheduler_metadata": metadata}, {"num_splits": 3}):
        assert_right(inputs, *attend(inputs, backend, **given))
    if backend == "hopper" and inputs.case.form != "kv":
        with by_tma():
            assert_right(inputs, *attend(inputs, backend, scheduler_metadata=metadata))


def main() -> int:
    if not torch.cuda.is_available():
        print("needs a CUDA device", file=sys.stderr)  # noqa: T201
        return 2
    backends = sys.argv[1:] or ["triton", "hopper"]
    made = dict.fromkeys(backends, 0)
    for name, layout, rows, table, *tokens in CALLS:
        case = find_case(name)
        q_len = tokens[0] if tokens else min(4, max(case.q_lens))
        case = replace(case, seqused_k=(0, 70, 200), q_lens=(q_len,) * 3)
        inputs = make_inputs(case, find_layout(layout), "cuda", rows=rows, table=table, out=rows)
        kwargs = inputs.kwargs
        metadata = None
        if case.paged:
            metadata = get_scheduler_metadata(
                case.batch, kwargs["max_seqlen_q"], kwargs["max_seqlen_k"], case.num_q_heads,
                case.num_kv_heads, case.d_qk, kwargs["seqused_k"], case.torch_dtype, case.d_v,
                kwargs["cu_seqlens_q"], causal=case.causal, window_size=case.window,
            )  # fmt: skip
        for backend in backends:
            try:
                calls(backend, inputs, metadata)
            except UnsupportedError:
                continue
            torch.cuda.synchronize()
            made[backend] += 1
            print(f"{name} in {layout} by {backend}: right", flush=True)  # noqa: T201
    print(made)  # noqa: T201
    return 0 if min(made.values()) >= 12 else 1  # a back end that refuses them all is not checked


if __name__ == "__main__":
    raise SystemExit(main())
