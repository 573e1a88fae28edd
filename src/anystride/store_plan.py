"""Who runs a call of the write side: choose a back end, remember the choice, run.

See ``plan.py`` for the read side. A call allocates nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from anystride import blocks
from anystride.errors import Fault, InvalidInputError, UnsupportedError
from anystride.plan import backend_named, check_wanted, not_installed
from anystride.problem import FP8_DTYPES, in_words
from anystride.store import Argument, StoreCall, check, half_of, make_problem

__all__ = ["copy_blocks", "store_kv", "store_mla"]

NAMES = ("triton", "cpu")


def choose(operation: str, kind: str, problem: Any, told: str, wanted: str | None) -> Any:
    """The module that runs a call: the first that can, or the one that was asked for.

    Args:
        operation: For messages.
        kind: What it does, the end of the modules' names.
        problem: The facts of the call.
        told: The same in a line, for messages.
        wanted: The back end that was asked for.

    Raises:
        InvalidInputError: There is no such back end.
        UnsupportedError: The one that was asked for, or every one, refuses.
    """
    check_wanted(operation, wanted, NAMES)
    refused: dict[str, list[str]] = {}
    for name in (wanted,) if wanted else NAMES:
        module = backend_named(f"{name}_{kind}")
        reasons: list[str] = [not_installed(name)] if module is None else module.refusals(problem)
        if not reasons:
            return module
        refused[name] = reasons
    first = f"{operation}: no back end can run this call."
    if wanted is not None:
        first = f"{operation}: backend {wanted!r} was asked for and refuses; nothing else was tried."
    raise UnsupportedError(first, told, refused, "")


class StorePlan(NamedTuple):
    """Who runs a call and how."""

    problem: Any
    backend: Any
    config: Any


_PLANS: dict[tuple[Any, ...], StorePlan] = {}
_MOST_PLANS = 16384


def remembered(key: tuple[Any, ...]) -> StorePlan | None:
    """The plan of a call of these facts, if there is one."""
    try:
        return _PLANS.get(key)
    except TypeError:  # no tensors at all: the checks will say so
        return None


def remember(key: tuple[Any, ...], plan: StorePlan) -> StorePlan:
    """Keep a plan."""
    if len(_PLANS) >= _MOST_PLANS:
        _PLANS.clear()
    _PLANS[key] = plan
    return plan


def _facts(x: Any) -> Any:
    return (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() & 15) if isinstance(x, Tensor) else x


def execute(
    operation: str, slot_mapping: Any, arguments: tuple[Argument, Argument], wanted: str | None
) -> None:
    """Check a call that stores rows, or find it checked, and run it."""
    key = (operation, wanted, _facts(slot_mapping), *(tuple(map(_facts, a[3:])) for a in arguments))
    plan = remembered(key)
    if plan is None:
        p = make_problem(check(operation, slot_mapping, arguments))
        cache = f"[{p.num_pages}, {p.blocks_per_page}, {p.block_size}, {p.first.heads}, {p.first.d}]"
        told = f"{p.num_tokens} rows {p.first.dtype} into {p.first.cache_dtype} {cache} on {p.device}"
        backend = choose(operation, "store", p, told, wanted)
        plan = remember(key, StorePlan(p, backend, backend.choose_config(p)))
    if plan.problem.num_tokens:
        call = StoreCall(slot_mapping, half_of(arguments[0]), half_of(arguments[1]))
        plan.backend.run(plan.problem, plan.config, call)


def copy_blocks(operation: str, source: Any, target: Any, ids: Any, columns: int, wanted: str | None) -> None:
    """Check a call that copies blocks, or find it checked, and run it; see ``blocks.check``."""
    key = (operation, wanted, columns, _facts(source), _facts(target), _facts(ids))
    plan = remembered(key)
    if plan is None:
        blocks.check(operation, source, target, ids, columns)
        p = blocks.make_problem(blocks.canonical(source, target, ids, columns))
        told = f"{p.count} blocks of [{p.block_size}, {p.heads}, {p.d}] {source.dtype} on {p.device}"
        backend = choose(operation, "blocks", p, told, wanted)
        plan = remember(key, StorePlan(p, backend, backend.choose_config(p)))
    p = plan.problem
    if p.count and p.block_size * p.heads * p.d:
        plan.backend.run(p, plan.config, blocks.canonical(source, target, ids, columns))


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
            f"{names[1]} {in_words(rope_cache)}",
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
