"""The one-layer transformer whose MLP the study takes apart (Bricken et al., Problem Setup; App. Transformer Training).

The model is a TransformerLens `TransformerBridge`, so that hooks, caches and interventions work as users know them. Training
and harvesting want neither hooks nor stored attention scores, so they run the same parameters through the short forward pass
below; a test holds the two equal.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

os.environ.setdefault("WANDB_MODE", "disabled")  # a dependency of transformer_lens that the study never uses
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge

from sae_lib.errors import StudyError
from sae_lib.seeds import generator

Transformer = TransformerBridge
MlpEdit = Callable[[Tensor], Tensor]
Parameters = dict[str, Tensor]
# On CPUs torch's fused attention takes longer, back twice as long, than one whose scores are in memory for so many positions at a
# time: those scores stay in cache, and what is later than all of these positions is not looked at. The way back wants few pieces.
ATTENTION_BLOCK, ATTENTION_BLOCK_WITH_GRADIENT = 64, 512


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes and training of the transformer. Where the paper gives a number it is the default (B1: d_model 128, d_mlp 512)."""

    n_tokens: int  # training budget; the paper's 100 billion is out of a laptop's reach
    d_vocab: int = 4096
    n_ctx: int = 256
    n_layers: int = 1
    d_model: int = 128
    n_heads: int = 4
    d_mlp: int = 512
    batch_contexts: int = 32
    lr: float = 4e-3
    lr_final: float = 0.05  # share of `lr` left at the end
    warmup: float = 0.02  # share of the run
    weight_decay: float = 0.01
    seed: int = 0

    @property
    def n_steps(self) -> int:
        return max(1, self.n_tokens // (self.batch_contexts * self.n_ctx))

    @property
    def hook_name(self) -> str:
        """Where the dictionary reads: the last layer's MLP activations, after the ReLU."""
        return f"blocks.{self.n_layers - 1}.mlp.hook_post"


def build(config: TransformerConfig) -> Transformer:
    """An untrained model; its weights depend on `config.seed` alone."""
    # The weights draw from torch's global state, which is put back afterwards.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(config.seed, "transformer-init").initial_seed())
        return TransformerBridge.boot_native(TransformerBridgeConfig(
            n_layers=config.n_layers, d_model=config.d_model, d_head=config.d_model // config.n_heads,
            n_heads=config.n_heads, d_mlp=config.d_mlp, d_vocab=config.d_vocab, n_ctx=config.n_ctx,
            act_fn="relu", normalization_type="LN", seed=config.seed))


def parameters(model: Transformer) -> Parameters:
    """The model's parameters by short names (`layers.0.mlp.fc_in.weight`), sharing memory with the model."""
    return {name.replace("._original_component", ""): p for name, p in model.named_parameters()}


# --- the forward pass ------------------------------------------------------------------------------------------------

def norm(p: Parameters, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"])


def linear(p: Parameters, name: str, x: Tensor) -> Tensor:
    return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])


def attention(p: Parameters, layer: str, x: Tensor, n_heads: int) -> Tensor:
    def heads(name: str) -> Tensor:
        return linear(p, f"{layer}.attn.{name}", x).unflatten(-1, (n_heads, -1)).transpose(1, 2)

    q, k, v = heads("q"), heads("k"), heads("v")
    if q.is_cuda:
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        size = ATTENTION_BLOCK_WITH_GRADIENT if torch.is_grad_enabled() else ATTENTION_BLOCK
        pieces = (q * q.shape[-1] ** -0.5).split(size, 2)
        z = torch.cat([_attend(few, k[:, :, :(i + 1) * size], v[:, :, :(i + 1) * size]) for i, few in enumerate(pieces)], 2)
    return linear(p, f"{layer}.attn.o", z.transpose(1, 2).flatten(-2))


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What the last positions, whose queries these are, take from all."""
    n = q.shape[2]
    later = q.new_full((n, n), -torch.inf).triu(1)
    scores = q @ k.mT
    scores[..., -n:] += later
    return torch.softmax(scores, -1) @ v


def embed(p: Parameters, tokens: Tensor) -> Tensor:
    """Residual stream before the first layer, [batch, pos, d_model]."""
    return F.embedding(tokens, p["tok_embed.weight"]) + p["pos.weight"][: tokens.shape[1]]


def attended(p: Parameters, layer: str, resid: Tensor, n_heads: int) -> Tensor:
    """Residual stream after a layer's attention."""
    return resid + attention(p, layer, norm(p, f"{layer}.ln1", resid), n_heads)


def through_layers(p: Parameters, resid: Tensor, n_heads: int, layers: range) -> Tensor:
    """Residual stream after some layers, from that before them."""
    for layer in (f"layers.{i}" for i in layers):
        resid = attended(p, layer, resid, n_heads)
        resid = resid + linear(p, f"{layer}.mlp.fc_out", mlp_post(p, layer, resid))
    return resid


