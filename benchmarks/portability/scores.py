"""Scores that might tell how much of a patch's skill an evolved model keeps, and how well they rank.

Larger is worse. All are made of ``portllm.drift``'s sums; no data and no forward pass. |.| is the Frobenius norm, |.|₄
the fourth root of the sum of the singular values' fourth powers (Schatten's norm), which few strong directions raise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

import portllm
from portllm.movement import Movement


def candidates(drift: portllm.Drift) -> dict[str, float]:
    """Each score by its name, from one patch and one evolved model."""
    total, each = drift.total, [weight.movement for weight in drift.weights]
    return {
        "|D|/|W|": total.distance,
        "|D|/|Δ|": total.relative_distance,
        "|D V|/|Δ|": _root(total.inputs, total.delta),
        "|UᵀD|/|Δ|": _root(total.outputs, total.delta),
        "|UᵀD V|/|Δ|": _root(total.core, total.delta),
        "|D in U or V|/|Δ|": total.interference,
        "|D V|/|W V|": _root(total.inputs, total.read),
        "|D|₄/|W|₄": _fourth(total.moved_fourth, total.base_fourth),
        "|D|₄/|Δ|₄": _fourth(total.moved_fourth, total.delta_fourth),
        "mean |D|₄/|W|₄": _mean(each, lambda m: _fourth(m.moved_fourth, m.base_fourth)),
        "mean |D|₄/|Δ|₄": _mean(each, lambda m: _fourth(m.moved_fourth, m.delta_fourth)),
        "|cosine(D, Δ)|": abs(total.cosine),
        "-<D, Δ>/|Δ|²": -total.inner / total.delta,
        "mean |D|/|W|": _mean(each, lambda m: m.distance),
        "mean |D in U or V|/|Δ|": _mean(each, lambda m: m.interference),
        "mean |D V|/|W V|": _mean(each, lambda m: _root(m.inputs, m.read)),
        "max |D V|/|W V|": max(_root(m.inputs, m.read) for m in each),
    }


def _mean(each: Sequence[Movement], of) -> float:
    return sum(map(of, each)) / len(each)


def _root(square: float, reference: float) -> float:
    return math.sqrt(square / reference) if reference else 0.0


def _fourth(power: float, reference: float) -> float:
    return (power / reference) ** 0.25 if reference else 0.0


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's rank correlation; ties have their average rank. NaN where either does not vary."""
    a, b = (_ranks(values) - (len(values) + 1) / 2 for values in (one, other))
    length = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / length if length else math.nan


def _ranks(values: Sequence[float]) -> np.ndarray:
    """1 for the smallest."""
    _, inverse, counts = np.unique(np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]
