"""Edits along one direction, compared on one case: what they break where they do as much of what they are for (C5)."""

from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int

from sae_lib import erasure, features, punctuation, residual
from sae_lib.errors import StudyError
from sae_lib.evaluate import Text
from sae_lib.metrics import Interval, bootstrap_interval
from sae_lib.residual import ResidualEdit
from sae_lib.seeds import numpy_generator
from sae_lib.study import cases, deep
from sae_lib.study.cases import Unit
from sae_lib.study.parentheses import truths_of
from sae_lib.study.pipeline import Study
from sae_lib.study.tables import flat

LEAST = "until it stops"
EDITS = (LEAST, "rank one", "LEACE", "rank one, random")
STRENGTHS = tuple(2.0 ** (-n / 2) for n in range(12, -1, -1))
BROKEN = ("absent", "active")


class Compared(NamedTuple):
    """Edits at several strengths; nan where one cannot be made, or has nothing to be measured on."""

    curves: pd.DataFrame
    """A row an edit and strength: edit, strength; wanted (change of the log-likelihood of what rightly follows: "s" after an
    apostrophe, a closing token), absent (KL where the concept is absent), active (KL where the feature is active and none of this
    is wanted), each with _low and _high, in nats; untouched: share of tokens that are left exactly as they are."""
    ratios: pd.DataFrame
    """What LEAST breaks over what another edit breaks at the strength at which it does as much: edit, measure (one of BROKEN),
    value, low, high, with a paired bootstrap over documents; draws in which LEAST does nothing of what it is for are left out."""


def rank_one(study: Study, case: str, unit: Unit) -> Compared:
    """Edits compared, for the unit of a case ("apostrophe" or "parenthesis")."""
    config = cases.draws(study) | {"contexts": study.profile.deep.case_contexts, "text": study.profile.deep.case_text,
                                   "case": case, "unit": unit._asdict(), "edits": EDITS, "strengths": STRENGTHS,
                                   "measures": BROKEN}

    def make(out: Path, _: Path) -> None:
        for name, table in _compare(study, case, unit)._asdict().items():
            table.to_json(out / f"{name}.json", orient="records")

    artefact = study.store.stage(f"case_rank_one_{case}_{unit.after}", config, make, inputs=cases.inputs(study))
    return Compared(*(pd.read_json(artefact.path / f"{name}.json", orient="records") for name in Compared._fields))


