"""Headline numbers of further trainings: another transformer and another dictionary each, measured as the notebooks measure.

A bootstrap over documents says how much a number depends on the text; only other trainings say how much it depends on the luck
of the seed. They take as long as the first, so a run does not make them unasked: `python -m sae_lib.study replicas` does, and the
numbers are kept (those of the reference run are committed). Every row of the scorecard that they know then rests on them too.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from sae_lib import compare, effects, features
from sae_lib.evaluate import held_out_pass
from sae_lib.metrics import density_summary
from sae_lib.steering import as_bytes
from sae_lib.study import panels, paths
from sae_lib.study.artefacts import Artefact
from sae_lib.study.pipeline import Study
from sae_lib.study.tables import flat, unit_table
from sae_lib.transformer import sample

REPLICAS = ("B", "C")
CONTEXTS = ("arabic", "hebrew", "dna", "base64")
STEERED = ("base64", "arabic", "hebrew", "russian", "greek", "chinese", "korean", "dna")  # the contexts of notebook 06
PINNED = ("arabic", "base64")  # those of them that have a row
N_SAMPLES, LENGTH = 64, 100
NEURON_TOKENS = 131_072  # on which neurons are compared: they fire on a third of all
ROWS = ("02.superposition.contexts", "03.loss_recovered", "03.l0", "03.dead_fraction",
        *(f"04.pearson.{name}.{kind}" for name in CONTEXTS for kind in ("feature", "neuron")),
        *(f"06.pin.{name}.share" for name in PINNED), "07.median.feature", "07.median.neuron")


def headline(study: Study, which: str) -> dict[str, float]:
    """{id of a scorecard's row: value} of the transformer `which` and its dictionary."""
    model, sae = study.transformer(which).model, study.dictionary(which).model
    found = held_out_pass(model, study.held_out("test"), sae)
    draws = {"seed": study.seed, "n_boot": 2}  # of the intervals only the values are used
    values = {"03.loss_recovered": found.loss_recovered("zero", **draws).value, "03.l0": found.average("l0", **draws).value,
              "03.dead_fraction": density_summary(found.fired, len(found.document)).dead,
              "02.superposition.contexts": study.superposition(which)[1].value}
    return values | _correlations(study, which) | _steering(study, which)


def _correlations(study: Study, which: str) -> dict[str, float]:
    """Correlation with the paper's proxy of the unit that is best on validation text, on the whole test text."""
    model, sae = study.transformer(which).model, study.dictionary(which).model
    validation, test = study.held_out("validation"), study.held_out("test", whole=True)
    tables = {kind: unit_table(study, "validation", on=which, units=f"{kind}s") for kind in ("feature", "neuron")}
    chosen = {}
    for name in CONTEXTS:
        target = panels.truths(study, name, validation, in_place=False)["proxy"]
        chosen |= {(name, kind): features.best_unit(table, target).unit for kind, table in tables.items()}
    units = {kind: [unit for (_, k), unit in chosen.items() if k == kind] for kind in tables}

    def encode(acts: torch.Tensor) -> torch.Tensor:
        return torch.cat([sae.encode(acts, units["feature"]), acts[:, units["neuron"]]], dim=1)

    measured = features.activation_table(model, test.contexts, encode)
    values = {}
    for i, name in enumerate(CONTEXTS):
        pearson = features.pearson_with(measured, panels.truths(study, name, test, in_place=False)["proxy"])
        values |= {f"04.pearson.{name}.feature": pearson[i], f"04.pearson.{name}.neuron": pearson[len(CONTEXTS) + i]}
    return values


def _steering(study: Study, which: str) -> dict[str, float]:
    """Share of sampled characters in a context, its best feature by label pinned at its greatest activation."""
    model, sae = study.transformer(which).model, study.dictionary(which).model
    validation, seen = study.held_out("validation"), study.contexts_with(STEERED)
    table, values = unit_table(study, "validation", on=which), {}
    prompt = torch.tensor(study.tokens.tokenizer.encode("1,2,3,4,5,6,7,8,9,10").ids)
    length = min(LENGTH, study.profile.tokens.n_ctx - len(prompt))
    for name in PINNED:
        unit = features.best_unit(table, panels.label(study, name, validation)).unit
        on_seen = features.activation_table(model, seen, lambda acts, unit=unit: sae.encode(acts, [unit]))
        edit = effects.pin(sae, unit, float(on_seen.max()))
        written = sample(model, prompt, length, study.seed, n_samples=N_SAMPLES, edit=edit)[:, len(prompt):]
        texts = [as_bytes(row, study.vocabulary) for row in written]
        values[f"06.pin.{name}.share"] = effects.character_share(texts, effects.CONTEXTS[name], seed=study.seed, n_boot=2).value
    return values


def universality(study: Study, first: str, second: str) -> dict[str, float]:
    """Median best-match correlation of two trainings, as in notebook 07."""
    test = study.held_out("test")
    documents, few = flat(test.documents), -(-test.contexts.numel() // NEURON_TOKENS)
    pair = [unit_table(study, on=which) for which in (first, second)]
    neurons = [features.activation_table(study.transformer(which).model, test.contexts[::few], features.neurons)
               for which in (first, second)]
    draws = {"seed": study.seed, "n_boot": 2}
    return {"07.median.feature": compare.universality(*pair, documents, **draws).median.value,
            "07.median.neuron": compare.universality(*neurons, flat(test.documents[::few]), **draws).median.value}


def known(study: Study, row: str) -> list[float]:
    """What the further trainings gave for a row of the scorecard: of those that were made, and measured it."""
    stages = [_stage(study, which, None) for which in REPLICAS] if row in ROWS else []
    found = [paths.read_json(artefact.path / "values.json") for artefact in stages if artefact]
    return [values[row] for values in found if row in values]


def make(study: Study, which: str) -> dict[str, float]:
    """Train and measure a further training, or load what was measured: {id of a row: value}.

    Universality is that of A and the further training; of A and B it is the scorecard's own.
    """
    def run(out: Path, _: Path) -> None:
        found = headline(study, which) | (universality(study, "A", which) if which != "B" else {})
        paths.write_json(out / "values.json", {row: float(found[row]) for row in ROWS if row in found})

    return paths.read_json(_stage(study, which, run).path / "values.json")


def _stage(study: Study, which: str, make: Callable[[Path, Path], object] | None) -> Artefact | None:
    return study.store.stage(f"replica_{which}", {"rows": ROWS, "transformer": which}, make,
                             inputs=[study.dictionary("A").artefact, study.tokens_artefact])
