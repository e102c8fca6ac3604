"""Other ways to cut activations into units: PCA, ICA and random directions (Cunningham et al., C3).

Each is an `encode` from MLP activations to units of which none is negative, as `features.activation_table` wants it. A
component's sign means nothing to PCA and ICA, and the paper sets negative values to zero: every component is turned so that
it is skewed to the positive side on the sample, which is the side that sparse peaks are on, and its negative part is dropped.
"""

import warnings
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from sklearn.decomposition import PCA, FastICA
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from sae_lib.errors import StudyError
from sae_lib.sae import SAE, SAEConfig, TopKSAE
from sae_lib.seeds import generator, numpy_generator


class Projection(NamedTuple):
    """Units max(0, (x - mean) @ directions); `write` are the directions that rebuild x, for logit weights."""

    directions: Float[Tensor, "d_mlp n_units"]
    write: Float[Tensor, "n_units d_mlp"]
    mean: Float[Tensor, " d_mlp"]

    def encode(self, acts: Float[Tensor, "n d_mlp"]) -> Float[Tensor, "n n_units"]:
        return ((acts - self.mean) @ self.directions).relu()


def random_directions(d_mlp: int, n_units: int, seed: int = 0) -> Projection:
    """Directions spread evenly over the sphere. As in the paper nothing is subtracted first."""
    directions = torch.randn(n_units, d_mlp, generator=generator(seed, "random directions"))
    directions = torch.nn.functional.normalize(directions, dim=1)
    return Projection(directions.T.contiguous(), directions, torch.zeros(d_mlp))


def pca(sample: Float[Tensor, "n d_mlp"], n_units: int) -> Projection:
    """Principal components of a sample, largest variance first. Raises StudyError for more units than the sample has."""
    _check(sample, n_units)
    found = PCA(n_units, svd_solver="full" if n_units == min(sample.shape) else "auto", random_state=0).fit(sample.numpy())
    return _projection(sample, found.components_.T, found.components_, found.mean_)


def ica(sample: Float[Tensor, "n d_mlp"], n_units: int, seed: int = 0, max_iter: int = 200) -> Projection:
    """Independent components (FastICA) of a sample, each of variance one on it; more rows and rounds find better ones.

    Hundreds of components do not converge within a sensible number of rounds: what `max_iter` gives is what there is.
    Raises StudyError for more units than the sample has.
    """
    _check(sample, n_units)
    state = int(numpy_generator(seed, "ica").integers(2**31))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = FastICA(n_units, whiten="unit-variance", max_iter=max_iter, random_state=state).fit(sample.numpy())
    return _projection(sample, found.components_.T, found.mixing_.T, found.mean_)


def as_dictionary(found: Projection, k: int | None = None) -> SAE:
    """Orthonormal components as a dictionary, to be evaluated like any other: a feature for each side of each component.

    One side of each is active, so L0 is the number of components and the reconstruction is the projection on them; with `k` the
    k largest of a token are kept, whichever they are.
    """
    directions, write = torch.cat([found.directions, -found.directions], 1), torch.cat([found.write, -found.write])
    config = SAEConfig(*directions.shape, model_name="components", hook_name="")
    sae = SAE(config) if k is None else TopKSAE(config, k)
    with torch.no_grad():
        for value, given in ((sae.W_enc, directions), (sae.W_dec, write), (sae.b_dec, found.mean)):
            value.copy_(given)
        sae.b_enc.zero_()
    return sae.requires_grad_(False)


def _check(sample: Tensor, n_units: int) -> None:
    if n_units > min(sample.shape):
        raise StudyError(f"{n_units} components cannot be found in a sample of shape {tuple(sample.shape)}; ask for fewer.")


def _projection(sample: Tensor, directions: np.ndarray, write: np.ndarray, mean: np.ndarray) -> Projection:
    directions, write, mean = (torch.tensor(array, dtype=torch.float32) for array in (directions, write, mean))
    scores = (sample - mean) @ directions
    sign = torch.where((scores**3).mean(0) < 0, -1.0, 1.0)
    return Projection(directions * sign, write * sign[:, None], mean)
