"""Six kinds of unit, sampled, explained and scored on the same text: what notebook 05 compares."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from scipy.sparse import csc_array
from torch import Tensor

from sae_lib import baselines, effects, endpoint, explain, features, interpret, rubric
from sae_lib.activations import ActivationStream
from sae_lib.errors import StudyError
from sae_lib.evaluate import Text
from sae_lib.metrics import Interval, share_interval
from sae_lib.seeds import numpy_generator
from sae_lib.study import paths
from sae_lib.study.artefacts import Artefact
from sae_lib.study.pipeline import Study
from sae_lib.study.rater import Shown
from sae_lib.study.tables import flat
from sae_lib.transformer import Transformer, mlp_activations

KINDS = {"feature": "features", "neuron": "neurons", "pca": "PCA", "ica": "ICA", "random_direction": "random directions",
         "random_weights": "random weights' features"}
DICTIONARIES = ("feature", "random_weights")  # whose units are rare, so that many fit a table
CANDIDATES = 4  # units drawn for each that is scored
ICA_ROUNDS = 100
INTERVALS = ("Top Activations", *(f"Subsample Interval {k}" for k in range(features.LEVELS)), "Bottom Activations")
RATED_KINDS, RATED_UNITS = ("feature", "neuron", "random_weights"), 4
RATED_INTERVALS, RATED_WIDTH = ("Top Activations", "Subsample Interval 5"), 21


class Kind(NamedTuple):
    """One way to cut a transformer's activations into units."""

    model: Transformer
    write: Float[Tensor, "n_units d_mlp"]
    """What each unit adds to the activations."""
    encode: Callable[[Tensor, Tensor], Tensor]
    """Activations [n, d_mlp] and numbers of units to the activations of these units."""
    inputs: list[Artefact]


class Scores(NamedTuple):
    units: pd.DataFrame
    """One row a scored unit: the columns of `interpret.score_units`; `single` (token); and for each interval the columns
    "token: ..." and "domain: ...", the share of its examples that are like those of the top."""
    living: Interval
    """Share of the drawn candidates that live."""
    single: Interval | None
    """Share of single-token units; None if too few live."""
    rated: list[dict]
    """What a rater sees: unit, interval, tokens, levels, top_logits."""


def components(study: Study) -> Artefact:
    """PCA and ICA of a sample of the activations of transformer A."""
    transformer, n, d_mlp = study.transformer("A"), study.profile.component_sample, study.profile.transformer.d_mlp

    def make(out: Path, _: Path) -> None:
        sample = study.stream("A").sample(n, "components")
        found = {"pca": baselines.pca(sample, d_mlp), "ica": baselines.ica(sample, d_mlp, study.seed, ICA_ROUNDS)}
        save_file({f"{kind}.{name}": value.contiguous() for kind, projection in found.items()
                   for name, value in projection._asdict().items()}, out / "components.safetensors")

    config = {"sample": n, "ica_rounds": ICA_ROUNDS, "seed": study.seed}
    return study.store.stage("components", config, make, inputs=[transformer.artefact, study.tokens_artefact])


def kind(study: Study, name: str) -> Kind:
    """One of KINDS. Raises StudyError for another name."""
    if name not in KINDS:
        raise StudyError(f"There is no kind of unit '{name}'; choose one of {', '.join(KINDS)}.")
    on = study.transformer("random" if name == "random_weights" else "A")
    if name in DICTIONARIES:
        sae = study.dictionary("random" if name == "random_weights" else "A")
        return Kind(on.model, sae.model.W_dec, sae.model.encode, [on.artefact, sae.artefact])
    d_mlp = study.profile.transformer.d_mlp
    if name == "neuron":
        return Kind(on.model, torch.eye(d_mlp), lambda acts, units: acts[:, units], [on.artefact])
    if name == "random_direction":
        projection, inputs = baselines.random_directions(d_mlp, d_mlp, study.seed), [on.artefact]
    else:
        made = components(study)
        parts = load_file(made.path / "components.safetensors")
        projection = baselines.Projection(*(parts[f"{name}.{field}"] for field in baselines.Projection._fields))
        inputs = [on.artefact, made]
    return Kind(on.model, projection.write,
                lambda acts, units: ((acts - projection.mean) @ projection.directions[:, units]).relu(), inputs)


