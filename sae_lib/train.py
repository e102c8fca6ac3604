"""Training a dictionary: resampling of dead features, exact resume, many processes (Bricken et al., App. Architecture; B2-B4)."""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from tqdm.auto import tqdm

from sae_lib.births import bear, geometric_median, make_rare
from sae_lib.checkpoint import load_checkpoint, save_checkpoint
from sae_lib.distributed import ALONE, Processes
from sae_lib.errors import StudyError
from sae_lib.recipe import TrainConfig, learning_rate
from sae_lib.sae import SAE, SAEConfig
from sae_lib.seeds import generator
from sae_lib.step import SPARSE_L0, LossGradient, StepSums, adam_step
from sae_lib.variants import AnyParameters, Standard

SCALE_SAMPLE = 16_384  # activations for the scale, the geometric median and the densities that features are born with
BIRTH_NORM = 0.3  # of the encoder rows of a dictionary whose features are born rare
RESAMPLE_CHUNK = 65_536  # inputs that are harvested at once when resampling
LOSS_ROWS = 1024  # of them whose features are in memory together
CUT_RATE = 0.05  # share of a batch in the running average of BatchTopK's smallest activation


@runtime_checkable
class ActivationSource(Protocol):
    """Where activations come from; what it gives depends on its arguments alone."""

    def batches(self, start_step: int = 0) -> Iterator[Tensor]:
        """Batches [batch, d_in], float32 or bfloat16, beginning with that of step `start_step`: of each what this process is to
        take through the dictionary, out of several that train together.
        """
        ...

    def sample(self, n: int, purpose: str = "sample", step: int = 0) -> Tensor:
        """At most `n` random rows [n, d_in], float32, the same in all processes."""
        ...


@dataclass
class TrainState:
    """Everything that training changes; what a checkpoint holds."""

    p: AnyParameters
    m: AnyParameters
    v: AnyParameters
    age: Int[Tensor, " d_sae"]  # updates of each feature since it was made or resampled
    last_fired: Int[Tensor, " d_sae"]  # step at which each feature was last active
    scale: float
    step: int
    l0: float  # mean number of active features in the last batch
    sums: list[float]  # squared error, L1, active features and rows since the last line of the log
    log: list[dict]
    cut: float = 0.0  # running average of the smallest activation that BatchTopK lets through
    control: float = 0.0  # what steers JumpReLU's penalty

    def dead(self, window: int) -> Bool[Tensor, " d_sae"]:
        """Features that were active in none of the last `window` steps."""
        return self.last_fired <= self.step - window


def initial_state(source: ActivationSource, sae_config: SAEConfig, birth_density: float | None = None,
                  rule: Standard = Standard()) -> TrainState:
    """A new dictionary, its pre-encoder bias at the geometric median of the scaled activations."""
    x = source.sample(SCALE_SAMPLE, "scale")
    if x.shape[1] != sae_config.d_in:
        raise StudyError(f"The activations have width {x.shape[1]} and the dictionary reads {sae_config.d_in}; set d_in to "
                         "match.")
    norm = x.norm(dim=1).mean().item()
    if not norm > 0 or not math.isfinite(norm):
        raise StudyError(f"The activations have mean norm {norm}, so there is nothing to train on; train the transformer "
                         "again.")
    scale = math.sqrt(sae_config.d_in) / norm
    p = rule.read(rule.begun(sae_config))._replace(b_dec=geometric_median(x * scale))
    if birth_density is not None:
        inputs, everyone = source.sample(sae_config.d_sae, "birth") * scale, torch.arange(sae_config.d_sae)
        bear(p, everyone, inputs[everyone % len(inputs)] - p.b_dec, BIRTH_NORM)
        make_rare(p, everyone, x * scale, birth_density)
    zeros = torch.zeros(sae_config.d_sae, dtype=torch.int64)
    return TrainState(p, p.zeros(), p.zeros(), zeros.clone(), zeros.clone(), scale, 0, rule.expected_l0, [0.0] * 4, [])


