"""Which features of one layer make a feature of the next fire: a tree of causes (Cunningham et al., section 5; C5).

Of the contexts in which a target is active between half of its maximum M and M, some are drawn. In each of them every feature of
the layer before is ablated in turn, at all positions and with what the dictionary misses left in place, and the target's
activation is read again. Features are ranked by how much of it is lost; of the first few the same is asked, down to the first
layer.

The first of a thousand candidates is flattered by having been chosen. So a ranking is made in some contexts and its numbers are
measured in others, of other documents; and beside each stands one of those that come nearest to it in activity where the target
is.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Float64, Int
from scipy.sparse import csc_array
from scipy.stats import spearmanr
from torch import Tensor

from sae_lib import features, residual
from sae_lib.errors import StudyError
from sae_lib.evaluate import Text
from sae_lib.metrics import mean_interval
from sae_lib.sae import SAE
from sae_lib.seeds import numpy_generator
from sae_lib.transformer import Transformer

CANDIDATES = 128  # ablated at once
PLACES = 20  # the paper's number of contexts
ALIKE = 3  # features nearest to a cause in activity, of which one is drawn to stand beside it


class Layers(NamedTuple):
    """A model's dictionaries by the number of layers they come after, and what their features are active on in a text."""

    model: Transformer
    dictionaries: Mapping[int, SAE]
    tables: Mapping[int, csc_array]
    """Unit tables of `text`."""
    text: Text


class Effects(NamedTuple):
    """What each feature of the layer before does to a target, at each of some places in the text."""

    lost: Float[np.ndarray, "places n_before"]
    """Share of the target's activation that ablating the feature takes away; below 0 if it adds to it; 0 where it is inactive."""
    active: Bool[np.ndarray, "places n_before"]
    """Whether the feature is active anywhere up to the place."""
    here: Float[np.ndarray, "places n_before"]
    """Its activation at the place itself."""

    @property
    def mean(self) -> Float64[np.ndarray, " n_before"]:
        return self.lost.mean(0, dtype=np.float64)


# --- places ----------------------------------------------------------------------------------------------------------

def strong_places(table: csc_array, feature: int, documents: Int[np.ndarray, " n_tokens"], n: int,
                  seed: int) -> Int[np.ndarray, " places"]:
    """Up to n tokens with an activation in [M/2, M], drawn at random, no two of one document; in random order."""
    where, values = features.column(table, feature)
    if not len(where):
        return where
    strong = where[values >= values.max() / 2]
    order = numpy_generator(seed, "strong places", feature).permutation(strong)
    _, first = np.unique(documents[order], return_index=True)
    return order[np.sort(first)][:n]


# --- ablations -------------------------------------------------------------------------------------------------------

def _before(layers: Layers, after: int, place: int) -> tuple[Float[Tensor, "pos d_model"], Float[Tensor, "pos n_before"]]:
    """The residual stream up to a place after one layer fewer, and its features."""
    row, position = divmod(place, layers.text.contexts.shape[1])
    tokens = layers.text.contexts[row, :position + 1].long()
    resid = residual.activations(layers.model, tokens[None], after - 1)[0]
    return resid, layers.dictionaries[after - 1].encode(resid)


def _lost(layers: Layers, after: int, feature: int, resid: Float[Tensor, "pos d_model"],
          taken: Iterable[Float[Tensor, "n pos d_model"]]) -> Float[np.ndarray, " n"]:
    """Share of the target's activation at the last position that is lost when each of `taken` is subtracted before it."""
    read = lambda x: layers.dictionaries[after].encode(residual.last_after_next(layers.model, x, after - 1), [feature])[:, 0]
    clean = read(resid[None])
    return torch.cat([1 - read(resid - part) / clean for part in taken]).numpy()


@torch.no_grad()
def effects(layers: Layers, after: int, feature: int, places: Int[np.ndarray, " places"],
            candidates: Sequence[int] | None = None) -> Effects:
    """Ablate every feature of the layer before, or the candidates alone, and read a feature `after` so many layers.

    `places` are tokens of the text, counted through its contexts, at which the feature is active.
    """
    n_before = len(layers.dictionaries[after - 1].W_dec)
    allowed = torch.zeros(n_before, dtype=torch.bool)
    allowed[slice(None) if candidates is None else list(candidates)] = True
    lost = np.zeros((len(places), n_before), dtype=np.float32)
    active, here = np.zeros((len(places), n_before), dtype=bool), np.zeros((len(places), n_before), dtype=np.float32)
    directions = layers.dictionaries[after - 1].W_dec
    for i, place in enumerate(places.tolist()):
        resid, codes = _before(layers, after, place)
        fires = (codes > 0).any(0)
        chosen = (fires & allowed).nonzero()[:, 0]
        taken = (codes[:, few].T[..., None] * directions[few][:, None] for few in chosen.split(CANDIDATES) if len(few))
        if len(chosen):
            lost[i, chosen.numpy()] = _lost(layers, after, feature, resid, taken)
        active[i], here[i] = fires.numpy(), codes[-1].numpy()
    return Effects(lost, active, here)


@torch.no_grad()
def together(layers: Layers, after: int, feature: int, places: Int[np.ndarray, " places"],
             group: Sequence[int]) -> Float[np.ndarray, " places"]:
    """Share of a target's activation that is lost when a group of features of the layer before is ablated at once."""
    directions, found = layers.dictionaries[after - 1].W_dec[list(group)], []
    for place in places.tolist():
        resid, codes = _before(layers, after, place)
        found.append(_lost(layers, after, feature, resid, [(codes[:, list(group)] @ directions)[None]])[0])
    return np.array(found, dtype=np.float32)


# --- causes ----------------------------------------------------------------------------------------------------------

