"""The toy model of superposition (Elhage et al. 2022) and the neuron that exclusive features share (Bricken et al.; B19).

A toy model squeezes n features through h < n hidden numbers and is to give them back:

    x' = relu(x W^T W + b)      W [h, n]; or the same without the relu: a linear model

Features are zero with probability 1 - density, else uniform in [0, 1], and the loss weighs each by its importance. Without the
relu the best that h numbers can do is to hold h features; with it, interference between features that seldom meet is cut off,
and more fit in. Many models are trained at once, each with its density and importance, on the same draws.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lib.errors import StudyError
from sae_lib.seeds import generator

EVALUATED = 65_536  # fresh draws that a model is measured on
ROWS = 4096  # of them in memory together
HELD = 0.5  # length of a feature's column of W from which it counts as held


@dataclass(frozen=True)
class ToyConfig:
    """Sizes of a toy model, and its training. Of `restarts` trainings of each model the one with the lowest loss is kept."""

    n_features: int
    n_hidden: int
    n_steps: int = 1500
    batch_size: int = 512
    lr: float = 0.01
    restarts: int = 1
    seed: int = 0


class Toys(NamedTuple):
    """Trained toy models."""

    W: Float[Tensor, "models hidden features"]
    b: Float[Tensor, "models features"]
    relu: bool

    def __call__(self, x: Float[Tensor, "*models n features"]) -> Float[Tensor, "models n features"]:
        """What each model makes of its features."""
        out = x @ self.W.mT @ self.W + self.b[:, None]
        return out.relu() if self.relu else out

    def pick(self, models: Int[Tensor, " kept"]) -> "Toys":
        return Toys(self.W[models], self.b[models], self.relu)


def sparse_features(n: int, density: Float[Tensor, "*models features"],
                    rng: torch.Generator) -> Float[Tensor, "*models n features"]:
    """`n` draws of features that are uniform in [0, 1] with probability `density`, else 0; all models share their luck."""
    u = torch.rand(n, density.shape[-1], generator=rng)
    # One number decides both: below the density a feature is there, and how far below is its value.
    value = 1 - u / density[..., None, :].clamp_min(1e-12)
    return value.clamp_min_(0.0)


def feature_variance(density: Tensor | float) -> Tensor | float:
    """Variance of one feature: E x^2 - (E x)^2 = density / 3 - density^2 / 4."""
    return density / 3 - density ** 2 / 4


# --- training --------------------------------------------------------------------------------------------------------


def train_toys(density: Float[Tensor, " models"], importance: Float[Tensor, "models features"], config: ToyConfig,
               relu: bool = True) -> Toys:
    """One model for each density (of all its features) and row of importances, by Adam, the learning rate falling to 0.

    Raises StudyError for a density outside (0, 1].
    """
    if not ((density > 0) & (density <= 1)).all():
        raise StudyError("A density of features is a share above 0 and at most 1; give others.")
    models, n = importance.shape
    copies = models * config.restarts
    p, weight = (t.repeat(config.restarts, 1) for t in (density[:, None].expand(-1, n), importance))
    rng = generator(config.seed, "toy-init")
    W = torch.randn(copies, config.n_hidden, n, generator=rng) / math.sqrt(n)
    toys = Toys(W.requires_grad_(), torch.zeros(copies, n, requires_grad=True), relu)
    adam = torch.optim.Adam([toys.W, toys.b], lr=config.lr)
    for step in range(config.n_steps):
        adam.param_groups[0]["lr"] = config.lr * min(1.0, 2 * (1 - step / config.n_steps))
        x = sparse_features(config.batch_size, p, generator(config.seed, "toy-batch", step))
        loss = (weight[:, None] * (x - toys(x)).square()).sum(2).mean(1)
        adam.zero_grad()
        loss.sum().backward()  # of models that share nothing: each gets its own gradient
        adam.step()
    trained = Toys(toys.W.detach(), toys.b.detach(), relu)
    losses = (measure(trained, p[:, 0], config.seed, "toy-choice").squared * weight).sum(1).view(config.restarts, models)
    return trained.pick(losses.argmin(0) * models + torch.arange(models))


class Errors(NamedTuple):
    """How well models give back each feature, over the same fresh draws."""

    squared: Float[Tensor, "models features"]
    """Mean squared error."""
    variance: Float[Tensor, "models features"]
    """Of the feature itself: what the best constant would leave."""


@torch.no_grad()
def measure(toys: Toys, density: Float[Tensor, " models"], seed: int = 0, purpose: str = "toy-test") -> Errors:
    """The errors of models, each on draws of its density."""
    p = density[:, None].expand(-1, toys.W.shape[2])
    squared, first, second = (torch.zeros_like(toys.b, dtype=torch.float64) for _ in range(3))
    for step in range(EVALUATED // ROWS):
        x = sparse_features(ROWS, p, generator(seed, purpose, step))
        for total, values in ((squared, (x - toys(x)).square()), (first, x), (second, x.square())):
            total += values.sum(1, dtype=torch.float64) / EVALUATED
    return Errors(squared.float(), (second - first.square()).float())


def capacity(errors: Errors) -> Float[Tensor, " models"]:
    """Features' worth that a model gives back: the explained share of each feature's variance, summed over features.

    Of a linear model with h hidden numbers it is h at most. With P = W^T W, features independent and of variance v, it is
    n - ||I - P||^2, and a matrix of rank h is at least n - h away from the identity (Eckart and Young 1936).
    """
    return (1 - errors.squared / errors.variance).sum(1)


def held(toys: Toys) -> Int[Tensor, " models"]:
    """How many features have a direction of their own, alone or shared: a column of W longer than HELD."""
    return (toys.W.norm(dim=1) > HELD).sum(1)


# --- closed forms ----------------------------------------------------------------------------------------------------


def linear_loss(density: Float[Tensor, " models"], importance: Float[Tensor, "models features"],
                n_hidden: int) -> Float[Tensor, " models"]:
    """Least loss of a linear model: it holds the most important features, and of the others loses all the variance."""
    return feature_variance(density) * importance.sort(dim=1, descending=True).values[:, n_hidden:].sum(1)


PAIR = ("first alone", "second alone", "both, opposed")


def pair_losses(density: Float[Tensor, " *grid"], importance: Float[Tensor, " *grid"]) -> Float[Tensor, "*grid 3"]:
    """Losses of the three ways to put two features into one hidden number, in the order of PAIR.

    The second feature has the given importance, the first 1. A feature that is left out is given as its mean, and costs its
    variance. With W = (1, -1) both come back if one of them is there; if both are, each is off by the smaller one, whose mean
    square is 1/6, and that happens with probability density^2.
    """
    variance = feature_variance(density)
    return torch.stack([importance * variance, variance, (1 + importance) * density ** 2 / 6], dim=-1)


def pair_boundary(importance: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Density below which superposition is the best of the three: 4 r / (2 + 5 r), r the lesser over the greater importance."""
    r = torch.minimum(importance, 1 / importance)
    return 4 * r / (2 + 5 * r)


