"""Training of the transformer (Bricken et al., App. Transformer Training): matrix products in low precision, weights in float32.

The paper gives neither learning rate nor batch; those here were chosen on validation loss at a laptop's budget. Of several
processes that train together each takes some contexts of every batch, and all make the same step with the summed gradient.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from sae_lib.checkpoint import load_checkpoint, save_checkpoint
from sae_lib.distributed import ALONE, Processes
from sae_lib.errors import StudyError
from sae_lib.kernels import in_parallel
from sae_lib.precision import low_precision
from sae_lib.seeds import generator
from sae_lib.transformer import (
    Parameters,
    Transformer,
    TransformerConfig,
    before_last_mlp,
    build,
    linear,
    mlp_post,
    norm,
    parameters,
)

MICRO_BATCH = 8  # contexts that one thread takes through the model and back: what they leave for the way back stays in cache
CHUNK, GPU_CHUNK = 512, 8192  # tokens whose logits are in memory together; a GPU wants large products


def unembed_gradients(x: Float[Tensor, "tokens d_model"], weight: Float[Tensor, "d_vocab d_model"],
                      targets: Int[Tensor, " tokens"]) -> tuple[Tensor, Tensor, Tensor]:
    """Summed cross-entropy of the logits `x @ weight.T`, and its gradients to `x` and, in float32, to `weight`.

    The logits are the largest tensor of the model by far: they are made, used and forgotten chunk by chunk.
    """
    total, chunk = torch.zeros((), dtype=torch.float64, device=x.device), GPU_CHUNK if x.is_cuda else CHUNK
    grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight, dtype=torch.float32)
    buffers = torch.empty(2, min(chunk, len(x)), len(weight), dtype=x.dtype, device=x.device)
    for x_rows, grad_rows, target in zip(x.split(chunk), grad_x.split(chunk), targets.split(chunk), strict=True):
        logits, p = buffers[:, :len(x_rows)]
        torch.softmax(torch.mm(x_rows, weight.T, out=logits), -1, out=p)
        place = torch.arange(len(p), device=p.device) * len(weight) + target
        p_target = p.view(-1)[place]
        # The floor is bfloat16's smallest normal number: an underflow must not turn the logged loss into infinity.
        total -= p_target.float().clamp_min(1e-38).log().sum()
        p.view(-1)[place] = p_target - 1
        torch.mm(p, weight, out=grad_rows)
        grad_weight += p.T @ x_rows
    return total, grad_x, grad_weight


def loss_gradients(p: Parameters, tokens: Int[Tensor, "batch pos"], n_heads: int, n_layers: int,
                   dtype: torch.dtype) -> tuple[Tensor, Parameters]:
    """Mean next-token loss in nats and its gradient, in float32; matrix products in `dtype`. All are on the device of `p`.

    Each thread takes a few contexts through the model and back, and the gradients are added in the order of the contexts: the
    result does not depend on how many threads there are. A GPU takes them all at once.
    """
    low, last = {name: value.detach().to(dtype) for name, value in p.items()}, f"layers.{n_layers - 1}"

    def one(few: Tensor) -> tuple[Tensor, list[Tensor]]:
        leaves = {name: value.detach().requires_grad_() for name, value in low.items()}
        head = leaves.pop("head.weight")
        with torch.enable_grad():
            resid = before_last_mlp(leaves, few, n_heads, n_layers)
            resid = resid + linear(leaves, f"{last}.mlp.fc_out", mlp_post(leaves, last, resid))
            final = norm(leaves, "ln_out", resid)[:, :-1].flatten(0, 1)
        with torch.no_grad():
            total, grad_final, grad_head = unembed_gradients(final, head, few[:, 1:].flatten())
        return total, [*torch.autograd.grad(final, list(leaves.values()), grad_final), grad_head]

    found = in_parallel(one, [(few,) for few in tokens.split(len(tokens) if tokens.is_cuda else MICRO_BATCH)])
    n = tokens[:, 1:].numel()
    names = [name for name in p if name != "head.weight"] + ["head.weight"]
    parts = zip(*(grads for _, grads in found), strict=True)
    grads = {name: torch.stack(few).float().sum(0).div_(n) for name, few in zip(names, parts, strict=True)}
    return sum(total for total, _ in found) / n, grads


def learning_rate(config: TransformerConfig, step: int) -> float:
    """Linear warm-up, then a cosine down to `lr_final` of the peak."""
    warmup = max(1, round(config.warmup * config.n_steps))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = torch.tensor((step - warmup) / max(1, config.n_steps - warmup))
    cosine = 0.5 * (1 + torch.cos(torch.pi * progress)).item()
    return config.lr * (config.lr_final + (1 - config.lr_final) * cosine)


def _context_batches(contexts: Tensor, config: TransformerConfig, start: int) -> Iterator[Tensor]:
    """Shuffled batches of contexts [batch, n_ctx] from step `start` on; each pass over the text has its own order."""
    per_epoch = len(contexts) // config.batch_contexts
    for step in range(start, config.n_steps):
        epoch, position = divmod(step, per_epoch)
        if position == 0 or step == start:
            order = torch.randperm(len(contexts), generator=generator(config.seed, "context-order", epoch))
        yield contexts[order[position * config.batch_contexts:(position + 1) * config.batch_contexts]].long()


def train_transformer(contexts: Int[Tensor, "n_contexts n_ctx"], config: TransformerConfig, checkpoint: Path | None = None,
                      checkpoint_every: int = 500, stop_after: int | None = None, processes: Processes = ALONE,
                      device: torch.device | str = "cpu") -> tuple[Transformer, pd.DataFrame]:
    """Train on the contexts and return the model, in the processor's memory, with its log (step, tokens, loss in nats, lr,
    seconds).

    Resumes exactly from `checkpoint` if that file exists. `stop_after` ends early at that step, as an interruption would.
    `processes` train one model together, each on `device`; the first reads and writes checkpoints, which any number of them may
    go on from.

    Raises StudyError if there are too few contexts, if there are more processes than contexts in a batch, if the loss is no
    longer finite, or if the checkpoint is damaged.
    """
    if len(contexts) < config.batch_contexts:
        raise StudyError(f"The corpus gives {len(contexts)} contexts of {config.n_ctx} tokens, fewer than one batch of "
                         f"{config.batch_contexts}; use more text or a smaller profile.")
    if processes.count > config.batch_contexts:
        raise StudyError(f"A batch of {config.batch_contexts} contexts is too small for {processes.count} processes; use fewer.")
    model = build(config)
    p = {name: value.detach().to(device).requires_grad_() for name, value in parameters(model).items()}
    # Decay on matrices only, as usual; contiguity matters because fused Adam ignores strides.
    groups = [{"params": [v for v in p.values() if v.ndim == 2], "weight_decay": config.weight_decay},
              {"params": [v for v in p.values() if v.ndim < 2], "weight_decay": 0.0}]
    assert all(v.is_contiguous() for v in p.values())
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.99), fused=True)
    names = [name for name in p if p[name].ndim == 2] + [name for name in p if p[name].ndim < 2]
    checkpoint = checkpoint if processes.first else None
    step, log = _resume(checkpoint, p, names, optimizer, processes)
    dtype, began = low_precision(device), time.monotonic() - (log[-1]["seconds"] if log else 0.0)
    end = min(config.n_steps, stop_after or config.n_steps)
    # Whole micro-batches where there are enough, so that products are the same however many share them.
    share = min(MICRO_BATCH, config.batch_contexts // processes.count)
    tokens_per_step = config.batch_contexts * config.n_ctx
    bar = tqdm(total=config.n_steps, initial=step, desc="transformer", unit="step", leave=False, mininterval=2,
               disable=not processes.first)
    for batch in _context_batches(contexts, config, step):
        if step >= end:
            break
        lr = learning_rate(config, step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        mine = torch.cat(batch.split(share)[processes.rank::processes.count]).to(device)
        loss, grads = loss_gradients(p, mine, config.n_heads, config.n_layers, dtype)
        for mean in (loss, *grads.values()):
            mean.mul_(len(mine) / len(batch))
        processes.sum(loss, *grads.values())
        for name, value in p.items():
            value.grad = grads[name]
        torch.nn.utils.clip_grad_norm_(p.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        bar.update()
        if step % 50 == 0 or step == config.n_steps:
            if not loss.isfinite():
                raise StudyError(f"The transformer's loss became {loss:g} at step {step}; lower its learning rate "
                                 f"({config.lr:g}) and run again.")
            log.append({"step": step, "tokens": step * tokens_per_step, "loss": loss.item(), "lr": lr,
                        "seconds": time.monotonic() - began})
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        if step % checkpoint_every == 0 or step == end:
            _save(checkpoint, p, names, optimizer, step, log, processes)
    bar.close()
    with torch.no_grad():
        for name, value in parameters(model).items():
            value.copy_(p[name])
    return model, pd.DataFrame(log)


def _save(path: Path | None, p: Parameters, names: list[str], optimizer: torch.optim.Optimizer, step: int, log: list[dict],
          processes: Processes) -> None:
    tensors = {f"p/{name}": p[name].detach() for name in names}
    for name in names:
        state = optimizer.state[p[name]]
        tensors |= {f"{key}/{name}": state[key] for key in ("exp_avg", "exp_avg_sq")}
    # Machines that round differently drift apart; all go on from what the checkpoint holds.
    processes.same(*tensors.values())
    if path:
        save_checkpoint(path, {name: t.cpu() for name, t in tensors.items()}, {"step": step, "log": log})


def _resume(path: Path | None, p: Parameters, names: list[str], optimizer: torch.optim.Optimizer,
            processes: Processes) -> tuple[int, list[dict]]:
    none = {f"p/{name}": value.detach().cpu() for name, value in p.items()}, {"step": 0, "log": []}
    tensors, values = processes.tensors_from_first(lambda: (load_checkpoint(path) if path else None) or none)
    with torch.no_grad():
        for name in names:
            p[name].copy_(tensors[f"p/{name}"])
            if values["step"]:
                optimizer.state[p[name]] = {"step": torch.tensor(float(values["step"]), device=p[name].device)} | {
                    key: tensors[f"{key}/{name}"].to(p[name].device) for key in ("exp_avg", "exp_avg_sq")}
    return values["step"], values["log"]
