"""What a dictionary's training is to be: its kind, its sizes and its schedules (Bricken et al., App. Architecture; B2-B4)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sae_lib.errors import StudyError
from sae_lib.precision import low_precision
from sae_lib.variants import BatchTopK, Gated, JumpReLU, Matryoshka, Standard, TopK

Number = float | Tensor  # a number that the processor knows, or one in a GPU's memory that it need not wait for

@dataclass(frozen=True)
class TrainConfig:
    """How a standard dictionary is trained. Everything given as a share is a share of the run's steps.

    The activations are trained on at mean norm sqrt(d_in), x' = s * x, and the loss is the mean over the batch of
    ||x' - x_hat'||^2 + l1_coefficient * ||f'||_1: a *summed* squared error. In the paper's units (squared error averaged over
    the d_in elements) the coefficient is l1_coefficient / d_in; on unscaled activations it is l1_coefficient / s.
    """

    n_activations: int
    batch_size: int = 8192
    l1_coefficient: float = 5.0
    lr: float = 4e-4  # the paper reports neither the learning rate nor betas nor warm-up
    betas: tuple[float, float] = (0.9, 0.999)
    lr_warmup: float = 0.0
    lr_decay: float = 0.0  # the last share of the run, over which the rate falls linearly to `lr_final * lr`
    lr_final: float = 0.0
    l1_warmup: float = 0.0
    resample_at: tuple[float, ...] = (0.025, 0.05, 0.075, 0.1)
    dead_window: float = 0.0125
    resample_inputs: int = 819_200
    birth_density: float | None = None
    """Share of inputs on which a new feature fires. With None features are born as in the paper: at the start with Kaiming
    weights, which make each fire on half of the inputs; later along an uncentred input, with zero bias. With a number both
    are born along an input minus `b_dec`, which is what the encoder sees, with the bias that makes them as rare as that."""
    seed: int = 0
    precision: str = "auto"  # or "float32", "bfloat16": of the factors in matrix products
    log_every: int = 100
    checkpoint_every: int = 1000

    @property
    def rule(self) -> Standard:
        """The kind of dictionary that is trained."""
        return Standard()

    def penalty(self, step: int, control: Number, l0: Number) -> Number:  # noqa: ARG002
        """What the sparsity penalty is multiplied with at a step, counted from 0."""
        return l1_at(self, step)

    def controlled(self, control: Number, l0: Number) -> Number:  # noqa: ARG002
        """What steers the penalty, after a step with `l0` active features a row."""
        return control

    @property
    def n_steps(self) -> int:
        return max(1, self.n_activations // self.batch_size)

    def steps(self, share: float) -> int:
        return max(1, round(share * self.n_steps))

    @property
    def dtype(self) -> torch.dtype:
        """Type of the factors in matrix products on the processor."""
        return self.dtype_on("cpu")

    def dtype_on(self, device: torch.device | str) -> torch.dtype:
        """Type of the factors in matrix products: bfloat16 where the device has units for it, unless told."""
        if self.precision == "auto":
            return low_precision(device)
        if self.precision not in ("float32", "bfloat16"):
            raise StudyError(f"There is no precision '{self.precision}'; use auto, float32 or bfloat16.")
        return getattr(torch, self.precision)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, a plateau, and a linear fall at the end; `step` counts from 0."""
    rate = config.lr
    if config.lr_warmup:
        rate *= min(1.0, (step + 1) / config.steps(config.lr_warmup))
    if config.lr_decay:
        left = (config.n_steps - step) / config.steps(config.lr_decay)
        rate *= config.lr_final + (1 - config.lr_final) * min(1.0, left)
    return rate


def penalty_warmth(config: TrainConfig, step: int) -> float:
    """Share of its full size that the sparsity penalty has, which may rise linearly at the start; `step` counts from 0."""
    return min(1.0, (step + 1) / config.steps(config.l1_warmup)) if config.l1_warmup else 1.0


def l1_at(config: TrainConfig, step: int) -> float:
    """The L1 coefficient at a step."""
    return config.l1_coefficient * penalty_warmth(config, step)


