"""Dictionary against dictionary: universality, splitting, and the map of features (Bricken et al.; paper_facts B11, B17).

Two unit tables over the same tokens are compared by what fires when. A table holds a few active units a token, so that all
pairs are had from one sparse product. Neurons are compared by the same functions, on fewer tokens, for they fire more often.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Float64, Int
from scipy.sparse import block_array, csc_array, csr_array, vstack
from scipy.sparse.csgraph import connected_components
from sklearn.cluster import HDBSCAN
from torch import Tensor

from sae_lib.errors import StudyError
from sae_lib.metrics import Interval, bootstrap_interval, pearson_from_sums
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


def _check_same_tokens(a: csc_array, b: csc_array) -> None:
    if a.shape[0] != b.shape[0]:
        raise StudyError(f"The tables are over {a.shape[0]} and {b.shape[0]} tokens; make both from the same text.")


def _column_sums(table: csc_array) -> tuple[np.ndarray, np.ndarray]:
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
    _check_same_tokens(a, b)
    (x, xx), (y, yy), rows = _column_sums(a), _column_sums(b), b.tocsr().astype(np.float64)
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
    _check_same_tokens(a, b)
    return _pair_pearson(_pair_sums(a, b, pairs, np.zeros(a.shape[0], dtype=np.int64), 1)[0])


class Universality(NamedTuple):
    """How well the units of one model are found again in another."""

    median: Interval
    """Median over units of the correlation with their match."""
    units: pd.DataFrame
    """A row a unit: unit, match, chosen (the correlation on the half the match was chosen on), correlation (on the other)."""


def universality(a: csc_array, b: csc_array, document: Int[np.ndarray, " n_tokens"], seed: int = 0, n_boot: int = 400,
                 min_fired: int = 10, n_groups: int = 200) -> Universality:
    """The correlation of each live unit of `a` with its best match in `b`, and the median (B11: features 0.72, neurons 0.46).

    Unlike the paper's, matches are chosen on one half of the documents and measured on the other, so that the best of many
    is not flattered by chance. The interval is for the matches as chosen: it draws the measured documents with replacement,
    gathered at random into at most `n_groups` groups, for the sums of all pairs over every document would not fit in memory.
    Units of `a` that fire on fewer than `min_fired` tokens, or on none of a half, are left out; a match that falls silent
    on the measured half counts as 0.

    Raises StudyError if the tables are not over the same tokens, there are too few documents, or nothing fires.
    """
    _check_same_tokens(a, b)
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
    median = bootstrap_interval(sums.reshape(n_groups, -1), n_boot=n_boot, seed=seed,
                                statistic=lambda t: np.nanmedian(_pair_pearson(t.reshape(*t.shape[:-1], 6, -1)), axis=-1))
    return Universality(median, pd.DataFrame({"unit": unit, "match": pairs[:, 1], "chosen": match.correlation[unit],
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


# --- splitting -------------------------------------------------------------------------------------------------------


def masked_cosine(a: csc_array, b: csc_array, threshold: float = 0.4, min_fired: int = 10, chunk: int = 256) -> csr_array:
    """Links between the units of two dictionaries: [n_a, n_b], the masked cosines above `threshold` (B17; the paper's fn 32).

    The cosine of the activations of i and j over the tokens that i fires on, or over those that j fires on, whichever is
    larger: a narrow unit is linked to a wide one if, where it fires, the other does likewise. Units of either side that
    fire on fewer than `min_fired` tokens have no links.

    Raises StudyError if the tables are not over the same number of tokens.
    """
    _check_same_tokens(a, b)
    (_, aa), (_, bb), rows = _column_sums(a), _column_sums(b), b.tocsr().astype(np.float64)
    squares, fires = (csr_array((data, rows.indices, rows.indptr), shape=rows.shape)
                      for data in (rows.data ** 2, np.ones_like(rows.data)))
    live_a, live_b = live_units(a, min_fired), live_units(b, min_fired)
    blocks = []
    for start in range(0, a.shape[1], chunk):
        part = a[:, start:start + chunk].astype(np.float64).T
        dot = (part @ rows).toarray()
        where_a_fires = aa[start:start + chunk, None] * ((part > 0).astype(np.float64) @ squares).toarray()
        where_b_fires = bb * ((part * part) @ fires).toarray()
        cosine = dot / np.sqrt(np.where(dot > 0, np.minimum(where_a_fires, where_b_fires), 1.0))
        cosine[(cosine <= threshold) | ~live_a[start:start + chunk, None] | ~live_b] = 0
        blocks.append(csr_array(cosine))
    return vstack(blocks, format="csr")


def splits(links: Sequence[csr_array], unit: int) -> pd.DataFrame:
    """What becomes of a unit of the narrowest dictionary in wider ones: a row for each link that leads on from it.

    `links[k]` links dictionary k to dictionary k + 1. Columns: dictionary (1 for the one after the narrowest), parent (a unit
    of the dictionary before), unit, cosine; the strongest links of a parent first. Splits also merge, so a unit may have
    several parents.
    """
    rows: list[tuple[int, int, int, float]] = []
    parents = [unit]
    for dictionary, level in enumerate(links, start=1):
        found = level[parents].tocoo()
        order = np.lexsort([-found.data, found.row])
        rows += [(dictionary, parents[i], int(j), float(c))
                 for i, j, c in zip(found.row[order], found.col[order], found.data[order], strict=True)]
        parents = np.unique(found.col).tolist()
    return pd.DataFrame(rows, columns=["dictionary", "parent", "unit", "cosine"])


def families(links: Sequence[csr_array]) -> pd.DataFrame:
    """Units of all dictionaries that hang together by links, directly or not; those without a link are left out.

    `links` as for `splits`. Columns: family (0 is the largest), dictionary (0 is the narrowest), unit.
    """
    sizes = [links[0].shape[0], *(level.shape[1] for level in links)]
    blocks = [[None] * len(sizes) for _ in sizes]
    for k, level in enumerate(links):
        blocks[k][k + 1] = level
    blocks[-1][0] = csr_array((sizes[-1], sizes[0]))  # gives the first column and the last row their sizes
    _, family = connected_components(block_array(blocks), directed=False)
    nodes = pd.DataFrame({"family": family, "dictionary": np.repeat(np.arange(len(sizes)), sizes),
                          "unit": np.concatenate([np.arange(size) for size in sizes])})
    members = nodes.family.value_counts()
    members = members[members > 1]
    nodes = nodes[nodes.family.isin(members.index)]
    number = {name: i for i, name in enumerate(sorted(members.index, key=lambda name: (-members[name], name)))}
    return nodes.assign(family=nodes.family.map(number)).sort_values(["family", "dictionary", "unit"], ignore_index=True)


def decoder_map(decoders: Sequence[Float[Tensor, "_ d_in"]], seed: int = 0,
                keep: Sequence[Bool[np.ndarray, " _"]] | None = None, min_dist: float = 0.05) -> pd.DataFrame:
    """A map of dictionary elements: UMAP of the decoder rows of all dictionaries, and clusters of those near each other (B17).

    `keep` leaves units out, such as those that are not live. Columns: x, y (UMAP with 15 neighbours, cosine, `min_dist`),
    cluster (HDBSCAN of at least 3, on a UMAP of 10 dimensions and min_dist 0.1; -1 for none), dictionary (its place in
    `decoders`), unit. The same seed gives the same map.

    Raises StudyError if there are 15 elements or fewer.
    """
    from umap import UMAP  # compiles for seconds when imported

    keep = keep or [np.ones(len(rows), dtype=bool) for rows in decoders]
    unit = [np.flatnonzero(mask) for mask in keep]
    rows = np.concatenate([decoder.detach().float().numpy()[units] for decoder, units in zip(decoders, unit, strict=True)])
    if len(rows) <= 15:
        raise StudyError(f"A map with 15 neighbours each wants more than {len(rows)} dictionary elements; give more.")
    state = int(numpy_generator(seed, "decoder-map").integers(2**31))

    def embed(n_components: int, min_dist: float) -> np.ndarray:
        # One thread is what a fixed seed leads to in any case; asked for, it gives no warning.
        return UMAP(n_components=n_components, n_neighbors=15, metric="cosine", min_dist=min_dist, random_state=state,
                    n_jobs=1).fit_transform(rows)

    x, y = embed(2, min_dist).T
    cluster = HDBSCAN(min_cluster_size=3, copy=True).fit_predict(embed(min(10, len(rows) - 2), 0.1))
    return pd.DataFrame({"x": x, "y": y, "cluster": cluster, "unit": np.concatenate(unit),
                         "dictionary": np.repeat(np.arange(len(unit)), [len(units) for units in unit])})
