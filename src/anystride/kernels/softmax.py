"""A softmax in base 2, and how it ends: functions of elements, which Triton's and Gluon's kernels share."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tanh(x):
    """Hyperbolic tangent in float32, right to rounding near 0 as well; no vendor library needed."""
    square = x * x
    series = x * (
        1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * 62.0 / 2835)))
    )
    decay = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
    far = (1.0 - decay) / (1.0 + decay)
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -far, far))


@triton.jit
def add_sink(top, weight_sum, sink):
    """Add a sink's weight to a row's sum, whose weights are relative to ``top``.

    Returns:
        ``(top, shrink, weight_sum)``: the new reference, which a sink above every score moves; what the
        accumulator must be multiplied by; the new sum. A row without keys stays empty.
    """
    anchor = tl.maximum(top, sink)
    anchor = tl.where(anchor == float("-inf"), 0.0, anchor)
    shrink = tl.exp2(top - anchor)
    return anchor, shrink, tl.where(weight_sum > 0, weight_sum * shrink + tl.exp2(sink - anchor), 0.0)


@triton.jit
def normaliser(weight_sum, factor):
    """``(whether there are weights, their sum or 1, factor / sum or 0)``: a row without keys is zeros."""
    some = weight_sum > 0
    weight_sum = tl.where(some, weight_sum, 1.0)
    return some, weight_sum, tl.where(some, factor / weight_sum, 0.0)
