"""One call of somebody's kernel, and what it came to."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from anystride.testing.allocations import peak_bytes
from anystride.testing.cases import Case
from anystride.testing.inputs import Inputs, Values, make_inputs
from anystride.testing.judgement import Comparison, compare, plain, reference
from anystride.testing.recipe import Layout
from anystride.testing.report import Finding, Verdict
from anystride.testing.taming import POISONS, tame

__all__ = ["Kernel", "LeftOut", "Prepare", "Trial", "Trials"]

# The signature of ``anystride.flash_attn_varlen_func``, called by keywords: ``out``, or ``out`` and ``lse``.
Kernel = Callable[..., Any]
Prepare = Callable[[dict[str, Any]], Callable[[], Any]]

HUGE_BYTES = 12 << 30  # a layout beyond 2^31 elements takes up to 9 GB, and its checks some more
STALE_BYTES = (1 << 9, 1 << 12, 1 << 15, 1 << 18, 1 << 18, 1 << 20, 1 << 20, 20 << 20)
LONG = 8192  # tokens: enough for a split of the work to be as fine as it gets
LONG_ON_CPU = 4 << 20  # bytes of K: more than a workspace that a processor's cache bounds
SOME, MORE = 32, 160  # spare blocks, to see whether a kernel's memory grows with the cache


NOT_PROBED = "not probed:"


class Answers(NamedTuple):
    """What is right, and how far plain PyTorch is off: ``reference`` and ``plain`` of a call."""

    out: Tensor
    lse: Tensor
    plain_out: Tensor
    plain_lse: Tensor


class LeftOut(Exception):
    """The trial needs what this machine does not have; the message says what."""


class _DeviceLost(Exception):
    """A call that looks for copies broke the device; the message says how."""


@dataclass(frozen=True)
class Trial:
    """What one call asks, in which layout, and with which poisons.

    Attributes:
        case: What is asked.
        layout: Where the cache lies.
        probe: The column it belongs to, "" for none.
        poisons: Keys of ``taming.POISONS`` that stay in.
        rows: Strides of q and q_v, a key of ``ROW_RECIPES``.
        table: Strides of the block table, a key of ``TABLE_RECIPES``.
        out: Strides of a given ``out``, a key of ``ROW_RECIPES``; None leaves it out.
        of: What is judged: everything, or ``lse`` alone.
        rests_on: What must come out right first. If it does not, this trial is not made: whatever came of it
            would be blamed on the wrong thing.
    """

    case: Case
    layout: Layout
    probe: str = ""
    poisons: frozenset[str] = frozenset(POISONS)
    rows: str = "packed"
    table: str = "packed"
    out: str | None = None
    of: Literal["everything", "lse"] = "everything"
    rests_on: Trial | None = None

    def inputs(self, device: torch.device, **options: Any) -> Inputs:
        """The call, poisoned as asked for."""
        inputs = make_inputs(
            self.case, self.layout, device, rows=self.rows, table=self.table, out=self.out, **options
        )
        return tame(inputs, self.poisons) if self.poisons != set(POISONS) else inputs


class Trials:
    """Makes trials of one kernel on one device, in this process.

    Args:
        kernel: What is called.
        device: Of the tensors.
        prepare: Where a kernel makes page lists and masks first, which a step's layers share: what takes the
            call's arguments and returns the rest of the call. Only the rest is looked at for copies.
    """

    def __init__(self, kernel: Kernel, device: torch.device, prepare: Prepare | None = None) -> None:
        self.kernel = kernel
        self.device = device
        self._prepare = prepare or (lambda kwargs: lambda: kernel(**kwargs))
        self._ground: dict[Trial, Finding] = {}  # what other trials rest on
        self._answers: dict[Case, tuple[Values, Answers]] = {}
        self._copies: dict[tuple[str, str], int] = {}  # bytes of the cache, by layout and form
        self._gathers: dict[str, int] = {}  # bytes of sequences, by form, in the layout seen first
        self._least: dict[str, int] = {}  # bytes that a case takes, by its name, in the best layout so far

    def find(self, trial: Trial) -> Finding:
        """Make the call and judge it. Raises ``LeftOut``."""
        begin = time.perf_counter()
        if trial.layout.huge:
            self._demand(HUGE_BYTES)
        ground = self._below(trial.rests_on)
        if ground is None:
            finding = self._judged(trial)
        else:
            finding = Finding(trial.case.name, trial.layout.name, Verdict.REFUSED, message=ground)
        return replace(finding, probe=trial.probe, seconds=time.perf_counter() - begin)

    def _below(self, trial: Trial | None) -> str | None:
        """Why nothing can be said of what rests on the trial, None if it came out right."""
        if trial is None:
            return None
        if trial not in self._ground:
            name = "baseline" if trial.rests_on is None else ""
            self._ground[trial] = replace(self.find(trial), probe=name)
        found = self._ground[trial]
        if found.message.startswith(NOT_PROBED):
            return found.message
        if found.verdict in (Verdict.OK, Verdict.COPIED):
            return None
        what = found.probe or f"without NaN or garbage in {found.layout}"
        return f"{NOT_PROBED} {what}: {found.verdict.value}: {found.message}"

    def _judged(self, trial: Trial) -> Finding:
        found = Finding(trial.case.name, trial.layout.name, Verdict.OK)
        try:
            inputs = trial.inputs(self.device)
        except torch.OutOfMemoryError:
            raise LeftOut("there is not enough free memory for the cache") from None
        right = self._answers_of(inputs)  # before the call, which may write to the cache
        _leave_stale_memory(self.device)
        try:
            result = self._call(inputs)
        except Exception as failure:  # whatever a kernel raises is its refusal, unless its device is gone
            message = _in_short(failure)
            broken = self._broken()
            if broken:
                return replace(found, verdict=Verdict.CRASHED, message=broken)
            return replace(found, verdict=Verdict.REFUSED, message=message)
        out, lse = result if isinstance(result, tuple) else (result, None)
        if lse is None and trial.of == "lse":
            return replace(found, verdict=Verdict.REFUSED, message="it returns no lse")
        wrong = _lse_complaint(lse, right) if trial.of == "lse" else _complaint(inputs, out, lse, right)
        found = replace(found, error=wrong.error, allowed=wrong.allowed)
        if wrong.complaint:
            first = wrong.complaint.partition("\n")[0]
            return replace(found, verdict=Verdict.WRONG, message=first, where=wrong.where)
        if lse is None and trial.case.lse:
            found = replace(found, message="no lse")
        try:
            copied = self._copied(trial)
        except _DeviceLost as why:
            text = f"right, but with a longer or larger cache of this layout: {why}"
            return replace(found, verdict=Verdict.CRASHED, message=text)
        if copied:
            text = f"memory grew by {copied:,} bytes with the cache"
            return replace(found, verdict=Verdict.COPIED, message=text, copied_bytes=copied)
        return found

    def _answers_of(self, inputs: Inputs) -> Answers:
        """The law, once for all layouts that hold the same values."""
        values, answers = self._answers.get(inputs.case, (None, None))
        if answers is None or values is None or not _same(values, inputs.values):
            answers = Answers(*reference(inputs), *plain(inputs))
            self._answers[inputs.case] = inputs.values, answers
        return answers

    def _call(self, inputs: Inputs) -> Any:
        """What the kernel returns, once it is there."""
        result = self.kernel(**inputs.kwargs)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return result

    def _most_bytes(self, inputs: Inputs) -> int:
        """The most bytes that a call takes of PyTorch's allocator."""
        call = self._prepare(inputs.kwargs)
        if self.device.type != "cuda":
            return peak_bytes(call)
        call()  # what the first call of a shape alone allocates is no part of it
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before

    def _broken(self) -> str:
        """Why the device cannot go on, "" if it can."""
        if self.device.type != "cuda":
            return ""
        try:
            torch.cuda.synchronize(self.device)
            torch.zeros(1, device=self.device).item()
        except RuntimeError as error:
            return _in_short(error)
        return ""

    def _copied(self, trial: Trial) -> int:
        """Bytes of the cache that the kernel copies, as far as its memory grows with the cache; 0 for none.

        A workspace is no copy: memory must grow by half of what K, or V, grows by, when the cache gets many
        more unused blocks, asked once of a layout and a form; or when sequences of 8192 tokens become twice
        as long, asked once of a form, and of every layout in which a call takes more memory than elsewhere.
        """
        key = (trial.layout.name, trial.case.form)
        if key not in self._copies:
            looked_at = trial.case.paged and not trial.layout.huge
            self._copies[key] = self._growth(trial) if looked_at else self._gathers.get(trial.case.form, 0)
        return self._copies[key]

    def _growth(self, trial: Trial) -> int:
        """Bytes by which the kernel's memory grows with the cache, 0 if that is less than a copy takes."""
        case, form = trial.case, trial.case.form
        row = case.num_kv_heads * max(case.d_qk, case.d_v) * case.torch_k_dtype.itemsize
        used = sum(case.seqused_k) * row
        peak = self._peak(trial, case)
        if peak >= used:
            growth = self._peak(trial, case, MORE) - self._peak(trial, case, SOME)
            if growth >= (MORE - SOME) * case.block_size * row / 2:
                return growth
        least = self._least[case.name] = min(peak, self._least.get(case.name, peak))
        if trial.layout.lone or (form in self._gathers and peak - least < used / 2):
            return self._gathers.get(form, 0)
        n = min(2, case.batch)
        tokens = LONG if self.device.type == "cuda" else LONG_ON_CPU // (n * row)
        once, twice = (
            self._peak(trial, replace(case, seqused_k=(length,) * n, q_lens=case.q_lens[:n]))
            for length in (tokens, 2 * tokens)
        )
        growth = twice - once if twice - once >= n * tokens * row / 2 else 0
        self._gathers.setdefault(form, growth)
        return growth

    def _peak(self, trial: Trial, case: Case, spare_blocks: int = 0) -> int:
        inputs = replace(trial, case=case).inputs(self.device, spare_blocks=spare_blocks, guard=False)
        try:
            return self._most_bytes(inputs)
        except Exception as failure:  # it did the case itself, so that this says nothing of copies
            broken = self._broken()
            if broken:
                raise _DeviceLost(broken) from failure
            return 0

    def _demand(self, needed: int) -> None:
        if self.device.type == "cuda" and torch.cuda.mem_get_info(self.device)[0] < needed:
            raise LeftOut(f"layouts beyond 2^31 elements need {needed >> 30} GB of free memory")