def layer_at(p: Parameters, resid: Tensor, n_heads: int, i: int, at: Tensor) -> Tensor:
    """Residual stream after layer i at the position `at` of each row alone, [batch, d_model], from that before it at all."""
    layer, rows = f"layers.{i}", torch.arange(len(resid), device=resid.device)
    x = norm(p, f"{layer}.ln1", resid)
    k, v = (linear(p, f"{layer}.attn.{name}", x).unflatten(-1, (n_heads, -1)) for name in "kv")
    q = linear(p, f"{layer}.attn.q", x[rows, at]).unflatten(-1, (n_heads, -1))
    scores = torch.einsum("bhd,bphd->bph", q * q.shape[-1] ** -0.5, k)
    scores.masked_fill_((torch.arange(x.shape[1], device=at.device) > at[:, None])[..., None], -torch.inf)
    z = torch.einsum("bph,bphd->bhd", torch.softmax(scores, 1), v).flatten(1)
    end = resid[rows, at] + linear(p, f"{layer}.attn.o", z)
    return end + linear(p, f"{layer}.mlp.fc_out", mlp_post(p, layer, end))


def before_last_mlp(p: Parameters, tokens: Tensor, n_heads: int, n_layers: int) -> Tensor:
    """Residual stream before the last MLP, [batch, pos, d_model]."""
    resid = through_layers(p, embed(p, tokens), n_heads, range(n_layers - 1))
    return attended(p, f"layers.{n_layers - 1}", resid, n_heads)


def mlp_post(p: Parameters, layer: str, resid: Tensor) -> Tensor:
    return F.relu(linear(p, f"{layer}.mlp.fc_in", norm(p, f"{layer}.ln2", resid)))


def logits(p: Parameters, layer: str, resid: Tensor, acts: Tensor) -> Tensor:
    """Next-token logits [..., d_vocab], from the residual stream before the last MLP and that MLP's activations."""
    return F.linear(norm(p, "ln_out", resid + linear(p, f"{layer}.mlp.fc_out", acts)), p["head.weight"])


@torch.no_grad()
def mlp_activations(model: Transformer, tokens: Int[Tensor, "batch pos"], keep: Int[Tensor, "batch kept"] | None = None,
                    p: Parameters | None = None) -> Float[Tensor, "batch kept d_mlp"]:
    """Activations of the last layer's MLP neurons after the ReLU, at the positions `keep` (all if None).

    `p` stands in for the model's own parameters: the same in lower precision, which is then the precision of everything.
    """
    p, cfg = p or parameters(model), model.cfg
    resid = before_last_mlp(p, tokens, cfg.n_heads, cfg.n_layers)
    if keep is not None:
        resid = resid.gather(1, keep[..., None].expand(-1, -1, resid.shape[-1]))
    return mlp_post(p, f"layers.{cfg.n_layers - 1}", resid)


@torch.no_grad()
def token_losses(model: Transformer, tokens: Int[Tensor, "batch pos"],
                 edits: dict[str, MlpEdit | None]) -> dict[str, Float[Tensor, "batch pos-1"]]:
    """Next-token loss in nats, once for each way of editing the MLP activations [batch, pos, d_mlp] (None: left alone).

    The work before the MLP is shared by all edits.
    """
    p, cfg = parameters(model), model.cfg
    last = f"layers.{cfg.n_layers - 1}"
    resid = before_last_mlp(p, tokens, cfg.n_heads, cfg.n_layers)
    acts = mlp_post(p, last, resid)
    return {name: next_token_losses(p, resid + linear(p, f"{last}.mlp.fc_out", acts if edit is None else edit(acts)), tokens)
            for name, edit in edits.items()}


