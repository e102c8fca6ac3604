"""Edits along one direction, compared on one case: what they do where they should, and everywhere else (C5)."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch

from sae_lib import effects, erasure, features, punctuation, residual
from sae_lib.evaluate import Text
from sae_lib.seeds import numpy_generator
from sae_lib.study import cases, deep
from sae_lib.study.cases import Unit
from sae_lib.study.parentheses import truths_of
from sae_lib.study.pipeline import Study
from sae_lib.study.tables import flat

EDITS = ("until it stops", "its part", "rank one", "LEACE", "a dimension", "rank one, random")


def rank_one(study: Study, case: str, unit: Unit) -> pd.DataFrame:
    """Edits compared, for the unit of a case ("apostrophe" or "parenthesis").

    A row one of EDITS: edit; wanted (change of the log-likelihood of what rightly follows: "s" after an apostrophe, a closing
    token), collateral (KL where the feature is inactive), spared (KL where it is active though not wanted), norm (of the edit, a
    token), each with _low and _high; untouched: share of tokens that the edit leaves exactly as they are.
    """
    config = cases.draws(study) | {"contexts": study.profile.deep.case_contexts, "text": study.profile.deep.case_text,
                                   "case": case, "unit": unit._asdict(), "edits": EDITS}

    def make(out: Path, _: Path) -> None:
        _compare_edits(study, case, unit).to_json(out / "edits.json", orient="records")

    artefact = study.store.stage(f"case_rank_one_{case}_{unit.after}", config, make, inputs=cases.inputs(study))
    return pd.read_json(artefact.path / "edits.json", orient="records")


def _wanted(study: Study, case: str, text: Text) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of the concept; those of them at which what rightly follows is what the feature is for."""
    if case == "apostrophe":
        concept = punctuation.apostrophes(text.contexts, study.vocabulary)
        return concept, concept & punctuation.followed_by(text.contexts, study.vocabulary, ["s"])
    _, about = truths_of(study, text, punctuation.closing(study.vocabulary))
    return about, about


def _compare_edits(study: Study, case: str, unit: Unit) -> pd.DataFrame:
    model, sae = deep.transformer(study).model, deep.dictionary(study, unit.after).model
    fitted, text, n = study.held_out("validation"), cases.test_text(study), cases.draws(study)
    acts = torch.cat([residual.activations(model, part.long(), unit.after) for part in
                      fitted.contexts.split(features.BATCH_CONTEXTS)]).flatten(0, 1)
    mean, direction, dimension = acts.mean(0), sae.W_dec[unit.number], cases.most_read(study, unit.after, unit.number)
    random = torch.from_numpy(numpy_generator(study.seed, "random direction").standard_normal(len(mean)).astype(np.float32))
    concept = torch.from_numpy(_wanted(study, case, fitted)[0]).flatten()
    edits = {"until it stops": erasure.silence(sae, unit.number), "its part": effects.pin(sae, unit.number, 0.0),
             "rank one": erasure.project_out(direction, mean), "LEACE": erasure.leace(acts, concept),
             "a dimension": erasure.project_out(torch.eye(len(mean))[dimension.number], mean),
             "rank one, random": erasure.project_out(random, mean)}
    wanted = _wanted(study, case, text)[1]
    rows = np.flatnonzero(wanted.any(1))
    rows = np.sort(numpy_generator(study.seed, f"{case} contexts").permutation(rows)[:study.profile.deep.case_contexts])
    contexts, wanted = text.contexts[rows], wanted[rows].ravel()
    active = sae.encode(torch.cat([residual.activations(model, part.long(), unit.after) for part in
                                   contexts.split(features.BATCH_CONTEXTS)]), [unit.number])[..., 0].numpy().ravel() > 0
    real, documents = contexts.numpy().ravel() != 0, flat(text.documents[rows])
    measures = {"wanted": ("likelihood", wanted), "collateral": ("divergence", real & ~active),
                "spared": ("divergence", real & active & ~wanted), "norm": ("norm", real)}
    found = []
    for name, edit in edits.items():
        damage = erasure.damage(model, contexts, unit.after, edit)
        row = {"edit": name, "untouched": float((damage.norm.numpy().ravel()[real] == 0).mean())}
        for measure, (field, chosen) in measures.items():
            value = cases.mean_of(getattr(damage, field).numpy().ravel()[chosen], documents[chosen], n)
            row |= {measure: value.value, f"{measure}_low": value.low, f"{measure}_high": value.high}
        found.append(row)
    return pd.DataFrame(found)
