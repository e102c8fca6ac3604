"""Taking one direction out of the residual stream, from all of it to as little as will do (Cunningham et al., section 5; C5).

Four ways to make a model stop using one feature. Each moves an activation x along one direction; they differ in where, and how
far. With f the feature's activation, w its encoder column and d its decoder row:

- `effects.pin(sae, feature, 0)`: x - f d, the feature's part of the reconstruction, where it is active;
- `silence`: x - f / (w . d) d, to where the feature stops being active, and no further: less than rank one, for elsewhere x
  stays. In the paper's tied dictionaries, whose w is d, these two are one;
- `project_out`: x - d d . (x - mean), everywhere: rank one;
- `leace`: the least change after which no linear function of x tells a concept (Belrose et al. 2023): rank one, along another
  direction.

What an edit is for and what it breaks are measured on different tokens, and one edit breaks less than another only if it does so
where both do as much of what they are for: each is therefore taken at several strengths (`part_of_the_way`).
"""

from collections.abc import Hashable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lib import residual
from sae_lib.errors import StudyError
from sae_lib.features import BATCH_CONTEXTS
from sae_lib.residual import ResidualEdit
from sae_lib.sae import SAE
from sae_lib.transformer import Transformer

RIDGE = 1e-6  # of the mean variance: activations may span less than all their numbers


def silence(sae: SAE, feature: int) -> ResidualEdit:
    """Move x back along a feature's direction just until the feature is no longer active; leave it where it is not (C5).

    Each unit that x is moved back takes w . d from what is inside relu(w . (x - b_dec) + b_enc). Raises StudyError if there is no
    such feature, if moving back does not make it fall, or if the dictionary's activations are of another form.
    """
    if sae.architecture != SAE.architecture:
        raise StudyError(f"How far back a feature of a {sae.architecture} dictionary stops is not known from its weights; take "
                         f"one of a {SAE.architecture} dictionary.")
    if not 0 <= feature < len(sae.W_dec):
        raise StudyError(f"There is no feature {feature}; give a number from 0 to {len(sae.W_dec) - 1}.")
    w_d = float(sae.W_enc[:, feature] @ sae.W_dec[feature])
    if w_d <= 0:
        raise StudyError(f"Feature {feature} reads nothing of its own direction (w . d is {w_d:.2g}), so no step back along it "
                         "makes it stop; take another feature.")
    return lambda x: x - sae.encode(x, [feature]) / w_d * sae.W_dec[feature]


def project_out(direction: Float[Tensor, " d_model"], mean: Float[Tensor, " d_model"]) -> ResidualEdit:
    """Give x everywhere the mean's component along a direction, of whatever length."""
    unit = direction / direction.norm()
    return lambda x: x - ((x - mean) @ unit)[..., None] * unit


def part_of_the_way(edit: ResidualEdit, strength: float) -> ResidualEdit:
    """An edit at a strength: 0 leaves x alone, 1 is the whole edit."""
    return lambda x: x + strength * (edit(x) - x)


def leace(acts: Float[Tensor, "n d_model"], concept: Bool[Tensor, " n"]) -> ResidualEdit:
    """The least-squares smallest edit after which x and a concept are uncorrelated, over these activations.

    For one concept the closed form of Belrose et al. (2023) is x - s (s' C^-1 (x - mean)) / (s' C^-1 s), C the covariance of the
    activations and s their covariance with the concept.

    Raises StudyError if the concept holds everywhere or nowhere.
    """
    if concept.all() or not concept.any():
        raise StudyError("The concept to erase holds everywhere or nowhere in this text; give text in which it comes and goes.")
    mean = acts.double().mean(0)
    centred, label = acts.double() - mean, concept.double() - concept.double().mean()
    covariance, along = centred.T @ centred / len(acts), centred.T @ label / len(acts)
    ridge = RIDGE * covariance.diagonal().mean() * torch.eye(len(mean), dtype=torch.float64)
    reads = torch.linalg.solve(covariance + ridge, along)
    along, reads, mean = (value.float() for value in (along / (along @ reads), reads, mean))
    return lambda x: x - ((x - mean) @ reads)[..., None] * along


class Damage(NamedTuple):
    """What an edit at all positions does to each token of a text, [n_contexts, n_ctx]."""

    divergence: Float[Tensor, "n_contexts n_ctx"]
    """KL(untouched || edited) of the predictions made there, in nats."""
    likelihood: Float[Tensor, "n_contexts n_ctx"]
    """Change of the log-likelihood of the token that follows, in nats; 0 at a context's last token."""
    norm: Float[Tensor, "n_contexts n_ctx"]
    """How far the residual stream was moved."""


@torch.no_grad()
def damage(model: Transformer, contexts: Int[Tensor, "n_contexts n_ctx"], after: int,
           edits: Mapping[Hashable, ResidualEdit]) -> dict[Hashable, Damage]:
    """Edit the residual stream `after` so many layers at all positions, in several ways, and compare what the model predicts."""
    found: dict[Hashable, list[Damage]] = {name: [] for name in edits}
    for tokens in contexts.long().split(BATCH_CONTEXTS):
        resid = residual.activations(model, tokens, after)
        predict = lambda x: residual.unembed(model, x).log_softmax(-1)
        clean = [predict(x) for x in residual.go_on(model, resid, after)]
        following = tokens.roll(-1, 1)[..., None]
        for name, edit in edits.items():
            edited = edit(resid)
            divergence, likelihood = torch.zeros(tokens.shape), torch.zeros(tokens.shape)
            for i, (before, x) in enumerate(zip(clean, residual.go_on(model, edited, after), strict=True)):
                changed = predict(x)
                divergence[i] = F.kl_div(changed, before, reduction="none", log_target=True).sum(-1)
                likelihood[i, :-1] = (changed - before).gather(1, following[i])[:-1, 0]
            found[name].append(Damage(divergence, likelihood, (edited - resid).norm(dim=-1)))
    return {name: Damage(*map(torch.cat, zip(*parts, strict=True))) for name, parts in found.items()}


@torch.no_grad()
def logits_at(model: Transformer, contexts: Int[Tensor, "n_contexts n_ctx"], after: int, edit: ResidualEdit | None,
              positions: Int[Tensor, " n_contexts"]) -> Float[Tensor, "n_contexts d_vocab"]:
    """Logits at one position of each context, with the residual stream edited at all positions; as it is, if edit is None."""
    found = []
    for tokens, at in zip(contexts.long().split(BATCH_CONTEXTS), positions.long().split(BATCH_CONTEXTS), strict=True):
        resid = residual.activations(model, tokens, after)
        end = residual.go_on(model, resid if edit is None else edit(resid), after)
        found.append(residual.unembed(model, end[torch.arange(len(at)), at]))
    return torch.cat(found)
