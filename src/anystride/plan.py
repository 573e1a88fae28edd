"""Who runs a call and how: choose a back end, remember the choice, allocate, run.

Plans are remembered by the facts that decide them, so that the checks and the choice are paid once and
a decoding step pays a dictionary look-up.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from operator import attrgetter
from typing import Any, Protocol

import torch
from torch import Tensor

from anystride import memory
from anystride.errors import Fault, InvalidInputError, UnsupportedError
from anystride.problem import FP8_NAMES, OPERATION, Call, Numbers, Problem, make_problem

__all__ = ["Plan", "execute", "find_plan", "make_plan"]

log = logging.getLogger("anystride")


class Backend(Protocol):
    """A module that can run a problem."""

    NAME: str

    def refusals(self, problem: Problem) -> list[str]:
        """Every reason why it cannot run the problem; empty if it can."""
        ...

    def choose_config(self, problem: Problem) -> Any:
        """How it will run it: a pure function of the problem (and of the device's properties)."""
        ...

    def run(self, problem: Problem, config: Any, call: Call) -> None:
        """Write ``call.out``, and ``call.lse`` if there is one."""
        ...


NAMES = ("hopper", "triton", "cpu", "reference")
AUTOMATIC = ("hopper", "triton", "cpu")  # the reference is asked for by name or not at all
SCHEDULED = ("hopper", "triton")  # those whose work is cut on the device


@cache
def backend_named(name: str) -> Any:
    """The module of a back end, imported when it is first asked; None where Triton is not installed."""
    try:
        return import_module(f"anystride.backends.{name}")
    except ModuleNotFoundError as error:
        # A torch build for the CPU comes without Triton; anything else that is missing is a fault.
        if error.name is None or error.name.partition(".")[0] != "triton":
            raise
        return None


def not_installed(name: str) -> str:
    """Why a back end that :func:`backend_named` does not find runs nothing."""
    return f"{name} is not installed; needs the package triton (pip install triton)"


def check_wanted(operation: str, wanted: str | None, names: tuple[str, ...]) -> None:
    """Raise InvalidInputError if a back end was asked for that is none."""
    if wanted is not None and wanted not in names:
        fault = Fault("backend names no back end.", f"backend = {wanted!r}", f"one of {names} or None")
        raise InvalidInputError(operation, [fault])


@dataclass(frozen=True)
class Plan:
    """A problem, who runs it and how.

    Attributes:
        refused: What each back end that was asked before it answered.
    """

    problem: Problem
    backend: Backend
    config: Any
    refused: dict[str, list[str]]


@cache
def default_backend() -> str | None:
    """The back end named by ANYSTRIDE_BACKEND, read once."""
    return os.environ.get("ANYSTRIDE_BACKEND") or None


def describe(problem: Problem) -> str:
    """One line for messages: the shapes, strides, dtypes and device that decide."""
    p = problem
    short = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
    names = short | FP8_NAMES
    cache = f"[{p.num_pages}, {p.blocks_per_page}, {p.block_size}, {p.num_kv_heads}, " if p.paged else "["
    if not p.paged:
        cache = f"[{p.num_pages}, {p.num_kv_heads}, "
    scales = "".join(
        f"{name} {groups} a row strides {strides}, "
        for name, groups, strides in (
            ("k_scale_cache", p.k_scale_groups, p.k_scale_strides),
            ("v_scale_cache", p.v_scale_groups, p.v_scale_strides),
        )
        if groups
    )
    return (
        f"q {names[p.dtype]} [{p.total_q}, {p.num_q_heads}, {p.d_qk}] strides {p.q_strides}, "
        f"k {names[p.k_dtype]} {cache}{p.d_qk}] strides {p.k_strides}, "
        f"v {names[p.v_dtype]} {cache}{p.d_v}] strides {p.v_strides}, {scales}{p.device}"
    )


def refusals_of(name: str, problem: Problem) -> list[str]:
    """Why the named back end cannot run the problem; empty if it can."""
    backend = backend_named(name)
    if backend is None:
        return [not_installed(name)]
    reasons: list[str] = backend.refusals(problem)
    return reasons


def make_plan(problem: Problem, wanted: str | None) -> Plan:
    """Choose a back end and its configuration.

    Args:
        problem: The facts of the call.
        wanted: The back end that was asked for: obeyed or refused. None: the first that can.

    Raises:
        InvalidInputError: There is no back end of that name.
        UnsupportedError: The back end asked for, or every one, refuses.
    """
    wanted = wanted or default_backend()
    check_wanted(OPERATION, wanted, NAMES)
    refused: dict[str, list[str]] = {}
    for name in (wanted,) if wanted else AUTOMATIC:
        reasons = refusals_of(name, problem)
        if not reasons:
            backend = backend_named(name)
            log.info("%s runs %s; refused: %s", name, describe(problem), refused or "none")
            return Plan(problem, backend, backend.choose_config(problem), refused)
        refused[name] = reasons
    if wanted is None:
        first = f"{OPERATION}: no backend can run this call."
        do = "move the tensors to a CPU or to a GPU that Triton supports"
    else:
        first = f"{OPERATION}: backend {wanted!r} was asked for and refuses; nothing else was tried."
        able = [name for name in AUTOMATIC if not refusals_of(name, problem)]
        do = f"backend=None would run this on {able[0]!r}" if able else ""
    raise UnsupportedError(first, describe(problem), refused, do)


_PLANS: dict[tuple[Any, ...], Plan] = {}
_MOST_PLANS = 16384  # a few hundred bytes each; engines see some thousand shapes


_is_cpu, _device = attrgetter("is_cpu"), attrgetter("device")


def _key(tensors: tuple[Any, ...], numbers: tuple[Any, ...], wanted: str | None) -> tuple[Any, ...]:
    """What a plan depends on: everything but the tensors' values and exact addresses.

    Paid at every call, hence written out, with as few objects as can be.
    """
    q, k, v, q_v, *others, out, lse = tensors
    # The distance between V and K matters only while V may lie in K's row (at most 1152 elements of 4 bytes)
    # or beside it.
    k_strides, v_strides = k.stride(), v.stride()
    k_at, v_at = k.data_ptr(), v.data_ptr()
    reach = 8192 * max(k_strides[-1], v_strides[-1])
    distance = v_at - k_at
    # fmt: off
    # A number is cheaper than a device, where it tells.
    where = _is_cpu if q.is_cpu else Tensor.get_device if q.is_cuda else _device
    try:
        facts = [None if t is None else (t.shape, t.stride(), t.dtype, where(t)) for t in others]
    except (AttributeError, TypeError):  # descales may be numbers
        facts = [
            (t.shape, t.stride(), t.dtype, where(t)) if isinstance(t, Tensor) else t for t in others
        ]
    return (
        numbers, wanted, distance if -reach <= distance <= reach else None,
        q.shape, q.stride(), q.dtype, q.is_cuda, where(q), q.data_ptr() & 15,
        k.shape, k_strides, k.dtype, where(k), k_at & 15,
        v.shape, v_strides, v.dtype, where(v), v_at & 15,
        q_v if q_v is None else (q_v.shape, q_v.stride(), q_v.dtype, where(q_v), q_v.data_ptr() & 15),
        out if out is None else (out.shape, out.stride(), out.dtype, where(out), out.data_ptr() & 15),
        lse if lse is None else (lse.shape, lse.stride(), lse.dtype, where(lse)),
        *facts,
    )
    # fmt: on


def find_plan(tensors: tuple[Any, ...], numbers: tuple[Any, ...], wanted: str | None) -> Plan:
    """The plan for a call: remembered, or checked and made now.

    Args:
        tensors: The fields of a :class:`~anystride.problem.Call`, in their order.
        numbers: The fields of :class:`~anystride.problem.Numbers`, in their order.
        wanted: The back end that was asked for.

    Raises:
        InvalidInputError, UnsupportedError: See :func:`make_problem` and :func:`make_plan`.
    """
    key: tuple[Any, ...] | None
    try:
        key = _key(tensors, numbers, wanted)
        plan = _PLANS.get(key)
    except (AttributeError, TypeError, IndexError):  # no tensors at all: the checks will say so
        key, plan = None, None
    if plan is None:
        plan = make_plan(make_problem(Call(*tensors), Numbers(*numbers)), wanted)
        if key is not None:
            if len(_PLANS) >= _MOST_PLANS:
                _PLANS.clear()
            _PLANS[key] = plan
    return plan


def execute(plan: Plan, tensors: tuple[Any, ...]) -> Call:
    """Allocate what the call lacks, run it, and return it with its results filled in."""
    problem = plan.problem
    device = problem.device
    out, lse = tensors[17:]
    if out is None:
        out = memory.allocate((problem.total_q, problem.num_q_heads, problem.d_v), problem.dtype, device)
    if lse is None and problem.has_lse:
        lse = memory.allocate((problem.num_q_heads, problem.total_q), torch.float32, device)
    call = tuple.__new__(Call, (*tensors[:17], out, lse))  # as _make does, but for its check of the length
    if problem.total_q == 0 or problem.batch == 0:
        return call
    plan.backend.run(problem, plan.config, call)
    return call


def make_metadata(problem: Problem, cu_seqlens_q: Tensor | None, seqused_k: Tensor, margin: int) -> Tensor:
    """The schedule for calls of these shapes and lengths; a header of zeros where nothing schedules."""
    device = problem.device
    name = next((name for name in SCHEDULED if not refusals_of(name, problem)), None)
    if name is None:
        return torch.zeros(16, dtype=torch.int32, device=device)
    work = import_module("anystride.work")
    target = import_module("anystride.launch").device_target(device)
    target = target._replace(processors=max(1, target.processors - margin))
    if cu_seqlens_q is None:
        steps = torch.arange(problem.batch + 1, dtype=torch.int32, device=device)
        cu_seqlens_q = steps * problem.max_seqlen_q
    programs = backend_named(name).programs(problem, target)
    words = work.metadata_words(problem, work.cut_rows(problem, target), programs)
    metadata = memory.allocate((words,), torch.int32, device)
    work.make_metadata(problem, target, cu_seqlens_q, seqused_k, metadata)
    return metadata
