"""Apostrophe features: found by the paper's sentence and by correlation, measured, ablated (Cunningham et al., section 5)."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from sae_lib import effects, erasure, features, punctuation, residual
from sae_lib.evaluate import Text
from sae_lib.study import cases, deep
from sae_lib.study.cases import Unit
from sae_lib.study.pipeline import Study
from sae_lib.study.tables import flat
from sae_lib.study.widths import fires_on

PROBE = " I don't know about that. It is now up to Dave'"
"""The paper's sentence."""
PROBED = 4  # most active features at its last token
KINDS = {"'s": ("s",), "n't": ("t",), "'ll, 've, 'd, 're, 'm": ("ll", "ve", "d", "re", "m")}
"""Apostrophes by what follows them."""
ABLATED = ("feature", "dimension it reads most")
LOWERED = 12  # tokens that an ablation makes less likely: as many are listed


class Apostrophe(NamedTuple):
    """The search for apostrophe features and what was found."""

    probe: pd.DataFrame
    """The most active features at the last token of PROBE: after, feature, activation, share (of the feature's activation on the
    test text that is on apostrophes), fires_on (token ids)."""
    units: pd.DataFrame
    """A row a unit and layer. after, number, sign; role: "feature" (best on validation text), "best dimension" or "dimension it
    reads most"; chosen_by: validation correlation of the feature; active; and pearson, share, wider (of any token with the sign),
    strong, strong_wider, sensitivity (`cases.measured`), each with _low and _high, on `cases.test_text`."""
    levels: pd.DataFrame
    """Of the best feature and the dimension it reads most: role, truth, level, width, tokens, weight."""
    kinds: pd.DataFrame
    """The best feature for each of KINDS: kind, after, feature, pearson (test), and the share of its activation on apostrophes
    of each kind, as columns named like the kinds, and "other"."""
    effect: pd.DataFrame
    """What ablating does where the best feature is active on an apostrophe, of the LOWERED tokens whose probability falls most,
    "s" and "t": role (one of ABLATED), token, logit (mean change of its logit, beyond that of the mean token: a change of all
    alike changes nothing), probability (mean change of its probability), and for "s" and "t" low and high, of the probability,
    and logit_low and logit_high."""
    scale: dict[str, float]
    """places; by role the rank of "s" among the tokens whose logit falls ("... logit") and whose probability falls ("...
    probability"); and the probability of "s" as it is."""

    @property
    def best(self) -> pd.Series:
        """The row of the feature with the highest validation correlation of all layers."""
        rows = self.units[self.units.role == "feature"]
        return rows.loc[rows.chosen_by.idxmax()]


def token(study: Study, text: str) -> int:
    """The last of the tokens that spell a text: byte-level vocabularies have single characters twice."""
    return max(i for i, token in enumerate(study.vocabulary) if token == text.encode())


def _probe(study: Study) -> pd.DataFrame:
    tokens, rows = study.tokens.tokenizer.encode(PROBE).ids[-study.profile.tokens.n_ctx:], []
    text, model = study.held_out("test"), deep.transformer(study).model
    truth = flat(torch.from_numpy(punctuation.apostrophes(text.contexts, study.vocabulary)))
    for after in cases.layers(study):
        acts = residual.activations(model, torch.tensor([tokens]), after)[0, -1]
        found, units = deep.dictionary(study, after).model.encode(acts), cases.table(study, after, "test")
        listed = fires_on(units, flat(text.contexts))
        for feature in found.topk(PROBED).indices.tolist():
            where, values = features.column(units, feature)
            rows.append({"after": after, "feature": feature, "activation": found[feature].item(),
                         "share": float(values[truth[where]].sum() / values.sum()) if len(values) else math.nan,
                         "fires_on": [int(t) for t in listed[feature] if t >= 0]})
    return pd.DataFrame(rows)


def apostrophe(study: Study) -> Apostrophe:
    """Search for apostrophe features, by the paper's sentence and by correlation, and measure them."""
    def make(out: Path, _: Path) -> None:
        texts = study.held_out("validation"), cases.test_text(study)
        truths = [punctuation.apostrophes(text.contexts, study.vocabulary) for text in texts]
        kinds = [{kind: truth & punctuation.followed_by(text.contexts, study.vocabulary, texts_after)
                  for kind, texts_after in KINDS.items()} for text, truth in zip(texts, truths, strict=True)]
        searched = {after: _search(study, after, texts[0], truths[0], kinds[0]) for after in cases.layers(study)}
        units = {after: cases.read(study, found.units, texts[1]) for after, found in searched.items()}
        signs = punctuation.has_sign(study.vocabulary)[flat(texts[1].contexts)]
        measured = pd.concat([_measured(study, found, units[after], texts[1], truths[1], signs)
                              for after, found in searched.items()], ignore_index=True)
        after = int(measured.after[measured[measured.role == "feature"].chosen_by.idxmax()])
        roles = {role: searched[after].roles[role] for role in ABLATED}
        splits = {"apostrophes in words": truths[1].ravel(), "the same sign, elsewhere": signs}
        levels = [cases.levels(units[after], unit, splits).assign(role=role) for role, unit in roles.items()]
        effect, scale = _effect(study, roles, units[after], texts[1], truths[1].ravel())
        tables = {"probe": _probe(study), "units": measured, "levels": pd.concat(levels, ignore_index=True), "effect": effect,
                  "kinds": _kinds(study, {after: found.kinds for after, found in searched.items()}, units, texts[1], kinds[1])}
        for name, found in tables.items():
            found.to_json(out / f"{name}.json", orient="records", double_precision=6)
        (out / "scale.json").write_text(json.dumps(scale))

    config = cases.draws(study) | {"effect": ["logit", "probability"], "strong": True,
                                   "contexts": study.profile.held_out_contexts, "text": study.profile.deep.case_text,
                                   "places": study.profile.deep.case_places, "probe": PROBE, "kinds": KINDS,
                                   "levels": cases.LEVELS}
    artefact = study.store.stage("case_apostrophe", config, make, inputs=cases.inputs(study), version=2)
    read = lambda name: pd.read_json(artefact.path / f"{name}.json", orient="records")
    return Apostrophe(*(read(name) for name in ("probe", "units", "levels", "kinds", "effect")),
                      json.loads((artefact.path / "scale.json").read_text()))


