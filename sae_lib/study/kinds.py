"""Kinds of dictionaries, what makes each of them sparse, and the learning rate that suits each. What notebook 10 compares."""

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from sae_lib.activations import Harvest
from sae_lib.recipe import BatchTopKConfig, GatedConfig, JumpReLUConfig, MatryoshkaConfig, TopKConfig, TrainConfig
from sae_lib.sae import SAE
from sae_lib.study import paths
from sae_lib.study.artefacts import Artefact
from sae_lib.study.pipeline import Study
from sae_lib.train import train_sae

KINDS = {"paper": "the paper's recipe", "standard": "L1, born rare", "gated": "Gated", "topk": "TopK",
         "batchtopk": "BatchTopK", "jumprelu": "JumpReLU", "matryoshka": "Matryoshka"}
MODERN = ("gated", "topk", "batchtopk", "jumprelu", "matryoshka")
PENALISED = ("paper", "standard", "gated")  # their control is an L1 coefficient; of the others, a number of active features
NESTED = (16, 4)  # Matryoshka's inner dictionaries have a sixteenth and a quarter of the features
FAIR = 0.1  # how far from the L0 that was asked a trial may be to be compared, as a share of it
_TRAINING = {"topk": TopKConfig, "batchtopk": BatchTopKConfig, "matryoshka": MatryoshkaConfig, "gated": GatedConfig,
             "jumprelu": JumpReLUConfig}


class Setting(NamedTuple):
    """One dictionary: its kind, what makes it sparse, features a neuron, and seed."""

    kind: str
    control: float
    expansion: int
    seed: int
    matched: bool = False
    """Whether it is one of those that are to be as sparse as each other: from several seeds, and with its features explained."""

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.control:.4g}-{self.expansion}x-{self.seed}" + "-matched" * self.matched


def training(setting: Setting, base: TrainConfig, lr: float, d_sae: int) -> TrainConfig:
    """How a setting is trained: as `base` says, but for its kind, its control, its learning rate and its seed."""
    base, control = replace(base, lr=lr, seed=setting.seed), setting.control
    if setting.kind in ("paper", "standard"):
        return replace(base, l1_coefficient=control, birth_density=base.birth_density if setting.kind == "standard" else None)
    shared = {field.name: getattr(base, field.name) for field in fields(TrainConfig)}
    kind = _TRAINING[setting.kind]
    if issubclass(kind, TopKConfig):
        del shared["resample_at"]  # AuxK revives their dead features
        shared["k"] = round(control)
    if kind is MatryoshkaConfig:
        shared["inner"] = tuple(d_sae // part for part in NESTED)
    own = {GatedConfig: {"l1_coefficient": control}, JumpReLUConfig: {"l0": control}}.get(kind, {})
    return kind(**shared | own)


def trained(study: Study, setting: Setting, base: TrainConfig, lr: float, harvest: Harvest) -> tuple[SAE, pd.DataFrame]:
    """A dictionary and the log of its training."""
    d_sae = setting.expansion * study.profile.transformer.d_mlp
    config = replace(study.sae_config(), d_sae=d_sae, seed=setting.seed)
    return train_sae(harvest.reseeded(setting.seed), config, training(setting, base, lr, d_sae), device=harvest.rows.device)


def seed_of(study: Study, i: int = 0) -> int:
    """Of the i-th of several trainings; other seeds of the study have others."""
    return 100 * study.seed + i


# --- learning rates --------------------------------------------------------------------------------------------------


def rate_trials(study: Study) -> Artefact:
    """Short trainings of each kind at several learning rates; `rates` reads them."""
    sizes = study.profile.frontier
    base = replace(sizes.training, n_activations=sizes.trial_activations)

    def make(out: Path, checkpoint: Path) -> None:
        harvest = Harvest.of(study.stream("A", base.batch_size), base.n_activations)
        paths.write_json(out / "rates.json", [paths.kept(checkpoint / f"{kind}-{lr:g}.json", partial(trial, kind, lr, harvest))
                                              for kind in KINDS for lr in sizes.rates])

    def trial(kind: str, lr: float, harvest: Harvest) -> dict:
        control = sizes.trial_l1 if kind in PENALISED else float(sizes.matched_l0)
        last = trained(study, Setting(kind, control, study.profile.expansion, seed_of(study)), base, lr, harvest)[1].iloc[-1]
        told = kind not in PENALISED
        return {"kind": kind, "lr": lr, "objective": last.mse if told else last.loss, "mse": last.mse, "l0": last.l0,
                "fair": not told or bool(abs(last.l0 / control - 1) <= FAIR)}

    config = {"training": base, "rates": sizes.rates, "l1": sizes.trial_l1, "l0": sizes.matched_l0, "seed": study.seed}
    return study.store.stage("frontier_rates", config, make, version=2,
                             inputs=[study.transformer("A").artefact, study.tokens_artefact])


def rates(study: Study) -> pd.DataFrame:
    """Short trainings of each kind at several learning rates. Columns: kind, lr, mse, l0; objective: the squared error and, where
    there is one, the L1 penalty, on the last rows of the training, none of which was trained on before; fair: whether a kind that
    is told its L0 has reached it by then, without which its squared error says little.
    """
    return pd.read_json(rate_trials(study).path / "rates.json", orient="records", precise_float=True)


def compared(table: pd.DataFrame) -> pd.DataFrame:
    """The trials of `rates` that are fair; of a kind that has none, all."""
    return table[table.fair | ~table.groupby("kind").fair.transform("any")]


def best_rates(table: pd.DataFrame) -> dict[str, float]:
    """The learning rate with the smallest objective of those that are compared, by kind."""
    return {kind: float(part.loc[part.objective.idxmin(), "lr"]) for kind, part in compared(table).groupby("kind", sort=False)}


def control_for(wanted: float, controls: Sequence[float], l0: Sequence[float]) -> float:
    """The L1 coefficient at which L0 will be about `wanted`, between those tried, both in logarithms; the nearest end beyond."""
    x, y = np.log(np.maximum(l0, 1e-3)), np.log(controls)
    order = np.argsort(x)
    return float(f"{np.exp(np.interp(math.log(wanted), x[order], y[order])):.3g}")
