"""Paged decode attention over a KV cache of any stride, read in place.

``flash_attn_varlen_func`` is the one entry for GQA, MQA, MHA and MLA. ``get_scheduler_metadata`` computes
what the layers of a step can share, ``warmup`` compiles ahead, ``explain`` tells who would run a call and
why.
"""

from anystride.api import (
    explain,
    flash_attn_varlen_func,
    get_scheduler_metadata,
    warmup,
)
from anystride.errors import AnystrideError, InvalidInputError, UnsupportedError
from anystride.logs import show_log

__version__ = "0.1.0"

__all__ = [
    "AnystrideError",
    "InvalidInputError",
    "UnsupportedError",
    "__version__",
    "explain",
    "flash_attn_varlen_func",
    "get_scheduler_metadata",
    "warmup",
]

show_log()
