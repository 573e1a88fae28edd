"""How the tests hold a call to the law: a float64 answer, and a tolerance that nobody typed in.

``reference`` is the specification (``anystride.reference``) over the dense rows of the cache. ``plain`` is
the same formula in plain PyTorch in the storage dtype, one sequence at a time. ``assert_right`` demands
that a result is off by at most twice what ``plain`` is off, both against ``reference``.

    inputs = make_inputs(case, layout)
    out, lse = attend(inputs, "cpu")
    assert_right(inputs, out, lse)

Works for inputs on any device: ``reference`` computes on the CPU, ``plain`` on the device.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from anystride import flash_attn_varlen_func
from anystride.testing.cases import Case
from anystride.testing.inputs import Inputs
from anystride.testing.law import dequantised, law
from anystride.testing.storage import read

__all__ = [
    "Comparison", "assert_close_as_plain", "assert_right", "attend", "compare", "hidden_keys", "plain",
    "reference",
]  # fmt: skip


def attend(inputs: Inputs, backend: str | None, **others: object) -> tuple[Tensor, Tensor | None]:
    """Make the call. ``others`` are arguments that replace or join those of ``inputs``.

    Returns:
        ``out`` and ``lse``; None for an ``lse`` that was not asked for.
    """
    result = flash_attn_varlen_func(**(inputs.kwargs | {"backend": backend} | others))
    return result if isinstance(result, tuple) else (result, None)


def reference(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The float64 answer, from the dense rows of the cache: no stride of it takes part.

    Returns:
        ``out`` ``[total_q, num_q_heads, d_v]`` and ``lse`` ``[num_q_heads, total_q]``, both float64 on the
        CPU. Rows of no sequence are NaN.
    """
    kwargs = {name: _to_cpu(value) for name, value in inputs.kwargs.items()}
    k, v = (rows.cpu() for rows in _dense_rows(inputs))
    starts = torch.tensor([0, *inputs.lengths]).cumsum(0, dtype=torch.int32)
    kwargs |= {"k": k, "v": v, "cu_seqlens_k": starts, "block_table": None, "seqused_k": None, "out": None}
    kwargs |= {name: scales.cpu() for name, scales in inputs.scales.items()}
    return law(kwargs)


