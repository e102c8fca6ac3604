"""A training step on the processor: `step.py`'s arithmetic, summed over all processes, and what is counted on the way."""

import math

import torch
from torch import Tensor

from sae_lib.distributed import ALONE, Processes
from sae_lib.recipe import TrainConfig
from sae_lib.state import CUT_RATE, TrainState, check_rows
from sae_lib.step import SPARSE_L0, LossGradient, StepSums, adam_step


class HostStep:
    """Takes a state from step to step."""

    def __init__(self, state: TrainState, config: TrainConfig, processes: Processes = ALONE):
        self.state, self.config, self.processes = state, config, processes
        self.dead_window = config.steps(config.dead_window)
        self.gradient = LossGradient(state.p, config.dtype, config.rule)

    def take(self, x: Tensor, lr: float) -> float:
        """Learn from this process's rows [rows, d_in] of a batch; returns what the penalty was multiplied with."""
        state, config, rule, gradient = self.state, self.config, self.config.rule, self.gradient
        coefficient = config.penalty(state.step, state.control, state.l0)
        # Deterministic, since it depends on counts alone; the margin is for rows that have more than most.
        sparse = state.l0 < 0.75 * SPARSE_L0
        found = gradient.add(x, coefficient, state.scale, sparse, state.dead(self.dead_window) if rule.k_aux else None, state.cut)
        sums, rows = self._over_all(found, len(x))
        check_rows(rows, config)
        state.step += 1
        state.age += 1
        finite = adam_step(state.p, gradient.grads, state.m, state.v, state.age, state.step, 1 / rows, lr, config.betas,
                           threshold_rate=rule.threshold_rate)
        rule.constrain_(state.p)
        if not (finite and math.isfinite(sums.squared_error + sums.l1)):
            state.broken = state.step
            return coefficient
        self._count(sums, rows)
        state.control = config.controlled(state.control, state.l0)
        return coefficient

    def settle(self) -> None:
        """Nothing is behind: every step here is at its end before the next begins."""

    def _over_all(self, sums: StepSums, rows: int) -> tuple[StepSums, int]:
        """Sum the gradient over all processes, in place; what they found on the batch together, and its rows."""
        values = torch.tensor([sums.squared_error, sums.l1, sums.cut, rows], dtype=torch.float64)
        self.processes.sum(*self.gradient.grads, sums.fired, values)
        squared_error, l1, cut, all_rows = values.tolist()
        return StepSums(squared_error, l1, sums.fired, cut), round(all_rows)

    def _count(self, sums: StepSums, rows: int) -> None:
        state = self.state
        state.last_fired[sums.fired > 0] = state.step
        new = (sums.squared_error, sums.l1, float(sums.fired.sum()), float(rows))
        state.l0 = new[2] / rows
        state.cut += (CUT_RATE if state.step > 1 else 1.0) * (sums.cut / rows - state.cut)
        state.sums = [a + b for a, b in zip(state.sums, new, strict=True)]
