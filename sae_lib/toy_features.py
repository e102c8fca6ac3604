"""Activations made of known features, and how well a dictionary finds these (paper_facts B19, C5; Cunningham et al., toy data).

    x = c F + offset      c [n, n_features], mostly zero; F [n_features, d_in], unit rows, more of them than dimensions

A row of x is to a dictionary what an activation of the transformer is, but here the directions F and the activations c are known.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from sae_lib.errors import StudyError
from sae_lib.sae import SAE
from sae_lib.seeds import generator
from sae_lib.toy import sparse_features

BINS = 100  # of the histograms that information is counted with


@dataclass(frozen=True)
class FeatureConfig:
    """Sizes of the synthetic activations.

    `active` features are there on average, feature i + 1 with `decay` times the probability of feature i; the offset, of norm
    `offset`, makes them a biased problem, on which a dictionary without a bias before the encoder shows no bounce (B19).
    """

    d_in: int = 32
    n_features: int = 64
    active: float = 3.0
    decay: float = 0.99
    offset: float = 1.0
    seed: int = 0


class KnownFeatures:
    """Synthetic activations as training data for dictionaries: an `ActivationSource` that depends on (seed, purpose, step) alone.

    Raises StudyError if a feature would have to be there with a probability above 1.
    """

    def __init__(self, config: FeatureConfig, batch_size: int):
        self.config, self.batch_size = config, batch_size
        rarity = config.decay ** torch.arange(config.n_features)
        self.density: Float[Tensor, " n_features"] = config.active * rarity / rarity.sum()
        if self.density.max() > 1:
            raise StudyError(f"{config.active} of {config.n_features} features cannot be active on average; ask for fewer.")

    @cached_property
    def directions(self) -> Float[Tensor, "n_features d_in"]:
        """The true features, unit vectors drawn uniformly."""
        drawn = torch.randn(self.config.n_features, self.config.d_in, generator=generator(self.config.seed, "true-directions"))
        return drawn / drawn.norm(dim=1, keepdim=True)

    @cached_property
    def offset(self) -> Float[Tensor, " d_in"]:
        drawn = torch.randn(self.config.d_in, generator=generator(self.config.seed, "true-offset"))
        return self.config.offset * drawn / drawn.norm()

    def active(self, n: int, purpose: str = "sample", step: int = 0) -> Float[Tensor, "n n_features"]:
        """True activations of `n` rows: uniform in [0, 1] where a feature is there."""
        return sparse_features(n, self.density, generator(self.config.seed, f"known-{purpose}", step))

    def rows(self, active: Float[Tensor, "n n_features"]) -> Float[Tensor, "n d_in"]:
        """What a dictionary sees of them."""
        return active @ self.directions + self.offset

    def batches(self, start_step: int = 0) -> Iterator[Float[Tensor, "batch d_in"]]:
        """Endless batches, beginning with that of step `start_step`."""
        step = start_step
        while True:
            yield self.rows(self.active(self.batch_size, "batch", step))
            step += 1

    def sample(self, n: int, purpose: str = "sample", step: int = 0) -> Float[Tensor, "n d_in"]:
        """`n` rows for a purpose other than training."""
        return self.rows(self.active(n, purpose, step))


# --- recovery --------------------------------------------------------------------------------------------------------


class Match(NamedTuple):
    """One feature of a dictionary for each true one, none twice, so that the cosines are greatest in sum."""

    unit: Int[np.ndarray, " n_features"]
    """-1 where the dictionary has none left: it is narrower than the truth."""
    cosine: Float[np.ndarray, " n_features"]
    """0 there."""


def match(directions: Float[Tensor, "d_sae d_in"], truth: Float[Tensor, "n_features d_in"]) -> Match:
    """Assign features of a dictionary to true ones by the Hungarian method."""
    a, b = (torch.nn.functional.normalize(t, dim=1) for t in (directions, truth))
    cosines = (b @ a.T).numpy()
    true, learned = linear_sum_assignment(cosines, maximize=True)
    unit, cosine = np.full(len(b), -1), np.zeros(len(b), np.float32)
    unit[true], cosine[true] = learned, cosines[true, learned]
    return Match(unit, cosine)


def matched_f1(found: Float[Tensor, "n d_sae"], active: Float[Tensor, "n n_features"],
               unit: Int[np.ndarray, " n_features"]) -> Float[np.ndarray, " n_features"]:
    """F1 of each true feature: does its match fire on just the rows on which it is there?

    2 hits / (hits + misses + hits + false alarms); 0 for a feature without a match, nan for one that is never there.
    """
    truth, fires = active > 0, (found > 0)[:, np.maximum(unit, 0)]
    hits = (truth & fires).sum(0).numpy()
    f1 = 2 * hits / np.maximum(1, truth.sum(0).numpy() + fires.sum(0).numpy())
    return np.where(truth.any(0).numpy(), np.where(unit >= 0, f1, 0.0), np.nan).astype(np.float32)


# --- information -----------------------------------------------------------------------------------------------------


def histogram_bits(values: Float[Tensor, "*shape"], low: float, high: float) -> float:
    """Bits to write the entries down: the sum of their surprisals under their own histogram of 100 bins from `low` to `high`."""
    counts = torch.histc(values.float().clamp(low, high), bins=BINS, min=low, max=high).double()
    counts = counts[counts > 0]
    return -(counts * (counts / counts.sum()).log2()).sum().item()


class Coded(NamedTuple):
    """Activations written as features times directions."""

    features: Float[Tensor, "n d_sae"]
    directions: Float[Tensor, "d_sae d_in"]


@torch.no_grad()
def coded(sae: SAE, x: Float[Tensor, "n d_in"]) -> Coded:
    """Activations as a dictionary writes them."""
    return Coded(sae.encode(x), sae.W_dec)


def total_information(experiments: Sequence[Coded]) -> list[float]:
    """Bits to write down features and directions of each factorisation (May 2023 Circuits Update; B19).

    The range of the histograms is from the largest entry over all experiments, so that one that shrinks its features gains
    nothing by finer bins.
    """
    features, directions = (max(part[i].abs().max().item() for part in experiments) for i in (0, 1))
    return [histogram_bits(part.features, 0.0, features) + histogram_bits(part.directions, -directions, directions)
            for part in experiments]


def bounce(widths: Sequence[int], bits: Sequence[float]) -> int:
    """The width with the least information: with fewer features each says less of what there is, with more they say it twice."""
    return int(widths[int(np.nanargmin(bits))])


def bits_at(level: float, explained: Sequence[float], bits: Sequence[float]) -> float:
    """Bits at which dictionaries of one width, of several L1 coefficients, would explain `level` of the variance.

    Interpolated between those that explain less and more; nan if all explain less, or all more.
    """
    order = np.argsort(explained)
    return float(np.interp(level, np.asarray(explained)[order], np.asarray(bits)[order], left=np.nan, right=np.nan))
