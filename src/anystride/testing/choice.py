"""Which kernels a command line asks the kit to check, and whether what came of it is good."""

from __future__ import annotations

from collections.abc import Sequence

from anystride.peers import PEERS
from anystride.plan import NAMES
from anystride.testing.report import Report, Verdict

__all__ = ["ALL", "BACK_ENDS", "exit_code", "kernels_asked_for", "words"]

ALL = "all"
BACK_ENDS = {"cpu": ("cpu",), "cuda": ("hopper", "triton")}  # those chosen unasked; elsewhere it is triton


def kernels_asked_for(names: Sequence[str], device_type: str) -> list[str]:
    """The names of kernels, once each: ``all`` becomes our back ends for the device and every peer.

    Args:
        names: Back ends, peers, ``module:function``, ``all``; none: our back ends for the device.
        device_type: ``cpu``, ``cuda``, ...

    Raises:
        ValueError: A name names nothing; the text lists what does.
    """
    ours = BACK_ENDS.get(device_type, ("triton",))
    peers = [peer.name for peer in PEERS]
    found: list[str] = []
    for name in names or ours:
        if name == ALL:
            found += [*ours, *peers]
        elif name in NAMES or name in peers or ":" in name:
            found.append(name)
        else:
            known = ", ".join((*NAMES, *peers, ALL))
            raise ValueError(f"there is no kernel {name!r}; there are {known}, and module:function")
    return list(dict.fromkeys(found))


def words(text: str) -> list[str] | None:
    """``a,b`` as a list, ``none`` as an empty one; None, the default of the kit, for no text."""
    if text == "none":
        return []
    return [word.strip() for word in text.split(",") if word.strip()] or None


def exit_code(reports: Sequence[Report]) -> int:
    """0; 1 if a call was wrong or crashed; 2 if there was no call, or no kernel to make one."""
    found = [finding.verdict for report in reports for finding in report.findings]
    if not found:
        return 2
    return int(Verdict.WRONG in found or Verdict.CRASHED in found)
