"""Time every kernel on a row: checked first, then in turn."""

from __future__ import annotations

import datetime
import functools
import subprocess
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import anystride
from anystride.bench import store
from anystride.bench.clock import ROUNDS, Clock
from anystride.bench.cost import bytes_to_move, operations
from anystride.bench.gate import gate_for
from anystride.bench.lines import COPY, OURS, PLAIN_COPY, PURE_READ, Line
from anystride.bench.suites import Row
from anystride.collect_env import processor, version_of
from anystride.peers import PEERS, Absent, Peer, Refused
from anystride.peers.calls import rows_off_16_bytes
from anystride.peers.folder import VLLM_VERSION
from anystride.plan import SCHEDULED
from anystride.testing import Inputs, make_inputs
from anystride.testing.choice import BACK_ENDS

__all__ = ["Bench", "Kernel", "commit", "device_type", "kernels"]

GATHERED = "gathered-sdpa"  # the yardstick on CPUs; on a GPU its loop over sequences says nothing

Call = Callable[[], Any]


@dataclass(frozen=True)
class Kernel:
    """Somebody's kernel, as it stands in tables."""

    title: str
    version: str
    prepare: Callable[[Inputs], Call]


def _ours(inputs: Inputs, backend: str) -> Call:
    """Our call, with a schedule that is made once and shared, as by the layers of a model."""
    kwargs, case = dict(inputs.kwargs), inputs.case
    if backend in SCHEDULED and case.paged and not case.batch_invariant:
        kwargs["scheduler_metadata"] = anystride.get_scheduler_metadata(
            case.batch, kwargs["max_seqlen_q"], kwargs["max_seqlen_k"], case.num_q_heads, case.num_kv_heads,
            case.d_qk, kwargs["seqused_k"], case.torch_dtype, case.d_v, kwargs["cu_seqlens_q"],
            causal=case.causal, window_size=case.window,
        )  # fmt: skip
    return functools.partial(anystride.flash_attn_varlen_func, **kwargs, backend=backend)


def _of_peer(inputs: Inputs, peer: Peer) -> Call:
    if peer.crashes_off_16_bytes and any(rows_off_16_bytes(inputs.kwargs[name]) for name in "kv"):
        raise Refused("by this benchmark: rows off 16 bytes, on which it loses the device (docs/repro)")
    return peer.prepare(inputs.kwargs)


def kernels(
    backends: Sequence[str], device: torch.device, folder: Path | None, without: Collection[str] = ()
) -> tuple[list[Kernel], dict[str, str]]:
    """Our back ends and every peer that is there.

    Args:
        backends: Names of ours.
        device: Where they run: peers other than the gathered one need a GPU.
        folder: Of the peers that are not installed.
        without: Names of peers to leave out.

    Returns:
        The kernels, and why the other peers are absent, by name.
    """
    found = [
        Kernel(f"{OURS} {name}", anystride.__version__, functools.partial(_ours, backend=name))
        for name in backends
    ]
    absent = {}
    for peer in PEERS:
        if (peer.name == GATHERED) == (device.type == "cuda"):
            continue
        if peer.name in without:
            absent[peer.name] = "left out"
            continue
        try:
            found.append(Kernel(peer.title, peer.load(folder), functools.partial(_of_peer, peer=peer)))
        except Absent as why:
            absent[peer.name] = str(why)
    return found, absent