class _Searched(NamedTuple):
    """What validation text says of one layer."""

    roles: dict[str, Unit]
    chosen_by: float
    kinds: dict[str, tuple[Unit, float]]
    """The best feature for each of KINDS and its correlation."""

    @property
    def units(self) -> list[Unit]:
        """Each once."""
        return list(dict.fromkeys([*self.roles.values(), *(unit for unit, _ in self.kinds.values())]))


def _search(study: Study, after: int, text: Text, truth: np.ndarray, kinds: dict[str, np.ndarray]) -> _Searched:
    units = cases.table(study, after, "validation")
    best = features.best_unit(units, truth.ravel())
    roles = {"feature": Unit(after, best.unit), "best dimension": cases.best_dimension(study, after, truth, text),
             "dimension it reads most": cases.most_read(study, after, best.unit)}
    of_kinds = {kind: features.best_unit(units, target.ravel()) for kind, target in kinds.items()}
    return _Searched(roles, best.pearson, {kind: (Unit(after, found.unit), found.pearson) for kind, found in of_kinds.items()})


def _measured(study: Study, found: _Searched, units: cases.Read, text: Text, truth: np.ndarray,
              signs: np.ndarray) -> pd.DataFrame:
    rows = cases.measured(study, units, text, truth.ravel(), signs)
    chosen = [units.units.index(unit) for unit in found.roles.values()]
    return rows.iloc[chosen].assign(role=list(found.roles), chosen_by=found.chosen_by)


def _kinds(study: Study, chosen: dict[int, dict[str, tuple[Unit, float]]], units: dict[int, cases.Read], text: Text,
           kinds: dict[str, np.ndarray]) -> pd.DataFrame:
    """The best feature for each kind of apostrophe, of all layers, and how its activation is shared among the kinds."""
    rows = []
    for kind, wanted in kinds.items():
        after = max(chosen, key=lambda after: chosen[after][kind][1])
        unit, found = chosen[after][kind][0], units[after]
        where, values = found.column(unit)
        total = values.sum() if len(values) else math.nan
        shares = {name: float(values[truth.ravel()[where]].sum() / total) for name, truth in kinds.items()}
        value = features.pearson_interval(found.table, found.units.index(unit), wanted.ravel(), flat(text.documents),
                                          **cases.draws(study))
        rows.append({"kind": kind, "after": after, "feature": unit.number, "tokens": int(wanted.sum()), "pearson": value.value,
                     "low": value.low, "high": value.high} | shares | {"other": 1 - sum(shares.values())})
    return pd.DataFrame(rows)


def _effect(study: Study, roles: dict[str, Unit], units: cases.Read, text: Text,
            truth: np.ndarray) -> tuple[pd.DataFrame, dict[str, float]]:
    """Mean change of logits where the feature is active on apostrophes, if it, or a dimension, is ablated."""
    unit = roles["feature"]
    model, sae = deep.transformer(study).model, deep.dictionary(study, unit.after).model
    where = units.column(unit).tokens
    places = cases.some_places(study, where[truth[where]], "apostrophe places")
    documents, scale, tables = flat(text.documents)[places], {"places": float(len(places))}, []
    mean, said = cases.mean_of_stream(study, unit.after), [token(study, "s"), token(study, "t")]
    axis = torch.eye(len(mean))[roles["dimension it reads most"].number]
    for role, edit in zip(ABLATED, (effects.pin(sae, unit.number, 0.0), erasure.project_out(axis, mean)), strict=True):
        found = cases.shift(study, text, unit.after, edit, places)
        change = {"logit": found.edited - found.clean, "probability": found.edited.softmax(1) - found.clean.softmax(1)}
        change["logit"] -= change["logit"].mean(1, keepdim=True)
        average = {name: values.numpy().mean(0) if len(places) else np.full(model.cfg.d_vocab, math.nan)
                   for name, values in change.items()}
        rows = pd.DataFrame({"role": role, "token": range(model.cfg.d_vocab), **average})
        for name, end in (("logit", "logit_"), ("probability", "")):
            scale[f"{role} {name}"] = float((average[name] < average[name][said[0]]).sum() + 1)
            for letter in said:
                value = cases.mean_of(change[name][:, letter].numpy(), documents, cases.draws(study))
                rows.loc[letter, [f"{end}low", f"{end}high"]] = value.low, value.high
        scale["probability of s"] = float(found.clean.softmax(1)[:, said[0]].mean()) if len(places) else math.nan
        tables.append(rows.loc[sorted({*rows.probability.nsmallest(LOWERED).index, *said})])
    return pd.concat(tables, ignore_index=True), scale