@torch.no_grad()
def resample(state: TrainState, source: ActivationSource, config: TrainConfig) -> int:
    """Give every dead feature a new direction; returns how many (Bricken et al., Neuron Resampling).

    An input is drawn for each with probability proportional to its loss squared, out of `resample_inputs`. Its direction
    becomes the dictionary row, and at 0.2 times the mean norm of the living features' encoders the encoder row; the encoder
    bias becomes 0 (or what `birth_density` asks for), and Adam starts anew for all of these weights.
    """
    dead = state.dead(config.steps(config.dead_window))
    n_dead = int(dead.sum())
    if not n_dead:
        return 0
    rng, p, rule = generator(config.seed, "resample", state.step), state.p, config.rule
    coefficient = config.penalty(state.step - 1, state.control, state.l0)
    W_enc, W_dec = p.W_enc_T.T.to(config.dtype), p.W_dec.to(config.dtype)

    def losses(x: Tensor) -> Tensor:
        centred = x - p.b_dec
        z = torch.mm(centred.to(config.dtype), W_enc).add_(p.b_enc)
        features = rule.activate(p, z, slice(None)).to(config.dtype)
        error = torch.mm(features, W_dec).float().sub_(centred)
        return error.square().sum(1) + coefficient * rule.penalised(z, features).sum(1, dtype=torch.float32)

    picked, total = torch.zeros(n_dead, p.W_dec.shape[1]), 0.0
    for i, start in enumerate(range(0, config.resample_inputs, RESAMPLE_CHUNK)):
        n = min(RESAMPLE_CHUNK, config.resample_inputs - start)
        x = source.sample(n, f"resample-{i}", state.step) * state.scale
        weight = torch.cat([losses(rows) for rows in x.split(LOSS_ROWS)]).double().square()
        # Drawing chunk by chunk: a later chunk takes over a draw with its share of all the weight so far.
        total += weight.sum().item()
        replaced = torch.rand(n_dead, generator=rng, dtype=torch.float64) * total < weight.sum()
        picked[replaced] = x[torch.multinomial(weight, n_dead, replacement=True, generator=rng)][replaced]
    alive_norm = p.W_enc_T[~dead].norm(dim=1).mean() if n_dead < len(dead) else p.W_enc_T.norm(dim=1).mean()
    features = dead.nonzero()[:, 0]
    bear(p, features, picked if config.birth_density is None else picked - p.b_dec, 0.2 * alive_norm)
    if config.birth_density is not None:
        make_rare(p, features, source.sample(SCALE_SAMPLE, "birth", state.step) * state.scale, config.birth_density)
    for moments in (state.m, state.v):
        moments.W_dec[dead], moments.W_enc_T[dead], moments.b_enc[dead] = 0.0, 0.0, 0.0
        for further in moments[4:]:
            further[dead] = 0.0
    state.age[dead], state.last_fired[dead] = 0, state.step
    return n_dead


def train_sae(source: ActivationSource, sae_config: SAEConfig, config: TrainConfig, checkpoint: Path | None = None,
              stop_after: int | None = None, processes: Processes = ALONE) -> tuple[SAE, pd.DataFrame]:
    """Train a dictionary of the kind that `config` is for and return it, reading unscaled activations, with its log.

    The log's columns: step; activations (seen); loss, mse (summed over d_in), l1 (or whatever the penalty is on, see
    `variants.py`) and l0, means over the rows since the line before, in scaled units; dead (share of features not active in
    `dead_window`); resampled (features, at this step); lr; seconds (of training). The loss is mse and penalty, without what
    AuxK, inner dictionaries and a frozen decoder add. Resumes exactly from `checkpoint` if that file exists: 200 steps give the
    same bits as 100, a stop, and 100 more. `stop_after` ends early at that step, as an interruption would. `processes` train one
    dictionary together, each on its part of every batch; the first reads and writes checkpoints, which any number of processes
    may go on from.

    Raises StudyError if the loss is no longer finite (the last checkpoint is kept), if the activations are not of width
    `d_in`, or if the checkpoint is damaged or belongs to another training.
    """
    resample_steps = {config.steps(share) for share in config.resample_at}
    checkpoint = checkpoint if processes.first else None
    rule, dead_window = config.rule, config.steps(config.dead_window)
    begin = lambda: _resume(checkpoint, sae_config, config) or initial_state(source, sae_config, config.birth_density, rule)
    state = _state(rule, *processes.tensors_from_first(lambda: _parts(begin())))
    gradient = LossGradient(state.p, config.dtype, rule)
    end = min(config.n_steps, stop_after or config.n_steps)
    began = time.monotonic() - (state.log[-1]["seconds"] if state.log else 0.0)
    bar = tqdm(total=config.n_steps, initial=state.step, desc="dictionary", unit="step", leave=False, mininterval=2,
               disable=not processes.first)
    batches = source.batches(state.step)
    while state.step < end:
        lr, coefficient = learning_rate(config, state.step), config.penalty(state.step, state.control, state.l0)
        # Deterministic, since it depends on counts alone; the margin is for rows that have more than most.
        x, sparse = next(batches), state.l0 < 0.75 * SPARSE_L0
        dead = state.dead(dead_window) if rule.k_aux else None
        found = gradient.add(x, coefficient, state.scale, sparse, dead, state.cut)
        sums, rows = _over_all(processes, gradient.grads, found, len(x))
        if rows != config.batch_size:
            raise StudyError(f"A batch has {rows} rows instead of {config.batch_size}; give the activations and the training one "
                             "batch size.")
        state.step += 1
        state.age += 1
        finite = adam_step(state.p, gradient.grads, state.m, state.v, state.age, state.step, 1 / rows, lr, config.betas,
                           threshold_rate=rule.threshold_rate)
        rule.constrain_(state.p)
        if not (finite and math.isfinite(sums.squared_error + sums.l1)):
            raise StudyError(_not_finite(state.step, config, checkpoint))
        _count(state, sums, rows)
        state.control = config.controlled(state.control, state.l0)
        resampled = resample(state, source, config) if state.step in resample_steps else 0
        bar.update()
        if state.step % config.log_every == 0 or state.step == config.n_steps or resampled:
            _log(state, config, coefficient, lr, resampled, time.monotonic() - began)
            bar.set_postfix(loss=f"{state.log[-1]['loss']:.1f}", l0=f"{state.log[-1]['l0']:.1f}", refresh=False)
        if state.step % config.checkpoint_every == 0 or state.step == end:
            _save(checkpoint, state, sae_config, config, processes)
    bar.close()
    return _finished(state, sae_config, config), pd.DataFrame(state.log)


