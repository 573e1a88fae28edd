"""Who runs a call of the write side: choose a back end, remember the choice, run.

See ``plan.py`` for the read side. A call allocates nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

from torch import Tensor

from anystride.errors import Fault, InvalidInputError, UnsupportedError
from anystride.problem import FP8_DTYPES
from anystride.store import Argument, StoreCall, StoreProblem, check, describe, half_of, make_problem

__all__ = ["store_kv", "store_mla"]

NAMES = ("triton", "cpu")


def choose(operation: str, problem: StoreProblem, wanted: str | None) -> Any:
    """The module that runs a call: the first that can, or the one that was asked for.

    Raises:
        InvalidInputError: There is no such back end.
        UnsupportedError: The one that was asked for, or every one, refuses.
    """
    if wanted is not None and wanted not in NAMES:
        raise InvalidInputError(
            operation,
            [Fault("backend names no back end.", f"backend = {wanted!r}", f"one of {NAMES} or None")],
        )
    refused: dict[str, list[str]] = {}
    for name in (wanted,) if wanted else NAMES:
        try:
            module = import_module(f"anystride.backends.{name}_store")
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] != "triton":
                raise
            refused[name] = ["triton is not installed; needs the package triton (pip install triton)"]
            continue
        reasons: list[str] = module.refusals(problem)
        if not reasons:
            return module
        refused[name] = reasons
    p = problem
    cache = f"[{p.num_pages}, {p.blocks_per_page}, {p.block_size}, {p.first.heads}, {p.first.d}]"
    raise UnsupportedError(
        f"{operation}: no back end can run this call."
        if wanted is None
        else f"{operation}: backend {wanted!r} was asked for and refuses; nothing else was tried.",
        f"{p.num_tokens} rows {p.first.dtype} into {p.first.cache_dtype} {cache} on {p.device}",
        refused,
        "",
    )


class StorePlan(NamedTuple):
    """Who runs a call and how."""

    problem: StoreProblem
    backend: Any
    config: Any


_PLANS: dict[tuple[Any, ...], StorePlan] = {}
_MOST_PLANS = 16384


def _facts(x: Any) -> Any:
    return (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() & 15) if isinstance(x, Tensor) else x


def execute(
    operation: str, slot_mapping: Any, arguments: tuple[Argument, Argument], wanted: str | None
) -> None:
    """Check a call, or find it checked, and run it."""
    key: tuple[Any, ...] | None
    key = (operation, wanted, _facts(slot_mapping), *(tuple(map(_facts, a[3:])) for a in arguments))
    try:
        plan = _PLANS.get(key)
    except TypeError:  # no tensors at all: the checks will say so
        key, plan = None, None
    if plan is None:
        call = check(operation, slot_mapping, arguments)
        problem = make_problem(call)
        backend = choose(operation, problem, wanted)
        plan = StorePlan(problem, backend, backend.choose_config(problem))
        if len(_PLANS) >= _MOST_PLANS:
            _PLANS.clear()
        if key is not None:
            _PLANS[key] = plan
    else:
        call = StoreCall(slot_mapping, half_of(arguments[0]), half_of(arguments[1]))
    if plan.problem.num_tokens:
        plan.backend.run(plan.problem, plan.config, call)


def store_kv(
    key: Any, value: Any, k_cache: Any, v_cache: Any, slot_mapping: Any, k_scale: Any, v_scale: Any,
    backend: str | None,
) -> None:  # fmt: skip
    """See :func:`anystride.cache.store_kv`."""
    halves = (
        Argument("key", "k_cache", "k_scale", key, k_cache, k_scale, False),
        Argument("value", "v_cache", "v_scale", value, v_cache, v_scale, False),
    )
    execute("store_kv", slot_mapping, halves, backend)


def store_mla(
    kv_c: Any, k_pe: Any, latent_cache: Any, rope_cache: Any, slot_mapping: Any, scale: Any,
    backend: str | None,
) -> None:  # fmt: skip
    """See :func:`anystride.cache.store_mla`; without ``rope_cache`` it lies behind the latent part."""
    names = ("latent_cache", "rope_cache")
    if rope_cache is None:
        names = ("kv_cache", "kv_cache")
        if (
            isinstance(latent_cache, Tensor)
            and isinstance(kv_c, Tensor)
            and min(kv_c.dim(), latent_cache.dim())
        ):
            rank = kv_c.shape[-1]
            latent_cache, rope_cache = latent_cache[..., :rank], latent_cache[..., rank:]
    # What is written beside the latent part is its scale alone.
    rope_scale = None if isinstance(scale, Tensor) and scale.dim() > 2 else scale
    if rope_scale is not scale and isinstance(rope_cache, Tensor) and rope_cache.dtype in FP8_DTYPES:
        fault = Fault(
            "scales that are computed are those of the latent part: the rope part must not be fp8.",
            f"{names[1]} {describe(rope_cache)}",
            "a rope part of 16 or 32 bits",
            "store_mla(kv_c, k_pe, (latent_cache, rope_cache), slot_mapping, scale)",
        )
        raise InvalidInputError("store_mla", [fault])
    halves = (
        Argument("kv_c", names[0], "scale", _with_head(kv_c), _with_head(latent_cache, 3), scale, True),
        Argument("k_pe", names[1], "scale", _with_head(k_pe), _with_head(rope_cache, 3), rope_scale, True),
    )
    execute("store_mla", slot_mapping, halves, backend)


def _with_head(tensor: Any, without: int = 2) -> Any:
    """MLA has one head, which rows and caches may leave out."""
    return tensor.unsqueeze(-2) if isinstance(tensor, Tensor) and tensor.dim() == without else tensor
