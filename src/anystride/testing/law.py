"""The law as a function of a call's arguments: what ``anystride.reference`` says of them, in float64."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from anystride import flash_attn_varlen_func
from anystride.problem import Call, Numbers, Problem, bucket, make_problem
from anystride.reference import attention

__all__ = ["checked", "dequantised", "law"]


def checked(arguments: dict[str, Any]) -> tuple[Problem, Call]:
    """The facts and the tensors of a call of ``flash_attn_varlen_func`` with these arguments."""
    bound = inspect.signature(flash_attn_varlen_func).bind(**arguments)
    bound.apply_defaults()
    given = bound.arguments
    call = Call(*(given.get(name) for name in Call._fields))  # type: ignore[arg-type]
    facts = {name: given[name] for name in Numbers._fields if name in given}
    facts |= {
        "max_keys": bucket(given["max_seqlen_k"]),
        "window": tuple(given["window_size"] or (-1, -1)),
        "wants_lse": True,
    }
    return make_problem(call, Numbers(**facts)), call


def law(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What ``anystride.reference`` says, in float64; NaN in rows of no sequence."""
    return attention(*checked(arguments))


def dequantised(rows: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Rows ``[..., heads, d]`` of a cache with scales ``[..., n]``, in ``dtype``, rounded once."""
    if scales is None:
        return rows.to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    groups = scales.shape[-1] if rows.shape[-2] == 1 else 1
    runs = rows.to(wide).reshape(*rows.shape[:-1], groups, rows.shape[-1] // groups)
    products = runs * scales.to(wide).reshape(*rows.shape[:-1], groups, 1)
    return products.reshape(rows.shape).to(dtype)