def explainer(vocabulary: Sequence[bytes]) -> tuple[interpret.Explainer, str]:
    """The explainer that the environment asks for, and its name: the pattern explainer, unless OPENAI_BASE_URL names a server.

    Raises StudyError if a server is named but no model, in OPENAI_MODEL.
    """
    if not os.environ.get("OPENAI_BASE_URL"):
        return explain.PatternExplainer(vocabulary), "pattern explainer"
    model = os.environ.get("OPENAI_MODEL")
    if not model:
        raise StudyError("OPENAI_BASE_URL names a server; set OPENAI_MODEL to one of its models, or unset both.")
    return endpoint.EndpointExplainer(vocabulary, model), f"language model {model}"


def used_tokens(study: Study) -> Tensor:
    """Tokens seen often enough in training that their logits were trained: 20 times in a quarter of the text."""
    return effects.used_tokens(study.tokens.tokens("train")[::4], study.vocabulary, at_least=20)


def score(study: Study, name: str) -> Scores:
    """Explain and score a random sample of the living units of a kind.

    Candidates are drawn by seed; those are living that are active on 20 tokens or more of the *validation* text. The first of
    them are explained and scored on the *test* text, the same contexts for every kind.
    """
    chosen, n = kind(study, name), study.profile.scored_units
    ask, by = explainer(study.vocabulary)

    def make(out: Path, _: Path) -> None:
        units, n_candidates = living(study, chosen, name, n)
        table_units = units if name in DICTIONARIES else units[:n]
        text = text_of(study, "test")
        table = features.activation_table(chosen.model, text.contexts, lambda acts: chosen.encode(acts, table_units))
        weights = effects.logit_weights(chosen.model, chosen.write[table_units[:n]], used_tokens(study))
        scored = range(min(n, len(table_units)))
        scores = interpret.score_units(table, text.contexts, scored, ask, weights, study.seed)
        tokens, domains = flat(text.contexts), flat(text.domains)
        seen, single = np.diff(table.indptr) >= interpret.MIN_EXAMPLES, features.is_single_token(table, tokens)
        like = [_like_the_top(table, unit, tokens, domains, study.seed) for unit in scored]
        scores = scores.assign(single=single[scores.unit.astype(int)]).join(pd.DataFrame(like, index=scores.index))
        few = scored[:RATED_UNITS] if name in RATED_KINDS else []
        rated = [item for unit in few for item in _rated(table, unit, text.contexts, weights[unit], study.seed)]
        number = table_units.tolist()
        scores = scores.assign(unit=[number[unit] for unit in scores.unit])
        scores.to_json(out / "scores.json", orient="records")
        (out / "counts.json").write_text(json.dumps({"candidates": n_candidates, "living": len(units),
                                                     "seen": int(seen.sum()), "single": int(single[seen].sum())}))
        (out / "rated.json").write_text(json.dumps([item | {"unit": number[item["unit"]]} for item in rated]))

    config = {"units": n, "contexts": study.profile.scored_contexts, "explainer": by, "seed": study.seed}
    path = study.store.stage(f"scores_{name}", config, make, inputs=[study.tokens_artefact, *chosen.inputs]).path
    counts = json.loads((path / "counts.json").read_text())
    return Scores(pd.read_json(path / "scores.json", orient="records"),
                  share_interval(counts["living"], counts["candidates"]),
                  share_interval(counts["single"], counts["seen"]) if counts["seen"] else None,
                  json.loads((path / "rated.json").read_text()))


def text_of(study: Study, split: str) -> Text:
    """The contexts that units are chosen on (validation) and scored on (test): every few of the held-out ones."""
    return study.held_out(split).spread(study.profile.scored_contexts)


def living(study: Study, chosen: Kind, name: str, n: int) -> tuple[Int[Tensor, " living"], int]:
    """The living ones of up to 4 n units drawn at random, in the order drawn; and how many were drawn."""
    drawn = numpy_generator(study.seed, f"scored units: {name}").permutation(len(chosen.write))[:CANDIDATES * n]
    candidates = torch.from_numpy(drawn)
    fired = torch.zeros(len(candidates), dtype=torch.int64)
    for batch in text_of(study, "validation").contexts.split(features.BATCH_CONTEXTS):
        acts = mlp_activations(chosen.model, batch.long())[batch != ActivationStream.END_OF_TEXT]
        fired += (chosen.encode(acts, candidates) > 0).sum(0)
    return candidates[fired >= interpret.MIN_EXAMPLES], len(candidates)


def _intervals(table: csc_array, unit: int, seed: int) -> tuple[features.Column, interpret.Intervals]:
    column = features.column(table, unit)
    return column, features.intervals(column.values, seed, unit).examples if len(column.values) else {}


