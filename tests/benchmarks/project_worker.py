"""The project, stepping as `train_sae` and `train_transformer` do, and the judge of everyone's dictionaries."""

import resource
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sae_lib.activations import ActivationStream, StreamConfig
from sae_lib.precision import low_precision
from sae_lib.pretrain import loss_gradients, train_transformer
from sae_lib.sae import SAEConfig
from sae_lib.step import SPARSE_L0, LossGradient, adam_step
from sae_lib.tokens import TokenData
from sae_lib.train import TrainConfig, initial_state
from sae_lib.transformer import TransformerConfig, build, load_transformer, mlp_activations, parameters
from sae_lib.variants import Standard, TopK

from .protocol import clock, serve
from .trainings import Training, Trainings

EVALUATED = 1024  # rows whose features are in memory at once


class _Pool:
    """Stored activations as the source that a training begins with."""

    def __init__(self, pool: np.ndarray):
        self.pool = pool

    def sample(self, n: int, purpose: str = "sample", step: int = 0) -> Tensor:
        return torch.from_numpy(self.pool[:n].astype(np.float32))


class Project(Training):
    """`birth_density` None begins as the paper does, with half of the features active; a number, as the study's profile does."""

    def __init__(self, pool: np.ndarray, batch_size: int, d_sae: int, lr: float, warmup: int, l1_coefficient: float = 0.0,
                 birth_density: float | None = None, k: int | None = None):
        self.lr, self.warmup, self.l1_coefficient = lr, warmup, l1_coefficient
        self.config, rule = TrainConfig(n_activations=batch_size, batch_size=batch_size), Standard() if k is None else TopK(k)
        self.state = initial_state(_Pool(pool), SAEConfig(pool.shape[1], d_sae), birth_density, rule)
        self.gradient = LossGradient(self.state.p, self.config.dtype, rule)
        self.scale, self.l0 = self.state.scale, None

    def step(self, x: Tensor, sparse: bool | None = None) -> None:
        """As one turn of `train_sae`'s loop; `sparse` False asks for the dense way whatever the number of active features."""
        state = self.state
        wanted = state.l0 < 0.75 * SPARSE_L0 if sparse is None else sparse
        sums = self.gradient.add(x, self.l1_coefficient, state.scale, sparse=wanted)
        state.step += 1
        state.age += 1
        lr = self.lr * min(1.0, state.step / self.warmup)
        if not adam_step(state.p, self.gradient.grads, state.m, state.v, state.age, state.step, 1 / len(x), lr):
            raise FloatingPointError("the weights are no longer finite")
        state.last_fired[sums.fired > 0] = state.step
        self.l0 = state.l0 = float(sums.fired.sum()) / len(x)

    def loss(self, x: Tensor) -> float:
        sums = self.gradient.add(x, self.l1_coefficient, self.scale, sparse=self.state.l0 < 0.75 * SPARSE_L0)
        for gradient in self.gradient.grads:
            gradient.zero_()
        return (sums.squared_error + self.l1_coefficient * sums.l1) / len(x)

    def weights(self) -> dict[str, Tensor]:
        p = self.state.p
        return {"W_enc": p.W_enc_T.T, "b_enc": p.b_enc, "W_dec": p.W_dec, "b_dec": p.b_dec}


# --- what the machine can do -------------------------------------------------------------------------------------------

_products: dict = {}


def products(batch: int, d_in: int, d_sae: int, repeat: int = 1) -> dict:
    """Seconds of the five matrix products of a step, in the precision of training, bare: everything lies where and as the
    product likes it best, and in memory that has been written to before."""
    if (kept := (batch, d_in, d_sae)) not in _products:
        _products.clear()  # a wide dictionary's take gigabytes
        kind = low_precision()
        x, f, W = (torch.randn(*shape).to(kind) for shape in ((batch, d_in), (batch, d_sae), (d_sae, d_in)))
        _products[kept] = x, f, W, torch.zeros_like(x), torch.zeros_like(f), torch.zeros_like(W)
        products(batch, d_in, d_sae)
    (x, f, W, out, pre, grad), times = _products[kept], []
    for _ in range(repeat):
        began = clock()
        torch.mm(x, W.T, out=pre)
        torch.mm(f, W, out=out)
        torch.mm(x, W.T, out=pre)
        torch.mm(f.T, x, out=grad)
        torch.mm(f.T, x, out=grad)
        times.append(clock() - began)
    return {"times": times, "dtype": str(x.dtype).removeprefix("torch.")}


