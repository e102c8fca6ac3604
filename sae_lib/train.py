"""Training a dictionary: resampling of dead features, exact resume, many processes (Bricken et al., App. Architecture; B2-B4)."""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Protocol, runtime_checkable

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from sae_lib.births import bear, geometric_median, make_rare
from sae_lib.checkpoint import load_checkpoint, save_checkpoint
from sae_lib.device_step import DeviceStep
from sae_lib.distributed import ALONE, Processes
from sae_lib.errors import StudyError
from sae_lib.host_step import HostStep
from sae_lib.recipe import TrainConfig, learning_rate
from sae_lib.sae import SAE, SAEConfig
from sae_lib.seeds import generator
from sae_lib.state import TrainState
from sae_lib.variants import Standard

SCALE_SAMPLE = 16_384  # activations for the scale, the geometric median and the densities that features are born with
BIRTH_NORM = 0.3  # of the encoder rows of a dictionary whose features are born rare
RESAMPLE_CHUNK = 65_536  # inputs that are harvested at once when resampling
LOSS_ROWS = 1024  # of them whose features are in memory together


@runtime_checkable
class ActivationSource(Protocol):
    """Where activations come from; what it gives depends on its arguments alone."""

    def batches(self, start_step: int = 0) -> Iterator[Tensor]:
        """Batches [batch, d_in], float32 or bfloat16, beginning with that of step `start_step`: of each what this process is to
        take through the dictionary, out of several that train together. They may be in a GPU's memory.
        """
        ...

    def sample(self, n: int, purpose: str = "sample", step: int = 0) -> Tensor:
        """At most `n` random rows [n, d_in], float32, in the processor's memory, the same in all processes."""
        ...


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
    device, dtype = p.W_dec.device, config.dtype_on(p.W_dec.device)
    W_enc, W_dec = p.W_enc_T.T.to(dtype), p.W_dec.to(dtype)

    def losses(x: Tensor) -> Tensor:
        centred = x - p.b_dec
        z = torch.mm(centred.to(dtype), W_enc).add_(p.b_enc)
        features = rule.activate(p, z, slice(None)).to(dtype)
        error = torch.mm(features, W_dec).float().sub_(centred)
        return error.square().sum(1) + coefficient * rule.penalised(z, features).sum(1, dtype=torch.float32)

    picked, total = torch.zeros(n_dead, p.W_dec.shape[1], device=device), 0.0
    for i, start in enumerate(range(0, config.resample_inputs, RESAMPLE_CHUNK)):
        n = min(RESAMPLE_CHUNK, config.resample_inputs - start)
        x = source.sample(n, f"resample-{i}", state.step).to(device) * state.scale
        weight = torch.cat([losses(rows) for rows in x.split(LOSS_ROWS)]).double().square().cpu()
        # Drawing chunk by chunk: a later chunk takes over a draw with its share of all the weight so far.
        total += weight.sum().item()
        replaced = torch.rand(n_dead, generator=rng, dtype=torch.float64) * total < weight.sum()
        picked[replaced] = x[torch.multinomial(weight, n_dead, replacement=True, generator=rng)][replaced]
    alive_norm = p.W_enc_T[~dead].norm(dim=1).mean() if n_dead < len(dead) else p.W_enc_T.norm(dim=1).mean()
    features = dead.nonzero()[:, 0]
    bear(p, features, picked if config.birth_density is None else picked - p.b_dec, 0.2 * alive_norm)
    if config.birth_density is not None:
        x = source.sample(SCALE_SAMPLE, "birth", state.step).to(device) * state.scale
        make_rare(p, features, x, config.birth_density)
    for moments in (state.m, state.v):
        moments.W_dec[dead], moments.W_enc_T[dead], moments.b_enc[dead] = 0.0, 0.0, 0.0
        for further in moments[4:]:
            further[dead] = 0.0
    state.age[dead], state.last_fired[dead] = 0, state.step
    return n_dead


