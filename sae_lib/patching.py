"""Patching directions between two sentences (Cunningham et al., section 4, App. F; C4).

Two runs of a model differ in one word: the *base* and the *target*. The residual stream x of the base is edited after one layer,
at all positions, towards the target's, along some directions d_j only, by the difference of their codes:

    x' = x + sum over j in F of (c_j(target) - c_j(base)) d_j

What the codes do not say of x stays as it is. The fewer directions it takes to make the base predict what the target predicts,
the better they are cut for what changed. Which directions come first is found by ACDC's algorithm (Conmy et al. 2023) over a flat
graph: all are patched, and one after another those are dropped without which the prediction is hardly worse.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lib import residual
from sae_lib.baselines import Projection
from sae_lib.errors import StudyError
from sae_lib.sae import SAE
from sae_lib.seeds import generator
from sae_lib.transformer import Transformer

LATER = 4.0  # times a threshold: a direction that is needed so much more is not looked at again yet


class Coding(NamedTuple):
    """A way to write the residual stream as numbers along directions."""

    codes: Callable[[Tensor], Tensor]
    """Activations [..., d_model] to numbers [..., n_directions]."""
    directions: Float[Tensor, "n_directions d_model"]


def of_features(sae: SAE) -> Coding:
    """A dictionary's features."""
    return Coding(sae.encode, sae.W_dec.detach())


def of_rotation(projection: Projection) -> Coding:
    """Components with both signs: a rotation of the space, if there are as many as dimensions."""
    return Coding(lambda x: (x - projection.mean) @ projection.directions, projection.write)


def of_pairs(projection: Projection) -> Coding:
    """Each component as two directions, of which at most one is active: as a dictionary's features are."""
    def codes(x: Tensor) -> Tensor:
        signed = (x - projection.mean) @ projection.directions
        return torch.cat([signed.relu(), (-signed).relu()], -1)

    return Coding(codes, torch.cat([projection.write, -projection.write]))


def of_dimensions(d_model: int, device: torch.device | str = "cpu") -> Coding:
    """The numbers of the residual stream themselves: its basis."""
    return Coding(lambda x: x, torch.eye(d_model, device=device))


class Pair(NamedTuple):
    """Base and target sentences in the residual stream after some layers, and what the target predicts at each last token; all
    of it where the model is.
    """

    base: Float[Tensor, "n pos d_model"]
    target: Float[Tensor, "n pos d_model"]
    last: Int[Tensor, " n"]
    log_y: Float[Tensor, "n d_vocab"]
    """Log-probabilities."""

    @property
    def inside(self) -> Bool[Tensor, "n pos"]:
        """Positions up to the last token."""
        return torch.arange(self.base.shape[1], device=self.last.device) <= self.last[:, None]


def pair(model: Transformer, base: Int[Tensor, "n pos"], target: Int[Tensor, "n other"], last: Int[Tensor, " n"],
         after: int) -> Pair:
    """Run both. Raises StudyError if they are not of one shape."""
    if base.shape != target.shape:
        raise StudyError(f"Sentences of shapes {tuple(base.shape)} and {tuple(target.shape)} cannot be patched into each other; "
                         "make both of the same sentences.")
    device = residual.device(model)
    runs, last = [residual.activations(model, tokens.to(device), after) for tokens in (base, target)], last.to(device)
    return Pair(*runs, last, _log_probabilities(model, runs[1], last, after))


def _log_probabilities(model: Transformer, resid: Tensor, last: Tensor, after: int) -> Tensor:
    return torch.log_softmax(residual.unembed(model, residual.ends(model, resid, after, last)), -1)


def divergences(model: Transformer, runs: Pair, resid: Float[Tensor, "n pos d_model"], after: int) -> Float[Tensor, " n"]:
    """KL(z || y) in nats at each last token: z is predicted from the given residual stream, y by the target run."""
    log_z = _log_probabilities(model, resid, runs.last, after)
    return (log_z.exp() * (log_z - runs.log_y)).sum(-1)


class Patched(NamedTuple):
    """What patching the first k directions does, for k = 0, 1, ..."""

    divergence: Float[np.ndarray, "n k"]
    """KL(z || y) of each sentence."""
    edit: Float[np.ndarray, "n k"]
    """Mean norm of the edit over the sentence's positions."""


def order(model: Transformer, runs: Pair, coding: Coding, after: int, thresholds: Sequence[float],
          seed: int) -> Int[np.ndarray, " n_ordered"]:
    """Directions whose codes differ between the runs, the most needed first (ACDC, Algorithm 4.1; thresholds rise).

    At each threshold every direction that is still patched is looked at once, in random order, and dropped if without it the mean
    KL rises by less than the threshold. One whose absence cost LATER times the threshold when last looked at waits for a higher
    one. What is dropped later is more needed; what is never dropped comes first, by the rise.
    """
    changes = coding.codes(runs.target) - coding.codes(runs.base)
    changes = changes * runs.inside[..., None]
    kept = (changes.abs().amax((0, 1)) > 0).nonzero()[:, 0].tolist()
    edited = runs.base + changes[..., kept] @ coding.directions[kept]
    current = divergences(model, runs, edited, after).mean().item()
    rng, dropped, rise = generator(seed, "patching order"), [], dict.fromkeys(kept, 0.0)
    for threshold in thresholds:
        left = []
        for unit in (kept[i] for i in torch.randperm(len(kept), generator=rng).tolist()):
            if rise[unit] < LATER * threshold:
                without = edited - changes[..., unit, None] * coding.directions[unit]
                found = divergences(model, runs, without, after).mean().item()
                rise[unit] = found - current
                if rise[unit] < threshold:
                    edited, current = without, found
                    dropped.append(unit)
                    continue
            left.append(unit)
        kept = left
    return np.array(sorted(kept, key=lambda unit: -rise[unit]) + dropped[::-1], dtype=int)


def patch(model: Transformer, runs: Pair, coding: Coding, after: int, ordered: Int[np.ndarray, " n_ordered"],
          most: int) -> Patched:
    """Patch the first 0, 1, ..., `most` of ordered directions (all, if there are fewer)."""
    changes = coding.codes(runs.target) - coding.codes(runs.base)
    inside, kl, size, edited = runs.inside.float(), [], [], runs.base.clone()
    for k in range(min(most, len(ordered)) + 1):
        if k:
            unit = ordered[k - 1]
            edited += changes[..., unit, None] * coding.directions[unit]
        kl.append(divergences(model, runs, edited, after))
        size.append(((edited - runs.base).norm(dim=-1) * inside).sum(1) / inside.sum(1))
    return Patched(torch.stack(kl, 1).cpu().numpy(), torch.stack(size, 1).cpu().numpy())
