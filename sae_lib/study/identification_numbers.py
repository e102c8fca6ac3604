"""Numbers of the sets of `identification`: how many directions half of the KL takes, and how large the edit is there."""

import numpy as np
import pandas as pd
from jaxtyping import Float

from sae_lib.metrics import Interval, bootstrap_interval, mean_interval


def half(curve: Float[np.ndarray, "*draws k"]) -> Float[np.ndarray, "*draws"]:
    """The fewest directions that take the KL to half of what it is with none; nan if none of the curve is so low."""
    low = curve <= curve[..., :1] / 2
    return np.where(low.any(-1), low.argmax(-1), np.nan)


def needed(sets: pd.DataFrame) -> Float[np.ndarray, " sets"]:
    """Directions that half of the KL takes; of a set that never gets there, which needs more, all that were patched."""
    return np.where(sets.half.isna(), [len(kl) - 1 for kl in sets.kl], sets.half).astype(float)


def mean_half(sets: pd.DataFrame, **draws: int) -> Interval:
    """Mean over sets of the directions `needed`, with a bootstrap over sets."""
    return mean_interval(needed(sets), **draws)


def needed_ratio(sets: pd.DataFrame, coding: str, other: str, **draws: int) -> Interval:
    """Mean of the directions `needed` by one coding over that of another; the same sets are drawn for both."""
    return _ratio(*(needed(sets[sets.coding == name].sort_values("repeat")) for name in (coding, other)), **draws)


def edit_ratio(sets: pd.DataFrame, coding: str, other: str, **draws: int) -> tuple[Interval, Interval, Interval]:
    """Mean norm of the edit at half of the KL by one coding, by another, and the one over the other: of those sets in which both
    get there. All nan if there are fewer than two.
    """
    both = [sets[sets.coding == name].set_index("repeat").dropna(subset="half") for name in (coding, other)]
    common = both[0].index.intersection(both[1].index)
    if len(common) < 2:
        return (Interval(np.nan, np.nan, np.nan),) * 3
    mine, theirs = (np.array([table.edit[i][int(table.half[i])] for i in common]) for table in both)
    return mean_interval(mine, **draws), mean_interval(theirs, **draws), _ratio(mine, theirs, **draws)


def _ratio(above: Float[np.ndarray, " sets"], below: Float[np.ndarray, " sets"], **draws: int) -> Interval:
    return bootstrap_interval(np.stack([above, below], 1), lambda t: t[..., 0] / t[..., 1], **draws)


def drawn_ratios(one: pd.Series, other: pd.Series) -> tuple[Interval, Interval]:
    """Of a set of many exchanges: directions that half of the KL takes, and the edit's mean norm there, by one coding over by
    another. The order is as it is, and a bootstrap over sentences, the same for both, says where half is.
    """
    halves = [np.append(row.drawn, needed(row.to_frame().T)[0]) for row in (one, other)]
    edits = [np.array(row.edit)[np.minimum(half, len(row.edit) - 1).astype(int)]
             for row, half in zip((one, other), halves, strict=True)]

    def interval(mine: np.ndarray, theirs: np.ndarray) -> Interval:
        *draws, value = mine / theirs
        low, high = np.quantile(draws, [0.025, 0.975])
        return Interval(float(value), float(min(low, value)), float(max(high, value)))

    return interval(*halves), interval(*edits)


def left_by_directions(sets: pd.DataFrame, most: int) -> Float[np.ndarray, "sets k"]:
    """Share of the KL that is left with 0, 1, ..., `most` directions patched, a row a set; beyond a set's last, as with all."""
    rows = [np.array(curve[:most + 1]) / max(curve[0], 1e-12) for curve in sets.kl]
    return np.stack([np.append(row, np.full(most + 1 - len(row), row[-1])) for row in rows])


def left_by_edit(sets: pd.DataFrame, grid: Float[np.ndarray, " sizes"]) -> Float[np.ndarray, "sets sizes"]:
    """The least share of the KL that is left with an edit of at most each size, a row a set."""
    rows = []
    for row in sets.itertuples():
        kl, edit = np.array(row.kl) / max(row.kl[0], 1e-12), np.array(row.edit)
        rows.append([kl[edit <= size].min() for size in grid])
    return np.array(rows)
