"""Dictionaries of every kind at several sparsities, widths and seeds, all trained on one harvest. What notebook 10 loads.

The dictionaries themselves are there only until they are measured: some fifty of them would take a gigabyte. What is kept is a
row for each, its sums over the documents of the held-out text, from which every number gets its interval, and what the explainer
said of some of its features.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float64
from safetensors.numpy import load_file, save_file

from sae_lib import effects, fronts, interpret
from sae_lib.activations import Harvest
from sae_lib.evaluate import HeldOut, held_out_pass
from sae_lib.features import activation_table
from sae_lib.fronts import Lead
from sae_lib.metrics import Interval, Numbers, bootstrap_interval, density_summary, explained_share, recovered_share
from sae_lib.sae import SAE
from sae_lib.shrinkage import own_gains
from sae_lib.study import paths, scores
from sae_lib.study.kinds import KINDS, PENALISED, Setting, best_rates, control_for, rate_trials, rates, seed_of, trained
from sae_lib.study.pipeline import Study
from sae_lib.transformer import mlp_activations

WIDE = ("standard", "batchtopk")  # kinds that are trained at several widths
ULTRALOW = 1e-4  # density: the held-out text has some hundred thousand tokens
# Activations of validation text on which features' own gains are measured, and on how many of them they are active at least.
GAIN_ROWS, GAIN_ACTIVE = 16_384, 20
SCORE_COLUMNS = ("active", "spearman", "importance", "logit", "text", "dropped")
QUARTILES = (0.25, 0.5, 0.75)
Rows = Sequence | np.ndarray  # places in the table
COMMON, OWN = ("clean", "zero", "mean", "spread"), ("dictionary", "l0", "error", "fit", "written")


class Frontier(NamedTuple):
    """What was measured of all dictionaries, on the same held-out text."""

    table: pd.DataFrame
    """A row a dictionary: those of `Setting`; lr; steps and l0_curve (mean over the steps since the one before) of its training;
    dead, ultralow, median_density; gains: quartiles over features of `shrinkage.own_gains`; and of those that are matched
    validation and validation_l0: explained variance and L0 on validation text."""
    common: Float64[np.ndarray, "documents 5"]
    """Sums over each document of COMMON, and the number of its tokens."""
    own: Float64[np.ndarray, "dictionaries documents 5"]
    """Sums of OWN."""
    scores: pd.DataFrame
    """A row an explained feature: kind, and columns of `interpret.score_units`."""
    explainer: str

    def which(self, **wanted: object) -> np.ndarray:
        """Rows of the table with these values, in its order."""
        return np.flatnonzero(np.all([self.table[name] == value for name, value in wanted.items()], axis=0))

    def of(self, rows: Rows, statistic: Callable, **draws: int) -> Interval:
        """A number with its bootstrap interval over documents. `statistic` is given a function from a measure to its values
        [..., rows]: l0, recovered (loss, by zero ablation), from_mean (the same by mean ablation), explained (variance) and gain.
        """
        n = len(rows)
        sums = np.concatenate([self.common, self.own[rows].transpose(1, 0, 2).reshape(len(self.common), -1)], axis=1)
        cut = lambda t: (t[..., None, :len(COMMON) + 1], t[..., len(COMMON) + 1:].reshape(*t.shape[:-1], n, len(OWN)))
        return bootstrap_interval(sums, lambda t: statistic(partial(_measure, *cut(t))), **draws)

    def each(self, rows: Rows, measure: str, **draws: int) -> pd.DataFrame:
        """A measure of each of some dictionaries: columns value, low, high."""
        found = [self.of([row], lambda values: values(measure)[..., 0], **draws) for row in rows]
        return pd.DataFrame(found, columns=Interval._fields, index=rows)

    def lead(self, kind: str, other: str, measure: str, **draws: int) -> tuple[Interval, Lead]:
        """By how much the front of one kind is above another's where they overlap: the least, with an interval that draws the
        same documents for both; and the whole of `fronts.lead`. Fronts are of the main width and the first seed."""
        place = {"expansion": self.table.expansion.mode()[0], "seed": self.table.seed.min()}
        rows, others = (self.which(kind=name, **place) for name in (kind, other))
        both = [*rows, *others]

        def leads(values: Callable) -> list[Lead]:
            l0, fidelity = (values(name).reshape(-1, len(both)) for name in ("l0", measure))
            split = lambda row: (row[:len(rows)], row[len(rows):])
            return [fronts.lead(*(fronts.front(*points) for points in zip(split(x), split(y), strict=True)))
                    for x, y in zip(l0, fidelity, strict=True)]

        least = lambda values: np.array([lead.least for lead in leads(values)]).reshape(values("l0").shape[:-1])
        totals = partial(_measure, self.common.sum(0)[None], self.own[both].sum(1))
        return self.of(both, least, **draws), leads(totals)[0]


def _measure(common: np.ndarray, own: np.ndarray, name: str) -> Numbers:
    shared = dict(zip((*COMMON, "tokens"), np.moveaxis(common, -1, 0), strict=True))
    values = shared | dict(zip(OWN, np.moveaxis(own, -1, 0), strict=True))
    with np.errstate(invalid="ignore", divide="ignore"):
        match name:
            case "l0":
                return values["l0"] / values["tokens"]
            case "explained":
                return explained_share(values["error"], values["spread"])
            case "gain":
                return values["fit"] / values["written"]
        return recovered_share(values["clean"], values["dictionary"], values["zero" if name == "recovered" else "mean"])


def frontier(study: Study) -> Frontier:
    """All dictionaries, trained and measured, or what was measured of them. An interrupted run goes on after the last one."""
    sizes, found, (_, by) = study.profile.frontier, rate_trials(study), scores.explainer(study.vocabulary)

    def make(out: Path, checkpoint: Path) -> None:
        measure = _Measuring(study, checkpoint)
        settings = _settings(study, measure)
        rows = [measure(setting) for setting in settings]
        sums = [load_file(checkpoint / f"{setting.name}.safetensors") for setting in settings]
        save_file({"common": sums[0]["common"], "own": np.stack([each["own"] for each in sums])}, out / "sums.safetensors")
        units = [{"kind": row["kind"]} | unit for row in rows for unit in row.pop("scores")]
        paths.write_json(out / "table.json", rows)
        paths.write_json(out / "scores.json", units)

    config = asdict(sizes) | {"kinds": list(KINDS), "explainer": by, "seed": study.seed, "scored": study.profile.scored_contexts,
                              "stream": asdict(study.profile.stream), "expansion": study.profile.expansion}
    config = {name: value for name, value in config.items() if not name.startswith(("fault", "trial", "rates"))}
    artefact = study.store.stage("frontier", config, make, inputs=[study.transformer("A").artefact, study.tokens_artefact, found])
    read = lambda name: pd.DataFrame(json.loads((artefact.path / f"{name}.json").read_text()))
    sums = load_file(artefact.path / "sums.safetensors")
    units = read("scores").reindex(columns=["kind", "unit", *SCORE_COLUMNS])
    return Frontier(read("table"), sums["common"].astype(np.float64), sums["own"].astype(np.float64), units, by)


class _Measuring:
    """Trains and measures the dictionary of a setting, unless the checkpoint folder has what was measured of it."""

    def __init__(self, study: Study, checkpoint: Path):
        self.study, self.checkpoint, self.sizes, self._harvest = study, checkpoint, study.profile.frontier, None
        self.model, self.rate = study.transformer("A").model, best_rates(rates(study))
        self.text = {split: study.held_out(split).spread(self.sizes.contexts) for split in ("test", "validation")}
        few = self.text["validation"].spread(max(1, GAIN_ROWS // study.profile.tokens.n_ctx))
        self.gain_rows = mlp_activations(self.model, few.contexts.long()).flatten(0, 1)
        self.known: dict[str, HeldOut] = {}

    def __call__(self, setting: Setting) -> dict:
        return paths.kept(self.checkpoint / f"{setting.name}.json", partial(self._measured, setting))

    @property
    def harvest(self) -> Harvest:
        base = self.sizes.training
        self._harvest = self._harvest or Harvest.of(self.study.stream("A", base.batch_size), base.n_activations)
        return self._harvest

    def _held_out(self, split: str, sae: SAE) -> HeldOut:
        self.known[split] = held_out_pass(self.model, self.text[split], sae, known=self.known.get(split))
        return self.known[split]

    def _measured(self, setting: Setting) -> dict:
        lr = self.rate[setting.kind]
        sae, log = trained(self.study, setting, self.sizes.training, lr, self.harvest)
        found = self._held_out("test", sae)
        sums = {"common": found.document_sums(*COMMON), "own": found.document_sums(*OWN)[:, :len(OWN)]}
        low = {name: value.astype(np.float32) for name, value in sums.items()}
        save_file(low, self.checkpoint / f"{setting.name}.safetensors")
        density = density_summary(found.fired, len(found.document), ULTRALOW)
        gains = own_gains(sae, self.gain_rows, GAIN_ACTIVE)
        gains = gains[gains.isfinite()]
        quartiles = gains.quantile(torch.tensor(QUARTILES)).tolist() if len(gains) else None
        row = setting._asdict() | {"lr": lr, "steps": log.step.tolist(), "l0_curve": log.l0.tolist(), "dead": density.dead,
                                   "ultralow": density.ultralow, "gains": quartiles, "scores": [], "validation": None,
                                   "median_density": density.median_live if math.isfinite(density.median_live) else None}
        if setting.matched:
            chosen_on = self._held_out("validation", sae)
            row |= {"validation": _whole(chosen_on, "explained"), "validation_l0": _whole(chosen_on, "l0")}
            if setting.seed == seed_of(self.study):
                row["scores"] = self._explained(sae, setting.kind)
        return row

    def _explained(self, sae: SAE, name: str) -> list[dict]:
        """Living features, drawn at random, explained and scored as notebook 05 does."""
        study, n = self.study, self.sizes.units
        ask, _ = scores.explainer(study.vocabulary)
        kind = scores.Kind(self.model, sae.W_dec, sae.encode, [])
        units = scores.living(study, kind, name, n)[0][:n]
        text = scores.text_of(study, "test")
        table = activation_table(self.model, text.contexts, lambda acts: sae.encode(acts, units))
        weights = effects.logit_weights(self.model, sae.W_dec[units], scores.used_tokens(study))
        found = interpret.score_units(table, text.contexts, range(len(units)), ask, weights, study.seed)
        known = found.reindex(columns=SCORE_COLUMNS).assign(unit=units.tolist())  # without a living feature there are none
        return json.loads(known.to_json(orient="records"))


def _whole(found: HeldOut, name: str) -> float:
    common, own = (found.document_sums(*names).sum(0) for names in (COMMON, OWN))
    return float(_measure(common, own[:len(OWN)], name))


def _settings(study: Study, measure: Callable[[Setting], dict]) -> list[Setting]:
    """All dictionaries. What an L1 coefficient makes of L0 is not known before: the one for the matched dictionaries is read off
    from those that differ in it."""
    sizes, main, first = study.profile.frontier, study.profile.expansion, seed_of(study)
    settings, matched, wanted = [], {}, float(sizes.matched_l0)
    for kind in KINDS:
        told = kind not in PENALISED
        swept = [Setting(kind, float(control), main, first, told and control == wanted)
                 for control in (sizes.l0 if told else sizes.gate_l1 if kind == "gated" else sizes.l1)]
        matched[kind] = wanted if told else control_for(
            wanted, [setting.control for setting in swept], [measure(setting)["l0_curve"][-1] for setting in swept])
        seeds = [Setting(kind, matched[kind], main, seed_of(study, i), True) for i in range(sizes.seeds)]
        settings += swept + [setting for setting in seeds if setting not in swept]
    return settings + [Setting(kind, matched[kind], width, first) for kind in WIDE for width in sizes.widths]