def plain(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The formula of ``anystride.reference`` in plain PyTorch, in the dtype of ``q``, for the tolerance.

    What PyTorch's own attention does without a fused kernel: scores rounded to the dtype, softmax (which
    works in float32 inside), weights rounded to the dtype, values weighted. An fp8 cache is raised to the
    dtype of ``q`` first, which is exact, or, times its scales, rounded; descales multiply after the products.

    Returns:
        ``out`` ``[total_q, num_q_heads, d_v]`` in the dtype of ``q`` and ``lse`` ``[num_q_heads, total_q]``
        float32 (of the rounded scores), on the device of the inputs. Rows of no sequence are NaN.
    """
    kwargs, case = inputs.kwargs, inputs.case
    q = kwargs["q"]
    out = q.new_full((*q.shape[:2], case.d_v), float("nan"))
    lse = q.new_full((q.shape[1], q.shape[0]), float("nan"), dtype=torch.float32)
    k_rows, v_rows = (
        dequantised(rows, inputs.scales.get(f"{name}_scale_cache"), q.dtype)
        for name, rows in zip("kv", _dense_rows(inputs), strict=True)
    )
    begin = first = 0
    for seq, (n, length) in enumerate(zip(case.q_lens, inputs.lengths, strict=True)):
        rows, keys = slice(begin, begin + n), slice(first, first + length)
        begin, first = begin + n, first + length
        # [num_q_heads, length, d], heads of a group repeated
        k = k_rows[keys].transpose(0, 1).repeat_interleave(case.group_size, 0)
        v = v_rows[keys].transpose(0, 1).repeat_interleave(case.group_size, 0)
        q_scale, k_scale, v_scale = (_descale(inputs, name, seq) for name in "qkv")
        scores = q[rows].transpose(0, 1) @ k.transpose(1, 2)
        scores = scores * (q_scale * k_scale * case.scale).to(q.dtype)
        if "q_v" in kwargs:
            more = kwargs["q_v"][rows].transpose(0, 1) @ v.transpose(1, 2)
            scores = scores + more * (q_scale * v_scale * case.scale).to(q.dtype)
        if case.softcap:
            scores = case.softcap * torch.tanh(scores / case.softcap)
        position, centre = _positions(inputs, seq, n, length)
        if case.alibi:
            slopes = kwargs["alibi_slopes"]
            slopes = slopes[seq] if slopes.dim() == 2 else slopes
            scores = scores - (slopes[:, None, None] * (centre - position).abs()).to(q.dtype)
        hidden = hidden_keys(case, position, centre)
        scores = scores.masked_fill(hidden, float("-inf"))
        if case.sinks:
            sink = kwargs["s_aux"].to(q.dtype)[:, None, None].expand(-1, n, 1)
            scores = torch.cat([scores, sink], dim=-1)
        empty = hidden.all(-1)  # also where there is no key at all
        weights = torch.softmax(scores, dim=-1)[..., :length].masked_fill(empty[:, None], 0)
        out[rows] = ((weights @ v) * v_scale.to(q.dtype)).transpose(0, 1)
        lse[:, rows] = scores.float().logsumexp(-1).masked_fill(empty, float("-inf"))
    return out, lse


def hidden_keys(case: Case, position: Tensor, centre: Tensor) -> Tensor:
    """Which keys causality and the window hide from which queries: ``[n, length]`` bool.

    Args:
        case: What is asked.
        position: Of the keys in their whole sequence, ``[length]``.
        centre: Of the queries, ``[n, 1]``.
    """
    left, right = case.window[0], 0 if case.causal else case.window[1]
    hidden = torch.zeros(len(centre), len(position), dtype=torch.bool, device=position.device)
    if left >= 0:
        hidden |= position < centre - left
    if right >= 0:
        hidden |= position > centre + right
    return hidden


class Comparison(NamedTuple):
    """How far a result is from the law.

    Attributes:
        complaint: What is wrong, "" if nothing is.
        where: The worst element in a line, "" if nothing is wrong.
        error: Largest error, NaN if an element is NaN or infinite where it should not be.
        allowed: What it may be.
    """

    complaint: str
    where: str
    error: float
    allowed: float


def compare(
    name: str, got: Tensor, plain_one: Tensor, right_one: Tensor, rounding: torch.dtype
) -> Comparison:
    """Whether the errors of ``got`` are at most twice those of ``plain_one``, against ``right_one``.

    Both the largest error and the root of the mean square are held. Infinities must be the same, and no
    NaN may stand where ``right_one`` has none; where it has NaN nothing is promised and nothing is compared.

    The bound never falls below one rounding step of the dtype ``rounding`` at the magnitude of the values
    (half a step for the mean): where few elements are compared, or the answer is a copy of a value, plain
    PyTorch may be exact by luck, and a correct result that was rounded elsewhere is still one step off. In
    float32 it is three steps: kernels compute in it, and to go to base 2, to raise 2 to a rounded power, and
    to go back costs a step each.
    """
    if got.shape != right_one.shape:
        text = f"{name}: shape {list(got.shape)}, not {list(right_one.shape)}"
        return Comparison(text, "", math.nan, math.nan)
    got, plain_one = got.detach().cpu().double(), plain_one.cpu().double()
    promised = ~right_one.isnan()
    finite = promised & right_one.isfinite()
    exact = promised & ~finite
    for wrong, what in (
        (promised & got.isnan(), "are NaN"),
        (exact & (got != right_one), "should be infinite as in the reference"),
        (finite & got.isinf(), "are infinite"),
    ):
        places = wrong.nonzero().tolist()
        if places:
            text = f"{name}: {len(places)} of {wrong.numel()} elements {what}, first {places[0]}"
            return Comparison(text, _element(name, places[0], got, right_one), math.nan, math.nan)
    if not finite.any():
        return Comparison("", "", 0.0, 0.0)
    error = (got - right_one)[finite].abs()
    allowed = (plain_one - right_one)[finite].abs()
    size = right_one[finite].abs()
    step = torch.finfo(rounding).eps * (3 if rounding == torch.float32 else 1)
    largest = max(2 * allowed.max().item(), step * size.max().item())
    mean = max(2 * _rms(allowed), step / 2 * _rms(size))
    if error.max().item() <= largest and _rms(error) <= mean:
        return Comparison("", "", error.max().item(), largest)
    worst = int(error.argmax())
    place = finite.nonzero()[worst].tolist()
    share = (error > largest).double().mean().item()
    text = (
        f"{name}: off by more than twice plain PyTorch in the storage dtype\n"
        f"  largest error  {error.max().item():.3e}, allowed {largest:.3e}\n"
        f"  mean (RMS)     {_rms(error):.3e}, allowed {mean:.3e}\n"
        f"  worst element  {place}: got {got[finite][worst].item():.8g}, "
        f"right {right_one[finite][worst].item():.8g}, plain {plain_one[finite][worst].item():.8g}\n"
        f"  {share:.1%} of {error.numel()} elements are off by more than allowed"
    )
    return Comparison(text, _element(name, place, got, right_one), error.max().item(), largest)


def _element(name: str, place: list[int], got: Tensor, right: Tensor) -> str:
    where = ", ".join(map(str, place))
    return f"{name}[{where}]: got {got[tuple(place)].item():.6g}, right {right[tuple(place)].item():.6g}"


def assert_close_as_plain(
    name: str, got: Tensor, plain_one: Tensor, right_one: Tensor, rounding: torch.dtype
) -> None:
    """Fail unless :func:`compare` has nothing to complain of."""
    complaint = compare(name, got, plain_one, right_one, rounding).complaint
    assert not complaint, complaint


def assert_right(inputs: Inputs, out: Tensor, lse: Tensor | None) -> None:
    """Fail unless ``out`` and ``lse`` are right, and nothing else was written.

    Checks shapes and dtypes, that a given ``out`` is the one returned, numbers and infinities (see
    :func:`assert_close_as_plain`), the cache byte by byte, and the canaries around a given ``out``.
    ``lse`` may be None only if the case does not ask for it.
    """
    q = inputs.kwargs["q"]
    assert out.dtype == q.dtype, f"out is {out.dtype}, q is {q.dtype}"
    assert out.device == q.device, f"out is on {out.device}, q on {q.device}"
    if "out" in inputs.kwargs:
        assert out is inputs.kwargs["out"], "the given out was not returned"
    right_out, right_lse = reference(inputs)
    plain_out, plain_lse = plain(inputs)
    assert_close_as_plain("out", out, plain_out, right_out, q.dtype)
    assert (lse is not None) == inputs.case.lse, "lse is returned if and only if it was asked for"
    if lse is not None:
        assert lse.dtype == torch.float32, f"lse is {lse.dtype}"
        assert_close_as_plain("lse", lse, plain_lse, right_lse, torch.float32)
    if inputs.before is not None:
        inputs.assert_untouched()


def _dense_rows(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The valid rows, one sequence after the other, on the device of the inputs."""
    kwargs = inputs.kwargs
    lengths = torch.tensor(inputs.lengths, dtype=torch.int32, device=kwargs["q"].device)
    return read(inputs.storage, kwargs.get("block_table"), lengths, kwargs.get("cu_seqlens_k"))


