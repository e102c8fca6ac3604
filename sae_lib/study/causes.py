"""The trees of causes that notebook 12 draws, and how well weights alone would have told them, over many features (C5)."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from sae_lib import causal_tree
from sae_lib.causal_tree import Layers, strong_places
from sae_lib.errors import StudyError
from sae_lib.seeds import numpy_generator
from sae_lib.study import cases, deep
from sae_lib.study.cases import Unit
from sae_lib.study.pipeline import Study
from sae_lib.study.tables import flat
from sae_lib.study.widths import fires_on

COLUMNS = ("node", "parent", "after", "feature", "kind", "ranked", "value", "low", "high", "active", "here", "cosine",
           "fires_on")
SURVEYED = ("after", "feature", "cosine", "first", "alike", "together", "there", "alike_there", "encoder", "decoder", "hit")


def _layers(study: Study) -> Layers:
    return Layers(deep.transformer(study).model, {after: deep.dictionary(study, after).model for after in cases.layers(study)},
                  {after: cases.table(study, after, "test") for after in cases.layers(study)}, study.held_out("test"))


def _sizes(study: Study) -> dict:
    return cases.draws(study) | {"places": study.profile.deep.tree_places, "contexts": study.profile.held_out_contexts}


def tree(study: Study, name: str, unit: Unit) -> pd.DataFrame:
    """`causal_tree.grow` for a feature, with what each node fires on (token ids); empty if it is too rare to ask for causes."""
    def make(out: Path, _: Path) -> None:
        found = _layers(study)
        try:
            grown = causal_tree.grow(found, unit.after, unit.number, study.profile.deep.tree_branches,
                                     study.profile.deep.tree_places, **cases.draws(study))
        except StudyError:
            grown = pd.DataFrame(columns=COLUMNS)
        tokens = flat(found.text.contexts)
        listed = {after: fires_on(units, tokens) for after, units in found.tables.items()}
        grown["fires_on"] = [[int(t) for t in listed[after][feature] if t >= 0] if feature >= 0 else []
                             for after, feature in zip(grown.after, grown.feature, strict=True)]
        grown.to_json(out / "tree.json", orient="records")

    config = _sizes(study) | {"unit": unit._asdict(), "branches": study.profile.deep.tree_branches}
    artefact = study.store.stage(f"case_tree_{name}", config, make, inputs=cases.inputs(study), version=2)
    return pd.read_json(artefact.path / "tree.json", orient="records").reindex(columns=COLUMNS)


def survey(study: Study) -> pd.DataFrame:
    """The causes of features drawn at random, of every layer but the first.

    They are drawn among those that are strong in as many documents as ranking and measuring want. A row a feature: after,
    feature; cosine (of the greatest cause with it); first, alike (share lost on ablating the greatest cause, and one of those
    nearest to it in activity where the target is), together (the first four), all measured where they were not ranked; there,
    alike_there: mean activation of the greatest cause and of the other at those places; encoder, decoder, hit: `weight_guess`.
    """
    def one(found: Layers, after: int, feature: int) -> dict:
        causes = causal_tree.causes(found, after, feature, 4, study.profile.deep.tree_places, **cases.draws(study))
        first, alike, together = (causes.table[causes.table.kind == kind].iloc[0] for kind in ("cause", "alike", "together"))
        guess = causal_tree.weight_guess(found.dictionaries[after - 1], found.dictionaries[after], feature, causes.ranking)
        return {"after": after, "feature": feature, "cosine": first.cosine, "first": first.value, "alike": alike.value,
                "together": together.value, "there": first.here, "alike_there": alike.here, "encoder": guess.encoder,
                "decoder": guess.decoder, "hit": guess.first}

    def make(out: Path, _: Path) -> None:
        found = _layers(study)
        rows = [one(found, after, feature) for after in cases.layers(study)[1:] for feature in _drawn(study, found, after)]
        pd.DataFrame(rows).to_json(out / "survey.json", orient="records")

    config = _sizes(study) | {"surveyed": study.profile.deep.surveyed}
    artefact = study.store.stage("case_survey", config, make, inputs=cases.inputs(study), version=2)
    return pd.read_json(artefact.path / "survey.json", orient="records").reindex(columns=SURVEYED)


def _drawn(study: Study, found: Layers, after: int) -> Sequence[int]:
    """Features of a layer at random, of those that are strong in as many documents as ranking and measuring want."""
    documents, wanted, drawn = flat(found.text.documents), 2 * study.profile.deep.tree_places, []
    for feature in numpy_generator(study.seed, "surveyed features", after).permutation(found.tables[after].shape[1]).tolist():
        if len(drawn) == study.profile.deep.surveyed:
            break
        if len(strong_places(found.tables[after], feature, documents, wanted, study.seed)) == wanted:
            drawn.append(feature)
    return drawn
