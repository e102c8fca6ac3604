"""Automated interpretability: examples of what a unit fires on, explanations of them, and how well these predict (B13-B15).

A unit is one column of a unit table: a feature, a neuron, a PCA or ICA component, a random direction. An explainer is shown
some examples and says in words what the unit fires on; the explanation then has to predict the unit's activations on examples
that it was not made from, and which tokens the unit makes more likely. The score alone flatters units that fire on one token
(B16), so the score on logits belongs beside it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from scipy import stats
from scipy.sparse import csc_array
from torch import Tensor
from tqdm.auto import tqdm

from sae_lib import features
from sae_lib.activations import ActivationStream
from sae_lib.errors import StudyError
from sae_lib.metrics import Interval
from sae_lib.seeds import numpy_generator

WINDOW = 9
MIN_EXAMPLES = 20
RANDOM, ELSEWHERE = "random", "top tokens elsewhere"
SHOWN_LOGITS = 10
# Examples of the top interval, of each other interval, random, of top tokens in other contexts: 49 and 60 (B14).
EXPLAIN, SCORE = (10, 2, 5, 10), (6, 2, 10, 20)

Intervals = Mapping[str, np.ndarray]


class Unanswered(StudyError):
    """An explainer gave no usable answer for one unit; `score_units` counts such units and goes on."""


class Examples(NamedTuple):
    """Windows of tokens, 9 unless told, with the unit's activations, quantised to the levels 0-9."""

    tokens: Int[np.ndarray, "n width"]
    levels: Int[np.ndarray, "n width"]
    """floor(10 * activation / the unit's largest), at most 9."""
    index: Int[np.ndarray, " n"]
    """The token, in flat order, that the window was drawn for: its centre, unless the context ends too near."""
    source: Sequence[str]
    """The name of the interval, "random" or "top tokens elsewhere"."""
    weight: Float[np.ndarray, " n"]
    """Importance (B14): 1 if random, else density * share of the unit's activations in the example's tenth of the maximum."""


@runtime_checkable
class Explanation(Protocol):
    """What an explainer says of a unit, able to be put to the test."""

    text: str

    def simulate(self, windows: Int[np.ndarray, "n width"]) -> Float[np.ndarray, "n width"]:
        """The level, 0-9, that the explanation expects on every token."""

    def logits(self, tokens: Int[np.ndarray, " k"]) -> Bool[np.ndarray, " k"]:
        """Which of these tokens the explanation expects among those that the unit makes more likely."""


@runtime_checkable
class Explainer(Protocol):
    def explain(self, examples: Examples, top_logits: Int[np.ndarray, " top"],
                bottom_logits: Int[np.ndarray, " bottom"]) -> Explanation:
        """An explanation from examples and the tokens with the largest and smallest logit weights, most extreme first.

        Raises Unanswered if there is none.
        """


# --- examples --------------------------------------------------------------------------------------------------------

