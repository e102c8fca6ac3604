"""What each unit (feature or neuron) fires on, against the labels of the text and by itself (Bricken et al.; B6, B8-9, B13, B16).

The study's corpus labels every document with its domain, a truth the papers did not have: a unit's Pearson correlation with
"this token belongs to a Hebrew document" asks for specificity and sensitivity at once.

What many units do on a text is kept in a *unit table*: a sparse array [n_tokens, n_units] of the activations above 0, float32,
one column a unit. Tokens are counted through the contexts, one after another; the rows of end-of-text tokens are empty.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from scipy.sparse import csc_array
from torch import Tensor
from tqdm.auto import tqdm

from sae_lib import residual
from sae_lib.activations import Skip
from sae_lib.errors import StudyError
from sae_lib.metrics import Interval, bootstrap_interval, pearson_from_sums, share_interval
from sae_lib.seeds import numpy_generator
from sae_lib.transformer import Transformer

BATCH_CONTEXTS = 32  # contexts that go through the model at once
ENCODED_ROWS = 1024  # tokens encoded at once: their units stay in cache
# Examples of the top and of the bottom interval, and of each of those between.
ENDS, EXAMPLES, LEVELS = 20, 5, 11
SUBSAMPLE = 1000
Target = Float[np.ndarray, " n_tokens"] | Bool[np.ndarray, " n_tokens"]  # a label or a proxy's score of each token

# --- the unit table --------------------------------------------------------------------------------------------------

@torch.no_grad()
def activation_table(model: Transformer, contexts: Int[Tensor, "n_contexts n_ctx"],
                     encode: Callable[[Tensor], Tensor], after: int | None = None, skip: Skip = Skip()) -> csc_array:
    """The unit table of contexts; `encode` maps activations [n, d_in] to those of units [n, n_units], none negative.

    What is encoded is the last layer's MLP activations, or the residual stream `after` so many layers; rows to `skip` are empty.
    A table takes 8 bytes an activation above 0; making it, four times that. Raises StudyError if there is no text.
    """
    found, n_units = [], 0
    for i, batch in enumerate(tqdm(contexts.split(BATCH_CONTEXTS), desc="unit table", unit="batch", leave=False, mininterval=2)):
        acts = residual.activations(model, batch := batch.long(), after)
        kept = (~skip.mask(batch, acts)).flatten().nonzero()[:, 0]
        rows = kept.cpu().numpy() + i * BATCH_CONTEXTS * contexts.shape[1]
        for start in range(0, len(rows), ENCODED_ROWS):
            part = encode(acts.flatten(0, 1)[kept[start:start + ENCODED_ROWS]]).float().cpu().numpy()
            n_units, place = part.shape[1], np.flatnonzero(part > 0)
            row, unit = np.divmod(place, n_units)
            found.append((part.ravel()[place], rows[start + row].astype(np.int32), unit.astype(np.int32)))
    if not found:
        raise StudyError("There are no tokens to make a unit table of; give a corpus with more held-out text.")
    values, tokens, units = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return csc_array((values, (tokens, units)), shape=(contexts.numel(), n_units))


def neurons(acts: Float[Tensor, "n d_mlp"]) -> Float[Tensor, "n d_mlp"]:
    """The `encode` of the neurons themselves."""
    return acts


class Column(NamedTuple):
    """One unit: the tokens it is active on, in order, and its activations there."""

    tokens: Int[np.ndarray, " active"]
    values: Float[np.ndarray, " active"]


def column(table: csc_array, unit: int) -> Column:
    """A unit's column of the table, without a copy."""
    part = slice(table.indptr[unit], table.indptr[unit + 1])
    return Column(table.indices[part], table.data[part])


def densities(table: csc_array) -> Float64[np.ndarray, " n_units"]:
    """Share of all tokens that each unit is active on (B6)."""
    return np.diff(table.indptr) / table.shape[0]