def next_token_losses(p: Parameters, resid: Float[Tensor, "batch pos d_model"],
                      tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos-1"]:
    """Loss in nats from the residual stream after the last layer; logits are in memory one context at a time."""
    final = norm(p, "ln_out", resid)[:, :-1]
    return torch.stack([F.cross_entropy(F.linear(h, p["head.weight"]), t, reduction="none")
                        for h, t in zip(final, tokens[:, 1:], strict=True)])


# --- sampling --------------------------------------------------------------------------------------------------------

def _advance(p: Parameters, tokens: Tensor, n_heads: int, n_layers: int, seen: dict[str, Tensor]) -> Tensor:
    """`before_last_mlp` at the positions that follow those whose keys and values are in `seen`; adds theirs to it."""
    start = seen["layers.0.k"].shape[2] if seen else 0
    resid = F.embedding(tokens, p["tok_embed.weight"]) + p["pos.weight"][start:start + tokens.shape[1]]
    for layer in (f"layers.{i}" for i in range(n_layers)):
        x = norm(p, f"{layer}.ln1", resid)
        q, k, v = (linear(p, f"{layer}.attn.{name}", x).unflatten(-1, (n_heads, -1)).transpose(1, 2) for name in "qkv")
        for name, new in ((f"{layer}.k", k), (f"{layer}.v", v)):
            seen[name] = torch.cat([seen[name], new], 2) if start else new
        z = F.scaled_dot_product_attention(q, seen[f"{layer}.k"], seen[f"{layer}.v"], is_causal=not start)
        resid = resid + linear(p, f"{layer}.attn.o", z.transpose(1, 2).flatten(-2))
        if layer != f"layers.{n_layers - 1}":
            resid = resid + linear(p, f"{layer}.mlp.fc_out", mlp_post(p, layer, resid))
    return resid


@torch.no_grad()
def sample(model: Transformer, prompt: Int[Tensor, " pos"], n_tokens: int, seed: int, n_samples: int = 1,
           temperature: float = 1.0, edit: MlpEdit | None = None) -> Int[Tensor, "n_samples length"]:
    """Continue a prompt, with the last layer's MLP activations edited if there is an edit.

    The edit gets the last position alone, [n_samples, 1, d_mlp]: what it would do at earlier ones reaches no later prediction.

    Raises StudyError if the prompt and what follows do not fit in the model's context.
    """
    p, cfg = parameters(model), model.cfg
    if len(prompt) + n_tokens > cfg.n_ctx:
        raise StudyError(f"A prompt of {len(prompt)} tokens and {n_tokens} more do not fit in the model's context of "
                         f"{cfg.n_ctx}; ask for fewer.")
    rng, tokens, last = generator(seed, "sample"), prompt.long().repeat(n_samples, 1), f"layers.{cfg.n_layers - 1}"
    following, seen = tokens, {}
    for _ in range(n_tokens):
        resid = _advance(p, following, cfg.n_heads, cfg.n_layers, seen)[:, -1:]
        acts = mlp_post(p, last, resid)
        probabilities = torch.softmax(logits(p, last, resid, acts if edit is None else edit(acts))[:, 0] / temperature, -1)
        following = torch.multinomial(probabilities, 1, generator=rng)
        tokens = torch.cat([tokens, following], dim=1)
    return tokens


# --- controls, baselines, files --------------------------------------------------------------------------------------

def shuffle_weights(model: Transformer, config: TransformerConfig, seed: int) -> Transformer:
    """The random control: the entries of every weight matrix shuffled, vectors left as they are (B16; the paper's fn 28)."""
    control = build(config)
    with torch.no_grad():
        for name, value in parameters(control).items():
            trained = parameters(model)[name]
            if trained.ndim < 2:
                value.copy_(trained)
                continue
            order = torch.randperm(trained.numel(), generator=generator(seed, f"shuffle-{name}"))
            value.copy_(trained.flatten()[order].view_as(trained))
    return control


def ngram_losses(train: Int[Tensor, " n"], held_out: Int[Tensor, "n_contexts n_ctx"], d_vocab: int) -> dict[str, float]:
    """Loss in nats on held-out next tokens of a unigram and of a bigram model counted on the training tokens.

    The bigram is interpolated with the unigram as if `prior` further tokens of the unigram had followed each token; the
    prior is the best of a few on the held-out text, which favours this baseline slightly.
    """
    train, previous, following = train.long(), held_out[:, :-1].flatten().long(), held_out[:, 1:].flatten().long()
    counts = torch.bincount(train, minlength=d_vocab).double()
    unigram = (counts + 1) / (counts.sum() + d_vocab)
    codes, n = torch.unique(train[:-1] * d_vocab + train[1:], return_counts=True)
    wanted = previous * d_vocab + following
    index = torch.searchsorted(codes, wanted).clamp_max(len(codes) - 1)
    pair_counts = torch.where(codes[index] == wanted, n[index], 0).double()
    bigram = min(-((pair_counts + prior * unigram[following]) / (counts[previous] + prior)).log().mean().item()
                 for prior in (3.0, 10.0, 30.0, 100.0))
    return {"unigram": -unigram[following].log().mean().item(), "bigram": bigram}


def save_transformer(model: Transformer, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the weights as safetensors, under the short names of `parameters`; in float16 the file is half as large."""
    save_file({name: value.detach().to(dtype).contiguous() for name, value in parameters(model).items()}, path)


def load_transformer(path: Path, config: TransformerConfig) -> Transformer:
    """Read what `save_transformer` wrote. Raises StudyError if the file is not a model of these sizes."""
    model = build(config)
    try:
        weights = load_file(path)
        with torch.no_grad():
            for name, value in parameters(model).items():
                value.copy_(weights.pop(name).view_as(value))
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise StudyError(f"{path} does not hold the weights of this profile's transformer; delete its folder and run "
                         "./run_all.sh again to remake it.") from error
    return model.eval().requires_grad_(False)


def load_pretrained(name: str, device: torch.device | str = "cpu") -> Transformer:
    """A model that was trained elsewhere: a folder in Hugging Face's layout, or a name on its hub, which needs a network.

    Raises StudyError if there is none.
    """
    try:
        return TransformerBridge.boot_transformers(name, device=device).eval().requires_grad_(False)
    except OSError as error:
        raise StudyError(f"'{name}' is neither a folder with a model nor one that can be downloaded now; check the name and the "
                         "network.") from error
