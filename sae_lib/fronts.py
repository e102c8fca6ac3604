"""Sparsity against fidelity: dictionaries of one kind at several settings, compared with another kind where both are as sparse.

Each dictionary is a point: its L0, and a fidelity that is better the larger it is (loss recovered, explained variance). The front
of a kind is made of those of its points that no other of them beats at as few active features. Between neighbours the front is a
straight line in the logarithm of L0; beyond its ends nothing is known, so nothing is said.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64


class Front(NamedTuple):
    """Points that no other of their kind beats, the sparsest first; fidelity rises with L0."""

    l0: Float64[np.ndarray, " points"]
    fidelity: Float64[np.ndarray, " points"]

    def at(self, l0: Float[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
        """Fidelity at these L0; nan beyond the ends of the front."""
        if not len(self.l0):
            return np.full(len(l0), np.nan)
        return np.interp(np.log(l0), np.log(self.l0), self.fidelity, left=np.nan, right=np.nan)


class Lead(NamedTuple):
    """By how much one front is above another over the L0 that both have; nan where they have none in common."""

    least: float
    mean: float
    """Over the logarithm of L0."""
    low: float
    """The L0 that both have: from here"""
    high: float
    """to here."""


def front(l0: Float[np.ndarray, " points"], fidelity: Float[np.ndarray, " points"]) -> Front:
    """The front of some points in any order. Those without active features, or without a fidelity, are left out."""
    known = np.isfinite(fidelity) & (l0 > 0)
    l0, fidelity = (np.asarray(values, dtype=np.float64)[known] for values in (l0, fidelity))
    order = np.lexsort([-fidelity, l0])
    l0, fidelity = l0[order], fidelity[order]
    best_before = np.maximum.accumulate(np.append(-np.inf, fidelity))[:-1]
    return Front(l0[fidelity > best_before], fidelity[fidelity > best_before])


def lead(ours: Front, other: Front) -> Lead:
    """By how much `ours` is above `other`, exactly: both are piecewise linear, so the least is at a point or an end of one."""
    if not (len(ours.l0) and len(other.l0)):
        return Lead(*[math.nan] * 4)
    low, high = max(ours.l0[0], other.l0[0]), min(ours.l0[-1], other.l0[-1])
    if low > high:
        return Lead(*[math.nan] * 4)
    points = np.concatenate([ours.l0, other.l0])
    shared = np.unique(np.concatenate([[low, high], points[(points > low) & (points < high)]]))
    difference = ours.at(shared) - other.at(shared)
    x = np.log(shared)
    mean = np.trapezoid(difference, x) / (x[-1] - x[0]) if len(x) > 1 else difference[0]
    return Lead(float(difference.min()), float(mean), float(low), float(high))


def sharpest_turn(front: Front) -> float:
    """Share that the sharpest single turn of a front has in all of its turning, from 1 / turns to 1: near 1 is a knee.

    Turns are changes of slope, in the logarithm of L0, from one part to the next. A front that is straight has none: 0. nan with
    fewer than four points, for a single turn would have to be all of it.
    """
    if len(front.l0) < 4:
        return math.nan
    turns = np.abs(np.diff(np.diff(front.fidelity) / np.diff(np.log(front.l0))))
    return float(turns.max() / turns.sum()) if turns.sum() > 1e-12 else 0.0
