"""``anystride check`` and ``python -m anystride.testing``: what they print, store and leave with."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from reports import HOSTILE, KERNELS, PROBE_NAMES, hand_made
from rich.console import Console
from test_cli import ask

from anystride.cli.check_summary import Cell, groups_of, layouts_by_family, probe_cell
from anystride.cli.check_terminal import show_reports
from anystride.peers import PEERS
from anystride.testing import LAYOUTS
from anystride.testing.__main__ import main
from anystride.testing.choice import exit_code, kernels_asked_for, words
from anystride.testing.report import Finding, Report, Verdict, load_reports, save_reports

SMALL = ("--cases", "tiny-gqa", "--layouts", "G2,G16", "--probes", "none", "--device", "cpu")


def shown(reports: list[Report], width: int = 100) -> str:
    """What a terminal without colours shows."""
    console = Console(width=width, force_terminal=False, color_system=None, record=True)
    with console.capture() as capture:
        show_reports(console, reports)
    return capture.get()


def report(*verdicts: Verdict, absent: str = "", message: str = "") -> Report:
    findings = (Finding("a", "G2-vllm-nhd", verdict, message=message) for verdict in verdicts)
    return Report("k", "Kernel", "1.0", "cpu", {"torch": "2.11"}, tuple(findings), absent)


# What a cell and a group say.


@pytest.mark.parametrize(
    ("verdicts", "text", "spoken"),
    [
        ("ok ok", "ok", "2 ok"),
        ("ok refused refused", "ok 1/3", "2 refused, 1 ok"),
        ("refused refused", "refused", "2 refused"),
        ("ok copied refused", "copied 1/3", "1 refused, 1 copied, 1 ok"),
        ("copied WRONG ok", "WRONG 1/3", "1 WRONG, 1 copied, 1 ok"),
        ("WRONG crashed", "crashed 1/2", "1 crashed, 1 WRONG"),
    ],
)
def test_a_cell_shows_the_worst_of_what_was_taken(verdicts: str, text: str, spoken: str) -> None:
    cell = Cell(report(*map(Verdict, verdicts.split())).findings)
    assert (cell.text, cell.spoken) == (text, spoken)


def test_where_nothing_was_asked_there_is_no_cell() -> None:
    assert probe_cell(report(Verdict.OK), "page stride") is None


def test_messages_that_differ_in_numbers_are_one_group() -> None:
    findings = [
        Finding("a", "x", Verdict.REFUSED, "", "stride 12 is odd"),
        Finding("b", "x", Verdict.REFUSED, "NaN tails", "stride 345 is odd"),
        Finding("c", "x", Verdict.REFUSED, "", "no"),
        Finding("d", "x", Verdict.CRASHED, "", "no"),
        Finding("e", "x", Verdict.OK, "", "no"),
    ]
    kernel = replace(report(), findings=tuple(findings))
    refused = groups_of(kernel, Verdict.REFUSED)
    assert [(g.message, g.alike, [f.case for f in g.findings]) for g in refused] == [
        ("stride 345 is odd", True, ["b", "a"]),  # the probe first
        ("no", False, ["c"]),
    ]
    both = groups_of(kernel, Verdict.REFUSED, Verdict.CRASHED)
    assert [g.verdict for g in both] == [Verdict.CRASHED, Verdict.REFUSED, Verdict.REFUSED]


def test_layouts_stand_in_the_order_of_the_catalogue() -> None:
    found = [Finding("a", name, Verdict.OK) for name in ("mine", *reversed(LAYOUTS))]
    probed = Finding("a", "only probed", Verdict.OK, "NaN tails")
    families = layouts_by_family([replace(report(), findings=(*found, probed))])
    assert list(families) == ["gqa", "mla", "adversarial", "other"]
    assert [name for names in families.values() for name in names] == [*LAYOUTS, "mine"]


# The terminal.


def test_the_terminal_shows_everything_in_100_columns_without_colour() -> None:
    text = shown(hand_made())
    assert max(map(len, text.splitlines())) <= 100
    assert "\x1b" not in text
    told = " ".join(text.split())
    for word in (*PROBE_NAMES, *LAYOUTS, *(word for _, title in KERNELS for word in title.split())):
        assert word in told
    assert "A peer that is absent: the package <absent> is not installed; pip install absent" in told
    assert "out[3, 5, 17]: got nan, right 0.12 error 7.00e-01, allowed 8.00e-03" in told
    assert "Not tried A-huge-blocks: <8 GB> are not free: hopper, triton, FlashMLA, " in told
    assert " ".join(HOSTILE.split()) in told  # no markup is taken from a message


def test_a_row_of_the_terminal_has_the_verdicts_of_all_kernels() -> None:
    reports = hand_made()
    text = shown(reports, width=100)
    for probe in PROBE_NAMES:
        cells = [probe_cell(kernel, probe) for kernel in reports]
        expected = [cell.text for cell in cells if cell]
        rows = re.findall(rf"^{re.escape(probe)}  +(.*)$", text, re.MULTILINE)
        assert len(rows) > 1  # the kernels do not fit into one table
        assert [cell for row in rows for cell in re.split(r"\s{2,}", row.strip())] == expected


def test_a_wide_terminal_has_one_table_a_kind() -> None:
    text = shown(hand_made(), width=300)
    assert "continued" not in text
    assert "continued" in shown(hand_made(), width=100)


# What is asked for, and what it leaves with.


def test_names_of_kernels() -> None:
    peers = [peer.name for peer in PEERS]
    assert kernels_asked_for([], "cpu") == ["cpu"]
    assert kernels_asked_for([], "cuda") == ["hopper", "triton"]
    assert kernels_asked_for([], "xpu") == ["triton"]
    assert kernels_asked_for(["all", "cpu"], "cuda") == ["hopper", "triton", *peers, "cpu"]
    assert kernels_asked_for(["reference", "my.kernels:decode"], "cpu") == ["reference", "my.kernels:decode"]
    with pytest.raises(ValueError, match="there is no kernel 'hoper'; there are hopper, triton, cpu"):
        kernels_asked_for(["hoper"], "cuda")


def test_words() -> None:
    assert words("") is None
    assert words("none") == []
    assert words("NaN tails, page stride") == ["NaN tails", "page stride"]


@pytest.mark.parametrize(
    ("reports", "code"),
    [
        ([report(Verdict.OK)], 0),
        ([report(Verdict.OK, Verdict.REFUSED, Verdict.COPIED)], 0),
        ([report(Verdict.REFUSED)], 0),
        ([report(Verdict.OK), report(absent="not installed")], 0),
        ([report(Verdict.OK), report(Verdict.OK, Verdict.WRONG)], 1),
        ([report(Verdict.CRASHED)], 1),
        ([report(absent="not installed")], 2),
        ([report()], 2),
        ([], 2),
    ],
)
def test_the_exit_code(tmp_path: Path, reports: list[Report], code: int) -> None:
    assert exit_code(reports) == code
    stored = tmp_path / "reports.json"
    save_reports(stored, reports)
    assert ask("check", "--from", str(stored))[0] == code


def test_stored_reports_are_shown_again_together(tmp_path: Path) -> None:
    first, second, both = tmp_path / "1.json", tmp_path / "2.json", tmp_path / "new" / "both.json"
    save_reports(first, hand_made()[:3])
    save_reports(second, hand_made()[3:])
    made = tmp_path / "new" / "page.html"
    code, text = ask(
        "check", "--from", str(first), "--from", str(second), "--json", str(both), "--html", str(made)
    )
    assert code == 1
    assert load_reports(both) == hand_made()
    assert all(title in made.read_text() for _, title in KERNELS)
    assert f"reports {both.resolve()} page {made.resolve()}" in text
    assert "FlashMLA" in text


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("hoper",), "there is no kernel 'hoper'; there are hopper,"),
        (("--layouts", "G99"), "there is no layout 'G99'"),
        (("--cases", "deepsek-v3-h16"), "near: deepseek-v3-h16"),
        (("--probes", "page strid"), "near: page stride"),
        (("--device", "nowhere"), "'nowhere' cannot be used"),
        (("--from", "nowhere.json"), "no reports are stored there"),
        (("cpu", "--from", "x.json"), "shows what is stored and runs no kernel"),
    ],
)
def test_what_cannot_be_asked_is_told(arguments: tuple[str, ...], told: str) -> None:
    code, text = ask("check", *arguments)
    assert code == 2
    assert told in text


# A run.


def test_a_small_check_runs_and_is_stored(tmp_path: Path) -> None:
    stored, made = tmp_path / "r.json", tmp_path / "r.html"
    code, text = ask("check", "cpu", *SMALL, "--no-isolation", "--json", str(stored), "--html", str(made))
    assert code == 0
    (found,) = load_reports(stored)
    assert [(f.case, f.layout, f.verdict) for f in found.findings] == [
        (SMALL[1], "G2-vllm-nhd", Verdict.OK),
        (SMALL[1], "G16-sglang-pool", Verdict.OK),
    ]
    assert "G16-sglang-pool ok" in text
    assert 'id="layout-G16-sglang-pool"' in made.read_text()


def test_a_bare_machine_checks_with_torch_alone(tmp_path: Path) -> None:
    stored = tmp_path / "r.json"
    code = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("rich", "typer", "matplotlib"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
from anystride.testing.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
    asked = ["cpu", *SMALL, "--no-isolation", "--json", str(stored)]
    done = subprocess.run([sys.executable, "-c", code, *asked], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "cpu: 2 ok\n"
    assert len(load_reports(stored)[0].findings) == 2


def test_a_bare_machine_is_told_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["test_check:wrong", *SMALL, "--no-isolation"]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"test_check:wrong: WRONG:  {SMALL[1]} in G2-vllm-nhd: ")
    assert printed[-1] == "test_check:wrong: 2 WRONG"
    with pytest.raises(SystemExit):
        main(["hoper"])
    assert "there is no kernel 'hoper'" in capsys.readouterr().err


def wrong(**arguments: object) -> object:
    """A kernel that answers 1 everywhere."""
    import torch

    q, v = arguments["q"], arguments["v"]
    assert isinstance(q, torch.Tensor)
    assert isinstance(v, torch.Tensor)
    out = torch.ones(*q.shape[:2], v.shape[-1], dtype=q.dtype, device=q.device)
    lse = torch.zeros(q.shape[1], q.shape[0], device=q.device)
    return (out, lse) if arguments.get("return_softmax_lse") else out
