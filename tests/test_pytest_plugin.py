"""The kit inside pytest: what passes, fails and is skipped; and nothing at all when it is not asked for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KERNELS = """
import os, signal
from anystride import flash_attn_varlen_func

def right(**kwargs):
    return flash_attn_varlen_func(**kwargs, backend="cpu")

def mla_only(**kwargs):
    if kwargs["k"].shape[-1] != 576:
        raise NotImplementedError("a row of 576, please")
    return right(**kwargs)

def copies(**kwargs):
    ints = {"k": kwargs["k"].contiguous()}
    return right(**kwargs | ints) if kwargs["k"].shape[-1] == 128 else mla_only(**kwargs)

def dies_of_queries(**kwargs):
    if kwargs["max_seqlen_q"] > 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    return right(**kwargs)

def causal_from_the_top(**kwargs):
    return right(**kwargs | {"causal": kwargs["causal"] and kwargs["max_seqlen_q"] == 1})
"""


def pytest_of(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest as another project calls it, in a folder with a file of kernels and no file of tests."""
    (folder / "my_kernels.py").write_text(KERNELS)
    command = [sys.executable, "-m", "pytest", "-p", "pytest_anystride", "-p", "no:cacheprovider", "-rA"]
    return subprocess.run(
        [*command, *arguments], cwd=folder, capture_output=True, text=True, check=False, env=os.environ
    )


def outcomes(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """What became of each test, by its name."""
    found = re.findall(r"^(PASSED|FAILED|SKIPPED|ERROR) (.*)$", done.stdout, re.MULTILINE)
    return {name.partition(" - ")[0].rpartition("::")[2]: what for what, name in found}


def test_a_right_kernel_passes_a_test_for_each_probe_and_for_each_case_in_each_layout(tmp_path: Path) -> None:
    from anystride.testing.conformance import CASES_CHECKED
    from anystride.testing.probes import PROBES

    done = pytest_of(tmp_path, "--anystride-kernel=my_kernels:right", "--anystride-layouts=G2")
    assert done.returncode == 0, done.stdout
    found = outcomes(done)
    cases = [f"{name}-G2-vllm-nhd" for name in CASES_CHECKED if name in ("llama-3-8b", "pages-4x16")]
    assert [name for name, what in found.items() if what == "PASSED"] == [*(p.name for p in PROBES), *cases]


def test_a_fault_fails_its_column_and_says_where(tmp_path: Path) -> None:
    asked = ("--anystride-kernel=my_kernels:causal_from_the_top", "--anystride-layouts=none")
    done = pytest_of(tmp_path, *asked, "-k", "several or baseline")
    assert done.returncode == 1
    assert outcomes(done) == {"baseline": "PASSED", "several query tokens": "FAILED"}
    assert re.search(r"^WRONG: tame-gqa-q-3 in G16-sglang-pool: out: off by more", done.stdout, re.MULTILINE)
    assert re.search(r"^  out\[\d+, \d+, \d+\]: got .*, right ", done.stdout, re.MULTILINE)
    assert "Traceback" not in done.stdout


def test_a_crash_fails_one_test_and_the_others_go_on(tmp_path: Path) -> None:
    asked = ("--anystride-kernel=my_kernels:dies_of_queries", "--anystride-layouts=none")
    done = pytest_of(tmp_path, *asked, "-k", "several or baseline or lse")
    assert outcomes(done) == {
        "baseline": "PASSED",
        "several query tokens": "FAILED",
        "lse convention": "PASSED",
    }
    assert "crashed: tame-gqa-q-3 in G16-sglang-pool: the process died of SIGSEGV" in done.stdout


def test_a_refusal_is_skipped_in_the_words_of_the_kernel(tmp_path: Path) -> None:
    asked = ("--anystride-kernel=my_kernels:mla_only", "--anystride-layouts=G2")
    done = pytest_of(tmp_path, *asked, "-k", "llama")
    assert done.returncode == 0
    assert re.search(r"^SKIPPED .*NotImplementedError: a row of 576, please$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("allowed", [False, True])
def test_a_copy_fails_unless_it_is_allowed(tmp_path: Path, allowed: bool) -> None:
    asked = ["--anystride-kernel=my_kernels:copies", "--anystride-layouts=G2", "-k", "llama"]
    done = pytest_of(tmp_path, *asked, *["--anystride-allow-copies"] * allowed)
    assert done.returncode == (0 if allowed else 1)
    assert ("copied: llama-3-8b in G2-vllm-nhd: memory grew" in done.stdout) is not allowed


@pytest.mark.parametrize(
    ("kernel", "text"),
    [
        ("my_kernels:no_such", "AttributeError: module 'my_kernels' has no attribute 'no_such'"),
        ("hoper", "no kernel 'hoper': back ends are hopper, triton, cpu, reference"),
    ],
)
def test_a_kernel_that_cannot_be_loaded_is_an_error_of_collection(
    tmp_path: Path, kernel: str, text: str
) -> None:
    done = pytest_of(tmp_path, f"--anystride-kernel={kernel}")
    assert done.returncode == 2
    assert text in done.stdout
    assert "1 error during collection" in done.stdout


def test_a_peer_that_is_absent_is_skipped_and_says_how_to_get_it(tmp_path: Path) -> None:
    done = pytest_of(tmp_path, "--anystride-kernel=flash-mla", "--anystride-layouts=none", "-k", "baseline")
    assert done.returncode == 0
    assert re.search(r"^SKIPPED \[1\] .*: .+", done.stdout, re.MULTILINE)


def test_two_processes_of_xdist_share_the_tests(tmp_path: Path) -> None:
    asked = ("--anystride-kernel=my_kernels:right", "--anystride-layouts=none", "-n", "2")
    done = pytest_of(tmp_path, *asked, "-k", "table")
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout


def test_without_the_option_nothing_changes_and_torch_is_not_loaded(tmp_path: Path) -> None:
    (tmp_path / "test_own.py").write_text(
        "import sys\ndef test_own():\n    assert not {'torch', 'anystride'} & set(sys.modules)\n"
    )
    done = pytest_of(tmp_path, "-W", "error")
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout


def test_the_entry_point_is_the_module_by_its_own_name() -> None:
    # -p pytest_anystride and the entry point must be one plugin: pytest knows plugins by name.
    text = (ROOT / "pyproject.toml").read_text()
    found = re.search(r"^\[project\.entry-points\.pytest11\]\n(\w+) = \"(\w+)\"$", text, re.MULTILINE)
    assert found is not None
    assert found[1] == found[2] == "pytest_anystride"
    assert (ROOT / "src" / f"{found[2]}.py").exists()
    assert re.search(r'^py-modules = \["pytest_anystride"\]$', text, re.MULTILINE)
