"""A trial of the kit: what it blames, what it does not, and what its process survives.

The kernels here are the back end ``cpu`` with its arguments changed on the way: as a kernel sees them that
takes something for granted.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from anystride import flash_attn_varlen_func
from anystride.testing import Inputs, find_case, find_layout
from anystride.testing.child import Child
from anystride.testing.conformance import check, trials
from anystride.testing.judgement import reference
from anystride.testing.probes import GQA, MLA, PROBES
from anystride.testing.report import Report, Verdict
from anystride.testing.trial import LONG_ON_CPU, Trial, Trials

CPU = torch.device("cpu")


def right(**kwargs: Any) -> Any:
    return flash_attn_varlen_func(**kwargs, backend="cpu")


def with_strides(view: Tensor, change: Callable[[list[int], list[int]], list[int]]) -> Tensor:
    """K or V as a kernel sees it that computes a stride; where that leads out of memory, the first rows."""
    strides = change(list(view.shape), list(view.stride()))
    size, room = list(view.shape), view.untyped_storage().nbytes() // view.itemsize - view.storage_offset()
    if 1 + sum((n - 1) * s for n, s in zip(size, strides, strict=True)) > room:
        strides[0] = 0
    return view.as_strided(size, strides)


def packed(axis: int) -> Callable[..., Any]:
    """A kernel that takes one stride for packed: page 0, token 1, head 2, element 3."""

    def change(size: list[int], stride: list[int]) -> list[int]:
        stride[axis] = int(torch.tensor(size[axis + 1 :], dtype=torch.int64).prod())
        return stride

    def kernel(**kwargs: Any) -> Any:
        if kwargs["k"].dim() != 4:
            raise NotImplementedError("pages of several blocks")
        return right(**kwargs | {name: with_strides(kwargs[name], change) for name in "kv"})

    return kernel


def sees_whole_blocks(**kwargs: Any) -> Any:
    size = kwargs["k"].shape[-3]
    lengths = (kwargs["seqused_k"] + size - 1) // size * size
    table = kwargs["block_table"]
    room = table.shape[1] * size
    return right(**kwargs | {"seqused_k": lengths, "max_seqlen_k": room})


def gathers_unless_packed(**kwargs: Any) -> Any:
    """Copies the rows that are needed, but only where a layout is not the one that it was made for."""
    k, v, table = kwargs["k"], kwargs["v"], kwargs["block_table"].long()
    if k.dim() != 4 or k.stride(0) == k[0].numel():
        return right(**kwargs)
    used = table.clamp(0, k.shape[0] - 1)
    ids = torch.arange(used.numel(), dtype=torch.int32).view(used.shape)
    return right(**kwargs | {"k": k[used.flatten()], "v": v[used.flatten()], "block_table": ids})


def wrong_of_everything(**kwargs: Any) -> Any:
    return torch.zeros_like(kwargs["q"][..., : kwargs["v"].shape[-1]]), None


def writes_rows_of_no_sequence(**kwargs: Any) -> Any:
    result = right(**kwargs)
    out = result[0] if isinstance(result, tuple) else result
    out[int(kwargs["cu_seqlens_q"][-1]) :] = 0
    return result


def leaves_empty_rows(**kwargs: Any) -> Any:
    given = kwargs.pop("out", None)
    result = right(**kwargs)
    if given is None:
        return result
    rows = kwargs["seqused_k"].bool().nonzero()[:, 0]
    if len(kwargs["seqused_k"]) != result.shape[0]:
        raise NotImplementedError("one query token of each sequence")
    given[rows] = result[rows]
    return given


def dies_of_tame_heads(**kwargs: Any) -> Any:
    if kwargs["q"].shape[1] in (GQA.num_q_heads, MLA.num_q_heads):
        os.kill(os.getpid(), signal.SIGSEGV)
    return right(**kwargs)


def of_gqa(kernel: Callable[..., Any], probes: list[str] | None = None) -> dict[str, set[str]]:
    """The columns of the family with K and V of their own, by the verdict that they come to."""
    run = Trials(kernel, CPU)
    chosen = [trial for trial in trials([], [], probes) if trial.case.form == "kv"]
    found = tuple(run.find(trial) for trial in chosen if not trial.layout.huge)
    report = Report("", "", "", "", findings=found)
    columns: dict[str, set[str]] = {}
    for probe in PROBES:
        worst = report.worst(probe=probe.name)
        if worst is not None:
            columns.setdefault(worst.verdict.value, set()).add(probe.name)
    return columns


def test_a_stride_that_is_taken_for_packed_is_blamed_on_that_axis_alone() -> None:
    strides = ["page stride", "token stride", "head stride", "last-dim stride"]
    for axis, name in enumerate(strides):
        bad = {name}
        if name == "head stride":  # nor can the elements of a row be apart where heads are packed
            bad.add("last-dim stride")
        assert of_gqa(packed(axis), strides)["WRONG"] == bad


def test_scores_of_the_tail_are_blamed_on_lengths_and_on_nothing_else() -> None:
    columns = of_gqa(sees_whole_blocks)
    # Four queries over two keys have a block that is not full, as they must.
    assert columns["WRONG"] == {"uneven lengths", "several query tokens"}
    # What has a tail rests on the same call without poison, which is wrong already.
    assert columns["refused"] == {"NaN tails", "NaN null block", "garbage ids past the end"}


def test_nothing_is_claimed_where_the_tame_call_fails() -> None:
    columns = of_gqa(wrong_of_everything)
    assert columns["WRONG"] == {"baseline"}
    assert set(columns) == {"WRONG", "refused"}
    found = Trials(wrong_of_everything, CPU).find(one_of("NaN in gaps"))
    assert found.message.startswith("not probed: baseline: WRONG: out: ")


def one_of(probe: str) -> Trial:
    return next(trial for trial in trials([], [], [probe]) if trial.case.form == "kv")


def test_rows_of_no_sequence_that_are_written_are_seen() -> None:
    assert of_gqa(writes_rows_of_no_sequence)["WRONG"] == {"padded graph rows"}


def test_an_empty_row_of_a_given_out_that_is_left_is_seen() -> None:
    assert "stale output" in of_gqa(leaves_empty_rows)["WRONG"]


def test_a_layout_that_alone_is_gathered_is_copied() -> None:
    run = Trials(gathers_unless_packed, CPU)
    assert run.find(one_of("baseline")).verdict is Verdict.OK
    found = run.find(one_of("page stride"))
    assert found.verdict is Verdict.COPIED
    assert found.copied_bytes >= LONG_ON_CPU  # K, and V as well
    # And of the whole run: what is packed stays right, so that the layout is what is blamed.
    assert run.find(one_of("sliced block table")).verdict is Verdict.OK


def test_a_device_that_the_search_for_copies_loses_is_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails_of_length(**kwargs: Any) -> Any:
        if kwargs["max_seqlen_k"] > 1000:
            raise RuntimeError("CUDA error")
        return right(**kwargs)

    found = Trials(fails_of_length, CPU).find(one_of("baseline"))
    assert found.verdict is Verdict.OK  # where the device lives on it says nothing
    monkeypatch.setattr(Trials, "_broken", lambda self: "CUDA error: an illegal memory access")
    found = Trials(fails_of_length, CPU).find(one_of("baseline"))
    assert found.verdict is Verdict.CRASHED
    assert found.message.startswith("right, but with a longer")


def test_the_law_is_asked_once_for_all_layouts_with_the_same_values(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def counted(inputs: Inputs) -> tuple[Tensor, Tensor]:
        asked.append(inputs.layout.name)
        return reference(inputs)

    monkeypatch.setattr("anystride.testing.trial.reference", counted)
    run, case = Trials(right, CPU), find_case("tiny-gqa")
    for name in ("G1", "G2", "A-expanded-heads", "G3"):  # in the third all heads hold the same values
        assert run.find(Trial(case, find_layout(name))).verdict is Verdict.OK
    assert asked == ["G1-kv-outermost", "A-expanded-heads", "G3-vllm-hnd"]


def test_a_lone_stride_is_not_packed_and_all_others_are() -> None:
    for probe, axis in (("token stride", 1), ("head stride", 2)):
        (trial, *_) = (one for one in trials([], [], [probe]) if one.case.form == "kv")
        k = trial.inputs(CPU).kwargs["k"]
        plain = torch.empty(k.shape).stride()
        assert [a for a in range(4) if k.stride(a) != plain[a]] == [axis]


def test_a_crash_of_the_tame_call_is_a_crash_of_each_trial_and_the_run_goes_on() -> None:
    report = check(dies_of_tame_heads, ["tiny-gqa"], ["G2"], probes=["sliced block table"])
    verdicts = [(found.probe, found.verdict) for found in report.findings]
    assert verdicts == [("sliced block table", Verdict.CRASHED)] * 2 + [("", Verdict.OK)]
    assert all("SIGSEGV" in found.message for found in report.findings[:2])


def test_a_process_that_dies_before_it_reads_a_trial_is_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    child, trial = Child("cpu", CPU, 300.0, None), Trial(find_case("tiny-gqa"), find_layout("G2"))
    try:
        child._process.kill()
        child._process.join()
        with monkeypatch.context() as patch:
            patch.setattr(child._process, "is_alive", lambda: True)  # as it was a moment ago
            found = child.find(trial)
        assert (found.verdict, found.message) == (Verdict.CRASHED, "the process died of SIGKILL")
        assert child.find(trial).verdict is Verdict.OK
    finally:
        child.close()


def test_a_program_without_a_guard_is_not_run_once_more(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "from anystride.testing.conformance import check\n"
        "print(check('cpu', [], [], probes=['baseline']).findings[0].verdict.value)\n"
    )
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, check=False)
    assert done.stdout == "ok\n", done.stderr


def test_an_unknown_name_is_said_at_once_with_all_that_there_are() -> None:
    with pytest.raises(KeyError, match=r"no kernel 'hoper': back ends are hopper, .* peers are flash-mla"):
        check("hoper")


def test_the_command_finds_a_kernel_in_the_folder_where_it_is_given(tmp_path: Path) -> None:
    (tmp_path / "my_kernels.py").write_text(
        "import anystride\n"
        "def decode(**kwargs):\n"
        "    return anystride.flash_attn_varlen_func(**kwargs, backend='cpu')\n"
    )
    command = tmp_path / "bin" / "anystride"  # as pip makes it: its own folder is what Python looks into
    command.parent.mkdir()
    command.write_text("from anystride.cli import app\napp()\n")
    asked = ["check", "my_kernels:decode", "--layouts", "none", "--probes", "baseline"]
    done = subprocess.run(
        [sys.executable, str(command), *asked], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
