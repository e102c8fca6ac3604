"""How good a dictionary is: each number defined once, by a formula that closed-form cases in the tests check.

To be measured on held-out text. Sums are pooled over all rows in float64, so that no result depends on the scale of the
activations or on how the rows were batched. Explained variance, L0 and loss recovered each mean several things in the
literature; the docstrings say which.
"""

import math
from collections.abc import Callable
from numbers import Real
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from sae_lib.errors import StudyError
from sae_lib.seeds import numpy_generator

Numbers = np.ndarray | Real

# --- reconstruction --------------------------------------------------------------------------------------------------


class Reconstruction(NamedTuple):
    """How well activations are rebuilt, over all rows that were given."""

    n: int
    """Rows."""
    l0: float
    """Mean number of features above zero in a row."""
    l1: float
    """Mean sum of a row's feature activations."""
    mse: float
    """Mean over rows of ||x - x_hat||^2, *summed* over d_in."""
    explained_variance: float
    """1 - sum ||x - x_hat||^2 / sum ||x - mean(x)||^2, mean and sums over all rows: 0 for always predicting the mean."""
    median_fvu: float
    """Median over rows of ||x - x_hat||^2 / ||x - mean||^2: a companion that a few huge rows cannot carry."""
    fired: Int[Tensor, " d_sae"]
    """Rows that each feature was above zero on."""


class ReconstructionMetrics:
    """Adds up batches of any size; `result()` gives the metrics of all rows so far.

    `mean` is the mean activation that `median_fvu` compares with, from a sample or a first pass; the explained variance uses
    the exact mean of the rows themselves, whatever is given here.
    """

    def __init__(self, mean: Float[Tensor, " d_in"], d_sae: int):
        self.mean = mean.double()
        self.n, self.squared_error, self.l1, self.spread = 0, 0.0, 0.0, 0.0
        self.offset = torch.zeros_like(self.mean)
        self.fired = torch.zeros(d_sae, dtype=torch.int64)
        self.fvu: list[Tensor] = []

    def update(self, x: Float[Tensor, "batch d_in"], x_hat: Float[Tensor, "batch d_in"],
               features: Float[Tensor, "batch d_sae"]) -> None:
        """Add a batch of activations, their reconstructions and the features these were made of."""
        error = (x.double() - x_hat.double()).square().sum(1)
        centred = x.double() - self.mean
        spread = centred.square().sum(1)
        self.n += len(x)
        self.squared_error += error.sum().item()
        self.spread += spread.sum().item()
        self.offset += centred.sum(0)
        self.l1 += features.sum(dtype=torch.float64).item()
        self.fired += (features > 0).sum(0)
        self.fvu.append(error / spread)

    def result(self) -> Reconstruction:
        """The metrics; raises StudyError if there was no row."""
        if not self.n:
            raise StudyError("There are no activations to measure on; give a corpus with more held-out text.")
        # Spread about the exact mean, from the spread about the given one.
        variance = self.spread - self.offset.square().sum().item() / self.n
        explained = explained_share(self.squared_error, variance) if variance > 0 else math.nan
        return Reconstruction(self.n, self.fired.sum().item() / self.n, self.l1 / self.n, self.squared_error / self.n, explained,
                              torch.cat(self.fvu).median().item(), self.fired)


def recovered_share(clean: Numbers, spliced: Numbers, ablated: Numbers) -> Numbers:
    """(ablated - spliced) / (ablated - clean), of mean losses or of sums over the same tokens; arrays go through element-wise."""
    return (ablated - spliced) / (ablated - clean)


def explained_share(error: Numbers, spread: Numbers) -> Numbers:
    """1 - error / spread, of sums of squared distances to the reconstruction and to the mean; arrays go through element-wise."""
    return 1 - error / spread


def loss_recovered(clean: Float[Tensor, "*tokens"], spliced: Float[Tensor, "*tokens"],
                   ablated: Float[Tensor, "*tokens"]) -> float:
    """Share of the loss that ablating the MLP costs which the dictionary's reconstruction wins back (paper_facts B7).

    (L_ablated - L_spliced) / (L_ablated - L_clean), from per-token losses in nats over the same tokens. The paper ablates to
    zero, "an especially bad baseline"; say which ablation was used. It can be negative.

    Raises StudyError if ablation does not raise the loss, for then there is nothing to recover.
    """
    clean_loss, spliced_loss, ablated_loss = (t.double().mean().item() for t in (clean, spliced, ablated))
    if not ablated_loss > clean_loss:
        raise StudyError(f"Ablating the MLP does not raise the loss ({clean_loss:.3f} to {ablated_loss:.3f} nats), so there "
                         "is nothing to recover; train the transformer longer.")
    return recovered_share(clean_loss, spliced_loss, ablated_loss)


# --- densities -------------------------------------------------------------------------------------------------------


class DensitySummary(NamedTuple):
    """Dead, ultralow and living features; the shares add up to 1."""

    dead: float
    """Share of features active on none of the tokens."""
    ultralow: float
    """Share active on some, but with density below the threshold."""
    live: float
    """Share with density at or above the threshold."""
    median_live: float
    """Median density of living features; nan if there is none."""
    floor: float
    """1 / tokens, the smallest density above zero that can be seen. At or above the threshold, `ultralow` is 0 by force."""
    missed: float
    """Probability that a feature of exactly the threshold's density is active nowhere, and so counted as dead."""


def feature_density(fired: Int[Tensor, " d_sae"], n_tokens: int) -> Float64[Tensor, " d_sae"]:
    """Share of tokens each feature is active on."""
    return fired.double() / n_tokens


