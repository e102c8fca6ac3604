"""Dictionaries of several widths on the same activations (Bricken et al., Feature Splitting; paper_facts B17).

What a narrow dictionary says with one feature, a wider one says with several. Features of two dictionaries are linked by what
they fire on; features of one context are counted by a rule; the directions of all dictionaries are laid out on a map.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from scipy.sparse import block_array, csc_array, csr_array, vstack
from scipy.sparse.csgraph import connected_components
from sklearn.cluster import HDBSCAN
from torch import Tensor

from sae_lib.compare import check_same_tokens, column_sums, live_units
from sae_lib.errors import StudyError
from sae_lib.features import maxima
from sae_lib.metrics import Interval, bootstrap_interval
from sae_lib.seeds import numpy_generator


def _unit_of_entry(table: csc_array) -> Int[np.ndarray, " entries"]:
    return np.repeat(np.arange(table.shape[1], dtype=np.int32), np.diff(table.indptr))


# --- how many are alive ----------------------------------------------------------------------------------------------


def live_by_text(table: csc_array, documents: Int[np.ndarray, " n_tokens"], shares: Sequence[float], seed: int = 0,
                 min_fired: int = 10) -> pd.DataFrame:
    """Live units in growing parts of a text: whether more text would show more of them.

    Documents are taken in random order until their tokens are a share of all. Columns: tokens, live (units that fire on
    `min_fired` tokens or more of this part).
    """
    names, index = np.unique(documents, return_inverse=True)
    order = numpy_generator(seed, "live-by-text").permutation(len(names))
    sizes = np.bincount(index)
    before = np.empty(len(names), dtype=np.int64)
    before[order] = np.cumsum(sizes[order])  # tokens up to and with this document
    unit, of_entry = _unit_of_entry(table), before[index][table.indices]
    rows = []
    for share in shares:
        limit = before[before <= max(share * len(documents), sizes[order[0]])].max()
        fired = np.bincount(unit[of_entry <= limit], minlength=table.shape[1])
        rows.append((int(limit), int((fired >= min_fired).sum())))
    return pd.DataFrame(rows, columns=["tokens", "live"])


def nearest_cosine(decoder: Float[Tensor, "n d_in"], chunk: int = 1024) -> Float[np.ndarray, " n"]:
    """Of each dictionary element (of norm 1) the greatest cosine with another one of the same dictionary."""
    best = torch.empty(len(decoder))
    for start in range(0, len(decoder), chunk):
        cosine = decoder[start:start + chunk] @ decoder.T
        rows = torch.arange(len(cosine))
        cosine[rows, start + rows] = -torch.inf
        best[start:start + chunk] = cosine.amax(1)
    return best.numpy()


# --- features of a context -------------------------------------------------------------------------------------------


def strong(table: csc_array, above: float = 0.5) -> csc_array:
    """A unit table of the strong activations only: those of more than `above` of their unit's maximum.

    Weak activations are many, and say less about a unit than the strong ones, which a reader of its examples looks at.
    """
    unit = _unit_of_entry(table)
    kept = table.data > above * maxima(table)[unit]
    ends = np.append(0, np.cumsum(np.bincount(unit[kept], minlength=table.shape[1])))
    return csc_array((table.data[kept], table.indices[kept], ends), shape=table.shape)


def units_of_context(table: csc_array, is_context: Bool[np.ndarray, " n_tokens"], share: float = 0.5,
                     min_inside: int = 20) -> Int[np.ndarray, " found"]:
    """Units that are specific to a context: at least `share` of the tokens they fire on are in it, and `min_inside` or more.

    The rule finds what it looks for more easily among many units: count those it finds again on other text
    (`count_of_context`).
    """
    fired, inside = np.diff(table.indptr), tokens_inside(table, is_context)
    return np.flatnonzero((inside >= min_inside) & (inside >= share * fired))


def tokens_inside(table: csc_array, is_context: Bool[np.ndarray, " n_tokens"]) -> Int[np.ndarray, " n_units"]:
    """On how many tokens of a context each unit fires."""
    return np.bincount(_unit_of_entry(table)[is_context[table.indices]], minlength=table.shape[1])


def count_of_context(table: csc_array, units: Int[np.ndarray, " chosen"], is_context: Bool[np.ndarray, " n_tokens"],
                     documents: Int[np.ndarray, " n_tokens"], share: float = 0.5,
                     **draws: int) -> tuple[Interval, Bool[np.ndarray, " chosen"]]:
    """How many of the chosen units, and which, have at least `share` of the tokens they fire on in a context, on text that did
    not choose them; a bootstrap over documents (`draws`: its seed and n_boot). A unit that does not fire is not counted.
    """
    if not len(units):
        return Interval(0.0, 0.0, 0.0), np.zeros(0, dtype=bool)
    names, index = np.unique(documents, return_inverse=True)
    members = csc_array((np.ones(len(index)), index, np.arange(len(index) + 1)), shape=(len(names), len(index)))
    fires = table[:, units]
    fires = csc_array((np.ones(fires.nnz), fires.indices, fires.indptr), shape=fires.shape)
    sums = np.concatenate([(members @ part).toarray() for part in (fires.multiply(is_context[:, None]), fires)], axis=1)

    def counted(totals: np.ndarray) -> np.ndarray:
        inside, fired = np.split(totals, 2, axis=-1)
        return (fired > 0) & (inside >= share * fired)

    return bootstrap_interval(sums, lambda totals: counted(totals).sum(-1), **draws), counted(sums.sum(0))


# --- links -----------------------------------------------------------------------------------------------------------


def masked_cosine(a: csc_array, b: csc_array, threshold: float = 0.4, min_fired: int = 10, chunk: int = 256) -> csr_array:
    """Links between the units of two dictionaries: [n_a, n_b], the masked cosines above `threshold` (B17; the paper's fn 32).

    The cosine of the activations of i and j over the tokens that i fires on, or over those that j fires on, whichever is
    larger: a narrow unit is linked to a wide one if, where it fires, the other does likewise. Units of either side that
    fire on fewer than `min_fired` tokens have no links.

    Raises StudyError if the tables are not over the same number of tokens.
    """
    check_same_tokens(a, b)
    (_, aa), (_, bb), rows = column_sums(a), column_sums(b), b.tocsr().astype(np.float64)
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


def links_by_luck(a: csc_array, b: csc_array, n_ctx: int, threshold: float = 0.4, min_fired: int = 10) -> csr_array:
    """The links that `masked_cosine` finds when `b` reads another half of the text than `a`.

    Contexts of `n_ctx` tokens of one table are moved on by half the text, so that whatever fires together does so by chance.
    """
    n_contexts = b.shape[0] // n_ctx
    moved = np.roll(np.arange(b.shape[0]), n_contexts // 2 * n_ctx)
    return masked_cosine(a, b.tocsr()[moved].tocsc(), threshold, min_fired)


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


# --- the map ---------------------------------------------------------------------------------------------------------


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


class Mixed(NamedTuple):
    """How many clusters of a map hold elements of several dictionaries."""

    clusters: int
    mixed: int
    by_luck: float
    """The same, on average, if the elements of the clusters are dealt to the dictionaries at random."""


def mixed_clusters(found: pd.DataFrame, seed: int = 0, n_draws: int = 100) -> Mixed:
    """Whether dictionaries of several widths share their clusters; `found` is a map of `decoder_map`."""
    inside = found[found.cluster >= 0]
    cluster, dictionary = inside.cluster.to_numpy(), inside.dictionary.to_numpy(copy=True)
    rng = numpy_generator(seed, "mixed-clusters")

    def mixed(labels: np.ndarray) -> int:
        pairs = np.unique(np.stack([cluster, labels]), axis=1)
        return int((np.bincount(pairs[0]) > 1).sum()) if len(cluster) else 0

    by_luck = np.mean([mixed(rng.permutation(dictionary)) for _ in range(n_draws)])
    return Mixed(len(np.unique(cluster)), mixed(dictionary), float(by_luck))
