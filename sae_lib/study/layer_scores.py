"""Seven kinds of unit of the residual stream, explained and scored layer by layer: a section of notebook 12."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_lib import baselines, features, fragments
from sae_lib.baselines import Projection
from sae_lib.seeds import numpy_generator
from sae_lib.study import deep
from sae_lib.study.artefacts import Artefact
from sae_lib.study.pipeline import Study
from sae_lib.study.scores import explainer, text_of
from sae_lib.study.tables import flat

KINDS = {"feature": "features", "dimension": "residual dimensions", "random_direction": "random directions", "pca": "PCA",
         "ica": "ICA", "top_k_pca": "top-k PCA", "top_k_ica": "top-k ICA"}
ICA_ROUNDS = 200


class Kind(NamedTuple):
    """One way to cut the residual stream into units."""

    n_units: int
    encode: Callable[[Tensor, Tensor], Tensor]
    """Activations [n, d_model] and numbers of units to the activations of these units, none negative."""
    inputs: list[Artefact]


class Units(NamedTuple):
    """The scored units of one kind."""

    units: pd.DataFrame


def top_k(values: Float[Tensor, "n n_units"], k: int) -> Float[Tensor, "n n_units"]:
    """The k largest of each row; 0 elsewhere."""
    largest = values.topk(min(k, values.shape[1]), dim=1)
    return torch.zeros_like(values).scatter_(1, largest.indices, largest.values)


def components(study: Study, after: int) -> Artefact:
    """PCA and ICA of a sample of the residual stream after so many layers."""
    n, d_model = study.profile.component_sample, study.profile.deep.transformer.d_model

    def make(out: Path, _: Path) -> None:
        sample = deep.stream(study, after).sample(n, "components")
        found = {"pca": baselines.pca(sample, d_model), "ica": baselines.ica(sample, d_model, study.seed, ICA_ROUNDS)}
        save_file({f"{kind}.{name}": value.contiguous() for kind, projection in found.items()
                   for name, value in projection._asdict().items()}, out / "components.safetensors")

    config = {"sample": n, "after": after, "ica_rounds": ICA_ROUNDS, "seed": study.seed}
    return study.store.stage(f"deep_components_{after}", config, make,
                             inputs=[deep.transformer(study).artefact, study.tokens_artefact], reference=False)


def kind(study: Study, name: str, after: int) -> Kind:
    """One of KINDS, of the residual stream after so many layers. As in the paper what is negative counts as 0."""
    dictionary, d_model = deep.dictionary(study, after), study.profile.deep.transformer.d_model
    if name == "feature":
        return Kind(len(dictionary.model.W_dec), dictionary.model.encode, [dictionary.artefact])
    if name == "dimension":
        return Kind(d_model, lambda acts, units: acts[:, units].relu(), [])
    if name == "random_direction":
        projection = baselines.random_directions(d_model, d_model, study.seed)
        return Kind(d_model, lambda acts, units: (acts @ projection.directions[:, units]).relu(), [])
    made, k = components(study, after), max(1, round(float(dictionary.model.metadata["l0"])))
    parts = load_file(made.path / "components.safetensors")
    projection = Projection(*(parts[f"{name.removeprefix('top_k_')}.{field}"] for field in Projection._fields))
    if name.startswith("top_k"):
        return Kind(d_model, lambda acts, units: top_k(projection.encode(acts), k)[:, units], [made, dictionary.artefact])
    return Kind(d_model, lambda acts, units: projection.encode(acts)[:, units], [made])


def chosen_units(study: Study, name: str, found: Kind) -> Int[Tensor, " units"]:
    """Units drawn at random, as many as the residual stream has numbers unless the profile scores fewer."""
    drawn = numpy_generator(study.seed, f"layer scores: {name}").permutation(found.n_units)
    # Rare features may lack fragments, so more of them are drawn than are wanted.
    n = min(study.profile.scored_units, study.profile.deep.transformer.d_model)
    return torch.from_numpy(drawn[:2 * n if name == "feature" else n])


def scores(study: Study) -> pd.DataFrame:
    """`fragments.score_units` of all kinds at all layers, with the columns after (layers) and kind besides.

    Of each kind as many units as of the others at most: the first drawn that have a score, and those dropped before them.
    """
    model, ask = deep.transformer(study), explainer(study.vocabulary)
    layers = range(1, study.profile.deep.transformer.n_layers + 1)
    limit = min(study.profile.scored_units, study.profile.deep.transformer.d_model)

    def one(name: str, after: int) -> pd.DataFrame:
        found, text = kind(study, name, after), text_of(study, "test")
        units = chosen_units(study, name, found)
        table = features.activation_table(model.model, text.contexts, lambda acts: found.encode(acts, units), after)
        scored = fragments.score_units(table, flat(text.contexts), text.contexts.shape[1], range(len(units)), ask[0], study.seed)
        scored = scored[(scored.dropped == "").cumsum() <= limit]
        return scored.assign(unit=units.numpy()[scored.unit.to_numpy()], kind=name, after=after)

    def make(out: Path, _: Path) -> None:
        found = pd.concat([one(name, after) for after in layers for name in KINDS], ignore_index=True)
        found.to_json(out / "scores.json", orient="records", double_precision=4)

    config = {"units": limit, "contexts": study.profile.scored_contexts, "explainer": ask[1], "ica_rounds": ICA_ROUNDS,
              "sample": study.profile.component_sample, "layers": len(layers), "seed": study.seed}
    inputs = [study.tokens_artefact, model.artefact, *(deep.dictionary(study, after).artefact for after in layers)]
    artefact = study.store.stage("layer_scores", config, make, inputs=inputs, version=2)
    return pd.read_json(artefact.path / "scores.json", orient="records")


def of_layer(found: pd.DataFrame, after: int) -> dict[str, Units]:
    """The scored units after so many layers, by kind: what `scores.summary` and `scores.differences` take."""
    here = found[found.after == after]
    return {name: Units(here[here.kind == name]) for name in KINDS}
