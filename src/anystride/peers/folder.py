"""The folder of peers that are not installed: what ``get_peers`` puts there, and how it is loaded."""

from __future__ import annotations

import hashlib
import importlib.util
import lzma
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from anystride.peers.peer import Absent

__all__ = ["VLLM_VERSION", "load_library", "load_wheels"]

VLLM_VERSION = "0.25.0"  # whose compiled parts the folder holds


def load_library(folder: Path | None, file: str) -> None:
    """Load a shared library with operators of torch, unpacked first if its name ends in ``.xz``.

    Raises:
        Absent: There is no folder, no such file, or it does not fit this torch.
    """
    if folder is None or not (path := folder / file).exists():
        raise Absent(f"no {file}: pass the folder of peers, which get_peers fills")
    if path.suffix == ".xz":
        path = _unpacked(path)
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise Absent(str(error)) from None


def _unpacked(path: Path) -> Path:
    """What is packed in a file, once for all processes: under a name that another version does not have."""
    packed = path.read_bytes()
    unpacked = Path(tempfile.gettempdir()) / f"{hashlib.sha256(packed).hexdigest()[:16]}-{path.stem}"
    if not unpacked.exists():
        with tempfile.NamedTemporaryFile(dir=unpacked.parent, delete=False) as whole:
            whole.write(lzma.decompress(packed))
        os.chmod(whole.name, 0o644)
        os.replace(whole.name, unpacked)  # at once: who comes in between must not load a part
    return unpacked


def load_wheels(folder: Path | None, package: str) -> None:
    """Make a package importable from wheels in the folder, which are installed beside nothing else.

    One version always into the same place: what one process has built there serves the next.

    Raises:
        Absent: There is no such wheel, or it cannot be installed.
    """
    if importlib.util.find_spec(package) is not None:
        return
    files = [] if folder is None else sorted(str(path) for path in (folder / "wheels").glob("*.whl"))
    names = "-".join(Path(file).stem for file in files if Path(file).name.startswith(package))
    if not names:
        raise Absent(f"{package} is not installed, and the folder of peers has no wheel of it")
    place = Path(tempfile.gettempdir()) / f"anystride-{names}"
    if not (place / package).exists():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        try:
            subprocess.run([*install, "--target", str(place), *files], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise Absent(str(error)) from None
    sys.path.append(str(place))
