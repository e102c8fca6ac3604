"""How much memory a dictionary's training will take, told before it begins; and a refusal where there is too little.

A training that runs out of memory is killed without a word, hours in, when dead features are resampled or another chunk of
activations comes. Everything large in it is known from its settings.
"""

from dataclasses import replace
from typing import NamedTuple

import psutil
import torch

from sae_lib.device_step import FEATURES_AT_ONCE
from sae_lib.distributed import ALONE, Processes
from sae_lib.errors import StudyError
from sae_lib.precision import low_precision
from sae_lib.recipe import TrainConfig
from sae_lib.sae import SAEConfig
from sae_lib.step import DENSE_ELEMENTS, GROUP, MICRO_BATCH, SPARSE_L0
from sae_lib.train import LOSS_ROWS, RESAMPLE_CHUNK
from sae_lib.variants import Standard

GIB = 2 ** 30
FLOAT, INT = 4, 8  # bytes


class MemoryPlan(NamedTuple):
    """Bytes of one process of a training, at the moment that takes most; besides the program, the text and the transformer."""

    weights: int
    moments: int
    """Of Adam, and each feature's age and last step of being active."""
    gradients: int
    copies: int
    """Of the weights as factors of products, where these are not in float32."""
    dense: int
    """Buffers of the step's dense way. Those of both ways are kept."""
    sparse: int
    """Buffers of its sparse way, which a GPU does not take."""
    activations: int
    """The chunk that batches are drawn from, and one batch."""
    resampling: int
    """Inputs that dead features are drawn from, and new rows for all features, should all be dead."""

    @property
    def total(self) -> int:
        return sum(self)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in self._asdict().items())
        return f"memory of the training: {self.total / GIB:.2f} GiB ({parts})"


def memory_plan(sae: SAEConfig, train: TrainConfig, rows_held: int, device: torch.device | str = "cpu") -> MemoryPlan:
    """What a training takes, in the device's memory, whose process holds `rows_held` activations at once
    (`ActivationStream.rows_held`).
    """
    d_in, d_sae, rule, dtype = sae.d_in, sae.d_sae, train.rule, train.dtype_on(device)
    low, harvested, on_gpu = dtype.itemsize, low_precision(device).itemsize, torch.device(device).type != "cpu"
    weights = FLOAT * (2 * d_sae * d_in + d_sae * (len(rule.kind._fields) - 3) + d_in)
    matrix_copy = low * d_sae * d_in if dtype != torch.float32 else 0
    group = min(train.batch_size, GROUP)
    dense_rows = min(group, max(MICRO_BATCH, DENSE_ELEMENTS // d_sae))
    if on_gpu:
        dense_rows = min(train.batch_size, max(1, FEATURES_AT_ONCE // d_sae))
    micro_batches, dense_micro_batches = -(-group // MICRO_BATCH), -(-dense_rows // MICRO_BATCH)
    # Features and their gradients, errors and inputs; counts and gradients of the biases of each micro-batch.
    dense = 2 * low * dense_rows * (d_sae + d_in) + FLOAT * dense_micro_batches * (2 * d_sae + d_in)
    if on_gpu or type(rule) is not Standard:  # about six arrays over all features
        dense = 6 * FLOAT * (group if rule.over_rows else dense_rows) * d_sae + 2 * low * d_sae * d_in
    # Of each micro-batch the pairs as found and in order, where rows end and where features begin; then the errors.
    pairs = lambda a_row: micro_batches * (MICRO_BATCH * a_row * 6 * FLOAT + INT * (MICRO_BATCH + 1 + d_sae + 1))
    auxiliary = pairs(rule.k_aux) + FLOAT * group * d_in if rule.k_aux else 0
    pre_activations = low * torch.get_num_threads() * MICRO_BATCH * d_sae
    sparse = (1 + len(rule.widths(d_sae))) * FLOAT * group * d_in + pairs(SPARSE_L0) + auxiliary + pre_activations
    sparse *= not on_gpu
    # A row's own bytes, where it is among the rows held, and its place in the order, drawn and looked up.
    activations = rows_held * (harvested * d_in + 3 * INT) + harvested * train.batch_size * d_in
    inputs = min(train.resample_inputs, RESAMPLE_CHUNK) if train.resample_at else 0
    # Inputs as harvested and shuffled, in float32 and scaled; weights as factors; features of those looked at together. As many
    # new rows as these are in memory once more when the finished dictionary is put together.
    resampling = inputs * d_in * 2 * (harvested + FLOAT) + 2 * matrix_copy + low * LOSS_ROWS * d_sae + 3 * FLOAT * d_sae * d_in
    return MemoryPlan(weights, 2 * weights + 2 * INT * d_sae, weights, 2 * matrix_copy, dense, sparse, activations, resampling)


def fitting_plan(sae: SAEConfig, train: TrainConfig, rows_held: int, processes: Processes = ALONE,
                 available: int | None = None, device: torch.device | str = "cpu") -> MemoryPlan:
    """The plan of a training for which there is memory: `available` bytes, by default what this machine or this GPU has free.

    Processes on one machine share its memory, but each has a GPU of its own. Raises StudyError, which names the widest
    dictionary that fits, if that is too little; widths are multiples of `d_in`.
    """
    device = torch.device(device)
    if available is None:
        available = psutil.virtual_memory().available if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    free = available // processes.on_this_machine if device.type == "cpu" else available
    plan = memory_plan(sae, train, rows_held, device)
    if plan.total <= free:
        return plan
    total = lambda width: memory_plan(replace(sae, d_sae=width), train, rows_held, device).total
    widest = max((n for n in range(sae.d_in, sae.d_sae, sae.d_in) if total(n) <= free), default=0)
    advice = f"the widest that fits has {widest:,}" if widest else "end other programs, or take smaller chunks of activations"
    raise StudyError(f"A dictionary of {sae.d_sae:,} features needs {plan.total / GIB:.2f} GiB of memory in each process and "
                     f"{free / GIB:.2f} GiB are free; {advice}.")
