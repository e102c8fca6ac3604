"""Training of the transformer (Bricken et al., App. Transformer Training): matrix products in low precision, weights in float32.

The paper gives neither learning rate nor batch; those here were chosen on validation loss at a laptop's budget.
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
from sae_lib.errors import StudyError
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


class _UnembedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of `x @ W.T`, its gradients made in the forward pass chunk by chunk.

    The logits [tokens, d_vocab] are the largest tensor of the model by far; a chunk of them stays in cache.
    """

    CHUNK = 1024

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:  # noqa: ARG004
        n = len(x)
        loss = x.new_zeros((), dtype=torch.float32)
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, n, _UnembedCrossEntropy.CHUNK):
            rows = slice(start, start + _UnembedCrossEntropy.CHUNK)
            x_rows, target = x[rows], targets[rows, None]
            p = torch.softmax(x_rows @ weight.T, dim=-1)
            p_target = p.gather(1, target)
            # The floor is bfloat16's smallest normal number: an underflow must not turn the logged loss into infinity.
            loss -= p_target.float().clamp_min(1e-38).log().sum()
            p.scatter_(1, target, p_target - 1)
            grad_x[rows] = (p @ weight).div_(n)
            grad_weight += p.T @ x_rows
        ctx.save_for_backward(grad_x, grad_weight.div_(n).to(weight.dtype))
        return loss / n

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad, grad_weight * grad, None


def training_loss(p: Parameters, tokens: Int[Tensor, "batch pos"], n_heads: int, n_layers: int,
                  dtype: torch.dtype) -> Float[Tensor, ""]:
    """Mean next-token loss in nats, differentiable; matrix products in `dtype`."""
    low = {name: value.to(dtype) for name, value in p.items()}
    resid = before_last_mlp(low, tokens, n_heads, n_layers)
    last = f"layers.{n_layers - 1}"
    resid = resid + linear(low, f"{last}.mlp.fc_out", mlp_post(low, last, resid))
    final = norm(low, "ln_out", resid)[:, :-1].flatten(0, 1)
    return _UnembedCrossEntropy.apply(final, low["head.weight"], tokens[:, 1:].flatten())


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
                      checkpoint_every: int = 500, stop_after: int | None = None) -> tuple[Transformer, pd.DataFrame]:
    """Train on the contexts and return the model with its log (step, tokens, loss in nats, lr, seconds).

    Resumes exactly from `checkpoint` if that file exists. `stop_after` ends early at that step, as an interruption would.

    Raises StudyError if there are too few contexts, if the loss is no longer finite, or if the checkpoint is damaged.
    """
    if len(contexts) < config.batch_contexts:
        raise StudyError(f"The corpus gives {len(contexts)} contexts of {config.n_ctx} tokens, fewer than one batch of "
                         f"{config.batch_contexts}; use more text or a smaller profile.")
    model = build(config)
    p = parameters(model)
    # Decay on matrices only, as usual; contiguity matters because fused Adam ignores strides.
    groups = [{"params": [v for v in p.values() if v.ndim == 2], "weight_decay": config.weight_decay},
              {"params": [v for v in p.values() if v.ndim < 2], "weight_decay": 0.0}]
    assert all(v.is_contiguous() for v in p.values())
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.99), fused=True)
    names = [name for name in p if p[name].ndim == 2] + [name for name in p if p[name].ndim < 2]
    step, log = _resume(checkpoint, p, names, optimizer)
    dtype, began = low_precision(), time.monotonic() - (log[-1]["seconds"] if log else 0.0)
    end = min(config.n_steps, stop_after or config.n_steps)
    tokens_per_step = config.batch_contexts * config.n_ctx
    bar = tqdm(total=config.n_steps, initial=step, desc="transformer", unit="step", leave=False, mininterval=2)
    for batch in _context_batches(contexts, config, step):
        if step >= end:
            break
        lr = learning_rate(config, step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = training_loss(p, batch, config.n_heads, config.n_layers, dtype)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(p.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        bar.update()
        if step % 50 == 0 or step == config.n_steps:
            if not loss.isfinite():
                raise StudyError(f"The transformer's loss became {loss.item()} at step {step}; lower its learning rate "
                                 f"({config.lr:g}) and run again.")
            log.append({"step": step, "tokens": step * tokens_per_step, "loss": loss.item(), "lr": lr,
                        "seconds": time.monotonic() - began})
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if checkpoint and (step % checkpoint_every == 0 or step == end):
            _save(checkpoint, p, names, optimizer, step, log)
    bar.close()
    return model, pd.DataFrame(log)


def _save(path: Path, p: Parameters, names: list[str], optimizer: torch.optim.Optimizer, step: int, log: list[dict]) -> None:
    tensors = {f"p/{name}": p[name].detach() for name in names}
    for name in names:
        state = optimizer.state[p[name]]
        tensors |= {f"{key}/{name}": state[key] for key in ("exp_avg", "exp_avg_sq")}
    save_checkpoint(path, tensors, {"step": step, "log": log})


def _resume(path: Path | None, p: Parameters, names: list[str], optimizer: torch.optim.Optimizer) -> tuple[int, list[dict]]:
    saved = load_checkpoint(path) if path else None
    if saved is None:
        return 0, []
    tensors, values = saved
    with torch.no_grad():
        for name in names:
            p[name].copy_(tensors[f"p/{name}"])
            optimizer.state[p[name]] = {"step": torch.tensor(float(values["step"]))} | {
                key: tensors[f"{key}/{name}"] for key in ("exp_avg", "exp_avg_sq")}
    return values["step"], values["log"]
