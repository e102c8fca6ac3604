"""A training step on a GPU: one compiled graph, for nothing in which the processor waits.

The gradient is that of `dense.py`; Adam and all that is counted follow it in the same graph. Learning rate and coefficient come
in as tensors and what is found stays on the device, until somebody asks for it (`settle`): so the processor hands over step after
step, many ahead of the GPU. Weights, moments, biases and sums are float32 or wider; only factors of products may be bfloat16.

Without a GPU the same functions run as they stand, operation by operation; tests hold them against `step.py` that way.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lib.dense import dense_gradient
from sae_lib.distributed import ALONE, Processes
from sae_lib.recipe import TrainConfig
from sae_lib.state import CUT_RATE, TrainState, check_rows
from sae_lib.step import EPS, GROUP
from sae_lib.variants import AnyParameters, Standard

FEATURES_AT_ONCE = 2 ** 28  # rows times features that are looked at together: five or so arrays of them take 5 GB


class Found(NamedTuple):
    """What a batch gives."""

    grads: AnyParameters
    fired: Int[Tensor, " d_sae"]
    """Rows each feature was active on."""
    sums: Float[Tensor, "4"]
    """Squared error; what the coefficient multiplies; BatchTopK's smallest activation, times rows; rows."""


class Counts(NamedTuple):
    """The numbers of `TrainState` that every step changes."""

    step: Int[Tensor, ""]
    l0: Float[Tensor, ""]
    cut: Float[Tensor, ""]
    control: Float[Tensor, ""]
    sums: Float[Tensor, "4"]
    broken: Int[Tensor, ""]


@dataclass(frozen=True)
class Fixed:
    """What no step changes, so that it may become part of the graph."""

    rule: Standard
    dtype: torch.dtype
    scale: float
    dead_window: int
    betas: tuple[float, float]
    controlled: Callable[[Tensor, Tensor], Tensor]


