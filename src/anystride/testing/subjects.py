"""What the kit can look at: our back ends and the peers by name, anybody's function by its place."""

from __future__ import annotations

import functools
import importlib
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

import anystride
from anystride.collect_env import version_of
from anystride.plan import NAMES
from anystride.testing.trial import Kernel, Prepare

__all__ = ["Subject", "demand_name", "facts_of", "load"]


@dataclass(frozen=True)
class Subject:
    """A kernel that is looked at: fields of ``Report``, and what ``Trials`` takes."""

    name: str
    title: str
    version: str
    kernel: Kernel | None
    absent: str = ""
    prepare: Prepare | None = None


def load(kernel: Kernel | str, peers: Path | None = None) -> Subject:
    """Find a kernel.

    Args:
        kernel: A function; or the name of a back end, of a peer, or of a function as ``module:function``.
        peers: The folder of peers that are not installed.

    Raises:
        KeyError: No back end and no peer has this name.
        ImportError: There is no such module.
        AttributeError: The module has no such function.
    """
    if not isinstance(kernel, str):
        name = (
            f"{kernel.__module__}:{kernel.__qualname__}" if hasattr(kernel, "__qualname__") else repr(kernel)
        )
        return Subject(name, name, "", kernel)
    if kernel in NAMES:
        entry = functools.partial(anystride.flash_attn_varlen_func, backend=kernel)
        return Subject(kernel, f"anystride {kernel}", anystride.__version__, entry)
    module, colon, function = kernel.partition(":")
    if colon:
        found = functools.reduce(getattr, function.split("."), importlib.import_module(module))
        return Subject(kernel, kernel, version_of(module.partition(".")[0]), found)  # type: ignore[arg-type]
    from anystride.peers import Absent, find_peer

    demand_name(kernel)
    peer = find_peer(kernel)
    try:
        return Subject(peer.name, peer.title, peer.load(peers), peer.kernel, prepare=peer.prepare)
    except Absent as why:
        return Subject(peer.name, peer.title, "", None, str(why))


def demand_name(kernel: Kernel | str) -> None:
    """Raise KeyError, with all names, for a name that no back end and no peer has; loads nothing."""
    if not isinstance(kernel, str) or kernel in NAMES or ":" in kernel:
        return
    from anystride.peers import find_peer

    try:
        find_peer(kernel)
    except KeyError as error:
        raise KeyError(
            f"no kernel {kernel!r}: back ends are {', '.join(NAMES)}; {error.args[0]}; "
            "a function of your own is module:function"
        ) from None


def facts_of(device: torch.device) -> tuple[str, dict[str, str]]:
    """The name of the device, and versions of what takes part."""
    versions = {
        "anystride": anystride.__version__,
        "torch": torch.__version__,
        "triton": version_of("triton"),
    }
    versions["python"] = platform.python_version()
    if device.type == "cuda":
        versions["cuda"] = str(torch.version.cuda)
        return torch.cuda.get_device_name(device), versions
    return f"{device.type}, {platform.machine()}", versions