def memory() -> dict:
    """Peak of this process in GB; Linux counts it in kibibytes."""
    return {"gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}


# --- data, harvest, transformer ----------------------------------------------------------------------------------------

_opened: dict = {}


def activations(tokens: str | None, transformer: str | None, rows: int, held_out: int, out: str) -> dict:
    """Write shuffled activations of the study's transformer to `out`_train.npy and `out`_held_out.npy, float16; without
    tokens or transformer, synthetic ones. Returns where they are from, and the norms that decide everyone's scale."""
    if tokens and transformer:
        data, config = TokenData.open(Path(tokens)), TransformerConfig(n_tokens=1)
        model = load_transformer(Path(transformer), config)
        parts = {"train": rows, "held_out": held_out}
        found = {}
        for part, n in parts.items():
            split = "train" if part == "train" else "test"
            contexts = torch.from_numpy(np.array(data.contexts(split)[:max(16, 3 * n // data.n_ctx)]))
            chunk = min(len(contexts), -(-n // 120))
            stream = ActivationStream(model, contexts, n, StreamConfig(tokens_per_context=128, chunk_contexts=chunk))
            found[part] = next(stream.batches())
        _opened.update(model=model, config=config, contexts=torch.from_numpy(np.array(data.contexts("train")[:4096])))
        source = "the study's transformer"
    else:
        found = {part: synthetic(n, seed) for seed, (part, n) in enumerate({"train": rows, "held_out": held_out}.items())}
        config = TransformerConfig(n_tokens=1)
        contexts = torch.from_numpy(np.random.default_rng(0).integers(1, config.d_vocab, (4096, config.n_ctx), np.uint16))
        _opened.update(model=build(config).eval().requires_grad_(False), config=config, contexts=contexts)
        source = "synthetic"
    for part, x in found.items():
        np.save(f"{out}_{part}.npy", x.half().numpy())
    norms = found["train"].float().norm(dim=1)
    return {"source": source, "d_in": config.d_mlp, "mean_norm": norms.mean().item(),
            "mean_square_norm": norms.square().mean().item(), "share_active": (found["train"] > 0).float().mean().item()}


def synthetic(n: int, seed: int, d_in: int = 512, features: int = 4096, active: int = 12) -> Tensor:
    """ReLU activations [n, d_in] of which about a sixth are not zero: a few of many sparse directions, through a bias."""
    directions = torch.randn(features, d_in, generator=torch.Generator().manual_seed(17))
    rng = torch.Generator().manual_seed(seed)
    # Some features are far more common than others, as words are.
    frequency = 1 / torch.arange(1, features + 1).float()
    x = torch.empty(n, d_in)
    for rows in x.split(4096):
        chosen = torch.multinomial(frequency.expand(len(rows), -1), active, generator=rng)
        strength = -torch.rand(len(rows), active, generator=rng).clamp_min(1e-6).log()
        rows.copy_((strength[:, None] @ directions[chosen])[:, 0] - 4.0)
    return x.relu_()


def harvest(contexts: int, kept: int, chunk: int) -> dict:
    """Seconds of one chunk of contexts through the model, `kept` activations of each shuffled and handed out in batches."""
    stream = ActivationStream(_opened["model"], _opened["contexts"], contexts * kept // 8,
                              StreamConfig(tokens_per_context=kept, chunk_contexts=contexts))
    began = clock()
    batches = stream.batches(chunk % stream.chunks_per_pass * stream.batches_per_chunk)
    for _ in range(stream.batches_per_chunk):
        next(batches)
    return {"times": [clock() - began]}


@torch.no_grad()
def harvest_bridge(contexts: int) -> dict:
    """Seconds that TransformerBridge takes for the same activations, at every position, float32, in the order of the text."""
    model, config = _opened["model"], _opened["config"]
    began = clock()
    for tokens in _opened["contexts"][:contexts].long().split(32):
        model.run_with_cache(tokens, names_filter=config.hook_name)
    return {"times": [clock() - began]}


def transformer_steps(steps: int) -> dict:
    """Seconds a step of the project's transformer training; a training of one step shows what its beginning takes."""
    base = _opened["config"]

    def whole(n: int) -> float:
        began = clock()
        train_transformer(_opened["contexts"][:1024], replace(base, n_tokens=n * base.batch_contexts * base.n_ctx))
        return clock() - began

    beginning = whole(1)
    return {"times": [(whole(steps + 1) - beginning) / steps] * steps}


def bridge_steps(steps: int, autocast: bool) -> dict:
    """Seconds of a step as a user of TransformerBridge writes it: the model's own loss, backward, clipping, AdamW."""
    config = _opened["config"]
    if (kept := f"bridge-{autocast}") not in _opened:
        model = build(config)
        _opened[kept] = model, torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.99),
                                                 weight_decay=config.weight_decay, fused=True)
    (model, optimizer), times, n = _opened[kept], [], config.batch_contexts
    for i in range(steps):
        tokens = _opened["contexts"][i * n % 256:][:n].long()
        began = clock()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(tokens, return_type="loss")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(clock() - began)
    return {"times": times}


def same_model() -> dict:
    """Whether project and bridge compute the same: the loss of each on a batch, and the length of the difference of the last
    MLP's activations, as a share of the length of these."""
    model, config = _opened["model"], _opened["config"]
    tokens = _opened["contexts"][:8].long()
    project, _ = loss_gradients(parameters(model), tokens, config.n_heads, config.n_layers, low_precision())
    with torch.no_grad():
        bridge = model(tokens, return_type="loss").item()
        _, cache = model.run_with_cache(tokens, names_filter=config.hook_name)
    theirs, stream = cache[config.hook_name], ActivationStream(model, tokens, 1, StreamConfig())
    ours = mlp_activations(model, tokens, p=stream.parameters).float()
    return {"losses": [project.item(), bridge], "activations": ((ours - theirs).norm() / theirs.norm()).item()}


def sizes() -> dict:
    """What the transformer's training is made of: tokens of a step, and operations of the products that no way around them saves,
    by token: forward and back, and as far as the activations that are harvested."""
    c = _opened["config"]
    layer = 2.0 * (4 * c.d_model ** 2 + c.d_model * c.n_ctx)  # of the scores only half is needed
    mlp, out = 2.0 * c.d_model * c.d_mlp, 2.0 * c.d_model * c.d_vocab
    return {"tokens": c.batch_contexts * c.n_ctx, "n_ctx": c.n_ctx, "attention": layer, "mlp": mlp,
            "training": 3 * (c.n_layers * (layer + 2 * mlp) + out)}


# --- the judge ---------------------------------------------------------------------------------------------------------

def evaluate(data: str, path: str, l1_coefficient: float, scale: float) -> dict:
    """What `judge` finds of the dictionary in `path` on the held-out activations `data`."""
    weights = {name: torch.from_numpy(value) for name, value in np.load(path).items()}
    return judge(torch.from_numpy(np.load(data).astype(np.float32)), weights, l1_coefficient, scale)


def judge(x: Tensor, weights: dict[str, Tensor], l1_coefficient: float, scale: float) -> dict:
    """Normalised MSE, L0 and objective of any dictionary, in one unit whatever scale it was trained at.

    Normalised MSE is the summed squared error over that of the mean of `x`. The objective is the project's: at `scale`, mean of
    ||x' - x_hat'||^2 + l1_coefficient * sum of f' times the norm of its dictionary row, which no rescaling of rows changes.
    """
    own, squared_error, l1, l0 = float(weights["scale"]), 0.0, 0.0, 0
    norms = weights["W_dec"].norm(dim=1)
    for rows in x.split(EVALUATED):
        centred = rows * own - weights["b_dec"]
        features = torch.relu(centred @ weights["W_enc"] + weights["b_enc"])
        squared_error += (features @ weights["W_dec"] - centred).square().sum().item()
        l1 += (features @ norms).sum().item()
        l0 += int((features > 0).sum())
    n, variance = len(x), (x - x.mean(0)).square().sum().item()
    to_unscaled, to_shared = 1 / own, scale / own
    return {"normalised_mse": squared_error * to_unscaled ** 2 / variance, "l0": l0 / n,
            "objective": (squared_error * to_shared ** 2 + l1_coefficient * l1 * to_shared) / n}


if __name__ == "__main__":
    serve(Trainings(Project).operations() | {
        "products": products, "memory": memory, "activations": activations, "harvest": harvest, "harvest_bridge": harvest_bridge,
        "transformer_steps": transformer_steps, "bridge_steps": bridge_steps, "same_model": same_model, "sizes": sizes,
        "evaluate": evaluate})
