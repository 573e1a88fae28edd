"""``ANYSTRIDE_LOG``: show the package's log on stderr.

Nothing is shown by default. ``ANYSTRIDE_LOG=info`` shows, once for each new problem, who runs it and why the
others do not; a program that sets up :mod:`logging` itself needs no variable.
"""

from __future__ import annotations

import logging
import os

from anystride.errors import Fault, InvalidInputError

__all__ = ["show_log"]

LEVELS = ("debug", "info", "warning", "error")


def show_log() -> None:
    """Send the log to stderr from the level that ``ANYSTRIDE_LOG`` names; do nothing if it is not set.

    Raises:
        InvalidInputError: The variable names no level.
    """
    level = os.environ.get("ANYSTRIDE_LOG", "").lower()
    if not level:
        return
    if level not in LEVELS:
        fault = Fault("ANYSTRIDE_LOG names no level.", f"ANYSTRIDE_LOG = {level!r}", f"one of {LEVELS}")
        raise InvalidInputError("import anystride", [fault])
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    log = logging.getLogger("anystride")
    log.addHandler(handler)
    log.setLevel(level.upper())
