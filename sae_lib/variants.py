"""Kinds of dictionaries in training: which activations a row gets, what the loss adds to the squared error, and its gradient.

Every kind maps pre-activations z = (x - b_dec) @ W_enc + b_enc to activations f, and its loss is a sum over the rows of a batch
of ||x - x_hat||^2 and of what it adds:

    standard     f = relu(z)                               l1_coefficient * sum of f (Bricken et al.)
    TopK         the k largest of a row, if positive       AuxK (Gao et al. 2024, section 2.4)
    BatchTopK    the k largest a row, over all rows        AuxK (Bussmann et al. 2024)
    Matryoshka   as BatchTopK                              AuxK, and the squared errors of smaller dictionaries made of the first
                                                           features of the whole one (Bussmann et al. 2025)
    JumpReLU     z where z > threshold                     l1_coefficient * number of active features (Rajamanoharan et al. 2024)
    gated        z > 0 gates, relu(exp(r_mag) * (z - b_enc) + b_mag) measures
                                                           l1_coefficient * sum of relu(z), and the squared error of relu(z)
                                                           decoded by a frozen decoder (Rajamanoharan et al. 2024)

AuxK lets those `k_aux` of the dead features that have the largest positive z rebuild what the others leave: it is the squared
error of that, times `aux_coefficient`, less where fewer than `k_aux` are dead. What they are to rebuild has no gradient.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae_lib.errors import StudyError
from sae_lib.sae import SAE, GatedSAE, JumpReLUSAE, SAEConfig, TopKSAE
from sae_lib.selection import select_above, select_largest

At = Tensor | slice  # the features that values belong to: one for each value of a list of pairs, or all of them, in columns
FLOOR = 0.5  # of the smallest activation let through so far: below, BatchTopK does not look for any


class Parameters(NamedTuple):
    """The dictionary while it is trained, or anything with a value for each of its weights: gradients, moments."""

    W_enc_T: Float[Tensor, "d_sae d_in"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, " d_in"]

    def zeros(self) -> "AnyParameters":
        return type(self)(*(torch.zeros_like(p) for p in self))


class JumpReLUParameters(NamedTuple):
    """The same with thresholds."""

    W_enc_T: Float[Tensor, "d_sae d_in"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, " d_in"]
    threshold: Float[Tensor, " d_sae"]

    zeros = Parameters.zeros


class GatedParameters(NamedTuple):
    """The same with magnitudes of their own; `b_enc` is the gate's bias."""

    W_enc_T: Float[Tensor, "d_sae d_in"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, " d_in"]
    r_mag: Float[Tensor, " d_sae"]
    b_mag: Float[Tensor, " d_sae"]

    zeros = Parameters.zeros


AnyParameters = Parameters | JumpReLUParameters | GatedParameters
# What weights are called in the dictionary itself, where that differs.
_NAMES = {(kind, "W_enc_T"): "W_enc" for kind in (Parameters, JumpReLUParameters, GatedParameters)}
_NAMES |= {(GatedParameters, "b_enc"): "b_gate"}


class Backward(NamedTuple):
    """Gradient at pre-activations, the sum of what the coefficient multiplies, and the gradient of further weights, by value."""

    z: Tensor
    penalty: Tensor
    further: dict[str, Tensor]


