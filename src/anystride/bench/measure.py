"""Time every kernel on a row: checked first, then in turn."""

from __future__ import annotations

import datetime
import functools
import subprocess
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import anystride
from anystride.bench.clock import Clock, Spread
from anystride.bench.cost import bytes_to_move, operations
from anystride.bench.gate import gate_for
from anystride.bench.lines import Line
from anystride.bench.suites import Row
from anystride.peers import PEERS, Absent, Peer
from anystride.plan import SCHEDULED
from anystride.testing import Inputs, make_inputs

__all__ = ["COPY", "PURE_READ", "Kernel", "commit", "facts_of", "kernels", "measure"]

PURE_READ = "pure read"  # PyTorch's x.max() over as many bytes: a yardstick of this method, and no peer
COPY = "copy into packed"  # what a kernel needs first that reads packed caches alone
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
        Kernel(f"anystride {name}", anystride.__version__, functools.partial(_ours, backend=name))
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


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def commit() -> str:
    """The commit that runs, as far as git can tell."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def facts_of(clock: Clock, cold: bool, of_commit: str) -> Line:
    """A line without a measurement: the machine, the versions, and the ceilings of this process."""
    device, tops = clock.device, clock.ceilings()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return Line(
        "", "", "", "", "", None, None, None, 0, None, 0, 0, "", tops["read"], tops["product"], cold, name,
        torch.__version__, _version_of("triton"), anystride.__version__, of_commit, date,
    )  # fmt: skip


def measure(row: Row, asked: Sequence[Kernel], clock: Clock, facts: Line) -> Iterator[Line]:
    """Check and time the kernels on a row; ours first, as asked, then the yardsticks.

    Args:
        row: What is called.
        asked: Who is called.
        clock: Of the device.
        facts: What all lines of the run share.

    Yields:
        A line a kernel. Who refused, or was wrong, has a note and no time.
    """
    case = replace(row.case, lse=False)
    inputs = make_inputs(case, row.layout, clock.device, guard=False)
    complaint = gate_for(inputs)
    moved, done = bytes_to_move(case), operations(case)
    base = replace(facts, suite=row.suite, case=row.case.name, layout=row.layout.name, bytes=moved, flop=done)
    calls: dict[str, Call] = {}
    notes: dict[str, str] = {}
    for kernel in asked:
        try:
            call = kernel.prepare(inputs)
            result = call()
            notes[kernel.title] = complaint(result[0] if isinstance(result, tuple) else result)
        except Exception as failure:  # a refusal, in its own words
            lines = str(failure).splitlines() or [type(failure).__name__]
            notes[kernel.title] = f"refused: {lines[0][:100]}"
        if not notes[kernel.title]:
            calls[kernel.title] = call
    host = {title: clock.host(call) for title, call in calls.items()}
    if clock.device.type == "cuda":
        data = torch.zeros(max(1, moved // 8), dtype=torch.int64, device=clock.device)
        calls[PURE_READ] = data.max
    if row.suite == "layouts" and not row.is_packed:
        calls[COPY] = _copy(inputs)
    spreads = clock.turns(calls)
    versions = {kernel.title: kernel.version for kernel in asked}
    for title in dict.fromkeys((*versions, *calls)):
        spread: Spread | None = spreads.get(title)
        line = replace(base, kernel=title, version=versions.get(title, ""), note=notes.get(title, ""))
        if spread is not None:
            waits = host.get(title)
            line = replace(
                line, median_us=spread.median, q1_us=spread.q1, q3_us=spread.q3, samples=spread.samples,
                host_us=waits if waits is not None and waits > 0 else None,
            )  # fmt: skip
        yield line


def _copy(inputs: Inputs) -> Call:
    """Copy K, and V where it lies elsewhere, into packed tensors: one layer, used blocks and others."""
    views = [inputs.kwargs["k"]]
    if inputs.case.form != "row":
        views.append(inputs.kwargs["v"])
    packed = [torch.empty(view.shape, dtype=view.dtype, device=view.device) for view in views]

    def copy() -> list[Tensor]:
        return [target.copy_(view) for target, view in zip(packed, views, strict=True)]

    return copy