def maxima(table: csc_array) -> Float[np.ndarray, " n_units"]:
    """The greatest activation of each unit; 0 for one that is never active."""
    return table.max(axis=0).toarray()


# --- the unit for a context ------------------------------------------------------------------------------------------

def pearson_with(table: csc_array, target: Target) -> Float64[np.ndarray, " n_units"]:
    """Pearson correlation over all tokens of every unit with a label or a proxy's score, in float64.

    0 for a unit that is never active and for a target that does not vary.
    """
    y, ones = target.astype(np.float64), np.ones(len(target))
    squares = csc_array((np.square(table.data, dtype=np.float64), table.indices, table.indptr), shape=table.shape)
    return np.nan_to_num(pearson_from_sums(len(y), table.T @ ones, y.sum(), squares.T @ ones, y @ y, table.T @ y))


class Found(NamedTuple):
    """A unit and its correlation with what was searched for."""

    unit: int
    pearson: float


def best_unit(table: csc_array, target: Target, at_least: int = 1) -> Found:
    """The search: of all units active on `at_least` tokens or more, the one that correlates best with the target.

    Nobody picks by hand, so the best is the best of `n_units`: measure it on other text than it was found on.

    Raises StudyError if no unit is active on so many tokens.
    """
    allowed = np.diff(table.indptr) >= at_least
    if not allowed.any():
        raise StudyError(f"No unit is active on {at_least} tokens or more; search in more text.")
    correlations = np.where(allowed, pearson_with(table, target), -np.inf)
    unit = int(correlations.argmax())
    return Found(unit, float(correlations[unit]))


def pearson_sums(values: Float[Tensor, "tokens pairs"], target: Bool[Tensor, "tokens pairs"] | Float[Tensor, "tokens pairs"],
                 document: Int[Tensor, " tokens"]) -> Float64[Tensor, "documents 6 pairs"]:
    """Per-document sums (n, x, y, xx, yy, xy) of pairs of a unit and a label or a proxy's score; a bootstrap starts from them."""
    documents, index = torch.unique(document, return_inverse=True)
    x, y = values.double(), target.double()
    terms = torch.stack([torch.ones_like(x), x, y, x * x, y * y, x * y], dim=1)
    return torch.zeros(len(documents), *terms.shape[1:], dtype=torch.float64).index_add_(0, index, terms)


def _pearson(table: csc_array, units: list[int], target: Target, documents: np.ndarray,
             statistic: Callable[[np.ndarray], np.ndarray], **draws: int) -> Interval:
    """A statistic of the correlations [..., units] of units with a target; a draw of documents is the same for all units."""
    values, target = torch.from_numpy(table[:, units].toarray()), torch.from_numpy(target)[:, None].expand(-1, len(units))
    sums = pearson_sums(values, target, torch.from_numpy(documents)).numpy()

    def of_totals(totals: np.ndarray) -> np.ndarray | np.float64:
        terms = np.moveaxis(totals.reshape(*totals.shape[:-1], 6, len(units)), -2, 0)
        return statistic(np.nan_to_num(pearson_from_sums(*terms)))

    return bootstrap_interval(sums.reshape(len(sums), -1), of_totals, **draws)


def pearson_interval(table: csc_array, unit: int, target: Target,
                     documents: Int[np.ndarray, " n_tokens"], **draws: int) -> Interval:
    """Correlation of one unit with a target, 0 where either does not vary; the interval is a bootstrap over documents."""
    return _pearson(table, [unit], target, documents, lambda pearson: pearson[..., 0], **draws)


def pearson_difference(table: csc_array, unit: int, other: int, target: Target,
                       documents: Int[np.ndarray, " n_tokens"], **draws: int) -> Interval:
    """By how much one unit correlates better with a target than another does, with a *paired* bootstrap over documents.

    A document that is hard for one unit is as a rule hard for the other. Drawn for both at once, such documents leave the
    difference alone, where the intervals of the two correlations may overlap although one is greater in every draw.
    """
    return _pearson(table, [unit, other], target, documents, lambda pearson: pearson[..., 0] - pearson[..., 1], **draws)