@dataclass(frozen=True)
class Standard:
    """ReLU and an L1 penalty. What the others do not say for themselves is as here."""

    kind: ClassVar[type] = Parameters
    plain: ClassVar[bool] = True  # what is selected is the activation itself
    over_rows: ClassVar[bool] = False  # whether rows are selected together
    expected_l0: ClassVar[float] = math.inf  # before the first step has counted
    k_aux = 0
    threshold_rate = 1.0

    def widths(self, d_sae: int) -> tuple[int, ...]:
        """Features of each of the nested dictionaries, the whole one last."""
        return (d_sae,)

    def shift(self, p: AnyParameters) -> Float[Tensor, " d_sae"] | None:
        """Pairs are selected whose z is above this, or above 0 if there is none."""
        return None

    def select(self, pre: np.ndarray, bias: np.ndarray, cut: float, *pairs: np.ndarray) -> int:
        """Find the pairs of a micro-batch (`selection.py`)."""
        return select_above(pre, bias, np.float32(0), *pairs)

    def activate(self, p: AnyParameters, z: Tensor, at: At) -> Tensor:
        """Activations of pairs or, with `at` all features, of rows [batch, d_sae]; they may take the place of z."""
        return z.relu_()  # thousands of rows of wide dictionaries are looked at when resampling

    def gate(self, z: Tensor) -> Tensor | None:
        """Activations that a frozen decoder decodes as well."""
        return None

    def backward(self, p: AnyParameters, z: Tensor, f: Tensor, g: Tensor, gate_g: Tensor | None, at: At,
                 coefficient: float | Tensor) -> Backward:
        """From the gradients of squared errors at activations, and at those of the frozen decoder."""
        return Backward((g + coefficient) * (f > 0), f.sum(), {})

    def penalised(self, z: Tensor, f: Tensor) -> Tensor:
        """What the coefficient multiplies, by row and feature."""
        return f

    def constrain_(self, p: AnyParameters) -> None:
        """Bring weights back to where they may be."""

    def begun(self, config: SAEConfig) -> SAE:
        """A new dictionary."""
        return SAE(config)

    def read(self, sae: SAE) -> AnyParameters:
        """The weights of a dictionary as they are trained."""
        own = lambda name: getattr(sae, _NAMES.get((self.kind, name), name)).detach()
        return self.kind(*(own(name).T.contiguous() if name == "W_enc_T" else own(name) for name in self.kind._fields))

    def finished(self, config: SAEConfig, p: AnyParameters, cut: float) -> SAE:
        """The trained dictionary; `cut` is the smallest activation let through in training, as an average over batches."""
        sae = self.begun(config)
        self.load(sae, p)
        return sae

    @torch.no_grad()
    def load(self, sae: SAE, p: AnyParameters) -> None:
        """Give a dictionary trained weights."""
        for name, value in p._asdict().items():
            getattr(sae, _NAMES.get((self.kind, name), name)).copy_(value.T if name == "W_enc_T" else value)


@dataclass(frozen=True)
class TopK(Standard):
    """The `k` largest of a row."""

    k: int
    k_aux: int = 0
    aux_coefficient: float = 0.0

    def __post_init__(self) -> None:
        if self.k < 1 or self.k_aux < 0:
            raise StudyError(f"A row cannot have {self.k} active features and {self.k_aux} of the dead; set k to 1 or more and "
                             "k_aux to 0 or more.")

    @property
    def expected_l0(self) -> float:
        return float(self.k)

    def select(self, pre: np.ndarray, bias: np.ndarray, cut: float, *pairs: np.ndarray) -> int:
        return select_largest(pre, bias, self.k, *pairs)

    def activate(self, p: AnyParameters, z: Tensor, at: At) -> Tensor:
        return largest(z, self.k)

    def backward(self, p: AnyParameters, z: Tensor, f: Tensor, g: Tensor, gate_g: Tensor | None, at: At,
                 coefficient: float | Tensor) -> Backward:
        return Backward(g * (f > 0), f.sum(), {})

    def begun(self, config: SAEConfig) -> SAE:
        return TopKSAE(config, self.k)


@dataclass(frozen=True)
class BatchTopK(TopK):
    """The largest activations of all rows that are taken through the dictionary together, `k` times as many as rows; equal to the
    smallest of them may be more. Once trained, each row keeps what is above the smallest let through on average.
    """

    over_rows: ClassVar[bool] = True
    expected_l0: ClassVar[float] = math.inf  # nothing is known of the smallest before the first step

    def select(self, pre: np.ndarray, bias: np.ndarray, cut: float, *pairs: np.ndarray) -> int:
        return select_above(pre, bias, np.float32(cut), *pairs)

    def activate(self, p: AnyParameters, z: Tensor, at: At) -> Tensor:
        f = z.relu()
        return f * (f >= self.cut(f.flatten(), len(f))) if len(f) else f

    def cut(self, values: Tensor, rows: int) -> Tensor:
        """The smallest activation that `rows` rows with these values let through."""
        return values.topk(min(self.k * rows, len(values)), sorted=False).values.min()

    def finished(self, config: SAEConfig, p: AnyParameters, cut: float) -> SAE:
        sae = JumpReLUSAE(config, cut)
        self.load(sae, p)
        return sae