def _leave_stale_memory(device: torch.device) -> None:
    """Fill memory with NaN and give it back to the allocator, which hands it out again."""
    held = [torch.empty(size, dtype=torch.uint8, device=device) for size in STALE_BYTES]
    for piece in held:
        piece.fill_(0xFF)


def _in_short(failure: BaseException) -> str:
    """The kind of an exception and the first lines of its message."""
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    return f"{type(failure).__name__}: {' '.join(lines[:3])}"[:300]


def _same(a: Values, b: Values) -> bool:
    return torch.equal(a.k.float(), b.k.float()) and torch.equal(a.v.float(), b.v.float())


def _complaint(inputs: Inputs, out: Any, lse: Any, right: Answers) -> Comparison:
    """What is wrong with a result, and how far ``out`` is from the law."""
    q = inputs.kwargs["q"]
    if not isinstance(out, Tensor) or out.dtype != q.dtype or out.device != q.device:
        kind = f"{out.dtype} on {out.device}" if isinstance(out, Tensor) else type(out).__name__
        return _plainly(f"out is {kind}, q is {q.dtype} on {q.device}")
    if "out" in inputs.kwargs and out.data_ptr() != inputs.kwargs["out"].data_ptr():
        return _plainly("the given out was not returned")
    of_out = compare("out", out, right.plain_out, right.out, q.dtype)
    if of_out.complaint:
        return of_out
    if lse is not None and inputs.case.lse:
        of_lse = _lse_complaint(lse, right)
        if of_lse.complaint:
            return of_lse
    try:
        inputs.assert_untouched()
    except AssertionError as error:
        return _plainly(str(error))
    return of_out