def _wanted(study: Study, case: str, text: Text) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of the concept; those of them at which what rightly follows is what the feature is for."""
    if case == "apostrophe":
        concept = punctuation.apostrophes(text.contexts, study.vocabulary)
        return concept, concept & punctuation.followed_by(text.contexts, study.vocabulary, ["s"])
    _, about = truths_of(study, text, punctuation.closing(study.vocabulary))
    return about, about


def _edits(study: Study, case: str, unit: Unit) -> dict[str, ResidualEdit]:
    """Those of EDITS that can be made: some features read nothing of their own direction, some text lacks the concept."""
    model, sae, fitted = deep.transformer(study).model, deep.dictionary(study, unit.after).model, study.held_out("validation")
    acts = torch.cat([residual.activations(model, part.long(), unit.after)
                      for part in fitted.contexts.split(features.BATCH_CONTEXTS)]).flatten(0, 1)
    concept, mean = torch.from_numpy(_wanted(study, case, fitted)[0]).flatten(), acts.mean(0)
    random = torch.from_numpy(numpy_generator(study.seed, "random direction").standard_normal(len(mean)).astype(np.float32))
    found = {}
    for name, edit in ((LEAST, lambda: erasure.silence(sae, unit.number)), ("LEACE", lambda: erasure.leace(acts, concept)),
                       ("rank one", lambda: erasure.project_out(sae.W_dec[unit.number], mean)),
                       ("rank one, random", lambda: erasure.project_out(random, mean))):
        with suppress(StudyError):
            found[name] = edit()
    return found


def _compare(study: Study, case: str, unit: Unit) -> Compared:
    model, text, n = deep.transformer(study).model, cases.test_text(study), cases.draws(study)
    concept, wanted = _wanted(study, case, text)
    rows = np.flatnonzero(wanted.any(1))
    rows = np.sort(numpy_generator(study.seed, f"{case} contexts").permutation(rows)[:study.profile.deep.case_contexts])
    text, concept, wanted = Text(*(values[rows] for values in text)), concept[rows].ravel(), wanted[rows].ravel()
    documents = flat(text.documents)
    edits = {(name, strength): erasure.part_of_the_way(edit, strength)
             for name, edit in (_edits(study, case, unit) if len(rows) else {}).items() for strength in STRENGTHS}
    real, active = flat(text.contexts) != 0, np.zeros(len(documents), dtype=bool)
    if len(rows):
        active[cases.read(study, [unit], text).column(unit).tokens] = True
    chosen = {"wanted": wanted, "absent": real & ~concept, "active": real & active & ~wanted}
    curves, sums = [], {}
    for (name, strength), found in (erasure.damage(model, text.contexts, unit.after, edits) if edits else {}).items():
        row = {"edit": name, "strength": strength, "untouched": float((found.norm.numpy().ravel()[real] == 0).mean())}
        for measure, where in chosen.items():
            values = (found.likelihood if measure == "wanted" else found.divergence).numpy().ravel()
            value = cases.mean_of(values[where], documents[where], n)
            row |= {measure: value.value, f"{measure}_low": value.low, f"{measure}_high": value.high}
            sums[name, strength, measure] = _by_document(values, where, documents)
        curves.append(row)
    columns = ["edit", "strength", *(f"{name}{end}" for name in chosen for end in ("", "_low", "_high")), "untouched"]
    every = pd.MultiIndex.from_product([EDITS, STRENGTHS], names=columns[:2])
    known = pd.DataFrame(curves, columns=columns).set_index(columns[:2]).reindex(every).reset_index()
    ratios = [{"edit": edit, "measure": measure, **_at_equal_effect(sums, edit, measure, n)._asdict()}
              for edit in EDITS[1:] for measure in BROKEN]
    return Compared(known, pd.DataFrame(ratios))


def _by_document(values: Float[np.ndarray, " n"], where: Bool[np.ndarray, " n"],
                 documents: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n_documents"]:
    _, index = np.unique(documents, return_inverse=True)
    return np.bincount(index, values * where)


def _at_equal_effect(sums: dict[tuple, np.ndarray], edit: str, measure: str, draws: dict[str, int]) -> Interval:
    """One of `Compared.ratios`, from sums over each document's tokens, whose counts are alike for both edits."""
    if any((name, 1.0, "wanted") not in sums for name in (LEAST, edit)) or len(sums[edit, 1.0, "wanted"]) < 2:
        return Interval(np.nan, np.nan, np.nan)
    curve = [sums[edit, strength, of] for of in ("wanted", measure) for strength in STRENGTHS]
    columns = np.stack([sums[LEAST, 1.0, "wanted"], sums[LEAST, 1.0, measure], *curve], 1)

    def ratios(totals: Float[np.ndarray, "*n sums"]) -> Float[np.ndarray, "*n"]:
        drawn = totals.reshape(-1, totals.shape[-1])
        return np.array([row[1] / damage_at(-row[0], *(row[2:].reshape(2, -1) * [[-1], [1]])) for row in drawn]
                        ).reshape(totals.shape[:-1])

    return bootstrap_interval(columns, ratios, **draws)


def damage_at(effect: float, effects: Float[np.ndarray, " strengths"], damages: Float[np.ndarray, " strengths"]) -> float:
    """What an edit breaks at the least strength at which it does so much, on straight lines of log damage against log effect
    between some strengths; nan if it does not do so much, or does more at the least of them.
    """
    rising = (effects > 0) & (damages > 0) & (np.arange(len(effects)) <= effects.argmax())
    if effect <= 0 or not rising.any():
        return np.nan
    reached, broken = np.log(np.maximum.accumulate(effects[rising])), np.log(damages[rising])
    return float(np.exp(np.interp(np.log(effect), reached, broken, left=np.nan, right=np.nan)))
