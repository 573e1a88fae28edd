"""What a bug report needs: versions, devices, back ends and why some are missing, environment variables.

``python -m anystride.collect_env``, or ``anystride env``. Needs torch and nothing else.
"""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path

import torch

import anystride
from anystride.explanation import Explanation
from anystride.plan import NAMES

__all__ = ["processor", "report", "version_of"]

# Packages that are used where they are found, or that a report is often about.
PACKAGES = ("triton", "numpy", "rich", "typer", "matplotlib", "vllm", "transformers")
VARIABLES = (
    "ANYSTRIDE_BACKEND",
    "ANYSTRIDE_LOG",
    "TRITON_INTERPRET",
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
)


def report() -> str:
    """All of it, as lines of text."""
    parts = (_versions(), _devices(), _backends(), _variables())
    sections = ("versions", "devices", "back ends", "environment")
    text = []
    for name, rows in zip(sections, parts, strict=True):
        text.append(name)
        width = max(len(key) for key, _ in rows) + 2
        text += [f"  {key:<{width}}{value}" for key, value in rows]
    return "\n".join(text)


def _versions() -> list[tuple[str, str]]:
    build = torch.version.cuda and f"CUDA {torch.version.cuda}"
    build = build or (torch.version.hip and f"HIP {torch.version.hip}") or "no GPU support"
    rows = [
        ("anystride", f"{anystride.__version__} in {Path(anystride.__file__).parent}"),
        ("python", f"{platform.python_version()} ({sys.executable})"),
        ("system", platform.platform()),
        ("torch", f"{torch.__version__} ({build})"),
    ]
    rows += [(package, version_of(package) or "not installed") for package in PACKAGES]
    return rows


def version_of(package: str) -> str:
    """The version of an installed package, "" if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _devices() -> list[tuple[str, str]]:
    rows = [
        ("cpu", f"{processor()}, {os.cpu_count()} processors, {torch.get_num_threads()} threads in torch")
    ]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        rows.append((
            f"cuda:{index}",
            f"{gpu.name}, capability {gpu.major}.{gpu.minor}, {gpu.multi_processor_count} processors, "
            f"{gpu.total_memory / 2**30:.0f} GiB",
        ))  # fmt: skip
    return rows


def processor() -> str:
    """The model's name; Linux keeps it where ``platform`` does not look."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _backends() -> list[tuple[str, str]]:
    """For each back end and kind of device: whether it would run a small call there, or why not."""
    rows = []
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for name in NAMES:
        for device in devices:
            reasons = _small_call(device, name).refusals.get(name)
            rows.append((f"{name} on {device}", "; ".join(reasons) if reasons else "available"))
    return rows


def _small_call(device: str, backend: str) -> Explanation:
    """One query token over one block: what every back end can run if it can run at all."""
    q = torch.zeros(1, 2, 64, dtype=torch.float16, device=device)
    cache = torch.zeros(1, 16, 1, 64, dtype=torch.float16, device=device)
    starts = torch.arange(2, dtype=torch.int32, device=device)
    length, table = starts[1:], starts[:1, None]
    return anystride.explain(
        q, cache, cache, 1, starts, 16, seqused_k=length, block_table=table, backend=backend
    )  # fmt: skip


def _variables() -> list[tuple[str, str]]:
    return [(name, os.environ.get(name, "not set")) for name in VARIABLES]


if __name__ == "__main__":
    sys.stdout.write(report() + "\n")