class FlatText:
    """The tokens of held-out text in flat order, and where each of them occurs."""

    def __init__(self, contexts: Int[Tensor, "n_contexts n_ctx"]):
        """Raises StudyError if contexts are shorter than a window."""
        self.n_ctx = contexts.shape[1]
        if self.n_ctx < WINDOW:
            raise StudyError(f"Contexts of {self.n_ctx} tokens are too short for windows of {WINDOW}; use longer contexts.")
        self.tokens = contexts.flatten().numpy()
        self._order = np.argsort(self.tokens, kind="stable")
        self._starts = np.searchsorted(self.tokens[self._order], np.arange(self.tokens.max() + 2))

    def some_place(self, tokens: Int[np.ndarray, " n"], rng: np.random.Generator) -> Int[np.ndarray, " n"]:
        """For each token the flat index of one of its occurrences, drawn at random."""
        first = self._starts[tokens]
        return self._order[first + rng.integers(self._starts[tokens + 1] - first)]

    def windows(self, index: Int[np.ndarray, " n"], width: int = WINDOW) -> Int[np.ndarray, "n width"]:
        """Flat indices of the `width` tokens around each token, moved inwards where the context ends."""
        position = index % self.n_ctx
        start = np.clip(position - width // 2, 0, self.n_ctx - width) + index - position
        return start[:, None] + np.arange(width)


def sample_examples(text: FlatText, indices: Int[np.ndarray, " active"], values: Float[np.ndarray, " active"],
                    intervals: Intervals, seed: int, unit: int) -> tuple[Examples, Examples] | None:
    """Examples to explain one unit from (up to 49) and others to score it on (up to 60, shuffled) (B14).

    `indices` are the tokens that the unit is active on, rising, and `values` its activations there; `intervals`, of which the
    first is the top one, index these. "Top tokens elsewhere" are other places, outside the top examples' contexts, where the
    tokens stand that the top examples are about. A window whose tokens were drawn before is left out, in either set: the same
    licence in two files must not be both shown and asked. Nor is a window asked that overlaps one shown, which would give
    answers away. None if fewer than 20 windows of intervals are left.
    """
    if len(indices) < MIN_EXAMPLES:
        return None
    rng, maximum = numpy_generator(seed, "examples", unit), values.max()
    tenth = lambda activations: np.rint(np.minimum(10 * activations / maximum, 10)).astype(int)
    density, share = len(values) / len(text.tokens), np.bincount(tenth(values), minlength=11) / len(values)
    names = list(intervals)
    pools = {name: indices[rng.permutation(intervals[name])] for name in names}
    at_random = rng.integers(len(text.tokens), size=200)
    tops = indices[intervals[names[0]]]
    elsewhere = text.some_place(rng.choice(text.tokens[tops], 200), rng)
    pools[RANDOM] = at_random[text.tokens[at_random] != ActivationStream.END_OF_TEXT]
    pools[ELSEWHERE] = elsewhere[~np.isin(elsewhere // text.n_ctx, tops // text.n_ctx)]

    seen: set[bytes] = set()

    def draw(counts: tuple[int, int, int, int], shown: Sequence[tuple[int, str]] = ()) -> list[tuple[int, str]]:
        taken = set(text.windows(np.array([index for index, _ in shown], dtype=int)).ravel().tolist())
        wanted = dict.fromkeys(names, counts[1]) | {names[0]: counts[0], RANDOM: counts[2], ELSEWHERE: counts[3]}
        drawn: list[tuple[int, str]] = []
        for source, n in wanted.items():
            for index, window in zip(pools[source].tolist(), text.windows(pools[source]), strict=True):
                key = text.tokens[window].tobytes()
                if not n:
                    break
                if key not in seen and taken.isdisjoint(window.tolist()):
                    seen.add(key)
                    drawn.append((index, source))
                    n -= 1
        return drawn

    def examples(drawn: list[tuple[int, str]]) -> Examples:
        index, source = np.array([i for i, _ in drawn]), [name for _, name in drawn]
        activations = activations_at(indices, values, text.windows(index))
        own = share[tenth(activations_at(indices, values, index))]
        weight = np.where(np.array(source) == ELSEWHERE, share[10], own) * density
        weight[np.array(source) == RANDOM] = 1
        levels = np.minimum(np.floor(10 * activations / maximum), 9).astype(int)
        return Examples(text.tokens[text.windows(index)], levels, index, source, weight)

    explain = draw(EXPLAIN)
    score = draw(SCORE, explain)
    if sum(source in intervals for _, source in explain + score) < MIN_EXAMPLES:
        return None
    return examples(explain), examples([score[i] for i in rng.permutation(len(score))])


def activations_at(indices: Int[np.ndarray, " active"], values: Float[np.ndarray, " active"],
                   where: Int[np.ndarray, "*tokens"]) -> Float[np.ndarray, "*tokens"]:
    """A sparse column's activations at some tokens, 0 where it has none."""
    found = np.minimum(np.searchsorted(indices, where), len(indices) - 1)
    return np.where(indices[found] == where, values[found], 0.0)


# --- scores ----------------------------------------------------------------------------------------------------------

def activation_scores(predicted: Float[np.ndarray, "n 9"], examples: Examples) -> dict[str, float]:
    """Correlation of predicted and true levels over all tokens: spearman (the paper's), pearson, and importance (B14).

    importance: Spearman with each token weighted by its example's importance, which asks mostly about random text.
    A prediction that is the same everywhere scores 0.
    """
    x, y, weight = predicted.ravel(), examples.levels.ravel(), np.repeat(examples.weight, WINDOW)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return dict.fromkeys(("spearman", "pearson", "importance"), 0.0)
    ranks = (_weighted_ranks(x, weight), _weighted_ranks(y, weight))
    return {"spearman": float(stats.spearmanr(x, y).statistic), "pearson": float(stats.pearsonr(x, y).statistic),
            "importance": _weighted_pearson(*ranks, weight)}


def interval_scores(predicted: Float[np.ndarray, "n 9"], examples: Examples, own: Bool[np.ndarray, "n 9"]) -> dict[str, float]:
    """How well a prediction holds in each interval: how often it ranks a token of the interval above a silent one.

    `own` marks the token that each window was drawn for, and its prediction is what counts. Silent are the tokens at level 0 of
    the random windows. Ties count half: 0.5 is chance, 1 is perfect; nothing is returned where there is nothing silent.
    """
    source = np.array(examples.source)
    silent = predicted[source == RANDOM][examples.levels[source == RANDOM] == 0]
    if not len(silent):
        return {}
    of_example = predicted[own][:, None]
    above = (of_example > silent).mean(1) + (of_example == silent).mean(1) / 2
    names = [name for name in dict.fromkeys(examples.source) if name not in (RANDOM, ELSEWHERE)]
    return {name: float(above[source == name].mean()) for name in names}


def like_the_top(intervals: Intervals, labels: Int[np.ndarray, " active"]) -> dict[str, float]:
    """In each interval the share of examples with the label that most examples of the top interval have.

    `labels` are of the tokens that the unit is active on: their ids, say, or their documents' domains.
    """
    names = list(intervals)
    most = np.bincount(labels[intervals[names[0]]]).argmax()
    return {name: float((labels[intervals[name]] == most).mean()) for name in names}


def _weighted_ranks(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The weight of everything smaller, and half the weight of what is equal."""
    _, index = np.unique(x, return_inverse=True)
    mass = np.bincount(index, weights=weight)
    return (np.cumsum(mass) - mass / 2)[index]


def _weighted_pearson(x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> float:
    covariance = np.cov(x, y, aweights=weight)
    scale = np.sqrt(covariance[0, 0] * covariance[1, 1])
    return float(covariance[0, 1] / scale) if scale > 0 else 0.0


def _descending(weights: np.ndarray) -> np.ndarray:
    return np.argsort(-weights, kind="stable")[:np.isfinite(weights).sum()]  # nan is sorted last


def logit_question(weights: Float[np.ndarray, " d_vocab"], seed: int,
                   unit: int) -> tuple[Int[np.ndarray, " 100"], Bool[np.ndarray, " 100"]]:
    """100 tokens, shuffled, and whether each has one of the 11th to 60th largest logit weights; the others are random (B15).

    The ten largest are kept for the explainer, and random tokens are not among the 60 largest. Tokens whose weight is nan,
    because they are not used, are left out. Chance is 50 %. Raises StudyError if fewer than 110 tokens are used.
    """
    rng, order = numpy_generator(seed, "logits", unit), _descending(weights)
    if len(order) < 110:
        raise StudyError(f"A vocabulary of {len(order)} tokens is too small for the logit score; use one of 110 or more.")
    tokens = np.concatenate([order[SHOWN_LOGITS:60], rng.choice(order[60:], 50, replace=False)])
    shuffled = rng.permutation(100)
    return tokens[shuffled], shuffled < 50


def score_units(table: csc_array, contexts: Int[Tensor, "n_contexts n_ctx"], units: Iterable[int], explainer: Explainer,
                logit_weights: Float[Tensor, "n_units d_vocab"] | None = None, seed: int = 0) -> pd.DataFrame:
    """Explain some units of a table and score the explanations on other examples (B14) and on logits (B15).

    `logit_weights` has a row for each column of the table. Returns one row a unit: unit, active (tokens), shown and asked
    (examples), spearman, pearson, importance, logit (share of 100 right; nan without `logit_weights`), logit_of_another (the same
    for the explanation of the unit before, which knows nothing of this one: what chance gives), text, dropped ("" or why there
    is no score); and by the names of the intervals the `interval_scores`.
    Raises StudyError if table and contexts are not of the same text.
    """
    if table.shape[0] != contexts.numel():
        raise StudyError(f"The unit table has {table.shape[0]} tokens and the text {contexts.numel()}; give the text it was made "
                         "from.")
    text, rows, another = FlatText(contexts), [], None
    for unit in tqdm([int(unit) for unit in units], desc="explain and score", unit="unit", leave=False, mininterval=2):
        indices, values = features.column(table, unit)
        row = {"unit": unit, "active": len(indices), "shown": 0, "asked": 0, "text": "", "dropped": ""}
        row |= dict.fromkeys(("spearman", "pearson", "importance", "logit", "logit_of_another"), np.nan)
        rows.append(row)
        enough = len(indices) >= MIN_EXAMPLES
        intervals = features.intervals(values, seed, unit).examples if enough else {}
        examples = sample_examples(text, indices, values, intervals, seed, unit) if enough else None
        if examples is None:
            row["dropped"] = f"fewer than {MIN_EXAMPLES} examples"
            continue
        weights = logit_weights[unit].numpy() if logit_weights is not None else None
        shown, asked = examples
        order = _descending(weights) if weights is not None else np.zeros(0, dtype=int)
        try:
            explanation = explainer.explain(shown, order[:SHOWN_LOGITS], order[::-1][:SHOWN_LOGITS])
            predicted = explanation.simulate(asked.tokens)
            scores = activation_scores(predicted, asked)
            scores |= interval_scores(predicted, asked, text.windows(asked.index) == asked.index[:, None])
            if weights is not None:
                tokens, positive = logit_question(weights, seed, unit)
                scores["logit"] = float((explanation.logits(tokens) == positive).mean())
                if another is not None:
                    scores["logit_of_another"] = float((another.logits(tokens) == positive).mean())
        except Unanswered as error:
            row["dropped"] = str(error)
            continue
        another = explanation
        row |= {"shown": len(shown.tokens), "asked": len(asked.tokens), "text": explanation.text} | scores
    return pd.DataFrame(rows)


def unit_interval(scores: Iterable[float], statistic: Callable = np.median, n_boot: int = 1000, seed: int = 0,
                  level: float = 0.95) -> Interval:
    """A statistic (median, or mean) over units with its bootstrap interval, drawing units with replacement; nan is left out.

    Raises StudyError if fewer than two units have a score.
    """
    known = np.array([score for score in scores if not np.isnan(score)])
    if len(known) < 2:
        raise StudyError(f"An interval needs at least two scored units and there are {len(known)}; score more units.")
    draws = numpy_generator(seed, "units").choice(known, (n_boot, len(known)))
    low, high = np.quantile(statistic(draws, axis=1), [(1 - level) / 2, (1 + level) / 2])
    value = float(statistic(known))
    return Interval(value, min(value, float(low)), max(value, float(high)))