# --- specificity, sensitivity ----------------------------------------------------------------------------------------

class ByLevel(NamedTuple):
    """A unit's active tokens, in bins of equal width from 0 to its greatest activation."""

    edges: Float64[np.ndarray, " n_bins+1"]
    count: Float64[np.ndarray, " n_bins"]
    """Active tokens."""
    in_context: Float64[np.ndarray, " n_bins"]
    """Those of them that are in the context."""
    weight: Float64[np.ndarray, " n_bins"]
    """The sum of their activations: the paper's "expected value" plot, where `count` is its histogram."""
    weight_in_context: Float64[np.ndarray, " n_bins"]
    share: Float64[np.ndarray, " n_bins"]
    """Specificity at this level: in_context / count; nan where the unit is never as active."""


def specificity_by_level(values: Float[np.ndarray, " active"], is_context: Bool[np.ndarray, " active"],
                         n_bins: int = 20) -> ByLevel:
    """At each level of activation, the share of a unit's active tokens that are in a context (B9).

    `values`: its activations above 0; `is_context`: whether those tokens are in the context, by proxy or label.

    Raises StudyError if the unit is never active.
    """
    if not len(values):
        raise StudyError("This unit is never active here, so it has no activation levels; take a living one or more text.")
    edges = np.linspace(0, float(values.max()), n_bins + 1)
    tally = lambda chosen, weights=None: np.histogram(values[chosen], edges, weights=weights)[0].astype(np.float64)
    everywhere, weights = np.ones(len(values), bool), values.astype(np.float64)
    count, inside = tally(everywhere), tally(is_context)
    share = np.divide(inside, count, out=np.full(n_bins, np.nan), where=count > 0)
    return ByLevel(edges, count, inside, tally(everywhere, weights), tally(is_context, weights[is_context]), share)


def share_sums(inside: Bool[np.ndarray, " tokens"], weights: Float[np.ndarray, " tokens"] | None,
               documents: Int[np.ndarray, " tokens"]) -> Float64[np.ndarray, "documents 2"]:
    """Per-document sums (weight inside, weight) for the bootstrap of a share; without weights each token weighs 1."""
    _, index = np.unique(documents, return_inverse=True)
    weights = np.ones(len(inside)) if weights is None else weights
    return np.stack([np.bincount(index, weights * inside), np.bincount(index, weights)], axis=1)


def specificity(table: csc_array, unit: int, is_context: Bool[np.ndarray, " n_tokens"], documents: Int[np.ndarray, " n_tokens"],
                weighted: bool = False, **draws: int) -> Interval:
    """Share of a unit's active tokens (of its summed activations, if `weighted`) that is in the context, with a bootstrap over
    documents; nan for a unit that is never active.
    """
    acts = table[:, [unit]].toarray()[:, 0]
    return _share(is_context, acts if weighted else (acts > 0).astype(np.float32), documents, **draws)


def sensitivity(table: csc_array, unit: int, is_context: Bool[np.ndarray, " n_tokens"], documents: Int[np.ndarray, " n_tokens"],
                weights: Float[np.ndarray, " n_tokens"] | None = None, **draws: int) -> Interval:
    """Share of the context's tokens, weighted if there are weights, that a unit is active on; nan if the context has none."""
    acts = table[:, [unit]].toarray()[:, 0]
    return _share(acts > 0, is_context * (np.float32(1) if weights is None else weights), documents, **draws)


def _share(inside: np.ndarray, weights: np.ndarray, documents: np.ndarray, **draws: int) -> Interval:
    with np.errstate(invalid="ignore"):  # a draw of documents may leave nothing to share
        return bootstrap_interval(share_sums(inside, weights, documents), lambda t: t[..., 0] / t[..., 1], **draws)


# --- examples --------------------------------------------------------------------------------------------------------

