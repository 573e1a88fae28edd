"""The write side on GPUs: the launch of the Triton kernel."""

from __future__ import annotations

from typing import Any

import torch

from anystride.kernels.store import store_kernel
from anystride.launch import Launch, Pointer, Prepared, device_refusals, device_target, run_prepared
from anystride.problem import FP8_NAMES, bucket
from anystride.store import Half, HalfFacts, StoreCall, StoreProblem
from anystride.work import converts_fp8, vector

TILE_BYTES = 2048  # that a program writes: 16 a thread
MOST_ROWS = 32


def refusals(problem: StoreProblem) -> list[str]:
    """Every reason why the Triton kernel cannot run the call here."""
    return device_refusals(problem.device)


def constants(half: HalfFacts) -> dict[str, Any]:
    """Compile-time arguments of a half."""
    d = half.d // half.groups
    itemsize, cache_itemsize = half.dtype.itemsize, half.cache_dtype.itemsize
    tile_d = bucket(d)
    return {
        "HEADS": half.heads,
        "GROUPS": half.groups,
        "D": d,
        "FORMAT": FP8_NAMES.get(half.cache_dtype, "none"),
        "SCALE": half.scale,
        "UNIT": half.strides[2] == 1,
        "VECTOR": vector((*half.strides[:2], d), half.align, itemsize),
        "C_UNIT": half.cache_strides[4] == 1,
        "C_VECTOR": vector((*half.cache_strides[:4], d), half.cache_align, cache_itemsize),
        "ROWS": max(1, min(MOST_ROWS, TILE_BYTES // (tile_d * cache_itemsize))),
        "BLOCK_D": tile_d,
    }


def choose_config(problem: StoreProblem) -> Prepared:
    """The launch for the problem."""
    p = problem
    halves = {"A": (p.first, constants(p.first)), "B": (p.second, constants(p.second))}
    tiles = max(-(-p.num_tokens * x.heads * x.groups // c["ROWS"]) for x, c in halves.values())
    arguments: list[Any] = [Pointer("slots"), p.slot_stride, p.num_tokens]
    common = {
        "BLOCK_SIZE": p.block_size,
        "BLOCKS_PER_PAGE": p.blocks_per_page,
        "FP8_NATIVE": converts_fp8(device_target(p.device)),
    }
    for name, (half, _constants) in halves.items():
        pointed = half.scale in ("one", "heads", "written")
        arguments += [
            Pointer(f"{name}_rows"), *half.strides, Pointer(f"{name}_cache"), *half.cache_strides,
            half.number,
            Pointer(f"{name}_scale") if pointed else None, *half.scale_strides,
        ]  # fmt: skip
    return Prepared(
        Launch(
            store_kernel,
            (tiles, 2, 1),
            tuple(arguments),
            common
            | {f"{name}_{key}": value for name, (_half, c) in halves.items() for key, value in c.items()},
            {"num_warps": 4},
        )
    )


def _pointed(half: Half) -> tuple[Any, ...]:
    cache = half.cache.view(torch.uint8) if half.cache.dtype in FP8_NAMES else half.cache
    return half.rows, cache, half.written if half.written is not None else half.scale


def run(problem: StoreProblem, config: Prepared, call: StoreCall) -> None:
    """Launch the kernel on the device's current stream."""
    names = ("slots", "A_rows", "A_cache", "A_scale", "B_rows", "B_cache", "B_scale")
    tensors = (call.slot_mapping, *_pointed(call.first), *_pointed(call.second))
    run_prepared(config, problem.device, dict(zip(names, tensors, strict=True)))
