"""What somebody typed: found, or refused with what is near."""

from __future__ import annotations

import difflib
from typing import NoReturn

import torch
import typer

from anystride.testing import CASES, LAYOUTS, Case, Layout, find_case, find_layout

__all__ = ["near", "stop", "the_case", "the_device", "the_layout"]


def the_layout(name: str, hint: str) -> Layout:
    """The layout of a name or number."""
    try:
        return find_layout(name)
    except KeyError:
        names = [*LAYOUTS, *(other.partition("-")[0] for other in LAYOUTS)]
        raise typer.BadParameter(
            f"there is no layout {name!r}; {near(name, names)}", param_hint=hint
        ) from None


def the_case(name: str, hint: str = "--case") -> Case:
    """The case of a name."""
    try:
        return find_case(name)
    except KeyError:
        names = [case.name for case in CASES]
        raise typer.BadParameter(f"there is no case {name!r}; {near(name, names)}", param_hint=hint) from None


def near(name: str, names: list[str]) -> str:
    """What somebody who typed ``name`` may have meant; all names, if nothing is near."""
    plain = {other.lower(): other for other in names}
    close = [other for other in plain if name.lower() in other]
    close += difflib.get_close_matches(name.lower(), plain, n=8, cutoff=0.5)
    found = list(dict.fromkeys(plain[other] for other in close))[:8]
    return f"near: {', '.join(found)}" if found else f"there are: {', '.join(names)}"


def the_device(name: str) -> torch.device:
    """A device on which a tensor can be made."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # an AssertionError where torch has no CUDA
        first = str(error).partition("\n")[0]
        raise typer.BadParameter(f"{name!r} cannot be used: {first}", param_hint="--device") from None
    return device


def stop(message: str) -> NoReturn:
    """Print an error of the library as it is, and leave with 2."""
    typer.echo(message, err=True)
    raise typer.Exit(2)
