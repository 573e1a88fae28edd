"""The command line, ``anystride``, and what only it needs: the demonstration, pictures, maps of memory.

The one room that may use typer, rich and matplotlib: ``pip install 'anystride[cli]'``.
"""

from importlib.util import find_spec

missing = [name for name in ("typer", "rich", "matplotlib") if find_spec(name) is None]
if missing:
    raise SystemExit(
        f"anystride: the command line needs {', '.join(missing)}, not installed here.\n"
        "  do     pip install 'anystride[cli]'"
    )

from anystride.cli.commands import app  # noqa: E402  # it imports what was looked for

__all__ = ["app"]
