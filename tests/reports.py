"""Hand-made reports of the kit: all verdicts, all layouts, a dozen kernels, and messages that do harm."""

from __future__ import annotations

from itertools import count

from anystride.testing import LAYOUTS
from anystride.testing.probes import PROBES
from anystride.testing.report import Finding, Report, Verdict

PROBE_NAMES = tuple(probe.name for probe in PROBES)
CASES = {"gqa": ("llama-3-8b", "qwen-3-moe"), "mla": ("deepseek-v3-h16", "kimi-linear")}
KERNELS = (
    ("hopper", "hopper"), ("triton", "triton"), ("flash-mla", "FlashMLA"), ("fa3", "FlashAttention 3"),
    ("flashinfer-fa2", "FlashInfer fa2"), ("flashinfer-fa3", "FlashInfer fa3"),
    ("flashinfer-decode", "FlashInfer decode wrapper"), ("vllm-triton-unified", "vLLM Triton unified"),
    ("vllm-triton-mla", "vLLM Triton MLA"), ("flex", "PyTorch FlexAttention"), ("mine:kernel", "mine:kernel"),
)  # fmt: skip
HOSTILE = "<script>document.title = 'taken over'</script> & \"quoted\" [bold]no markup[/bold]\n</script><b>x"
LEFT_OUT = ("A-huge-blocks: <8 GB> are not free",)
VERSIONS = {"anystride": "0.6.0", "torch": "2.11.0+cu130", "triton": "3.6.0", "CUDA": "13.0"}


def hand_made() -> list[Report]:
    """A dozen reports in which nothing was measured: verdicts go by a fixed pattern."""
    reports = [_report(number, name, title) for number, (name, title) in enumerate(KERNELS)]
    absent = "the package <absent> is not installed; pip install absent"
    return [*reports, Report("gone", "A peer that is absent", "", "", absent=absent)]


def _report(number: int, name: str, title: str) -> Report:
    turn = count(number)
    findings = []
    for probe in PROBE_NAMES:
        for family in CASES:
            findings.append(_finding(number, next(turn), f"probe-{family}", "packed", probe))
    for layout in LAYOUTS.values():
        for family, cases in CASES.items():
            if layout.family in (family, "both"):
                for case in cases:
                    findings.append(_finding(number, next(turn), case, layout.name, ""))
    return Report(
        name, title, "1.2.3" if number else "", "NVIDIA H200", VERSIONS, tuple(findings), left_out=LEFT_OUT
    )


def _finding(number: int, turn: int, case: str, layout: str, probe: str) -> Finding:
    """The first two kernels are always right; of the others some know no GQA or no MLA, and all err."""
    no_gqa, no_mla = number in (2, 8), number in (3, 4, 6)
    if (no_gqa and case in ("probe-gqa", *CASES["gqa"])) or (no_mla and case in ("probe-mla", *CASES["mla"])):
        return Finding(case, layout, Verdict.REFUSED, probe, "NotImplementedError: <d_qk> is not supported")
    if number < 2 or (turn * 7 + number) % 13 > 2:
        return Finding(case, layout, Verdict.OK, probe, "", "", 3.1e-3, 8.2e-3, 0, 0.2)
    verdict = list(Verdict)[1 + (turn // 3 + number) % 4]
    if verdict is Verdict.COPIED:
        return Finding(case, layout, verdict, probe, "", "", 2.5e-3, 8.2e-3, 4_718_592, 0.3)
    if verdict is Verdict.REFUSED:
        message = f"RuntimeError: page stride {1000 + turn} is no multiple of the token stride"
        return Finding(case, layout, verdict, probe, HOSTILE if number == 10 else message)
    if verdict is Verdict.WRONG:
        message = HOSTILE if number == 10 else "reads outside the view"
        return Finding(case, layout, verdict, probe, message, "out[3, 5, 17]: got nan, right 0.12", 0.7, 8e-3)
    return Finding(case, layout, verdict, probe, "SIGSEGV: the process died", seconds=1.5)
