"""The residual stream between layers: read it, edit it, go on from it (Cunningham et al., section 2; C1, C4).

A dictionary reads either the last layer's MLP activations (`after` is None) or the residual stream after so many layers: 0 is
the sum of embeddings, `n_layers` is what the unembedding reads. Whatever harvests, evaluates or tabulates takes `after` and asks
here, so that one-layer MLP dictionaries and those between the layers of a deeper model share everything else.

The study's own transformers take the short forward pass of `transformer.py`. Any other model that TransformerLens bridges, such
as the Pythia models of the paper, goes through the bridge itself, in its own precision and on its own device.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sae_lib.errors import StudyError
from sae_lib.transformer import (
    MlpEdit,
    Parameters,
    Transformer,
    embed,
    layer_at,
    mlp_activations,
    next_token_losses,
    norm,
    parameters,
    through_layers,
    token_losses,
)

ResidualEdit = Callable[[Tensor], Tensor]


def is_own(model: Transformer) -> bool:
    """Whether a model is one of the study's, or one that was trained elsewhere."""
    return "tok_embed.weight" in parameters(model)


def _check(model: Transformer, after: int) -> None:
    n = model.cfg.n_layers
    if not 0 <= after <= n:
        raise StudyError(f"There is no residual stream after {after} layers of a model that has {n}; give a number from 0 to "
                         f"{n}.")


def hook_name(model: Transformer, after: int | None) -> str:
    """What TransformerLens calls the place."""
    last = model.cfg.n_layers - 1
    if after is None:
        return f"blocks.{last}.mlp.hook_post"
    _check(model, after)
    return f"blocks.{after}.hook_resid_pre" if after <= last else f"blocks.{last}.hook_resid_post"


def device(model: Transformer) -> torch.device:
    """Where a model is, and where it wants its tokens."""
    return next(iter(parameters(model).values())).device


def width(model: Transformer, after: int | None) -> int:
    """Numbers in one activation there: d_mlp, or d_model."""
    return model.cfg.d_mlp if after is None else model.cfg.d_model


@torch.no_grad()
def activations(model: Transformer, tokens: Int[Tensor, "batch pos"], after: int | None,
                keep: Int[Tensor, "batch kept"] | None = None, p: Parameters | None = None) -> Float[Tensor, "batch kept d_in"]:
    """MLP activations of the last layer (None) or the residual stream after some layers, at the positions `keep` (all if None).

    `p` stands in for the parameters of the study's own models, as in `mlp_activations`. Raises StudyError if there are not so
    many layers, or if MLP activations are asked of another model.
    """
    if after is None:
        if not is_own(model):
            raise StudyError("MLP activations are read from the study's own transformers only; give the number of layers after "
                             "which to read the residual stream.")
        return mlp_activations(model, tokens, keep, p)
    _check(model, after)
    if is_own(model):
        p = p or parameters(model)
        resid = through_layers(p, embed(p, tokens), model.cfg.n_heads, range(after))
    else:
        resid = _bridged(model, tokens, None, after)
    return resid if keep is None else resid.gather(1, keep[..., None].expand(-1, -1, resid.shape[-1]))


def _bridged(model: Transformer, given: Tensor, start: int | None, stop: int) -> Tensor:
    """The residual stream after `stop` layers of a bridge, from tokens (start is None) or from that after `start` layers."""
    if start == stop:
        return given
    if stop < model.cfg.n_layers:
        return model(given, start_at_layer=start, stop_at_layer=stop)
    name = hook_name(model, stop)  # stopping after the last layer would give logits
    return model.run_with_cache(given, start_at_layer=start, names_filter=name)[1][name]


@torch.no_grad()
def go_on(model: Transformer, resid: Float[Tensor, "batch pos d_model"], after: int,
          until: int | None = None) -> Float[Tensor, "batch pos d_model"]:
    """The residual stream after `until` layers (all if None), from that after `after` of them. Positions count from the first.

    Raises StudyError if there are not so many layers.
    """
    until = model.cfg.n_layers if until is None else until
    _check(model, after)
    _check(model, until)
    if is_own(model):
        return through_layers(parameters(model), resid, model.cfg.n_heads, range(after, until))
    return _bridged(model, resid, after, until)


@torch.no_grad()
def last_after_next(model: Transformer, resid: Float[Tensor, "batch pos d_model"], after: int) -> Float[Tensor, "batch d_model"]:
    """What `go_on` gives at the last position after one more layer: of the study's models many times faster to have alone.

    Raises StudyError if no layer follows.
    """
    _check(model, after + 1)
    if not is_own(model):
        return go_on(model, resid, after, after + 1)[:, -1]
    last = torch.full((len(resid),), resid.shape[1] - 1, device=resid.device)
    return layer_at(parameters(model), resid, model.cfg.n_heads, after, last)


@torch.no_grad()
def ends(model: Transformer, resid: Float[Tensor, "batch pos d_model"], after: int,
         last: Int[Tensor, " batch"]) -> Float[Tensor, "batch d_model"]:
    """The residual stream after all layers, from that after `after` of them, at one position of each row only.

    In the last layer of the study's own models no other position is worked out: whoever asks only what a sentence predicts pays
    about a fifth. Raises StudyError if there are not so many layers.
    """
    n, rows = model.cfg.n_layers, torch.arange(len(resid))
    if not is_own(model) or after >= n:
        return go_on(model, resid, after)[rows, last]
    return layer_at(parameters(model), go_on(model, resid, after, n - 1), model.cfg.n_heads, n - 1, last)


@torch.no_grad()
def unembed(model: Transformer, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
    """Logits of the residual stream after the last layer, as they are."""
    if not is_own(model):
        return model.unembed(model.ln_final(resid))
    p = parameters(model)
    return F.linear(norm(p, "ln_out", resid), p["head.weight"])


@torch.no_grad()
def next_token_log_probabilities(model: Transformer, tokens: Int[Tensor, "batch pos"], at: Int[Tensor, " batch"],
                                 edits: dict[str, ResidualEdit | None], after: int) -> dict[str, Float[Tensor, "batch d_vocab"]]:
    """What the model expects after position `at` of each context, in nats, once for each way of editing the residual stream."""
    resid, found = activations(model, tokens, after), {}
    for name, edit in edits.items():
        last = ends(model, resid if edit is None else edit(resid), after, at)
        found[name] = torch.log_softmax(unembed(model, last[:, None])[:, 0].float(), -1)
    return found


@torch.no_grad()
def losses(model: Transformer, tokens: Int[Tensor, "batch pos"], edits: dict[str, MlpEdit | ResidualEdit | None],
           after: int | None) -> dict[str, Float[Tensor, "batch pos-1"]]:
    """Next-token loss in nats, once for each way of editing the activations there [batch, pos, d_in] (None: left alone)."""
    if after is None:
        return token_losses(model, tokens, edits)
    resid, found = activations(model, tokens, after), {}
    for name, edit in edits.items():
        last = go_on(model, resid if edit is None else edit(resid), after)
        if is_own(model):
            found[name] = next_token_losses(parameters(model), last, tokens)
        else:
            found[name] = torch.stack([F.cross_entropy(unembed(model, h).float(), t, reduction="none")
                                       for h, t in zip(last[:, :-1], tokens[:, 1:], strict=True)])
    return found
