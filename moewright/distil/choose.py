"""The choice for a layer: its old weights or the trained ones, and the smallest sufficient top-k."""

import math
from collections.abc import Mapping
from typing import Any

from moewright.distil.measure import Measured
from moewright.errors import CheckpointError
from moewright.moe.stats import load_imbalance


def choose_top_k(errors: Mapping[int, float], *, tolerance: float) -> int:
    """The smallest top-k whose error is within the tolerance; if there is none, that of the least error."""
    return min(errors, key=lambda k: _rank(k, errors[k], tolerance))


def _rank(k: int, error: float, tolerance: float) -> tuple[bool, float, float]:
    """Sort key, smaller is better: within the tolerance fewer experts, then less error; outside it less error."""
    return (False, k, error) if error <= tolerance else (True, error, k)


def choose(layer: int, before: Measured, after: Measured, *, trained_with: int, tolerance: float) -> dict[str, Any]:
    """A layer's row of the report, before and after it was trained with the top-k `trained_with`.

    `trained` says whether the trained weights are better than those before: with their best top-k fewer experts within
    the tolerance, or less error. `top_k` is the best of the weights chosen.

    Raises `CheckpointError` for errors that are not finite.
    """
    if not all(error < math.inf for error in after.errors.values()):
        raise CheckpointError(f"layer {layer}: its output is no longer finite; lower the learning rate")

    def rank(measured: Measured) -> tuple[bool, float, float]:
        k = choose_top_k(measured.errors, tolerance=tolerance)
        return _rank(k, measured.errors[k], tolerance)

    best = min(before, after, key=rank)  # the first of equals
    top_k = choose_top_k(best.errors, tolerance=tolerance)
    counts_E = best.counts[top_k]
    return {
        "layer": layer,
        "trained_with": trained_with,
        "error_before": before.errors[trained_with],
        "error_after": after.errors[trained_with],
        "trained": best is not before,
        "top_k": top_k,
        "error": best.errors[top_k],
        "within_tolerance": best.errors[top_k] <= tolerance,
        "load_imbalance": float(load_imbalance(counts_E)),
        "dead_experts": int((counts_E == 0).sum()),
        "top_ks": list(after.errors),
        "errors_before": list(before.errors.values()),
        "errors_after": list(after.errors.values()),
    }