def _lse_complaint(lse: Any, right: Answers) -> Comparison:
    """What is wrong with an lse, and in which convention it would be right."""
    if not isinstance(lse, Tensor) or lse.dtype != torch.float32:
        return _plainly(f"lse is {lse.dtype if isinstance(lse, Tensor) else type(lse).__name__}")
    found = compare("lse", lse, right.plain_lse, right.lse, torch.float32)
    if not found.complaint:
        return found
    for text, candidate in _dialects(lse, right.lse.to(lse.device)):
        if not compare("lse", candidate, right.plain_lse, right.lse, torch.float32).complaint:
            return found._replace(complaint=f"{text}; {found.complaint}")
    return found


def _dialects(lse: Tensor, right: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Conventions that others have, and what an lse in them is in ours."""
    if lse.shape == right.t().shape:
        yield "lse is [total_q, num_q_heads]", lse.t()
    if lse.shape != right.shape:
        return
    finite = lse.masked_fill((right == -torch.inf) & lse.isposinf(), -torch.inf)
    yield "lse of a row without keys is +inf", finite
    yield "lse is a logarithm to base 2", lse * math.log(2)
    yield "lse is a logarithm to base 2, and +inf of a row without keys", finite * math.log(2)


def _plainly(complaint: str) -> Comparison:
    return Comparison(complaint, "", float("nan"), float("nan"))