def commit() -> str:
    """The commit that runs, as far as git can tell."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def device_type(suite: str) -> str:
    """The kind of device that a suite is timed on."""
    return "cpu" if suite == "cpu" else "cuda"


def _facts(clock: Clock, of_commit: str) -> Line:
    """A line without a measurement: the machine, the versions, and the ceilings of this process."""
    device, tops = clock.device, clock.ceilings()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{processor()}, {torch.get_num_threads()} threads"
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return Line(
        suite="", case="", layout="", kernel="", version="", median_us=None, q1_us=None, q3_us=None,
        samples=0, host_us=None, bytes=0, flop=0, note="", read=tops["read"], product=tops["product"],
        cold=clock.is_cold, device=name, torch=torch.__version__, triton=version_of("triton"),
        anystride=anystride.__version__, commit=of_commit, date=date,
    )  # fmt: skip


@dataclass
class _Found:
    """What became of the kernels on a row: calls that are right, and notes about the others."""

    calls: dict[str, Call] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def try_one(self, title: str, make: Callable[[], Call], fault: Callable[[Call], str], cuda: bool) -> None:
        """Make a call and look at what it does."""
        try:
            call = make()
            self.notes[title] = fault(call)
        except torch.OutOfMemoryError as failure:
            self.notes[title] = f"out of memory: {_first_line(failure)}"
        except Exception as failure:  # a refusal, in its own words
            if cuda:
                torch.cuda.synchronize()  # fails again if the device is lost: then nothing more can be timed
            self.notes[title] = f"refused: {_first_line(failure)}"
        if not self.notes[title]:
            self.calls[title] = call


def _first_line(failure: Exception) -> str:
    lines = str(failure).splitlines() or [type(failure).__name__]
    return lines[0][:200]


class Bench:
    """Our back ends and the peers on one device, its clock, and its ceilings, which are measured first.

    Args:
        device: Where everything runs.
        backends: Names of ours; none for the usual ones of the device.
        peers: The folder of peers that are not installed.
        without: Names of peers to leave out.
        hot: Leave the L2 cache as the call before left it.
        rounds: Turns of each kernel.
        of_commit: What runs; "" where git can tell.

    Attributes:
        facts: What all lines of the run share.
        absent: Why a peer is not here, by name.
    """

    def __init__(
        self,
        device: torch.device,
        backends: Sequence[str] = (),
        peers: Path | None = None,
        without: Collection[str] = (),
        hot: bool = False,
        rounds: int = ROUNDS,
        of_commit: str = "",
    ) -> None:
        self._folder = peers
        self._backends = backends or BACK_ENDS[device.type]
        self._kernels, self.absent = kernels(self._backends, device, peers, without)
        self._clock = Clock(device, hot, rounds)
        self.facts = _facts(self._clock, of_commit or commit())

    def measure(self, row: Row | store.Row) -> list[Line]:
        """Check and time the kernels on a row.

        Args:
            row: What is called.

        Returns:
            A line a kernel, ours first, then the peers, then the yardsticks. Who refused, or was wrong, has
            a note and no time.
        """
        lines = self._attend(row) if isinstance(row, Row) else self._store(row)
        if self._clock.device.type == "cuda":
            torch.cuda.empty_cache()
        return lines

    def _attend(self, row: Row) -> list[Line]:
        case, cuda = replace(row.case, lse=False), self._clock.device.type == "cuda"
        inputs = make_inputs(case, row.layout, self._clock.device, guard=False)
        complaint = gate_for(inputs)

        def fault(call: Call) -> str:
            result = call()
            return complaint(result[0] if isinstance(result, tuple) else result)

        found = _Found()
        for kernel in self._kernels:
            found.try_one(kernel.title, functools.partial(kernel.prepare, inputs), fault, cuda)
        moved = bytes_to_move(case, inputs.storage)
        yardsticks: dict[str, tuple[Call, int]] = {}
        if cuda:
            data = torch.zeros(max(1, moved // 8), dtype=torch.int64, device=self._clock.device)
            yardsticks[PURE_READ] = data.max, moved
        if row.suite == "layouts" and not row.is_packed:
            yardsticks[COPY] = _copy(inputs)
        versions = {kernel.title: kernel.version for kernel in self._kernels}
        base = replace(
            self.facts, suite=row.suite, case=case.name, layout=row.layout.name, bytes=moved,
            flop=operations(case),
        )  # fmt: skip
        return self._time(base, found, versions, yardsticks)

    def _store(self, row: store.Row) -> list[Line]:
        found, versions = _Found(), {store.VLLM: f"of vLLM {VLLM_VERSION}"}
        case = None
        for backend in [name for name in self._backends if name != "hopper"]:  # it has no store of its own
            case = store.build(row, self._clock.device, backend, self._folder)
            for title, make in case.makers.items():
                if title in found.notes:
                    continue
                exact = title != store.VLLM
                fault = functools.partial(store.fault_of, case, exact=exact)
                found.try_one(title, make, fault, self._clock.device.type == "cuda")
                if title.startswith(OURS):
                    versions[title] = anystride.__version__
                elif exact:
                    versions[title] = torch.__version__
        if case is None:
            return []
        moved = store.bytes_to_move(case)
        base = replace(self.facts, suite="store", case=row.name, layout=row.layout, bytes=moved)
        return self._time(base, found, versions, {PLAIN_COPY: (store.plain_copy(case), moved)})

    def _time(
        self,
        base: Line,
        found: _Found,
        versions: Mapping[str, str],
        yardsticks: Mapping[str, tuple[Call, int]],
    ) -> list[Line]:
        """Let everybody who is right take turns with the yardsticks."""
        spreads = self._clock.turns(found.calls | {name: call for name, (call, _) in yardsticks.items()})
        lines = []
        for title in (*found.notes, *yardsticks):
            line = replace(
                base, kernel=title, version=versions.get(title, ""), note=found.notes.get(title, "")
            )
            if title in yardsticks:
                line = replace(line, version=torch.__version__, bytes=yardsticks[title][1], flop=0)
            spread = spreads.get(title)
            if spread is not None:
                call = found.calls.get(title)
                line = replace(
                    line, median_us=spread.median, q1_us=spread.q1, q3_us=spread.q3, samples=spread.samples,
                    host_us=None if call is None else self._clock.host(call, spread.median),
                )  # fmt: skip
            lines.append(line)
        return lines


def _copy(inputs: Inputs) -> tuple[Call, int]:
    """Copy as many blocks as are in use into packed tensors; and its bytes, read and written.

    One block after the other, in one go: the least that such a copy can cost. In a cache whose V lies in K's
    row the row is copied once.
    """
    case = inputs.case
    views: list[Tensor] = [inputs.kwargs["k"]]
    if inputs.layout.relation(inputs.storage.shape).kind != "v_in_k":
        views.append(inputs.kwargs["v"])
    used = sum(-(-length // case.block_size) for length in inputs.lengths)
    pages = -(-used // case.blocks_per_page)
    sources = [view[:pages] for view in views]
    packed = [torch.empty(view.shape, dtype=view.dtype, device=view.device) for view in sources]

    def copy() -> list[Tensor]:
        return [target.copy_(view) for target, view in zip(packed, sources, strict=True)]

    return copy, 2 * sum(target.numel() * target.itemsize for target in packed)