def _to_cpu(value: object) -> object:
    return value.cpu() if isinstance(value, Tensor) else value


def _descale(inputs: Inputs, of: str, seq: int) -> Tensor:
    """Float32, ``[num_q_heads, 1, 1]``: the factor of each query head's products."""
    q, case = inputs.kwargs["q"], inputs.case
    factor = inputs.kwargs.get(f"{of}_descale", 1.0)
    if isinstance(factor, Tensor) and factor.dim() == 2:
        factor = factor[seq].repeat_interleave(case.group_size)
    factors = torch.as_tensor(factor, dtype=torch.float32, device=q.device)
    return factors.expand(case.num_q_heads)[:, None, None]


def _positions(inputs: Inputs, seq: int, n: int, length: int) -> tuple[Tensor, Tensor]:
    """Where this rank's keys stand in the whole sequence, ``[length]``, and the queries, ``[n, 1]``."""
    case, device = inputs.case, inputs.kwargs["q"].device
    total = case.seqused_k[seq]
    position = torch.arange(total, device=device)
    if case.cp is not None:
        owner = position // case.cp.interleave % case.cp.world_size
        position = position[owner == inputs.kwargs["cp_rank"]]
    assert position.numel() == length
    return position, (total - n + torch.arange(n, device=device))[:, None]


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()