class Causes(NamedTuple):
    """What a target owes to the layer before."""

    table: pd.DataFrame
    """A row a feature: feature; kind ("cause", one of the first few, or "alike", for each of them one of those nearest to it in
    activity where the target is); ranked: share lost in the contexts that ranked it; value, low, high: in others; active: share
    of those others in which it is active at the target's place; here: its mean activation there; cosine: of its direction and
    the target's, near 1 if it is the same feature a layer earlier. Last a row "together" of all causes."""
    ranking: Effects
    """All features in the contexts of the ranking."""


def causes(layers: Layers, after: int, feature: int, n_causes: int, n_places: int = PLACES, seed: int = 0,
           n_boot: int = 1000) -> Causes:
    """Rank the features of the layer before by what their ablation takes from a feature, and measure the first few anew.

    Raises StudyError if there is no dictionary a layer before, or if the feature is strong in fewer than four documents.
    """
    if after - 1 not in layers.dictionaries:
        raise StudyError(f"There is no dictionary after {after - 1} layers, so a feature after {after} has no causes here; take "
                         "one of a later layer.")
    documents = layers.text.documents.flatten().numpy()
    places = strong_places(layers.tables[after], feature, documents, 2 * n_places, seed)
    if len(places) < 4:
        raise StudyError(f"Feature {feature} after {after} layers is strongly active in {len(places)} documents, too few to rank "
                         "causes in some and measure them in others; take a commoner one or more text.")
    ranked_in, checked_in = places[::2], places[1::2]
    ranking = effects(layers, after, feature, ranked_in)
    chosen = np.argsort(-ranking.mean, kind="stable")[:n_causes]
    alike = _alike(ranking, chosen, numpy_generator(seed, f"alike after {after}", feature))
    check = effects(layers, after, feature, checked_in, [*chosen.tolist(), *alike.tolist()])
    normal = torch.nn.functional.normalize
    cosine = normal(layers.dictionaries[after - 1].W_dec, dim=1) @ normal(layers.dictionaries[after].W_dec[feature], dim=0)
    rows = [{"feature": int(unit), "kind": kind, "ranked": ranking.mean[unit],
             **mean_interval(check.lost[:, unit], seed=seed, n_boot=n_boot)._asdict(),
             "active": (check.here[:, unit] > 0).mean(), "here": check.here[:, unit].mean(), "cosine": float(cosine[unit])}
            for kind, units in (("cause", chosen), ("alike", alike)) for unit in units]
    joint = {"feature": -1, "kind": "together", "ranked": np.nan, "active": np.nan, "here": np.nan, "cosine": np.nan,
             **mean_interval(together(layers, after, feature, checked_in, chosen.tolist()), seed=seed, n_boot=n_boot)._asdict()}
    return Causes(pd.DataFrame([*rows, joint]), ranking)


def _alike(ranking: Effects, chosen: Int[np.ndarray, " chosen"], rng: np.random.Generator) -> Int[np.ndarray, " chosen"]:
    """For each chosen feature another: one of the three, at random, that are nearest to it in activity at the target's places.

    Nearest are those active at nearly as many of the places; of them, those of nearly the same mean activation there.
    """
    often, strength, found = (ranking.here > 0).sum(0), ranking.here.mean(0), []
    for unit in chosen:
        nearest = np.lexsort((np.abs(strength - strength[unit]), np.abs(often - often[unit])))
        nearest = nearest[~np.isin(nearest, [*chosen, *found])][:ALIKE]
        found.append(int(rng.choice(nearest)))
    return np.array(found, dtype=int)


def grow(layers: Layers, after: int, feature: int, branches: Sequence[int], n_places: int = PLACES, seed: int = 0,
         n_boot: int = 1000) -> pd.DataFrame:
    """The tree of a feature's causes: `branches[0]` of them a layer before, `branches[1]` of each of these, and so on.

    A row a node: node, parent (-1: the target itself), after, feature, and the columns of `Causes.table`; features alike and the
    rows "together" are leaves of their target. So is a cause of the first dictionary, or strong in too few documents.

    Raises StudyError as `causes` does, for the target itself.
    """
    rows = [{"node": 0, "parent": -1, "after": after, "feature": feature, "kind": "target"}]
    level = rows[:1]
    for branch in branches:
        following = []
        for node in level:
            try:
                found = causes(layers, node["after"], node["feature"], branch, n_places, seed, n_boot)
            except StudyError:
                if node["parent"] == -1:
                    raise
                continue
            for row in found.table.to_dict("records"):
                row = {"node": len(rows), "parent": node["node"], "after": node["after"] - 1} | row
                rows.append(row)
                following += [row] * (row["kind"] == "cause")
        level = following
    return pd.DataFrame(rows)


# --- the method that failed in the paper -----------------------------------------------------------------------------

class Guess(NamedTuple):
    """How well weights alone tell the causal ranking of a target's causes."""

    encoder: float
    """Spearman correlation of the share lost with the cosine of each feature's direction and what the target reads."""
    decoder: float
    """The same with the target's own direction."""
    first: bool
    """Whether the greatest cosine with what the target reads is the greatest cause."""


def weight_guess(before: SAE, target: SAE, feature: int, ranking: Effects) -> Guess:
    """Compare a ranking with cosines of weights, over the features that are active in at least one of its contexts."""
    candidates = ranking.active.any(0)
    lost, directions = ranking.mean[candidates], torch.nn.functional.normalize(before.W_dec, dim=1)
    cosines = [(directions @ torch.nn.functional.normalize(reads, dim=0)).numpy()[candidates]
               for reads in (target.W_enc[:, feature], target.W_dec[feature])]
    encoder, decoder = (float(spearmanr(lost, cosine).statistic) for cosine in cosines)
    return Guess(encoder, decoder, bool(lost.argmax() == cosines[0].argmax()))