class Intervals(NamedTuple):
    """Examples of a unit at every level of its activation."""

    maximum: float
    """The greatest activation of the subsample; interval k is about maximum * (10 - k) / 10."""
    examples: dict[str, Int[np.ndarray, " examples"]]
    """Positions in the unit's activations, of "Top Activations", "Subsample Interval 0" to "10", and "Bottom Activations"."""


def intervals(values: Float[np.ndarray, " active"], seed: int, unit: int) -> Intervals:
    """The 13 activation intervals of a unit (B13), from its activations above 0.

    Of a random subsample of 1,000 activations (all, if there are fewer), the 5 nearest to each of 11 levels from the subsample's
    maximum down to 0, nearest first; of all activations the 20 greatest, greatest first, and the 20 smallest, smallest first. A
    unit with few activations has the same examples in several intervals.

    Raises StudyError if the unit is never active.
    """
    if not len(values):
        raise StudyError(f"Unit {unit} is never active here, so it has no examples; take a living one or more text.")
    rng = numpy_generator(seed, "intervals", unit)
    chosen = rng.choice(len(values), min(SUBSAMPLE, len(values)), replace=False)
    maximum = float(values[chosen].max())
    bottom, top = _ends(values)
    examples = {"Top Activations": top}
    for k in range(LEVELS):
        level = maximum * (LEVELS - 1 - k) / (LEVELS - 1)
        nearest = np.argsort(np.abs(values[chosen] - level), kind="stable")
        examples[f"Subsample Interval {k}"] = chosen[nearest[:EXAMPLES]]
    return Intervals(maximum, examples | {"Bottom Activations": bottom})


def _ends(values: Float[np.ndarray, " active"]) -> tuple[Int[np.ndarray, " ends"], Int[np.ndarray, " ends"]]:
    """Positions of the 20 smallest activations, smallest first, and of the 20 greatest, greatest first; of all, if fewer.
    Equals keep their order in the first and reverse it in the second, as in a sorted whole, which would take far longer.
    """
    n = min(ENDS, len(values))
    low, high = np.partition(values, (n - 1, len(values) - n))[[n - 1, -n]]
    sort = lambda candidates: candidates[np.argsort(values[candidates], kind="stable")]
    return sort(np.flatnonzero(values <= low))[:n], sort(np.flatnonzero(values >= high))[::-1][:n]


def top_in_context(table: csc_array, is_context: Bool[np.ndarray, " n_tokens"]) -> Int[np.ndarray, " n_units"]:
    """How many of each unit's 20 greatest activations are in a context: the paper's search for neurons (B9)."""
    found = np.zeros(table.shape[1], int)
    for unit in np.flatnonzero(np.diff(table.indptr)).tolist():
        where, values = column(table, unit)
        found[unit] = is_context[where[_ends(values)[1]]].sum()
    return found


def is_single_token(table: csc_array, tokens: Int[np.ndarray, " n_tokens"]) -> Bool[np.ndarray, " n_units"]:
    """Whether the 20 greatest activations of each unit are all on the same token (B16); `tokens` are the token ids.

    Of a unit with fewer all are looked at; one that is never active is no single-token unit.
    """
    single = np.zeros(table.shape[1], bool)
    for unit in np.flatnonzero(np.diff(table.indptr)).tolist():
        where, values = column(table, unit)
        top = tokens[where[_ends(values)[1]]]
        single[unit] = (top == top[0]).all()
    return single


def single_token_share(table: csc_array, tokens: Int[np.ndarray, " n_tokens"]) -> Interval:
    """Share of living units that are single-token units, with Wilson's interval.

    Living are here the units active on 20 tokens or more: of fewer, the 20 greatest activations cannot be asked for.

    Raises StudyError if there is none.
    """
    live = np.diff(table.indptr) >= ENDS
    if not live.any():
        raise StudyError(f"No unit is active on {ENDS} tokens or more; take more text.")
    return share_interval(int(is_single_token(table, tokens)[live].sum()), int(live.sum()))
