"""Who may be timed: a kernel whose answer is right.

At the sizes of a benchmark the law in float64 is too slow. There, what is right is plain PyTorch in float32
on the device, for three of the sequences; how far off a kernel may be is twice what plain PyTorch in the
storage dtype is off, as everywhere in this project. Smaller cases are held to the law itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from anystride.testing import Inputs
from anystride.testing.judgement import compare, hidden_keys, plain, reference
from anystride.testing.law import dequantised
from anystride.testing.storage import slots

__all__ = ["Gate", "gate_for"]

Complaint = Callable[[Tensor], str]


def gate_for(inputs: Inputs) -> Complaint:
    """What tells of an ``out`` what is wrong, "" if nothing is: the law, or ``Gate`` for large cases."""
    if "bench" in inputs.case.tags:
        return Gate(inputs).complaint
    right, plain_one, rows = reference(inputs)[0], plain(inputs)[0], inputs.case.total_q

    def complaint(out: Tensor) -> str:
        found = compare("out", out[:rows], plain_one[:rows], right[:rows], inputs.case.torch_dtype)
        return f"WRONG: {found.where or found.complaint}" if found.complaint else ""

    return complaint


class Gate:
    """The right answers of a call, for its first, its middle and its last sequence.

    Args:
        inputs: The call: a block table, no context parallelism, no alibi slopes, no empty sequence.
    """

    def __init__(self, inputs: Inputs) -> None:
        case = inputs.case
        self._starts = [sum(case.q_lens[:seq]) for seq in range(case.batch)]
        self._lens = case.q_lens
        self._right = {
            seq: _plain(inputs, seq, torch.float32) for seq in {0, case.batch // 2, case.batch - 1}
        }
        rounded = {seq: _plain(inputs, seq, case.torch_dtype) for seq in self._right}
        step = torch.finfo(case.torch_dtype).eps / 2
        self.allowed = {seq: max(2 * _off(rounded[seq], right), step) for seq, right in self._right.items()}

    def complaint(self, out: Tensor) -> str:
        """What is wrong with ``out`` ``[total_q, num_q_heads, d_v]``; "" if nothing is."""
        for seq, right in self._right.items():
            begin = self._starts[seq]
            off = _off(out[begin : begin + self._lens[seq]], right)
            if not off <= self.allowed[seq]:
                return (
                    f"WRONG: sequence {seq} is off by {off:.1e} of its size, allowed {self.allowed[seq]:.1e}"
                )
        return ""


def _off(got: Tensor, right: Tensor) -> float:
    """The error's norm over that of the right answer; NaN if an element is."""
    return float((got.float() - right).norm() / right.norm())


def _rows(inputs: Inputs, name: str, seq: int, dtype: torch.dtype) -> Tensor:
    """K or V of one sequence, ``[tokens, num_kv_heads, d]``, by its scales."""
    kwargs, storage = inputs.kwargs, inputs.storage
    length = torch.tensor(inputs.lengths[seq : seq + 1], dtype=torch.int32, device=kwargs["q"].device)
    where = slots(storage.shape, kwargs["block_table"][seq : seq + 1], length, None)
    geometry = storage.k_geometry if name == "k" else storage.v_geometry
    rows = geometry.view(storage.bits())[where].view(storage.buffers[geometry.buffer].dtype)
    first = sum(inputs.lengths[:seq])
    scales = inputs.scales.get(f"{name}_scale_cache")
    of_rows = None if scales is None else scales[first : first + len(rows)]
    return dequantised(rows, of_rows, dtype)


def _factor(kwargs: dict[str, Any], name: str, seq: int, heads: int) -> Tensor:
    """A descale for each KV head, ``[heads, 1, 1]``."""
    factor = torch.as_tensor(kwargs.get(f"{name}_descale", 1.0), device=kwargs["q"].device)
    return (factor[seq] if factor.dim() == 2 else factor).expand(heads)[:, None, None]


def _plain(inputs: Inputs, seq: int, dtype: torch.dtype) -> Tensor:
    """One sequence in plain PyTorch, ``[q_len, num_q_heads, d_v]``, one KV head after the other."""
    case, kwargs = inputs.case, inputs.kwargs
    begin, n = sum(case.q_lens[:seq]), case.q_lens[seq]
    keys, values = (_rows(inputs, name, seq, dtype) for name in "kv")
    length, device = len(keys), keys.device
    q_by, k_by, v_by = (_factor(kwargs, name, seq, case.num_kv_heads).to(dtype) for name in "qkv")
    own = length - n + torch.arange(n, device=device)[:, None]
    hidden = hidden_keys(case, torch.arange(length, device=device), own)
    out = torch.empty(n, case.num_q_heads, case.d_v, dtype=dtype, device=device)
    group = case.group_size
    for head in range(case.num_kv_heads):
        heads = slice(head * group, (head + 1) * group)
        q = kwargs["q"][begin : begin + n, heads].transpose(0, 1).to(dtype)  # [group, q_len, d_qk]
        scores = (q @ keys[:, head].T) * (q_by[head] * k_by[head] * case.scale)
        if "q_v" in kwargs:
            q_v = kwargs["q_v"][begin : begin + n, heads].transpose(0, 1).to(dtype)
            scores = scores + (q_v @ values[:, head].T) * (q_by[head] * v_by[head] * case.scale)
        if case.softcap:
            scores = case.softcap * torch.tanh(scores / case.softcap)
        scores = scores.masked_fill(hidden, float("-inf"))
        if case.sinks:
            sink = kwargs["s_aux"][heads].to(dtype)[:, None, None].expand(-1, n, 1)
            scores = torch.cat((scores, sink), -1)
        weights = scores.softmax(-1)[..., :length]
        out[:, heads] = ((weights @ values[:, head]) * v_by[head]).transpose(0, 1)
    return out