def _over_all(processes: Processes, grads: AnyParameters, sums: StepSums, rows: int) -> tuple[StepSums, int]:
    """Sum the gradient over all processes, in place; what they found on the batch together, and its rows."""
    values = torch.tensor([sums.squared_error, sums.l1, sums.cut, rows], dtype=torch.float64)
    processes.sum(*grads, sums.fired, values)
    squared_error, l1, cut, all_rows = values.tolist()
    return StepSums(squared_error, l1, sums.fired, cut), round(all_rows)


def _count(state: TrainState, sums: StepSums, rows: int) -> None:
    state.last_fired[sums.fired > 0] = state.step
    new = (sums.squared_error, sums.l1, float(sums.fired.sum()), float(rows))
    state.l0 = new[2] / rows
    state.cut += (CUT_RATE if state.step > 1 else 1.0) * (sums.cut / rows - state.cut)
    state.sums = [a + b for a, b in zip(state.sums, new, strict=True)]


def _log(state: TrainState, config: TrainConfig, coefficient: float, lr: float, resampled: int, seconds: float) -> None:
    mse, l1, l0 = (value / state.sums[3] for value in state.sums[:3])
    dead = state.dead(config.steps(config.dead_window)).float().mean().item()
    state.log.append({"step": state.step, "activations": state.step * config.batch_size, "loss": mse + coefficient * l1,
                      "mse": mse, "l1": l1, "l0": l0, "dead": dead, "resampled": resampled, "lr": lr, "seconds": seconds})
    state.sums = [0.0] * 4


def _finished(state: TrainState, sae_config: SAEConfig, config: TrainConfig) -> SAE:
    sae = config.rule.finished(sae_config, state.p, state.cut)
    sae.metadata = {"training": asdict(config) | {"steps": state.step, "activation_scale": state.scale}}
    if state.log:
        sae.metadata["l0"] = state.log[-1]["l0"]
    return sae.fold_scale_(state.scale).requires_grad_(False)


def _not_finite(step: int, config: TrainConfig, checkpoint: Path | None) -> str:
    kept = "go on from the last checkpoint" if checkpoint and checkpoint.exists() else "run again"
    return (f"The dictionary's loss is no longer a finite number at step {step}; lower its learning rate ({config.lr:g}) "
            f"and {kept}.")


# --- checkpoints -----------------------------------------------------------------------------------------------------

def _identity(sae_config: SAEConfig, config: TrainConfig) -> dict:
    """What must agree for a checkpoint to be gone on from; a lower learning rate may be what rescues a training."""
    free = ("lr", "log_every", "checkpoint_every")
    identity = {"sae": asdict(sae_config), "train": {k: v for k, v in asdict(config).items() if k not in free}}
    identity["train"]["precision"] = str(config.dtype)
    return identity


def _parts(state: TrainState) -> tuple[dict[str, Tensor], dict]:
    tensors = {f"{group}/{name}": value for group in ("p", "m", "v")
               for name, value in getattr(state, group)._asdict().items()}
    tensors |= {"age": state.age, "last_fired": state.last_fired}
    names = ("scale", "step", "l0", "sums", "log", "cut", "control")
    return tensors, {name: getattr(state, name) for name in names}


def _state(rule: Standard, tensors: dict[str, Tensor], values: dict) -> TrainState:
    groups = {g: rule.kind(*(tensors[f"{g}/{name}"] for name in rule.kind._fields)) for g in ("p", "m", "v")}
    return TrainState(**groups, age=tensors["age"], last_fired=tensors["last_fired"], scale=values["scale"],
                      step=values["step"], l0=values["l0"], sums=values["sums"], log=values["log"],
                      cut=values.get("cut", 0.0), control=values.get("control", 0.0))


def _save(path: Path | None, state: TrainState, sae_config: SAEConfig, config: TrainConfig, processes: Processes) -> None:
    tensors, values = _parts(state)
    # Machines that round differently drift apart; all go on from what the checkpoint holds.
    processes.same(*tensors.values())
    if path:
        save_checkpoint(path, tensors, values | {"identity": _identity(sae_config, config)})


def _resume(path: Path | None, sae_config: SAEConfig, config: TrainConfig) -> TrainState | None:
    saved = load_checkpoint(path) if path else None
    if saved is None:
        return None
    tensors, values = saved
    # Compared as JSON values: tuples come back as lists.
    if values["identity"] != json.loads(json.dumps(_identity(sae_config, config))):
        raise StudyError(f"The checkpoint {path} belongs to a training with other settings; delete it to start this one.")
    return _state(config.rule, tensors, values)
