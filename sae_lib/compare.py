"""Dictionary against dictionary: universality (Bricken et al.; paper_facts B11). Dictionaries of several widths: splitting.py.

Two unit tables over the same tokens are compared by what fires when. A table holds a few active units a token, so that all
pairs are had from one sparse product. Neurons are compared by the same functions, on fewer tokens, for they fire more often.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Float64, Int
from scipy.sparse import csc_array
from torch import Tensor

from sae_lib.errors import StudyError
from sae_lib.metrics import Interval, half_sample_interval, pearson_from_sums
from sae_lib.seeds import numpy_generator

DENSE = 0.1  # share of entries above 0 from which dense products are the quicker

# --- unit tables -----------------------------------------------------------------------------------------------------


def live_units(table: csc_array, min_fired: int = 10) -> Bool[np.ndarray, " n_units"]:
    """Units that fire on at least `min_fired` tokens.

    The paper leaves out dead and ultralow features, below 1e-6 of 100 million tokens. A text of fewer tokens cannot show that
    density, and what fires on a handful of tokens correlates with anything that fires on one of them; hence a count.
    """
    return np.diff(table.indptr) >= min_fired


def select_tokens(table: csc_array, keep: Bool[np.ndarray, " n_tokens"]) -> csc_array:
    """The table of the kept tokens alone, [kept, n_units], in the same order."""
    kept = keep[table.indices]
    ends = np.concatenate([[0], np.cumsum(kept)])[table.indptr]
    index = (np.cumsum(keep) - 1).astype(table.indices.dtype)
    return csc_array((table.data[kept], index[table.indices[kept]], ends), shape=(int(keep.sum()), table.shape[1]))


def check_same_tokens(a: csc_array, b: csc_array) -> None:
    """Raises StudyError if two tables are not over the same number of tokens."""
    if a.shape[0] != b.shape[0]:
        raise StudyError(f"The tables are over {a.shape[0]} and {b.shape[0]} tokens; make both from the same text.")


def column_sums(table: csc_array) -> tuple[Float64[np.ndarray, " n_units"], Float64[np.ndarray, " n_units"]]:
    """Sums of each unit's activations and of their squares."""
    exact = table.astype(np.float64)
    return exact.sum(axis=0), (exact * exact).sum(axis=0)


# --- universality ----------------------------------------------------------------------------------------------------


class BestMatch(NamedTuple):
    """For each unit of one table, the unit of the other that correlates with it best."""

    unit: Int[np.ndarray, " n_a"]
    """-1 for a unit that never fires."""
    correlation: Float64[np.ndarray, " n_a"]
    """Pearson over all tokens, the silent ones included; nan for a unit that never fires."""


def _dense_products(a: csc_array, b: csc_array, chunk: int = 8192) -> Float64[np.ndarray, "n_a n_b"]:
    """a.T @ b by blocks of tokens: for tables with so many entries that a sparse product is slower."""
    blocks = [slice(start, start + chunk) for start in range(0, a.shape[0], chunk)]
    a, b = a.tocsr(), b.tocsr()
    return sum(a[rows].toarray().astype(np.float64).T @ b[rows].toarray() for rows in blocks)


def table_correlations(a: csc_array, b: csc_array, chunk: int = 256) -> BestMatch:
    """The unit of `b` most correlated with each unit of `a`, over the tokens of both tables (B11).

    In float64 throughout; `chunk` units of `a` at a time against all of `b`. The greatest of many correlations flatters;
    `universality` does not.

    Raises StudyError if the tables are not over the same number of tokens.
    """
    check_same_tokens(a, b)
    (x, xx), (y, yy), rows = column_sums(a), column_sums(b), b.tocsr().astype(np.float64)
    dense = _dense_products(a, b) if min(t.nnz / np.prod(t.shape) for t in (a, b)) > DENSE else None
    unit, correlation = np.full(a.shape[1], -1), np.full(a.shape[1], np.nan)
    for start in range(0, a.shape[1], chunk):
        part = np.arange(start, min(start + chunk, a.shape[1]))
        xy = (a[:, part].T @ rows).toarray() if dense is None else dense[part]
        pearson = np.nan_to_num(pearson_from_sums(a.shape[0], x[part, None], y, xx[part, None], yy, xy), nan=-np.inf)
        best = pearson.argmax(1)
        found = np.isfinite(pearson[np.arange(len(part)), best])
        unit[part[found]], correlation[part[found]] = best[found], pearson[found, best[found]]
    return BestMatch(unit, correlation)


def _pair_sums(a: csc_array, b: csc_array, pairs: np.ndarray, group: np.ndarray, n_groups: int,
               chunk: int = 512) -> Float64[np.ndarray, "groups 6 pairs"]:
    """Sums (n, x, y, xx, yy, xy) of each pair of units over each group of tokens."""
    n = len(group)
    members = csc_array((np.ones(n), group, np.arange(n + 1)), shape=(n_groups, n))
    counts = np.bincount(group, minlength=n_groups)
    sums = np.empty((n_groups, 6, len(pairs)))
    sums[:, 0] = counts[:, None]
    for start in range(0, len(pairs), chunk):
        x, y = (table[:, units].astype(np.float64) for table, units in zip((a, b), pairs[start:start + chunk].T, strict=True))
        for term, product in enumerate((x, y, x * x, y * y, x * y), start=1):
            sums[:, term, start:start + chunk] = (members @ product).toarray()
    return sums


