"""The toy models and the dictionaries on known features, trained and measured. What notebook 01 loads."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_lib import toy, toy_features
from sae_lib.kernels import in_parallel
from sae_lib.metrics import ReconstructionMetrics, mmcs
from sae_lib.sae import SAE, SAEConfig
from sae_lib.seeds import generator
from sae_lib.study.pipeline import Study
from sae_lib.toy import Errors, NeuronRuns, ToyConfig, Toys
from sae_lib.toy_features import FeatureConfig, KnownFeatures
from sae_lib.train import TrainConfig, train_sae

RAREST = 0.01  # density of a toy model's features
PAIR_RAREST, PAIR_IMPORTANCE = 0.05, 10.0  # ends of the phase diagram: the least density, the importance or one over it
CROWD_DECAY = 0.9  # of importance, from one feature to the next
NEURON_RUNS, FREE_RUNS = 20, 200
FIXED = 30.0  # logit of a neuron that surely fires


class Models(NamedTuple):
    """Toy models of one shape, a row each."""

    toys: Toys
    density: Float[Tensor, " models"]
    importance: Float[Tensor, "models features"]
    errors: Errors

    @property
    def losses(self) -> Float[Tensor, " models"]:
        return (self.errors.squared * self.importance).sum(1)


# --- superposition ---------------------------------------------------------------------------------------------------


def _densities(n: int, rarest: float = RAREST) -> Float[Tensor, " n"]:
    return torch.logspace(0, math.log10(rarest), n)


def _models(study: Study, name: str, density: Tensor, importance: Tensor, config: ToyConfig, relu: bool = True) -> Models:
    config = replace(config, seed=study.seed)

    def make(out: Path, _: Path) -> None:
        toys = toy.train_toys(density, importance, config, relu)
        found = toy.measure(toys, density, study.seed)
        save_file({"W": toys.W, "b": toys.b, **found._asdict()}, out / "toys.safetensors")

    everything = {"toy": config, "density": density.tolist(), "importance": importance.tolist(), "relu": relu}
    artefact = study.store.stage(f"toy_{name}", everything, make)
    found = load_file(artefact.path / "toys.safetensors")
    errors = Errors(found["squared"], found["variance"])
    return Models(Toys(found["W"], found["b"], relu), density, importance, errors)


def crowd(study: Study, relu: bool) -> Models:
    """Many features through few numbers: for each density, from dense to sparse, several trainings, one after the other."""
    sizes = study.profile.toy
    density = _densities(sizes.n_densities).repeat(sizes.starts)
    importance = CROWD_DECAY ** torch.arange(sizes.crowd.n_features).expand(len(density), -1)
    return _models(study, "crowd" if relu else "crowd_linear", density, importance, sizes.crowd, relu)


def plane(study: Study) -> Models:
    """Equally important features in a plane: for each density the best of several trainings."""
    sizes = study.profile.toy
    density = _densities(sizes.n_densities)
    return _models(study, "plane", density, torch.ones(len(density), sizes.plane.n_features), sizes.plane)


def pairs(study: Study) -> Models:
    """Two features through one number, over a grid of densities (slow) and importances of the second (fast)."""
    sizes = study.profile.toy
    n_density, n_importance = sizes.pair_grid
    end = math.log10(PAIR_IMPORTANCE)
    grid = torch.cartesian_prod(_densities(n_density, PAIR_RAREST), torch.logspace(-end, end, n_importance))
    return _models(study, "pairs", grid[:, 0].contiguous(), torch.stack([torch.ones(len(grid)), grid[:, 1]], dim=1), sizes.pair)


def neurons(study: Study, n_features: int = 4) -> tuple[NeuronRuns, NeuronRuns]:
    """Binary neurons for exclusive features. Those told what to fire on: on none in the first NEURON_RUNS, on one in the next,
    up to all; and those that began with random logits and learned it.
    """
    def make(out: Path, _: Path) -> None:
        told = toy.train_neurons(_codes(n_features).repeat_interleave(NEURON_RUNS, 0), seed=study.seed)
        start = torch.randn(FREE_RUNS, n_features, generator=generator(study.seed, "neuron-start"))
        learned = toy.train_neurons(start, seed=study.seed)
        save_file({f"{name}_{field}": value for name, runs in (("told", told), ("learned", learned))
                   for field, value in runs._asdict().items()}, out / "neurons.safetensors")

    everything = {"features": n_features, "runs": [NEURON_RUNS, FREE_RUNS], "seed": study.seed}
    artefact = study.store.stage("toy_neurons", everything, make)
    found = load_file(artefact.path / "neurons.safetensors")
    return tuple(NeuronRuns(*(found[f"{name}_{field}"] for field in NeuronRuns._fields)) for name in ("told", "learned"))


def _codes(n_features: int) -> Float[Tensor, "codes features"]:
    """Logits of neurons that fire on the first 0, 1, ... features."""
    fires = torch.arange(n_features) < torch.arange(n_features + 1)[:, None]
    return torch.where(fires, FIXED, -FIXED)


# --- dictionaries on known features ----------------------------------------------------------------------------------


class Recovery(NamedTuple):
    """Dictionaries of several widths and L1 coefficients on activations of known features, several truths each."""

    table: pd.DataFrame
    """A row a dictionary. truth: its number; width; share (of the true number of features); l1; explained (variance), mse, l0,
    dead: on fresh rows; mmcs: of learned features with true ones; coverage: of true ones with learned ones; f1: mean over true
    features of their matches'; bits: total information for each row of activations."""
    best: Float[np.ndarray, "dictionaries features"]
    """For each dictionary the greatest cosine of its features with a true one, nan beyond its width."""
    directions: dict[tuple[int, float], Float[Tensor, "width d_in"]]
    """Decoder rows by (width, l1), on the first truth."""
    truth: Float[Tensor, "n_features d_in"]
    """The first truth."""