def density_summary(fired: Int[Tensor, " d_sae"], n_tokens: int, ultralow: float = 1e-6) -> DensitySummary:
    """Sort features by density as Bricken et al. do for A/1 (168 dead, 292 ultralow of 4,096; paper_facts B6).

    The paper's threshold of 1e-6 was seen on 100 million tokens; see `floor` and `missed` for what fewer can show.
    """
    density = feature_density(fired, n_tokens)
    dead, live = fired == 0, density >= ultralow
    median = density[live].median().item() if live.any() else math.nan
    share = lambda mask: mask.double().mean().item()
    return DensitySummary(share(dead), share(~dead & ~live), share(live & ~dead), median, 1 / n_tokens,
                          math.exp(-ultralow * n_tokens))


# --- dictionaries, correlations, intervals ---------------------------------------------------------------------------

def mmcs(directions: Float[Tensor, "n d_in"], others: Float[Tensor, "m d_in"], chunk: int = 4096) -> float:
    """Mean over `directions` of the greatest cosine similarity with any of `others` (Cunningham et al., section 2).

    Not symmetric.
    """
    a, b = (torch.nn.functional.normalize(t, dim=1) for t in (directions, others))
    return torch.cat([(rows @ b.T).amax(1) for rows in a.split(chunk)]).double().mean().item()


def pearson_from_sums(n: Numbers, x: Numbers, y: Numbers, xx: Numbers, yy: Numbers, xy: Numbers) -> Numbers:
    """Pearson correlation from the number of pairs and the sums of x, y, x^2, y^2 and xy; arrays broadcast.

    nan where either side does not vary.
    """
    n, x, y, xx, yy, xy = (np.asarray(value, dtype=np.float64) for value in (n, x, y, xx, yy, xy))
    covariance, var_x, var_y = n * xy - x * y, n * xx - x * x, n * yy - y * y
    # What rounding leaves of a constant's variance is no variance.
    varies = (var_x > 1e-12 * n * xx) & (var_y > 1e-12 * n * yy)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(varies, covariance / np.sqrt(var_x * var_y), np.nan)[()]


class Interval(NamedTuple):
    """A statistic with its bootstrap interval."""

    value: float
    low: float
    high: float


def share_interval(count: int, n: int) -> Interval:
    """Wilson's 95 % interval of a share of independent things: of features that are dead, say. Closed form."""
    z, share = 1.96, count / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half))


def bootstrap_interval(document_sums: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], n_boot: int = 1000,
                       seed: int = 0, level: float = 0.95) -> Interval:
    """Percentile interval of a statistic of pooled sums, by drawing *documents* with replacement.

    Tokens of one document are no independent evidence, documents are. `document_sums` is [n_documents, n_sums], float64;
    `statistic` maps totals [..., n_sums] to values [...]: `lambda t: t[..., 0] / t[..., 1]` for a ratio.

    Raises StudyError if there are fewer than two documents.
    """
    sums = _drawable(document_sums)
    rng, n = numpy_generator(seed, "bootstrap"), len(sums)
    chunk = max(1, 20_000_000 // n)  # draws at once: some 160 MB of weights
    totals = [rng.multinomial(n, np.full(n, 1 / n), size=min(chunk, n_boot - start)) @ sums
              for start in range(0, n_boot, chunk)]
    drawn = statistic(np.concatenate(totals))
    if np.isnan(drawn).all():  # of which no quantile is known either
        return Interval(float(statistic(sums.sum(0))), np.nan, np.nan)
    low, high = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(statistic(sums.sum(0))), float(low), float(high))


def mean_interval(values: Float[np.ndarray, " n"], n_boot: int = 1000, seed: int = 0, level: float = 0.95) -> Interval:
    """The mean of values that are independent of each other, with its bootstrap interval: of prompts, exchanges, places.

    Raises StudyError if there are fewer than two.
    """
    sums = np.stack([values, np.ones(len(values))], axis=1)
    return bootstrap_interval(sums, lambda t: t[..., 0] / t[..., 1], n_boot, seed, level)


def half_sample_interval(document_sums: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], n_boot: int = 1000,
                         seed: int = 0, level: float = 0.95) -> tuple[Interval, float]:
    """Interval of a statistic of pooled sums by leaving out random halves of the documents; and how far it leans.

    Arguments as for `bootstrap_interval`. A statistic that fewer documents pull to one side, such as a median over units of
    which many fire in few documents, is pulled so in every bootstrap draw, which holds but 63 % of the documents: the percentile
    interval then lies beside the value. A half drawn without replacement varies about the whole as the whole does about
    the population (delete-half jackknife; Shao and Wu 1989, Ann. Statist. 17), for medians too. Here the halves' percentiles
    are centred on the value. The second number is what the centring took out, the mean of the halves less the value: the
    value's own bias, as far as that falls with 1 / documents. It is not taken out of the value.

    Raises StudyError if there are fewer than two documents.
    """
    sums = _drawable(document_sums)
    rng, n, kept = numpy_generator(seed, "halves"), len(sums), len(sums) // 2
    chosen = rng.permuted(np.tile(np.arange(n) < kept, (n_boot, 1)), axis=1)
    halves, value, left_out = statistic(chosen @ sums), float(statistic(sums.sum(0))), n / kept - 1
    centre = np.nanmean(halves)
    low, high = (np.nanquantile(halves, [(1 - level) / 2, (1 + level) / 2]) - centre) / math.sqrt(left_out)
    return Interval(value, value + min(0.0, float(low)), value + max(0.0, float(high))), float((centre - value) / left_out)


def _drawable(sums: np.ndarray) -> np.ndarray:
    """Sums as float64, a row each of what is drawn; raises StudyError unless there are two."""
    if len(sums) < 2:
        raise StudyError(f"An interval needs at least two independent samples, such as documents, and there are {len(sums)}; "
                         "use more held-out text, or draw more.")
    return np.asarray(sums, dtype=np.float64)