def pair_kind(toys: Toys) -> Int[Tensor, " models"]:
    """Which of PAIR each trained model of two features and one hidden number is: 2 if both are held, else the longer one."""
    length = toys.W[:, 0].abs()
    return torch.where((length > HELD).all(1), 2, length.argmax(1))


# --- exclusive features, one binary neuron ---------------------------------------------------------------------------


def shared_cross_entropy(n_features: int, shared: int) -> float:
    """Nats to tell which of `n_features` exclusive, equally likely features is there, if a neuron fires on `shared` of them.

    k / n ln k + (n - k) / n ln(n - k): 3/4 ln 3 = 0.824 for one of four, ln 2 = 0.693 for two of four (B19).
    """
    return sum(k / n_features * math.log(k) for k in (shared, n_features - shared) if k)


def shared_squared_error(n_features: int, shared: int) -> float:
    """The same for the squared error of the best guess at which feature is there, as a vector of zeros and a one.

    A group of k like features costs k / n (1 - 1 / k): in all (n - 2) / n, however the neuron divides them.
    """
    return sum((k - 1) / n_features for k in (shared, n_features - shared) if k)


class NeuronRuns(NamedTuple):
    """Binary neurons, trained with their readout to tell which of some exclusive features is there."""

    fires: Float[Tensor, "runs features"]
    """Probability that the neuron fires on each feature."""
    cross_entropy: Float[Tensor, " runs"]
    """Nats, on fresh draws."""
    squared_error: Float[Tensor, " runs"]
    """Of the predicted probabilities, on the same draws."""


def train_neurons(start: Float[Tensor, "runs features"], n_steps: int = 400, batch_size: int = 256, lr: float = 0.1,
                  seed: int = 0) -> NeuronRuns:
    """Train binary neurons, and a softmax readout of each, on draws of one feature at a time.

    `start` holds the logits of the probability to fire on each feature; of +-30 or more they do not move, and the readout
    alone is learned. The expectation over the neuron's two states is exact, so that gradients reach its logits.
    """
    runs, n = start.shape
    fires, readout = start.clone().requires_grad_(), torch.zeros(runs, 2, n, requires_grad=True)
    adam = torch.optim.Adam([fires, readout], lr=lr)
    for step in range(n_steps):
        adam.param_groups[0]["lr"] = lr * min(1.0, 2 * (1 - step / n_steps))
        share = _draws(runs, n, batch_size, generator(seed, "neuron-batch", step))
        p = fires.sigmoid()
        nats = -torch.log_softmax(readout, dim=2)
        adam.zero_grad()
        (share * (p * nats[:, 1] + (1 - p) * nats[:, 0])).sum().backward()
        adam.step()
    share = _draws(runs, n, EVALUATED, generator(seed, "neuron-test"))
    p, guess = fires.detach().sigmoid(), readout.detach().softmax(2)
    state = torch.stack([1 - p, p], dim=1)  # [runs, 2, features]
    # ||guess - one-hot||^2 = ||guess||^2 - 2 guess[feature] + 1
    squared = guess.square().sum(2, keepdim=True) - 2 * guess + 1
    measure = lambda cost: (share[:, None] * state * cost).sum((1, 2))
    return NeuronRuns(p, measure(-guess.log()), measure(squared))


def _draws(runs: int, n_features: int, n: int, rng: torch.Generator) -> Float[Tensor, "runs features"]:
    """Share of `n` draws that gave each feature."""
    drawn = torch.randint(n_features, (runs, n), generator=rng)
    return torch.zeros(runs, n_features).scatter_add_(1, drawn, torch.ones(runs, n)) / n