def batch_gradient(fixed: Fixed, p: AnyParameters, last_fired: Tensor, step: Tensor, x: Float[Tensor, "rows d_in"],
                   coefficient: Float[Tensor, ""]) -> Found:
    """Gradient of the loss of a batch, summed over its rows. BatchTopK selects over as many rows at once as on the processor."""
    rule, grads, low = fixed.rule, p.zeros(), p.W_enc_T.to(fixed.dtype)
    dead = last_fired <= step - fixed.dead_window if rule.k_aux else None
    at_once, fired, sums = max(1, FEATURES_AT_ONCE // len(p.b_enc)), 0, 0.0
    for few in x.split(GROUP if rule.over_rows else at_once):
        found = dense_gradient(rule, p, grads, low, few, coefficient, fixed.scale, dead)
        squared_error, penalty, active, smallest = found
        rows = torch.full_like(smallest, len(few))
        fired, sums = fired + active, sums + torch.stack([t.double() for t in (squared_error, penalty, smallest * rows, rows)])
    return Found(grads, fired, sums)


def update_(fixed: Fixed, p: AnyParameters, m: AnyParameters, v: AnyParameters, age: Tensor, last_fired: Tensor, counts: Counts,
            found: Found, lr: Float[Tensor, ""]) -> None:
    """Adam's step with what was found, and what is counted, all in place; `step.adam_step` says what is done to whom."""
    counts.step.add_(1)
    age.add_(1)
    squared_error, penalty, cut, rows = found.sums.unbind()
    finite = (squared_error + penalty).isfinite()
    for name in p._fields:
        ages = counts.step if name == "b_dec" else age
        rate = lr * fixed.rule.threshold_rate if name == "threshold" else lr
        of_name = (getattr(group, name) for group in (p, found.grads, m, v))
        finite = finite & _adam_(*of_name, ages, 1 / rows, rate, fixed.betas, name == "W_dec").sum().isfinite()
    fixed.rule.constrain_(p)
    last_fired.copy_(torch.where(found.fired > 0, counts.step, last_fired))
    active = found.fired.sum()
    counts.l0.copy_(active / rows)
    counts.cut.add_(torch.where(counts.step > 1, CUT_RATE, 1.0) * (cut / rows - counts.cut))
    counts.sums.add_(torch.stack([squared_error, penalty, active.double(), rows]))
    counts.control.copy_(fixed.controlled(counts.control, counts.l0))
    counts.broken.copy_(torch.where((counts.broken == 0) & ~finite, counts.step, counts.broken))


def _adam_(w: Tensor, g: Tensor, m: Tensor, v: Tensor, age: Tensor, scale: Tensor, lr: Tensor, betas: tuple[float, float],
           unit_norm: bool) -> Tensor:
    """Change weights, one row a feature, and their moments; the squares of the weights, before rows get their norm back."""
    by_row = lambda t: t.float().view(-1, *[1] * (w.ndim - 1)) if t.ndim else t.float()
    if unit_norm:
        g = g - (g * w).sum(1, keepdim=True) * w
    g = g * scale
    m.copy_(betas[0] * m + (1 - betas[0]) * g)
    v.copy_(betas[1] * v + (1 - betas[1]) * g * g)
    step, correction = lr / (1 - betas[0] ** age.double()), (1 - betas[1] ** age.double()).rsqrt()
    new = w - by_row(step) * m / (v.sqrt() * by_row(correction) + EPS)
    square = new.square()
    w.copy_(new * square.sum(1, keepdim=True).rsqrt() if unit_norm else new)
    return square


class DeviceStep:
    """Takes a state whose tensors are on a GPU from step to step; its numbers are up to date after `settle`."""

    def __init__(self, state: TrainState, config: TrainConfig, processes: Processes = ALONE, compiler: Callable | None = None):
        self.state, self.config, self.processes, device = state, config, processes, state.age.device
        self.fixed = Fixed(config.rule, config.dtype_on(device), state.scale, config.steps(config.dead_window), config.betas,
                           config.controlled)
        number = lambda value, dtype=torch.float64: torch.tensor(value, dtype=dtype, device=device)
        self.counts = Counts(number(state.step, torch.int64), number(state.l0), number(state.cut), number(state.control),
                             number([0.0] * 4), number(0, torch.int64))
        self.lr, self.coefficient, self.settled = number(0.0), number(0.0), state.step
        if compiler is None:
            # Of many processes each has more or fewer rows of a batch.
            dynamic = False if processes.count == 1 else None
            compiler = lambda f: torch.compile(f, fullgraph=True, dynamic=dynamic) if device.type == "cuda" else f
        parts = (_whole,) if processes.count == 1 else (batch_gradient, update_)
        self.parts = [compiler(part) for part in parts]

    @torch.no_grad()
    def take(self, x: Tensor, lr: float) -> Tensor:
        """Learn from this process's rows [rows, d_in] of a batch; returns what the penalty was multiplied with."""
        state, counts, fixed = self.state, self.counts, self.fixed
        x = x.to(self.lr.device, non_blocking=True)
        self.lr.fill_(lr)
        self.coefficient.fill_(self.config.penalty(state.step, counts.control, counts.l0))
        changed = state.p, state.m, state.v, state.age, state.last_fired, counts
        if len(self.parts) == 1:
            self.parts[0](fixed, *changed, x, self.coefficient, self.lr)
        else:
            found = self.parts[0](fixed, state.p, state.last_fired, counts.step, x, self.coefficient)
            self.processes.sum(*found.grads, found.fired, found.sums)
            self.parts[1](fixed, *changed, found, self.lr)
        state.step += 1
        return self.coefficient

    def settle(self) -> None:
        """Wait for the GPU and bring the numbers of the state up to date."""
        state, counts = self.state, self.counts
        if state.step == self.settled:
            return
        sums, steps = counts.sums.tolist(), state.step - self.settled
        check_rows(round(sums[3] / steps), self.config)
        for name in ("l0", "cut", "control", "broken"):
            setattr(state, name, getattr(counts, name).item())
        state.sums = [a + b for a, b in zip(state.sums, sums, strict=True)]
        counts.sums.zero_()
        self.settled = state.step


def _whole(fixed: Fixed, p: AnyParameters, m: AnyParameters, v: AnyParameters, age: Tensor, last_fired: Tensor, counts: Counts,
           x: Tensor, coefficient: Tensor, lr: Tensor) -> None:
    found = batch_gradient(fixed, p, last_fired, counts.step, x, coefficient)
    update_(fixed, p, m, v, age, last_fired, counts, found, lr)
