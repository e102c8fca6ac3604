"""Unit tables of the held-out text, made once and kept: what every feature and every neuron is active on."""

import numpy as np
import scipy.sparse
from scipy.sparse import csc_array

from sae_lib.features import activation_table, neurons
from sae_lib.study.pipeline import Study


def unit_table(study: Study, split: str = "test", on: str = "A", units: str = "features", whole: bool = False) -> csc_array:
    """The unit table of `study.held_out(split, whole)`: of the features of the dictionary on a transformer, or of its neurons.

    Neurons are active on about a third of all tokens: a table of them over the whole split takes gigabytes.
    """
    text, transformer = study.held_out(split, whole), study.transformer(on)
    dictionary = study.dictionary(on) if units == "features" else None
    encode = dictionary.model.encode if dictionary else neurons

    def make(out, _) -> None:
        scipy.sparse.save_npz(out / "table.npz", activation_table(transformer.model, text.contexts, encode), compressed=False)

    inputs = [study.tokens_artefact, transformer.artefact] + ([dictionary.artefact] if dictionary else [])
    # Measured on this environment's own text, so a committed one would not do.
    artefact = study.store.stage(f"table_{units}_{split}", {"contexts": len(text.contexts)}, make, inputs=inputs, reference=False)
    return csc_array(scipy.sparse.load_npz(artefact.path / "table.npz"))


def flat(values) -> np.ndarray:
    """Values of the tokens of a text [n_contexts, n_ctx] in the order of a unit table's rows."""
    return values.flatten().numpy()
