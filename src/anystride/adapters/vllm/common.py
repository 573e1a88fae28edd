"""What the back ends for GQA and MLA share: dtypes of the cache, a step's schedule, the line in the log."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.v1.attention.backend import MultipleOf

import anystride
from anystride.errors import UnsupportedError
from anystride.plan import describe, make_plan
from anystride.problem import Call, Numbers, bucket, make_problem

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
FP8 = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
PLAIN = {"float16": torch.float16, "bfloat16": torch.bfloat16}
MOST_DIMENSIONS = 576

log = init_logger("vllm.anystride")  # below "vllm", so that vLLM's own settings show it
_SIGNATURE = inspect.signature(anystride.flash_attn_varlen_func)
_TOLD: set[tuple[Any, ...]] = set()


def runs_on(capability: Any) -> bool:
    """Whether a device's compute capability will do; None, as on a CPU, does."""
    return capability is None or capability >= (8, 0)


class Declared:
    """What the back ends of both families tell vLLM alike; comes before vLLM's own class among the bases."""

    supported_dtypes: ClassVar[list[torch.dtype]] = DTYPES

    @staticmethod
    def get_name() -> str:
        """The registry's member: vLLM looks the name up."""
        return "CUSTOM"

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        """Any: a block need not be split for the kernels."""
        return [MultipleOf(1)]

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        """From sm_80 on."""
        return runs_on(capability)

    @classmethod
    def supports_combination(
        cls, head_size: int, dtype: torch.dtype, kv_cache_dtype: str | None, *_: Any, **__: Any
    ) -> str | None:
        """A 16-bit cache has the dtype of the model."""
        stored = PLAIN.get(kv_cache_dtype or "auto", dtype)
        if stored == dtype:
            return None
        return f"a cache of {stored} under queries of {dtype}: needs the same dtype, or fp8"


def as_stored(cache: Tensor, kv_cache_dtype: str) -> Tensor:
    """The cache with the dtype of what is in it: vLLM keeps fp8 as uint8."""
    dtype = FP8.get(kv_cache_dtype)
    return cache if dtype is None or cache.dtype == dtype else cache.view(dtype)


def unsupported(what: str, got: str, why: str, do: str) -> UnsupportedError:
    """The error for what vLLM asks and this back end does not do, to be raised."""
    return UnsupportedError(f"vLLM's attention on anystride: {what}", got, {"needs": [why]}, do)


def refuse_quantised_output(**scales: Tensor | None) -> None:
    """Raise if one of these arguments is given.

    Raises:
        UnsupportedError: Names it.
    """
    given = [name for name, scale in scales.items() if scale is not None]
    if given:
        raise unsupported(
            "a quantised output cannot be written.",
            f"{' and '.join(given)} given",
            "an output of the query's dtype",
            "the pass fuse_attn_quant off",
        )


def window_of(window: tuple[int, int], causal: bool) -> tuple[int, int]:
    """A layer's window: one to the left is one to both sides where queries see later keys."""
    return window if causal else (window[0], window[0])


class Schedule:
    """How a step's work is shared out, made once for all layers, in memory that CUDA graphs may keep.

    A graph remembers an address: each length of schedule, which depends on shapes only, has a tensor of its
    own, and every step copies a new schedule into it.

    Args:
        vllm_config: vLLM's. Without a schedule where it could be stale: a drafter moves lengths after its
            metadata is built; under context parallelism calls go without one, too.
        device: Where attention runs.
        heads: ``(num_heads_q, num_heads_kv, headdim, headdim_v)`` of all layers; None where layers differ.
        window: The window of all layers.
    """

    def __init__(
        self,
        vllm_config: Any,
        device: torch.device,
        heads: tuple[int, int, int, int] | None,
        window: tuple[int, int],
    ) -> None:
        config = vllm_config
        self.heads, self.window = heads, window
        self.dtype = config.model_config.dtype
        # The same bound in each step: a schedule's length depends on it, and a graph's must not change.
        self.max_keys = config.model_config.max_model_len
        self.made = (
            device.type == "cuda"
            and heads is not None
            and config.speculative_config is None
            and config.parallel_config.decode_context_parallel_size == 1
        )
        self.kept: dict[int, Tensor] = {}

    def make(self, starts: Tensor, lengths: Tensor, max_query_len: int, causal: bool) -> Tensor | None:
        """The schedule of a step.

        Args:
            starts: ``[batch + 1]`` int32: where each sequence's query tokens begin.
            lengths: ``[batch]`` int32: keys of each sequence.
            max_query_len: Upper bound on the query tokens of a sequence.
            causal: As in the calls.

        Returns:
            For ``scheduler_metadata`` of every layer's call; None where calls are made without.
        """
        if not self.made or self.heads is None:
            return None
        num_q, num_kv, d_qk, d_v = self.heads
        fresh = anystride.get_scheduler_metadata(
            lengths.shape[0], max_query_len, self.max_keys, num_q, num_kv, d_qk, lengths, self.dtype, d_v,
            starts, causal=causal, window_size=window_of(self.window, causal),
        )  # fmt: skip
        kept = self.kept.setdefault(fresh.shape[0], fresh)
        return kept if kept is fresh else kept.copy_(fresh)


def attend(kind: str, told: set[bool], **arguments: Any) -> Any:
    """:func:`anystride.flash_attn_varlen_func`; tells the log who runs it, once for each kind of call.

    Args:
        kind: What vLLM calls for, in words.
        told: Of one layer: whether it has told of calls with several query tokens to a sequence, and of
            those with one. Added to.
        **arguments: The call's.
    """
    longer = arguments["max_seqlen_q"] > 1
    if longer not in told:
        told.add(longer)
        _tell(kind, "several query tokens" if longer else "one query token", arguments)
    return anystride.flash_attn_varlen_func(**arguments)


def _tell(kind: str, rows: str, arguments: dict[str, Any]) -> None:
    """A line in the log, if no layer like this one has told it; reads no value of a tensor."""
    q, k = arguments["q"], arguments["k"]
    key = (kind, rows, q.shape[1:], q.dtype, k.dtype, k.stride(), arguments.get("window_size"))
    if key in _TOLD:
        return
    _TOLD.add(key)
    bound = _SIGNATURE.bind(**arguments)
    bound.apply_defaults()
    a = bound.arguments
    tensors = {name: a[name] for name in Call._fields if name != "lse"}
    numbers = Numbers(
        max_keys=bucket(a["max_seqlen_k"]),
        window=tuple(a["window_size"] or (-1, -1)),
        wants_lse=a["return_softmax_lse"],
        **{name: a[name] for name in Numbers._fields if name in a},
    )
    plan = make_plan(make_problem(Call(**tensors, lse=None), numbers), a["backend"])
    relation, offset = plan.problem.relation
    log.info(
        "anystride %s: %s runs %s, %s: %s, V %s%s, window %s, %s schedule; refused: %s",
        anystride.__version__,
        plan.backend.NAME,
        kind,
        rows,
        describe(plan.problem),
        relation,
        "" if relation == "separate" else f" at {offset} of K's row",
        numbers.window,
        "no" if a["scheduler_metadata"] is None else "a",
        plan.refused or "none",
    )
