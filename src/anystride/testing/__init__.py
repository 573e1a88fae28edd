"""What tests, the demo and the benchmark share: a catalogue of layouts, a table of cases, inputs.

``layouts.py`` is the catalogue, ``cases.py`` the table; ``make_inputs(case, layout)`` makes tensors
of a pair. Needs torch and nothing else.
"""

from anystride.testing.cases import CASES, Case, find_case, select
from anystride.testing.inputs import Inputs, Values, compatible, make_inputs
from anystride.testing.layouts import LAYOUTS, Layout, find_layout
from anystride.testing.storage import CacheShape, Storage, assert_untouched, canary, fill, occupancy

__all__ = [
    "CASES",
    "LAYOUTS",
    "CacheShape",
    "Case",
    "Inputs",
    "Layout",
    "Storage",
    "Values",
    "assert_untouched",
    "canary",
    "compatible",
    "fill",
    "find_case",
    "find_layout",
    "make_inputs",
    "occupancy",
    "select",
]