def _pair_pearson(sums: np.ndarray) -> np.ndarray:
    """Pearson from sums [..., 6, pairs]: nan if a pair's first unit is silent, 0 if the second alone is."""
    n, x, y, xx, yy, xy = np.moveaxis(sums, -2, 0)
    pearson = pearson_from_sums(n, x, y, xx, yy, xy)
    return np.where(np.isnan(pearson) & (xx > 0), 0.0, pearson)


def pair_correlations(a: csc_array, b: csc_array, pairs: Int[np.ndarray, "pairs 2"]) -> Float64[np.ndarray, " pairs"]:
    """Pearson over all tokens of unit `pairs[k, 0]` of `a` with unit `pairs[k, 1]` of `b`; of activations or attributions.

    nan if the first unit is silent, 0 if the second alone is. Raises StudyError if the tables are not over the same tokens.
    """
    check_same_tokens(a, b)
    return _pair_pearson(_pair_sums(a, b, pairs, np.zeros(a.shape[0], dtype=np.int64), 1)[0])


class Universality(NamedTuple):
    """How well the units of one model are found again in another."""

    median: Interval
    """Median over units of the correlation with their match."""
    lean: float
    """How much too high the median is for want of documents (too low, if negative); not taken out of it."""
    units: pd.DataFrame
    """A row a unit: unit, match, chosen (the correlation on the half the match was chosen on), correlation (on the other)."""


def universality(a: csc_array, b: csc_array, document: Int[np.ndarray, " n_tokens"], seed: int = 0, n_boot: int = 400,
                 min_fired: int = 10, n_groups: int = 200) -> Universality:
    """The correlation of each live unit of `a` with its best match in `b`, and the median (B11: features 0.72, neurons 0.46).

    Unlike the paper's, matches are chosen on one half of the documents and measured on the other, so that the best of many
    is not flattered by chance. The interval is for the matches as chosen, from `n_boot` halves of the measured documents
    (`half_sample_interval`), gathered at random into at most `n_groups` groups, for the sums of all pairs over every document
    would not fit in memory. It is no bootstrap: a draw of documents with replacement misses a third of the few documents that
    carry a rare unit's correlation. That moves the medians of all draws to one side, and all may lie below the value.
    Units of `a` that fire on fewer than `min_fired` tokens, or on none of a half, are left out; a match that falls silent
    on the measured half counts as 0.

    Raises StudyError if the tables are not over the same tokens, there are too few documents, or nothing fires.
    """
    check_same_tokens(a, b)
    documents, index = np.unique(document, return_inverse=True)
    if len(documents) < 4:
        raise StudyError(f"Universality wants at least four documents and there are {len(documents)}; use more held-out text.")
    rank = numpy_generator(seed, "universality").permutation(len(documents))
    choosing, measuring = (rank % 2 == 0)[index], (rank % 2 == 1)[index]
    match = table_correlations(select_tokens(a, choosing), select_tokens(b, choosing))
    a_measured, b_measured = select_tokens(a, measuring), select_tokens(b, measuring)
    unit = np.flatnonzero(live_units(a, min_fired) & (match.unit >= 0) & live_units(a_measured, 1))
    if not len(unit):
        raise StudyError("No unit fires often enough in both halves of the text to be matched; use more held-out text.")
    n_groups = min(n_groups, len(documents) // 2)
    pairs = np.stack([unit, match.unit[unit]], axis=1)
    sums = _pair_sums(a_measured, b_measured, pairs, (rank // 2 % n_groups)[index][measuring], n_groups)
    median, lean = half_sample_interval(
        sums.reshape(n_groups, -1), n_boot=n_boot, seed=seed,
        statistic=lambda t: np.nanmedian(_pair_pearson(t.reshape(*t.shape[:-1], 6, -1)), axis=-1))
    return Universality(median, lean, pd.DataFrame({"unit": unit, "match": pairs[:, 1], "chosen": match.correlation[unit],
                                              "correlation": _pair_pearson(sums.sum(0))}))


def logit_correlation(weights_a: Float[Tensor, "n_a d_vocab"], weights_b: Float[Tensor, "n_b d_vocab"],
                      pairs: Int[np.ndarray, "pairs 2"], chunk: int = 512) -> Float64[np.ndarray, " pairs"]:
    """Pearson over the vocabulary of the logit weights of matched units; nan where one of the two is constant (B11).

    Tokens whose weight is nan, because they hardly occur, are left out.
    """
    used = ~(weights_a.isnan().any(0) | weights_b.isnan().any(0))
    found = [np.empty(0)]
    for part in torch.from_numpy(pairs).split(chunk):
        x, y = (weights[units][:, used].double() for weights, units in zip((weights_a, weights_b), part.T, strict=True))
        # Centred first: weights may lie far from zero, all by the same amount.
        x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
        xx, yy, xy = ((left * right).sum(1).numpy() for left, right in ((x, x), (y, y), (x, y)))
        found.append(pearson_from_sums(x.shape[1], 0.0, 0.0, xx, yy, xy))
    return np.concatenate(found)