def truths(study: Study) -> list[FeatureConfig]:
    """The configurations of the true features; other seeds of the study have others."""
    sizes = study.profile.toy
    return [replace(sizes.truth, seed=study.seed * sizes.starts + i) for i in range(sizes.starts)]


def recovery(study: Study) -> Recovery:
    """Train and measure all dictionaries, or load what was measured."""
    sizes = study.profile.toy
    widths = [max(1, round(share * sizes.truth.n_features)) for share in sizes.widths]
    settings = [(width, l1) for l1 in sizes.l1 for width in widths]

    def make(out: Path, _: Path) -> None:
        rows, best, directions = [], [], {}
        for i, config in enumerate(truths(study)):
            known = KnownFeatures(config, sizes.training.batch_size)
            trained = _train(known, settings, sizes.training)
            active = known.active(sizes.test_rows, "test")
            x = known.rows(active)
            bits = toy_features.total_information([toy_features.coded(sae, x) for sae in trained])
            for (width, l1), sae, n_bits in zip(settings, trained, bits, strict=True):
                rows.append({"truth": i, "width": width, "share": width / config.n_features, "l1": l1, "bits": n_bits / len(x),
                             **_measured(sae, known, x, active)})
                cosines = (sae.W_dec @ known.directions.T).amax(1)
                best.append(torch.nn.functional.pad(cosines, (0, max(widths) - width), value=math.nan))
                if i == 0:
                    directions[f"{width}/{l1:g}"] = sae.W_dec.half().contiguous()
        pd.DataFrame(rows).to_json(out / "table.json", orient="records")
        save_file(directions | {"best": torch.stack(best)}, out / "directions.safetensors")

    everything = {"truths": truths(study), "settings": settings, "training": sizes.training, "rows": sizes.test_rows}
    artefact = study.store.stage("toy_recovery", everything, make)
    tensors = load_file(artefact.path / "directions.safetensors")
    best = tensors.pop("best").numpy()
    spelled = {tuple(json.loads(f"[{name.replace('/', ',')}]")): value.float() for name, value in tensors.items()}
    # Coefficients are looked up by value.
    table = pd.read_json(artefact.path / "table.json", orient="records", precise_float=True)
    return Recovery(table, best, spelled, KnownFeatures(truths(study)[0], sizes.training.batch_size).directions)


def _train(known: KnownFeatures, settings: Sequence[tuple[int, float]], training: TrainConfig) -> list[SAE]:
    """A dictionary for each width and L1 coefficient, several at once: each is too small to be shared among threads."""
    seed = known.config.seed

    def one(width: int, l1: float) -> SAE:
        config = SAEConfig(known.config.d_in, width, seed, model_name="known-features", hook_name="", context_size=1)
        return train_sae(known, config, replace(training, l1_coefficient=l1, seed=seed))[0]

    return in_parallel(one, settings)


@torch.no_grad()
def _measured(sae: SAE, known: KnownFeatures, x: Tensor, active: Tensor) -> dict[str, float]:
    features, reconstruction = sae(x)
    metrics = ReconstructionMetrics(x.mean(0), features.shape[1])
    metrics.update(x, reconstruction, features)
    found = metrics.result()
    matched = toy_features.match(sae.W_dec, known.directions)
    dead = (found.fired == 0).double().mean().item()
    return {"explained": found.explained_variance, "mse": found.mse, "l0": found.l0, "dead": dead,
            "mmcs": mmcs(sae.W_dec, known.directions), "coverage": mmcs(known.directions, sae.W_dec),
            "f1": float(np.nanmean(toy_features.matched_f1(features, active, matched.unit)))}
