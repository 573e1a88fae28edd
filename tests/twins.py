"""The same values in the packed layout, for results that must be the same bit by bit."""

from __future__ import annotations

from anystride.testing import LAYOUTS, Case, Inputs, Layout, compatible, find_layout, make_inputs

__all__ = ["layouts_of", "packed_twin"]

PACKED = {"kv": "G16", "row": "M1", "q_v": "M9"}


def layouts_of(case: Case) -> list[Layout]:
    """Every layout that holds the case, the packed one first."""
    packed = find_layout(PACKED[case.form])
    others = [layout for layout in LAYOUTS.values() if layout is not packed]
    return [layout for layout in (packed, *others) if compatible(case, layout) is None]


def packed_twin(inputs: Inputs, device: str = "cpu") -> Inputs | None:
    """The same call over a packed cache; None where that is another computation.

    It is another one where V is a part of K's row in one of the two, and in the other not, or another part.
    """
    packed = find_layout(PACKED[inputs.case.form])
    relations = {layout.relation(inputs.storage.shape) for layout in (inputs.layout, packed)}
    if len(relations) > 1 and "v_in_k" in {relation.kind for relation in relations}:
        return None
    rank = inputs.kwargs.get("cp_rank", 0)
    return make_inputs(inputs.case, packed, device, values=inputs.values, rank=rank)