@dataclass(frozen=True)
class Matryoshka(BatchTopK):
    """BatchTopK whose first features are dictionaries of their own."""

    inner: tuple[int, ...] = ()

    def widths(self, d_sae: int) -> tuple[int, ...]:
        widths = (*self.inner, d_sae)
        if any(b <= a for a, b in zip((0, *widths), widths, strict=False)):
            raise StudyError(f"Nested dictionaries of {', '.join(map(str, widths))} features do not lie in each other; give "
                             f"inner widths that grow and end below {d_sae}.")
        return widths


@dataclass(frozen=True)
class JumpReLU(Standard):
    """A threshold for each feature, whose gradient is estimated from pre-activations less than half a `bandwidth` away.

    Thresholds learn `threshold_rate` times as fast as the other weights.
    """

    kind: ClassVar[type] = JumpReLUParameters
    plain: ClassVar[bool] = False
    bandwidth: float
    threshold_rate: float = 1.0

    def shift(self, p: AnyParameters) -> Float[Tensor, " d_sae"] | None:
        return p.threshold - self.bandwidth / 2

    def activate(self, p: AnyParameters, z: Tensor, at: At) -> Tensor:
        return z * (z > p.threshold[at])

    def backward(self, p: AnyParameters, z: Tensor, f: Tensor, g: Tensor, gate_g: Tensor | None, at: At,
                 coefficient: float | Tensor) -> Backward:
        threshold, active = p.threshold[at], f > 0
        near = ((z - threshold).abs() < self.bandwidth / 2) / self.bandwidth
        return Backward(g * active, active.sum(), {"threshold": -near * (threshold * g + coefficient)})

    def penalised(self, z: Tensor, f: Tensor) -> Tensor:
        return f > 0

    def constrain_(self, p: AnyParameters) -> None:
        p.threshold.clamp_(min=0)  # below, there would be nothing to jump over, and negative activations

    def begun(self, config: SAEConfig) -> SAE:
        return JumpReLUSAE(config)


@dataclass(frozen=True)
class Gated(Standard):
    """One number decides, another measures."""

    kind: ClassVar[type] = GatedParameters
    plain: ClassVar[bool] = False

    def activate(self, p: AnyParameters, z: Tensor, at: At) -> Tensor:
        return ((z - p.b_enc[at]) * p.r_mag[at].exp() + p.b_mag[at]).relu() * (z > 0)

    def gate(self, z: Tensor) -> Tensor | None:
        return z.relu()

    def backward(self, p: AnyParameters, z: Tensor, f: Tensor, g: Tensor, gate_g: Tensor | None, at: At,
                 coefficient: float | Tensor) -> Backward:
        magnitude, growth = g * (f > 0), p.r_mag[at].exp()
        by_magnitude = magnitude * growth
        further = {"b_mag": magnitude, "r_mag": by_magnitude * (z - p.b_enc[at]), "b_enc": -by_magnitude}
        return Backward((gate_g + coefficient) * (z > 0) + by_magnitude, z.relu().sum(), further)

    def penalised(self, z: Tensor, f: Tensor) -> Tensor:
        return z.relu()

    def begun(self, config: SAEConfig) -> SAE:
        return GatedSAE(config)


def largest(z: Float[Tensor, "batch d_sae"], k: int) -> Float[Tensor, "batch d_sae"]:
    """The k largest of each row, as far as they are positive; 0 elsewhere."""
    found = z.topk(min(k, z.shape[1]), dim=1)
    return torch.zeros_like(z).scatter_(1, found.indices, found.values.relu())