def train_sae(source: ActivationSource, sae_config: SAEConfig, config: TrainConfig, checkpoint: Path | None = None,
              stop_after: int | None = None, processes: Processes = ALONE,
              device: torch.device | str = "cpu") -> tuple[SAE, pd.DataFrame]:
    """Train a dictionary of the kind that `config` is for and return it, reading unscaled activations, with its log.

    The log's columns: step; activations (seen); loss, mse (summed over d_in), l1 (or whatever the penalty is on, see
    `variants.py`) and l0, means over the rows since the line before, in scaled units; dead (share of features not active in
    `dead_window`); resampled (features, at this step); lr; seconds (of training). The loss is mse and penalty, without what
    AuxK, inner dictionaries and a frozen decoder add. Resumes exactly from `checkpoint` if that file exists: 200 steps give the
    same bits as 100, a stop, and 100 more. `stop_after` ends early at that step, as an interruption would. `processes` train one
    dictionary together, each on its part of every batch; the first reads and writes checkpoints, which any number of processes
    may go on from. They train on `device`, each on its own if that is a GPU; a training may also go on on another, if its
    precision is the same.

    Raises StudyError if the loss is no longer finite (the last checkpoint is kept), if the activations are not of width
    `d_in`, or if the checkpoint is damaged or belongs to another training.
    """
    resample_steps = {config.steps(share) for share in config.resample_at}
    checkpoint = checkpoint if processes.first else None
    rule, device = config.rule, torch.device(device)
    identity = _identity(sae_config, config, device)
    begin = lambda: _resume(checkpoint, rule, identity) or initial_state(source, sae_config, config.birth_density, rule)
    state = TrainState.of_parts(rule, *processes.tensors_from_first(lambda: begin().parts()), device)
    step = (HostStep if device.type == "cpu" else DeviceStep)(state, config, processes)
    end = min(config.n_steps, stop_after or config.n_steps)
    began = time.monotonic() - (state.log[-1]["seconds"] if state.log else 0.0)
    bar = tqdm(total=config.n_steps, initial=state.step, desc="dictionary", unit="step", leave=False, mininterval=2,
               disable=not processes.first)
    batches = source.batches(state.step)
    while state.step < end:
        lr = learning_rate(config, state.step)
        coefficient = step.take(next(batches), lr)
        to_log = state.step % config.log_every == 0 or state.step == config.n_steps
        to_save = state.step % config.checkpoint_every == 0 or state.step == end
        to_resample = state.step in resample_steps
        if to_log or to_save or to_resample:
            step.settle()
        if state.broken:
            raise StudyError(_not_finite(state.broken, config, checkpoint))
        resampled = resample(state, source, config) if to_resample else 0
        bar.update()
        if to_log or resampled:
            _log(state, config, float(coefficient), lr, resampled, time.monotonic() - began)
            bar.set_postfix(loss=f"{state.log[-1]['loss']:.1f}", l0=f"{state.log[-1]['l0']:.1f}", refresh=False)
        if to_save:
            _save(checkpoint, state, identity, processes)
    bar.close()
    return _finished(state, sae_config, config), pd.DataFrame(state.log)


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

def _identity(sae_config: SAEConfig, config: TrainConfig, device: torch.device) -> dict:
    """What must agree for a checkpoint to be gone on from; a lower learning rate may be what rescues a training."""
    free = ("lr", "log_every", "checkpoint_every")
    identity = {"sae": asdict(sae_config), "train": {k: v for k, v in asdict(config).items() if k not in free}}
    identity["train"]["precision"] = str(config.dtype_on(device))
    return identity


def _save(path: Path | None, state: TrainState, identity: dict, processes: Processes) -> None:
    tensors, values = state.parts()
    # Machines that round differently drift apart; all go on from what the checkpoint holds.
    processes.same(*tensors.values())
    if path:
        save_checkpoint(path, {name: t.cpu() for name, t in tensors.items()}, values | {"identity": identity})


def _resume(path: Path | None, rule: Standard, identity: dict) -> TrainState | None:
    saved = load_checkpoint(path) if path else None
    if saved is None:
        return None
    tensors, values = saved
    # Compared as JSON values: tuples come back as lists.
    if values["identity"] != json.loads(json.dumps(identity)):
        raise StudyError(f"The checkpoint {path} belongs to a training with other settings; delete it to start this one.")
    return TrainState.of_parts(rule, tensors, values)
