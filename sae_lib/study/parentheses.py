"""A feature of the last layer for closing parentheses: found by what it writes, measured by what it fires on (C5)."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool

from sae_lib import effects, features, punctuation
from sae_lib.evaluate import Text
from sae_lib.study import cases, deep
from sae_lib.study.cases import Unit
from sae_lib.study.pipeline import Study
from sae_lib.study.tables import flat
from sae_lib.study.widths import used_tokens

TOP = 10  # most raised tokens that are looked at
COMMON = 100  # a feature for parentheses is active on as many validation tokens
CANDIDATES = 5  # features with the most closing tokens among those they raise


class Parenthesis(NamedTuple):
    """The search for closing-parenthesis features and what was found."""

    units: pd.DataFrame
    """Features of the last layer that raise closing tokens most, the first first, and last the dimension that correlates best
    with "a parenthesis is open and the next token closes". number, sign; raises (token ids, most raised first), closing (how many
    of these close), weight (mean logit weight of closing tokens, in standard deviations); active; and with intervals pearson and
    sensitivity for that truth, share of activation where it holds, wider: where a parenthesis is open, and strong, strong_wider:
    the same of strong activations (`cases.measured`)."""
    levels: pd.DataFrame
    """Of the first: truth, level, width, tokens, weight."""
    effect: pd.DataFrame
    """place, edit, value, low, high: mean probability that the next token closes."""
    base: dict[str, float]
    """Shares of all tokens at which a parenthesis is open, and open and about to be closed; and the maximum that was pinned."""


PINNED_AT = ("active, parenthesis open", "inactive, parenthesis open", "nothing open")


def parenthesis(study: Study) -> Parenthesis:
    """Search the last layer for features that raise ")" and its variants, and measure when they do."""
    after = cases.layers(study)[-1]

    def make(out: Path, _: Path) -> None:
        closes, text = punctuation.closing(study.vocabulary), cases.test_text(study)
        ranked, searched = _by_weights(study, after, closes), study.held_out("validation")
        dimension = cases.best_dimension(study, after, truths_of(study, searched, closes)[1], searched)
        chosen = [Unit(after, int(number)) for number in ranked.number] + [dimension]
        opened, about = (truth.ravel() for truth in truths_of(study, text, closes))
        units = cases.read(study, chosen, text)
        measured = cases.measured(study, units, text, about, opened)
        measured.merge(ranked.assign(sign=0), on=["number", "sign"], how="left").to_json(out / "units.json", orient="records")
        splits = {"open, and closed next": about, "open": opened}
        cases.levels(units, chosen[0], splits).to_json(out / "levels.json", orient="records")
        maximum = float(features.maxima(units.table)[0])
        effect = _closing_probabilities(study, text, units.column(chosen[0]).tokens, opened, closes, chosen[0], maximum)
        effect.to_json(out / "effect.json", orient="records")
        (out / "base.json").write_text(json.dumps({"open": float(opened.mean()), "closed next": float(about.mean()),
                                                   "maximum": maximum}))

    config = cases.draws(study) | {"strong": True, "contexts": study.profile.held_out_contexts,
                                   "text": study.profile.deep.case_text,
                                   "places": study.profile.deep.case_places, "levels": cases.LEVELS, "top": TOP,
                                   "common": COMMON, "candidates": CANDIDATES}
    artefact = study.store.stage("case_parenthesis", config, make, inputs=cases.inputs(study))
    read = lambda name: pd.read_json(artefact.path / f"{name}.json", orient="records")
    return Parenthesis(read("units"), read("levels"), read("effect"), json.loads((artefact.path / "base.json").read_text()))


def truths_of(study: Study, text: Text, closes: Bool[np.ndarray, " d_vocab"]) -> tuple[np.ndarray, np.ndarray]:
    """Whether a parenthesis is open after each token; whether it is and the next token closes one."""
    opened, about = punctuation.depth(text.contexts, study.vocabulary) > 0, np.zeros(text.contexts.shape, dtype=bool)
    about[:, :-1] = opened[:, :-1] & closes[text.contexts.numpy()][:, 1:]
    return opened, about


def _by_weights(study: Study, after: int, closes: Bool[np.ndarray, " d_vocab"]) -> pd.DataFrame:
    """The features that raise closing tokens most, of those that are common enough."""
    model, sae, used = deep.transformer(study).model, deep.dictionary(study, after).model, used_tokens(study)
    weights = effects.logit_weights(model, sae.W_dec, used, of_residual=True)
    scaled = (weights / weights[:, used].std(1, keepdim=True))[:, used & torch.from_numpy(closes)].mean(1)
    active = torch.from_numpy(np.diff(cases.table(study, after, "validation").indptr))
    scaled = scaled.masked_fill(active < min(COMMON, int(active.max())), -torch.inf)
    raised = weights.nan_to_num(-torch.inf).topk(TOP).indices
    order = scaled.nan_to_num(-torch.inf).argsort(descending=True, stable=True)[:CANDIDATES]
    return pd.DataFrame([{"number": i, "weight": scaled[i].item(), "closing": int(closes[raised[i].numpy()].sum()),
                          "raises": raised[i].tolist()} for i in order.tolist()])


def _closing_probabilities(study: Study, text: Text, fires: np.ndarray, opened: np.ndarray, closes: np.ndarray, unit: Unit,
                           maximum: float) -> pd.DataFrame:
    """How likely a closing token is with the feature as it is, ablated, and held at its maximum."""
    sae, active = deep.dictionary(study, unit.after).model, np.zeros(len(opened), dtype=bool)
    active[fires] = True
    text_tokens = flat(text.contexts) != 0
    where = (active & opened, ~active & opened & text_tokens, ~active & ~opened & text_tokens)
    rows = []
    for place, chosen in zip(PINNED_AT, where, strict=True):
        places = cases.some_places(study, np.flatnonzero(chosen), place)
        documents = flat(text.documents)[places]
        for name, value in (("ablated", 0.0), ("held at its maximum", maximum)):
            edit = effects.pin(sae, unit.number, value)
            found = cases.shift(study, text, unit.after, edit, places)
            before, changed = (part.softmax(-1)[:, torch.from_numpy(closes)].sum(1).numpy() for part in found)
            columns = (("as it is", before), (name, changed), (f"{name}: change", changed - before))
            rows += [{"place": place, "edit": edit_name, **cases.mean_of(values, documents, cases.draws(study))._asdict()}
                     for edit_name, values in columns]
    return pd.DataFrame(rows).drop_duplicates(["place", "edit"])
