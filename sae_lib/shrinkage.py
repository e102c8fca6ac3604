"""Undoing what the L1 penalty does to a dictionary's activations (Wright & Sharkey, Addressing Feature Suppression in SAEs).

The penalty pays for every unit of activation, so a feature that belongs in a reconstruction is let in too weakly. Which features
fire is left as it is; each gets one gain, and the bias one shift, that together reconstruct best. ReLU passes a positive gain
through, so the result is a dictionary of the same form, with unit-norm decoder rows and the same features active.
"""

from copy import deepcopy
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lib.precision import low_precision
from sae_lib.sae import SAE

RIDGE = 0.02  # pulls the gain of a feature that is seldom active towards 1
GAINS = (0.5, 4.0)


class Correction(NamedTuple):
    """What to multiply each feature's activation with, and what to add to the decoder's bias."""

    gain: Float[Tensor, " d_sae"]
    shift: Float[Tensor, " d_in"]


@torch.no_grad()
def fit_correction(sae: SAE, x: Float[Tensor, "n d_in"], chunk: int = 8192) -> Correction:
    """Gains by ridge regression of the activations on the dictionary's own terms f_i d_i, then the mean of what is left."""
    d_sae, dtype = sae.W_dec.shape[0], low_precision()
    gram, target = torch.zeros(d_sae, d_sae), torch.zeros(d_sae)
    for rows in x.split(chunk):
        features = sae.encode(rows)
        target += (features * ((rows - sae.b_dec) @ sae.W_dec.T)).sum(0)
        low = features.to(dtype)
        gram += (low.T @ low).float()
    # The regressors are vectors: products of activations count as far as the directions agree.
    gram *= sae.W_dec @ sae.W_dec.T
    diagonal = gram.diagonal().clone()
    ridge = RIDGE * diagonal + 1e-3 * diagonal.mean()
    residual = target - gram.sum(1)
    gram.diagonal().add_(ridge)
    gain = (1 + torch.linalg.solve(gram, residual)).clamp(*GAINS)
    corrected = apply_correction(sae, Correction(gain, torch.zeros_like(sae.b_dec)))
    left = sum((rows - corrected(rows).reconstruction).sum(0) for rows in x.split(chunk))
    return Correction(gain, left / len(x))


@torch.no_grad()
def apply_correction(sae: SAE, correction: Correction) -> SAE:
    """A new dictionary with the gains in its encoder and the shift in its bias; the same features are active.

    Raises StudyError for a dictionary whose activations cannot be multiplied.
    """
    corrected = deepcopy(sae).correct_(*correction)
    corrected.metadata |= {"shrinkage_corrected": True}
    return corrected.requires_grad_(False)


@torch.no_grad()
def own_gains(sae: SAE, x: Float[Tensor, "n d_in"], min_active: int = 1, chunk: int = 1024) -> Float[Tensor, " d_sae"]:
    """What each feature's activation would have to be multiplied with to reconstruct best, if all others stayed as they are.

    1 + sum f_i (d_i . residual) / sum f_i^2 over the rows `x`: above 1 for a feature let in too weakly; nan for one that is
    active on fewer than `min_active` rows. Of a dictionary of any kind, for nothing is multiplied.
    """
    product, square, active = torch.zeros(3, len(sae.W_dec), dtype=torch.float64)
    for rows in x.split(chunk):
        features, reconstruction = sae(rows)
        product += (features * ((rows - reconstruction) @ sae.W_dec.T)).sum(0)
        square += features.square().sum(0)
        active += (features > 0).sum(0)
    return (1 + product / square).masked_fill(active < min_active, torch.nan).float()
