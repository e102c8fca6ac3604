"""From clock times to rows: medians, ratios, the common unit of the L1 coefficient. No tensors, no clocks."""

import math
from statistics import median
from typing import NamedTuple


class Rate(NamedTuple):
    """Something a second: the median over rounds, and the slowest and fastest round."""

    median: float
    low: float
    high: float
    rounds: int


def rate(amount: float, rounds: list[list[float]]) -> Rate:
    """From the seconds of the steps of each round, each step doing `amount`; a round counts by its mean step.

    Raises ValueError if there is no round.
    """
    if not rounds:
        raise ValueError("no round was measured")
    rates = [amount * len(times) / sum(times) for times in rounds]
    return Rate(median(rates), min(rates), max(rates), len(rates))


def ratio(project: list[list[float]], peer: list[list[float]]) -> Rate:
    """How many times as fast the project is, round by round: both of a round saw the same state of the machine."""
    if len(project) != len(peer):
        raise ValueError(f"{len(project)} rounds cannot be compared with {len(peer)}")
    ratios = [(sum(b) / len(b)) / (sum(a) / len(a)) for a, b in zip(project, peer, strict=True)]
    return Rate(median(ratios), min(ratios), max(ratios), len(ratios))


def order(names: list[str], round_: int) -> list[str]:
    """Who is measured when: all in every round, and each round begins with another, so that no one always runs first."""
    first = round_ % len(names)
    return names[first:] + names[:first]


def l1_at_scale(l1_coefficient: float, scale: float, new_scale: float) -> float:
    """The coefficient that weighs L1 against the summed squared error as before, once activations are scaled differently.

    With x' = c x, errors and activations are c times as large, so the squared error is c^2 times and the L1 norm c times as
    large: the coefficient must be c times as large for the same minimum.
    """
    return l1_coefficient * new_scale / scale


def mean_norm_scale(d_in: int, mean_norm: float) -> float:
    """The scale at which the project and SAELens train: mean norm sqrt(d_in)."""
    return math.sqrt(d_in) / mean_norm


def unit_norm_scale(mean_square_norm: float) -> float:
    """The scale at which dictionary_learning trains: mean squared norm 1."""
    return 1 / math.sqrt(mean_square_norm)


def product_operations(batch: int, d_in: int, d_sae: int) -> float:
    """Floating-point operations of the five matrix products of a step: encoder, decoder, and back without the input's."""
    return 5 * 2.0 * batch * d_in * d_sae


def row(id_: str, project: float, peer: float, value: float, unit: str, low: float | None = None, high: float | None = None,
        note: str = "") -> dict:
    """A line of results.json."""
    return {"id": id_, "project": _digits(project), "peer": _digits(peer), "ratio": _digits(value), "unit": unit,
            "low": _digits(low), "high": _digits(high), "note": note}


def _digits(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
