"""Numbers of the sets of `identification`: how many directions half of the KL takes, and how large the edit is there."""

import numpy as np
import pandas as pd
from jaxtyping import Float

from sae_lib.metrics import Interval, bootstrap_interval


def half(curve: Float[np.ndarray, "*draws k"]) -> Float[np.ndarray, "*draws"]:
    """The fewest directions that take the KL to half of what it is with none; nan if none of the curve is so low."""
    low = curve <= curve[..., :1] / 2
    return np.where(low.any(-1), low.argmax(-1), np.nan)


def needed(sets: pd.DataFrame) -> Float[np.ndarray, " sets"]:
    """Directions that half of the KL takes; of a set that never gets there, which needs more, all that were patched."""
    return np.where(sets.half.isna(), [len(kl) - 1 for kl in sets.kl], sets.half).astype(float)


def mean_half(sets: pd.DataFrame, **draws: int) -> Interval:
    """Mean over sets of the directions `needed`, with a bootstrap over sets."""
    values = needed(sets)
    return bootstrap_interval(np.stack([values, np.ones(len(values))], 1), lambda t: t[..., 0] / t[..., 1], **draws)


def edit_at_half(sets: pd.DataFrame, **draws: int) -> Interval:
    """Mean over those sets that get there of the edit's mean norm at half of the KL; all nan if fewer than two do."""
    values = np.array([row.edit[int(row.half)] for row in sets.dropna(subset="half").itertuples()])
    if len(values) < 2:
        return Interval(np.nan, np.nan, np.nan)
    return bootstrap_interval(np.stack([values, np.ones(len(values))], 1), lambda t: t[..., 0] / t[..., 1], **draws)


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
