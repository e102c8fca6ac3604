"""What the case studies of notebook 12 share: unit tables between layers, units, and what measuring and ablating them takes.

Features are searched for on validation text and measured on test text. Beside each stand dimensions of the residual stream,
read like features: how far a dimension is above its mean, or below it.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse
import torch
from jaxtyping import Bool, Float, Int
from scipy.sparse import csc_array
from torch import Tensor

from sae_lib import effects, erasure, features, residual
from sae_lib.evaluate import LabelCorrelations, Text, held_out_pass, mean_activation
from sae_lib.metrics import Interval, bootstrap_interval
from sae_lib.residual import ResidualEdit
from sae_lib.seeds import numpy_generator
from sae_lib.splitting import strong
from sae_lib.study import deep
from sae_lib.study.artefacts import Artefact
from sae_lib.study.pipeline import Study
from sae_lib.study.tables import flat

LEVELS = 12  # bins of activation
SAMPLE_CONTEXTS = 128  # over which a dimension's mean and standard deviation are taken


def layers(study: Study) -> range:
    """Numbers of layers after which there is a dictionary."""
    return range(1, study.profile.deep.transformer.n_layers + 1)


def inputs(study: Study) -> list[Artefact]:
    """What every case study is made from."""
    return [study.tokens_artefact, deep.transformer(study).artefact,
            *(deep.dictionary(study, after).artefact for after in layers(study))]


def draws(study: Study) -> dict[str, int]:
    return {"seed": study.seed, "n_boot": study.profile.bootstrap}


def table(study: Study, after: int, split: str) -> csc_array:
    """The unit table of `study.held_out(split)` of the dictionary after so many layers."""
    text, model, dictionary = study.held_out(split), deep.transformer(study), deep.dictionary(study, after)

    def make(out: Path, _: Path) -> None:
        found = features.activation_table(model.model, text.contexts, dictionary.model.encode, after)
        scipy.sparse.save_npz(out / "table.npz", found, compressed=False)

    artefact = study.store.stage(f"deep_table_{after}_{split}", {"contexts": len(text.contexts)}, make, reference=False,
                                 inputs=[study.tokens_artefact, model.artefact, dictionary.artefact])
    return csc_array(scipy.sparse.load_npz(artefact.path / "table.npz"))


def test_text(study: Study) -> Text:
    """The text that chosen units are measured on: test contexts at even distances, more of them than there are unit tables of."""
    text = study.held_out("test", whole=True)
    step = max(1, len(text.contexts) // study.profile.deep.case_text)
    return Text(*(values[::step] for values in text))


# --- what the dictionaries are ---------------------------------------------------------------------------------------

MEASURES = ("l0", "explained variance", "loss recovered (zero)", "loss recovered (mean)", "perplexity", "perplexity, untouched",
            "perplexity, times")
EVERY = 3  # of the held-out contexts one is read: the losses take most of the time


def quality(study: Study) -> pd.DataFrame:
    """Columns after, measure (one of MEASURES), value, low, high: each dictionary on held-out text."""
    text = Text(*(values[::EVERY] for values in study.held_out("test")))

    def one(after: int) -> list[dict]:
        found = held_out_pass(deep.transformer(study).model, text, deep.dictionary(study, after).model, after)
        perplexity = lambda name: bootstrap_interval(found.document_sums(name), lambda t: np.exp(t[..., 0] / t[..., 1]),
                                                     **draws(study))
        values = (found.average("l0", **draws(study)), found.explained_variance(**draws(study)),
                  *(found.loss_recovered(kind, **draws(study)) for kind in ("zero", "mean")), perplexity("dictionary"),
                  perplexity("clean"), bootstrap_interval(found.document_sums("dictionary", "clean"),
                                                          lambda t: np.exp((t[..., 0] - t[..., 1]) / t[..., 2]), **draws(study)))
        return [{"after": after, "measure": name, **value._asdict()} for name, value in zip(MEASURES, values, strict=True)]

    def make(out: Path, _: Path) -> None:
        rows = [row for after in layers(study) for row in one(after)]
        pd.DataFrame(rows).to_json(out / "quality.json", orient="records")

    config = draws(study) | {"contexts": len(text.contexts), "measures": MEASURES}
    artefact = study.store.stage("case_quality", config, make, inputs=inputs(study))
    return pd.read_json(artefact.path / "quality.json", orient="records")


# --- units and what they fire on -------------------------------------------------------------------------------------

class Unit(NamedTuple):
    """A feature, or half of a dimension of the residual stream: above its mean (sign 1) or below it (-1)."""

    after: int
    number: int
    sign: int = 0
    """0 for a feature."""


def mean_of_stream(study: Study, after: int) -> Float[Tensor, " d_model"]:
    """The mean of the residual stream after so many layers, over some validation text."""
    return mean_activation(deep.transformer(study).model, study.held_out("validation").first(SAMPLE_CONTEXTS), after)


def encoder(study: Study, units: Sequence[Unit]) -> Callable[[Tensor], Tensor]:
    """The `encode` of some units of one place in the stream."""
    after = units[0].after
    sae = deep.dictionary(study, after).model
    numbers = [unit.number for unit in units if not unit.sign]
    dims = [unit for unit in units if unit.sign]
    mean = mean_of_stream(study, after)

    def encode(acts: Float[Tensor, "n d_model"]) -> Float[Tensor, "n n_units"]:
        found = {unit: values for unit, values in zip([u for u in units if not u.sign], sae.encode(acts, numbers).T, strict=True)}
        found |= {unit: ((acts - mean)[:, unit.number] * unit.sign).relu() for unit in dims}
        return torch.stack([found[unit] for unit in units], 1)

    return encode


def best_dimension(study: Study, after: int, target: Bool[np.ndarray, "n_contexts n_ctx"], text: Text) -> Unit:
    """Of all half dimensions the one that correlates best with a target in a text."""
    model = deep.transformer(study).model
    mean, d_model = mean_of_stream(study, after), model.cfg.d_model
    found, label = LabelCorrelations(2 * d_model, 2), torch.from_numpy(target)
    for tokens, wanted in zip(text.contexts.split(features.BATCH_CONTEXTS), label.split(features.BATCH_CONTEXTS), strict=True):
        acts = residual.activations(model, tokens.long(), after).flatten(0, 1) - mean
        found.update(torch.cat([acts, -acts], 1).relu(), wanted.flatten().long())
    best = int(found.pearson()[:, 1].argmax())
    return Unit(after, best % d_model, 1 if best < d_model else -1)


def most_read(study: Study, after: int, feature: int) -> Unit:
    """The half dimension that moves a feature most: the greatest encoder weight times the dimension's standard deviation."""
    sample = study.held_out("validation").first(SAMPLE_CONTEXTS).contexts.long()
    acts = residual.activations(deep.transformer(study).model, sample, after)
    weights = deep.dictionary(study, after).model.W_enc[:, feature]
    number = int((weights.abs() * acts.flatten(0, 1).std(0)).argmax())
    return Unit(after, number, 1 if weights[number] > 0 else -1)


