"""Tests that run in a process of their own, in which Triton interprets its kernels on the CPU.

Triton reads TRITON_INTERPRET when it is imported, so a file has two kinds of tests: those of
``only_interpreted`` exist in that process alone, and one of ``only_compiled`` starts it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

__all__ = ["INTERPRETED", "assert_passes_interpreted", "only_compiled", "only_interpreted"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def only_interpreted(test: Callable[..., Any]) -> Callable[..., Any] | None:
    """No test at all in other processes: a skip for each would hide those that mean something."""
    return test if INTERPRETED else None


def only_compiled(test: Callable[..., Any]) -> Callable[..., Any] | None:
    """The counterpart of ``only_interpreted``."""
    return None if INTERPRETED else test


def assert_passes_interpreted(file: str, *options: str) -> None:
    """Fail with pytest's own report if a test of the file fails under TRITON_INTERPRET=1."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:xdist", file, *options]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.fail(done.stdout + done.stderr, pytrace=False)
    assert " passed" in done.stdout, "the process ran no test"
