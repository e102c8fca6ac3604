"""Automated interpretability as Cunningham et al. score it (section 3, App. A; C3): fragments of 64 tokens.

A unit is explained from 5 of its 20 strongest fragments and scored on 5 others of them and on 5 random ones: the correlation of
predicted and true activations over all of their tokens. The paper's GPT-4 explains and its GPT-3.5 simulates; here any
`interpret.Explainer` does both, so that numbers can be compared with each other and not with the paper's.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from scipy import stats
from scipy.sparse import csc_array
from tqdm.auto import tqdm

from sae_lib import features
from sae_lib.errors import StudyError
from sae_lib.interpret import Examples, Explainer, Unanswered
from sae_lib.seeds import numpy_generator

FRAGMENT = 64
TOP, EACH = 20, 5  # strongest fragments looked at; of them shown, of them asked, and of the random ones asked
LEVELS = 10


class Drawn(NamedTuple):
    """Fragments of one unit, by number."""

    shown: Int[np.ndarray, " 5"]
    strong: Int[np.ndarray, " 5"]
    random: Int[np.ndarray, " 5"]


def cut(tokens: Int[np.ndarray, " n_tokens"],
        n_ctx: int) -> tuple[Int[np.ndarray, "n_fragments width"], Bool[np.ndarray, " n_fragments"]]:
    """The text in fragments that no context's end goes through, and which of them are the first of their kind: what stands in
    two files must not be both shown and asked.

    The end of a context that is not filled by a fragment is left out. Raises StudyError if a context is shorter than one.
    """
    if n_ctx < FRAGMENT:
        raise StudyError(f"Contexts of {n_ctx} tokens are too short for fragments of {FRAGMENT}; use longer contexts.")
    found = as_fragments(tokens, n_ctx)
    new = np.zeros(len(found), dtype=bool)
    new[np.unique(found, axis=0, return_index=True)[1]] = True
    return found, new


def as_fragments(values: np.ndarray, n_ctx: int) -> np.ndarray:
    """Values of tokens, in flat order, in the shape of fragments [n_fragments, width]."""
    whole = n_ctx // FRAGMENT * FRAGMENT
    return values.reshape(-1, n_ctx)[:, :whole].reshape(-1, FRAGMENT)


def draw(acts: Float[np.ndarray, "n_fragments width"], allowed: Bool[np.ndarray, " n_fragments"], seed: int,
         unit: int) -> Drawn | None:
    """5 fragments to explain from and 5 to ask, out of the 20 with the greatest activations, and 5 random ones of the rest.

    All of them are allowed, and the unit's activation varies on them; None if it varies on fewer than 25.
    """
    varied = np.flatnonzero(allowed & (np.ptp(acts, axis=1) > 0))
    if len(varied) < TOP + EACH:
        return None
    rng = numpy_generator(seed, "fragments", unit)
    strongest = varied[np.argsort(-acts[varied].max(1), kind="stable")[:TOP]]
    top = rng.permutation(strongest)[:2 * EACH]
    return Drawn(top[:EACH], top[EACH:], rng.permutation(np.setdiff1d(varied, strongest))[:EACH])


def levels(acts: Float[np.ndarray, "*n width"], maximum: float) -> Int[np.ndarray, "*n width"]:
    """Activations as whole numbers from 0 to 10, of the unit's greatest."""
    return np.rint(LEVELS * acts / maximum).astype(int)


def correlation(predicted: Float[np.ndarray, "n width"], true: Float[np.ndarray, "n width"]) -> float:
    """Pearson's over all tokens; 0 if the prediction is the same everywhere, nan if the truth is."""
    if np.ptp(predicted) == 0 or np.ptp(true) == 0:
        return 0.0 if np.ptp(true) else np.nan
    return float(stats.pearsonr(predicted.ravel(), true.ravel()).statistic)


def score_units(table: csc_array, tokens: Int[np.ndarray, " n_tokens"], n_ctx: int, units: Iterable[int], explainer: Explainer,
                seed: int = 0) -> pd.DataFrame:
    """Explain some units of a table and score the explanations on other fragments.

    One row a unit: unit, varied (fragments on which it varies), top_random (the paper's score: 5 strong and 5 random fragments),
    random_only (its control), text, dropped ("" or why there is no score). Explainers see activations as whole levels; what they
    predict is compared with activations as they are.
    Raises StudyError if table and text are not of the same tokens, or contexts are too short.
    """
    if table.shape[0] != len(tokens):
        raise StudyError(f"The unit table has {table.shape[0]} tokens and the text {len(tokens)}; give the text it was made "
                         "from.")
    pieces, allowed = cut(tokens, n_ctx)
    none, rows = np.zeros(0, dtype=int), []
    for unit in tqdm([int(unit) for unit in units], desc="explain and score", unit="unit", leave=False, mininterval=2):
        where, values = features.column(table, unit)
        dense = np.zeros(len(tokens), dtype=np.float32)
        dense[where] = values
        acts = as_fragments(dense, n_ctx)
        drawn = draw(acts, allowed, seed, unit)
        row = {"unit": unit, "varied": int((np.ptp(acts, axis=1) > 0).sum()), "top_random": np.nan, "random_only": np.nan,
               "text": "", "dropped": ""}
        rows.append(row)
        if drawn is None:
            row["dropped"] = f"varies on fewer than {TOP + EACH} fragments"
            continue
        # Explainers speak of levels up to 9.
        seen = np.minimum(levels(acts[drawn.shown], float(dense.max())), 9)
        shown = Examples(pieces[drawn.shown], seen, drawn.shown * FRAGMENT, ["Top fragments"] * EACH, np.ones(EACH))
        try:
            explanation = explainer.explain(shown, none, none)
            asked = np.concatenate([drawn.strong, drawn.random])
            predicted = explanation.simulate(pieces[asked])
        except Unanswered as error:
            row["dropped"] = str(error)
            continue
        row |= {"top_random": correlation(predicted, acts[asked]), "text": explanation.text,
                "random_only": correlation(predicted[EACH:], acts[drawn.random])}
    return pd.DataFrame(rows)
