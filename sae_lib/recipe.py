"""What a dictionary's training is to be: its sizes and its schedules (Bricken et al., App. Architecture; B2-B4)."""

from dataclasses import dataclass

import torch

from sae_lib.errors import StudyError
from sae_lib.precision import native_bfloat16


@dataclass(frozen=True)
class TrainConfig:
    """How a dictionary is trained. Everything given as a share is a share of the run's steps.

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
    def n_steps(self) -> int:
        return max(1, self.n_activations // self.batch_size)

    def steps(self, share: float) -> int:
        return max(1, round(share * self.n_steps))

    @property
    def dtype(self) -> torch.dtype:
        """Type of the factors in matrix products: bfloat16 where the machine has units for it, unless told."""
        if self.precision == "auto":
            return torch.bfloat16 if native_bfloat16() else torch.float32
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


def l1_at(config: TrainConfig, step: int) -> float:
    """The L1 coefficient, which may rise linearly at the start; `step` counts from 0."""
    warm = min(1.0, (step + 1) / config.steps(config.l1_warmup)) if config.l1_warmup else 1.0
    return config.l1_coefficient * warm
