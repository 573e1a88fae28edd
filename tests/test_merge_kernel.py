"""The kernel that merges ranks' rows: against the one formula, in the strides in which rows arrive."""

from __future__ import annotations

import pytest
import torch
from interpreted import assert_passes_interpreted, only_compiled, only_interpreted
from offline import TARGETS, compile_launches
from torch import Tensor

from anystride.backends import triton_merge
from anystride.merge import merge
from anystride.testing.judgement import assert_close_as_plain

INF = float("inf")
SHAPES = {  # parts, tokens, heads, d_v
    "mla": (4, 2, 3, 512),
    "two": (2, 5, 2, 64),
    "odd": (3, 3, 2, 33),
    "wide": (2, 1, 2, 576),
    "alone": (1, 2, 2, 16),
}


def received(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Rows and lse as ``anystride.distributed`` has them: heads outermost, gaps, a part without keys."""
    parts, tokens, heads, d_v = shape
    generator = torch.Generator().manual_seed(sum(shape))
    room = -(-tokens * d_v // 8) * 8 + 8
    outs = torch.full((parts, heads, room), float("nan"), dtype=dtype, device=device)
    outs = outs[..., : tokens * d_v].unflatten(-1, (tokens, d_v)).transpose(1, 2)
    outs.copy_(torch.randn(shape, generator=generator))
    lses = torch.full((parts, heads, tokens + 3), float("nan"), device=device)[..., :tokens]
    lses.copy_(4 * torch.randn(parts, heads, tokens, generator=generator))
    lses[0, 0] = -INF
    outs[0, :, 0] = float("nan")
    lses[:, -1, -1] = -INF  # no part saw a key
    return outs, lses


def check(shape: tuple[int, ...], dtype: torch.dtype, sinks: bool, device: str = "cpu") -> None:
    outs, lses = received(shape, dtype, device)
    _, tokens, heads, d_v = shape
    logits = torch.randn(2 * heads, generator=torch.Generator().manual_seed(1))
    s_aux = logits.to(device, dtype)[::2] if sinks else None
    flat = torch.full((tokens, heads + 1, 2 * d_v), float("nan"), dtype=dtype, device=device)
    out = flat[:, :heads, ::2] if sinks else flat[:, :heads, :d_v]
    lse = torch.full((heads, tokens), float("nan"), device=device)
    triton_merge.run(outs, lses, s_aux, out, lse)
    in_float64 = None if s_aux is None else s_aux.double().cpu()
    right_out, right_lse = merge(outs.double().cpu(), lses.double().cpu(), in_float64)
    plain_out, plain_lse = merge(outs, lses, s_aux)
    assert_close_as_plain("out", out, plain_out, right_out, dtype)
    assert_close_as_plain("lse", lse, plain_lse, right_lse, torch.float32)
    assert flat.isnan().sum() == flat.numel() - out.numel()


@only_compiled
def test_the_kernel_under_the_interpreter() -> None:
    assert_passes_interpreted(__file__, "-k", "interpreted")


@only_interpreted
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_rows_interpreted(shape: tuple[int, ...], dtype: torch.dtype, sinks: bool) -> None:
    check(shape, dtype, sinks)


@only_interpreted
def test_nothing_to_merge_interpreted() -> None:
    outs, lses = torch.zeros(2, 0, 3, 16), torch.zeros(2, 3, 0)
    triton_merge.run(outs, lses, None, outs[0], lses[0])


@pytest.mark.gpu
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_rows_on_a_device(shape: tuple[int, ...], dtype: torch.dtype, sinks: bool) -> None:
    for _ in range(2):  # compiled, and past Triton's look-up
        check(shape, dtype, sinks, "cuda")


@only_compiled
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("parts", [2, 8])
def test_it_compiles_without_spilling(parts: int, target: str) -> None:
    outs, lses = received((parts, 16, 4, 512), torch.bfloat16)
    out, lse = torch.empty(16, 4, 512, dtype=torch.bfloat16), torch.empty(4, 16)
    (binary,) = compile_launches(lambda: triton_merge.run(outs, lses, None, out, lse), target)
    assert binary.kernel == "merge_kernel"
    assert binary.spilled_bytes == 0
    if target.startswith("sm"):
        assert "ld.global.v4.b32" in binary.assembly
