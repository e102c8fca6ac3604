"""Training runs with one fault each, under letters, and a healthy one beside them: what the reader of notebook 10 diagnoses.

Every fault is one that this library lets a user make: a setting, or rows in the wrong order or too few of them.
"""

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sae_lib.activations import HARVEST_CONTEXTS, ActivationStream, Harvest
from sae_lib.evaluate import held_out_pass
from sae_lib.recipe import TrainConfig
from sae_lib.seeds import numpy_generator
from sae_lib.study import paths
from sae_lib.study.kinds import seed_of
from sae_lib.study.pipeline import Study
from sae_lib.train import train_sae
from sae_lib.transformer import mlp_activations

HEALTHY = "healthy"
SMALL = 0.01
REPEATED = 8  # batches that come again and again
OFTEN = tuple(np.arange(0.02, 1.0, 0.02).round(2).tolist())


@dataclass(frozen=True)
class Fault:
    """What is wrong, what it looks like, and how to tell from a number whether it does."""

    what: str
    looks: str
    sign: str
    """Column of `signs` in which it shows."""
    limit: float
    """How many times the healthy run's number it must be at least; at most, if below 1. Numbers below SMALL count as that."""


FAULTS = {
    "rate": Fault("the learning rate is 30 times too high", "a high error, and half of the features fall silent", "silent", 10.0),
    "high": Fault("the L1 coefficient is 10 times too high", "next to nothing is active, and little is rebuilt", "l0", 0.25),
    "low": Fault("the L1 coefficient is 20 times too low", "a lovely error, paid for with very many active features", "l0", 4.0),
    "order": Fault("rows come in the order of the text", "the error jumps from batch to batch, as topics do", "jumps", 2.0),
    "few": Fault(f"the same {REPEATED} batches again and again", "an error too good to be true; held-out text tells", "gap", 1.3),
    "often": Fault("what is silent for one batch is reborn, dense", "L0 creeps up again: reborn features fire everywhere",
                   "resampled", 4.0),
}


COLUMNS = ["step", "activations", "loss", "mse", "l0", "dead", "resampled"]


class Broken(NamedTuple):
    """The runs. Both tables name them by letter, and the healthy one by HEALTHY."""

    logs: pd.DataFrame
    """The logs of `train.train_sae`, with the column run."""
    signs: pd.DataFrame
    """A row a run, from `signs`."""
    letters: dict[str, str]
    """The fault of each letter, a key of FAULTS: the answers."""


def _in_order(stream: ActivationStream, n: int) -> Float[Tensor, "n d_in"]:
    """Rows of one context after another, as they stand in the text."""
    rows: list[Tensor] = []
    for contexts in stream.contexts.split(HARVEST_CONTEXTS):
        acts = mlp_activations(stream.model, contexts.long())[contexts != ActivationStream.END_OF_TEXT]
        rows.append(acts.to(stream.device, stream.dtype))
        if sum(map(len, rows)) >= n:
            break
    return torch.cat(rows)[:n]


def _runs(train: TrainConfig) -> dict[str, TrainConfig]:
    changed = {"rate": {"lr": 30 * train.lr}, "high": {"l1_coefficient": 10 * train.l1_coefficient},
               "low": {"l1_coefficient": train.l1_coefficient / 20},
               "often": {"resample_at": OFTEN, "dead_window": 1e-4, "birth_density": None}}
    return {name: replace(train, **changed.get(name, {})) for name in (HEALTHY, *FAULTS)}


def broken(study: Study) -> Broken:
    """The runs, trained and measured, or loaded. Which letter stands for which fault is drawn by the study's seed."""
    sizes = study.profile.frontier
    base = replace(sizes.fault_training, seed=seed_of(study))
    config = replace(study.sae_config(), d_sae=sizes.fault_expansion * study.profile.transformer.d_mlp, seed=base.seed)
    model, runs = study.transformer("A"), _runs(base)

    def make(out: Path, checkpoint: Path) -> None:
        stream = study.stream("A", base.batch_size)
        usual = Harvest.of(stream, base.n_activations)
        sources = {"order": lambda: Harvest(_in_order(stream, base.n_activations), base.batch_size),
                   "few": lambda: Harvest(usual.rows[:REPEATED * base.batch_size], base.batch_size)}
        text, known = study.held_out("test").spread(sizes.contexts), []

        def one(name: str) -> dict:
            sae, log = train_sae(sources.get(name, lambda: usual)(), config, runs[name], device=stream.device)
            known[:] = [held_out_pass(model.model, text, sae, known=known[0] if known else None)]
            error = known[0].values["error"].mean().item() * sae.metadata["training"]["activation_scale"] ** 2
            return {"log": log[COLUMNS].round(5).to_dict("records"), "held_out": error}

        paths.write_json(out / "runs.json", {name: paths.kept(checkpoint / f"{name}.json", partial(one, name)) for name in runs})

    everything = {"runs": runs, "expansion": sizes.fault_expansion, "contexts": sizes.contexts, "repeated": REPEATED}
    artefact = study.store.stage("frontier_faults", everything, make, inputs=[model.artefact, study.tokens_artefact])
    found = json.loads((artefact.path / "runs.json").read_text())
    order = numpy_generator(study.seed, "letters of faults").permutation(list(FAULTS)).tolist()
    letters = dict(zip("ABCDEF", order, strict=True))
    named = {HEALTHY: HEALTHY} | letters
    logs = {run: pd.DataFrame(found[name]["log"]) for run, name in named.items()}
    table = pd.DataFrame({run: signs(log, config.d_sae, found[named[run]]["held_out"]) for run, log in logs.items()}).T
    return Broken(pd.concat([log.assign(run=run) for run, log in logs.items()], ignore_index=True), table, letters)


def signs(log: pd.DataFrame, d_sae: int, held_out: float) -> dict[str, float]:
    """Numbers that tell faults apart. l0, silent (share of features): at the end, means over the last tenth of the log's lines;
    jumps: median change of the squared error from line to line, in its logarithm, over the second half; gap: the squared error on
    held-out text over that of the last tenth; resampled: how often the mean feature was."""
    last, half = log.tail(max(1, len(log) // 10)), log.tail(max(2, len(log) // 2))
    return {"silent": last.dead.mean(), "l0": last.l0.mean(), "jumps": np.log(half.mse).diff().abs().median(),
            "gap": held_out / last.mse.mean(), "resampled": log.resampled.sum() / d_sae}


def answers(found: Broken) -> pd.DataFrame:
    """A row a letter: what was wrong, how it looks, its sign, that of the healthy run, and whether it shows."""
    rows = {}
    for letter, name in found.letters.items():
        fault = FAULTS[name]
        own, healthy = found.signs.loc[letter, fault.sign], found.signs.loc[HEALTHY, fault.sign]
        limit = fault.limit * max(healthy, SMALL)
        shows = own >= limit if fault.limit > 1 else own <= limit
        rows[letter] = {"fault": fault.what, "looks like": fault.looks, "sign": fault.sign, "here": own, "healthy": healthy,
                        "shows": bool(shows)}
    return pd.DataFrame(rows).T