class Read(NamedTuple):
    """What some units of one place in the stream are active on in a text."""

    units: Sequence[Unit]
    table: csc_array
    """Its columns are the units."""

    def column(self, unit: Unit) -> features.Column:
        return features.column(self.table, self.units.index(unit))


def read(study: Study, units: Sequence[Unit], text: Text) -> Read:
    """Units of one place in the stream, in a text."""
    model = deep.transformer(study).model
    return Read(units, features.activation_table(model, text.contexts, encoder(study, units), units[0].after))


def measured(study: Study, units: Read, text: Text, target: np.ndarray, wider: np.ndarray) -> pd.DataFrame:
    """Each unit against a target (and a wider one) on a text: a row a unit.

    share, wider: of its activation; strong, strong_wider: of its tokens above half of its maximum.
    """
    documents, n, rows, found = flat(text.documents), draws(study), [], units.table
    strongly = strong(found)
    for i, unit in enumerate(units.units):
        numbers = {"pearson": features.pearson_interval(found, i, target, documents, **n),
                   "share": features.specificity(found, i, target, documents, weighted=True, **n),
                   "wider": features.specificity(found, i, wider, documents, weighted=True, **n),
                   "strong": features.specificity(strongly, i, target, documents, **n),
                   "strong_wider": features.specificity(strongly, i, wider, documents, **n),
                   "sensitivity": features.sensitivity(found, i, target, documents, **n)}
        rows.append(unit._asdict() | {"active": int(found.indptr[i + 1] - found.indptr[i])}
                    | {f"{name}{end}": getattr(value, field) for name, value in numbers.items()
                       for end, field in (("", "value"), ("_low", "low"), ("_high", "high"))})
    return pd.DataFrame(rows)


def levels(units: Read, unit: Unit, truths: dict[str, np.ndarray]) -> pd.DataFrame:
    """A unit's active tokens and summed activation by level, split by the truths, of which the first that holds counts."""
    where, values = units.column(unit)
    rest, rows = np.ones(len(where), dtype=bool), []
    truths = truths | {"anything else": np.ones(units.table.shape[0], dtype=bool)} if len(where) else {}
    for name, truth in truths.items():
        inside = rest & truth[where]
        rest &= ~inside
        level = features.specificity_by_level(values, inside, LEVELS)
        rows += [{"truth": name, "level": (low + high) / 2, "width": high - low, "tokens": n, "weight": weight}
                 for low, high, n, weight in zip(level.edges, level.edges[1:], level.in_context, level.weight_in_context,
                                                 strict=False)]
    return pd.DataFrame(rows, columns=["truth", "level", "width", "tokens", "weight"])


# --- what ablating them does -----------------------------------------------------------------------------------------

class Shift(NamedTuple):
    """Logits at some places, as they are and with an edit at all positions."""

    clean: Float[Tensor, "places d_vocab"]
    edited: Float[Tensor, "places d_vocab"]


def some_places(study: Study, chosen: Int[np.ndarray, " n"], purpose: str) -> Int[np.ndarray, " places"]:
    """As many of some tokens as the profile averages over, at random."""
    return numpy_generator(study.seed, purpose).permutation(chosen)[:study.profile.deep.case_places]


def shift(study: Study, text: Text, after: int, edit: ResidualEdit, places: Int[np.ndarray, " places"]) -> Shift:
    """Logits at places of a text, without and with an edit."""
    rows, positions = (torch.from_numpy(part) for part in np.divmod(places, text.contexts.shape[1]))
    model = deep.transformer(study).model
    if not len(places):
        return Shift(*torch.zeros(2, 0, model.cfg.d_vocab))
    return Shift(*(erasure.logits_at(model, text.contexts[rows], after, which, positions) for which in (None, edit)))


def mean_of(values: Float[np.ndarray, " places"], documents: Int[np.ndarray, " places"], n: dict[str, int]) -> Interval:
    """Mean over places with a bootstrap over documents; nan if they are of fewer than two."""
    if len(np.unique(documents)) < 2:
        return Interval(math.nan, math.nan, math.nan)
    return effects.mean_effect(values, np.ones(len(values), dtype=bool), documents, **n)