# --- later kinds (`variants.py`): what they are trained with besides ---------------------------------------------------


@dataclass(frozen=True)
class TopKConfig(TrainConfig):
    """No penalty: the number of active features is given. Dead ones are revived by AuxK instead of being resampled."""

    architecture: str = "topk"
    k: int = 32
    k_aux: int = 64
    """Dead features that may fire on a row. Gao et al. take about d_in / 2, which costs several times the rest of the step."""
    aux_coefficient: float = 1 / 32
    resample_at: tuple[float, ...] = ()

    @property
    def rule(self) -> Standard:
        return TopK(self.k, self.k_aux, self.aux_coefficient)

    def penalty(self, step: int, control: Number, l0: Number) -> Number:  # noqa: ARG002
        return 0.0


@dataclass(frozen=True)
class BatchTopKConfig(TopKConfig):
    architecture: str = "batchtopk"

    @property
    def rule(self) -> Standard:
        return BatchTopK(self.k, self.k_aux, self.aux_coefficient)


@dataclass(frozen=True)
class MatryoshkaConfig(TopKConfig):
    """BatchTopK with nested dictionaries of the first `inner` features, from narrow to wide; the whole one is not named."""

    architecture: str = "matryoshka_batchtopk"
    inner: tuple[int, ...] = (256, 1024)

    @property
    def rule(self) -> Standard:
        return Matryoshka(self.k, self.k_aux, self.aux_coefficient, tuple(self.inner))


@dataclass(frozen=True)
class GatedConfig(TrainConfig):
    """The L1 penalty is on the gates; magnitudes are not shrunk by it."""

    architecture: str = "gated"

    @property
    def rule(self) -> Standard:
        return Gated()


@dataclass(frozen=True)
class JumpReLUConfig(TrainConfig):
    """The penalty is on the number of active features, and steered so that this becomes `l0`.

    A fixed coefficient leads to an L0 that has to be found by trial, and above some size it changes nothing (SAELens issue 719).
    Here it follows the batches: at once, with the twelfth power of L0 over its target, and by small steps that add up as long as
    there is a difference. Thresholds are trained as they are, not as logarithms, which Adam would hardly move.
    """

    architecture: str = "jumprelu"
    l0: float = 32.0
    l0_coefficient: float = 1.0  # at the start: about the square of the smallest activation that is worth having
    bandwidth: float = 1.0  # of activations of mean norm sqrt(d_in)
    threshold_rate: float = 10.0  # times the learning rate: a threshold has far to go, by rare and contradictory gradients
    GAIN: ClassVar[float] = 0.05  # of the small steps
    POWER: ClassVar[float] = 12.0  # with a lower one small steps have to do the rest, too late for a short training
    # Log of L0 over its target that is reacted to, at once and by small steps: a new dictionary's L0 may be a hundred times too
    # large for hundreds of steps, and what adds up in the meantime has to be undone.
    AT_ONCE: ClassVar[float] = 1 / 3
    BY_STEPS: ClassVar[float] = 0.1

    @property
    def rule(self) -> Standard:
        return JumpReLU(self.bandwidth, self.threshold_rate)

    def _excess(self, l0: Number, limit: float) -> Number:
        if isinstance(l0, Tensor):
            return (l0.clamp(min=1e-9) / self.l0).log().clamp(-limit, limit).masked_fill(~l0.isfinite(), 0.0)
        return max(-limit, min(limit, math.log(max(l0, 1e-9) / self.l0))) if math.isfinite(l0) else 0.0

    def penalty(self, step: int, control: Number, l0: Number) -> Number:
        exponent = control + self.POWER * self._excess(l0, self.AT_ONCE)
        return penalty_warmth(self, step) * self.l0_coefficient * (torch if isinstance(exponent, Tensor) else math).exp(exponent)

    def controlled(self, control: Number, l0: Number) -> Number:
        return control + self.GAIN * self._excess(l0, self.BY_STEPS)