def _like_the_top(table: csc_array, unit: int, tokens: np.ndarray, domains: np.ndarray, seed: int) -> dict[str, float]:
    column, intervals = _intervals(table, unit, seed)
    return {f"{what}: {name}": share for what, labels in (("token", tokens), ("domain", domains)) if intervals
            for name, share in interpret.like_the_top(intervals, labels[column.tokens]).items()}


def _rated(table: csc_array, unit: int, contexts: Tensor, weights: Tensor, seed: int) -> list[dict]:
    column, intervals = _intervals(table, unit, seed)
    text, top = interpret.FlatText(contexts), weights.nan_to_num(-torch.inf).topk(interpret.SHOWN_LOGITS).indices.tolist()
    items = []
    for name in (name for name in RATED_INTERVALS if name in intervals):
        where = text.windows(column.tokens[intervals[name]], RATED_WIDTH)
        levels = 10 * interpret.activations_at(*column, where) / column.values.max()
        items.append({"unit": unit, "interval": name, "tokens": text.tokens[where].tolist(), "top_logits": top,
                      "levels": np.minimum(levels, 9).astype(int).tolist()})
    return items


# --- what people say -------------------------------------------------------------------------------------------------

class Rating(NamedTuple):
    """What the rater needs: blinded items, what to show of each, and the file that ratings go to."""

    items: list[rubric.Item]
    shown: dict[str, Shown]
    path: Path


def rating(study: Study, scores: dict[str, Scores]) -> Rating:
    """Units of RATED_KINDS, shuffled under codes. The ratings file belongs to these units: another dictionary has another."""
    listed = {(name, item["unit"], item["interval"]): item for name, found in scores.items() for item in found.rated}
    items = rubric.blinded(listed, study.seed)
    parts = ("tokens", "levels", "top_logits")
    shown = {item.code: Shown(*(np.array(listed[item[1:]][part]) for part in parts)) for item in items}
    key = paths.digest([study.profile.name, sorted(item.code for item in items), study.dictionary("A").artefact.key])[:8]
    return Rating(items, shown, paths.data() / "ratings" / f"05-{key}.jsonl")


# --- summaries -------------------------------------------------------------------------------------------------------

@runtime_checkable
class WithUnits(Protocol):
    """Anything with a row for each scored unit."""

    units: pd.DataFrame


def summary(scores: dict[str, WithUnits], column: str, statistic: Callable = np.median, **draws: int) -> pd.DataFrame:
    """A statistic over the units of each kind with its bootstrap interval over units: value, low, high, units; nan where fewer
    than two units have a score."""
    rows = {}
    for name, found in scores.items():
        known = found.units[column].dropna() if column in found.units else pd.Series(dtype=float)
        nothing = Interval(np.nan, np.nan, np.nan)
        interval = interpret.unit_interval(known, statistic, **draws) if len(known) > 1 else nothing
        rows[name] = interval._asdict() | {"units": len(known)}
    return pd.DataFrame(rows).T


def differences(scores: dict[str, WithUnits], column: str, of: str = "feature", statistic: Callable = np.median, seed: int = 0,
                n_boot: int = 1000) -> pd.DataFrame:
    """By how much a statistic of one kind's units is above that of each other kind, with a bootstrap over both kinds' units:
    value, low, high; kinds with fewer than two scores are left out.

    Two intervals may overlap although the difference is not by chance: rarely do both err, and towards each other.
    """
    known = {name: found.units[column].dropna().to_numpy() for name, found in scores.items() if column in found.units}
    known = {name: values for name, values in known.items() if len(values) > 1}
    drawn = {name: statistic(numpy_generator(seed, f"differences: {name}").choice(values, (n_boot, len(values))), axis=1)
             for name, values in known.items()}
    rows = {}
    for name in known if of in known else ():
        if name != of:
            value, ends = statistic(known[of]) - statistic(known[name]), np.quantile(drawn[of] - drawn[name], (0.025, 0.975))
            rows[name] = Interval(value, min(value, ends[0]), max(value, ends[1]))._asdict()
    return pd.DataFrame(rows, index=Interval._fields).T


def by_interval(scores: dict[str, Scores], prefix: str, **draws: int) -> pd.DataFrame:
    """The mean over units of an interval's columns, the intervals in order: columns kind, interval, value, low, high, units.

    nan where fewer than 10 units have an example: of rare units the few strongest are shown, so that none is left to ask about.
    """
    tables = [summary(scores, f"{prefix}{name}", np.mean, **draws).assign(interval=name) for name in INTERVALS]
    found = pd.concat(tables).rename_axis("kind").reset_index()
    found.loc[found.units < 10, ["value", "low", "high"]] = np.nan
    return found
