"""What a dictionary does to the model on held-out text (Bricken et al., How much of the model; B6-B7).

The dictionary's reconstruction is put in place of the activations; beside it stand the untouched model and the two usual
baselines, all activations set to zero and all set to their mean. Everything is kept per token with its document, so that
every number gets its interval from a bootstrap over documents.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor
from tqdm.auto import tqdm

from sae_lib import residual
from sae_lib.activations import Skip
from sae_lib.features import BATCH_CONTEXTS, pearson_sums
from sae_lib.metrics import Interval, bootstrap_interval, explained_share, pearson_from_sums, recovered_share
from sae_lib.sae import SAE
from sae_lib.transformer import Transformer


class Text(NamedTuple):
    """Held-out text: token ids with each token's document and domain."""

    contexts: Int[Tensor, "n_contexts n_ctx"]
    documents: Int[Tensor, "n_contexts n_ctx"]
    domains: Int[Tensor, "n_contexts n_ctx"]

    def first(self, n_contexts: int) -> "Text":
        return Text(*(values[:n_contexts] for values in self))

    def spread(self, n_contexts: int) -> "Text":
        """At most so many contexts, every few of the text."""
        few = max(1, -(-len(self.contexts) // n_contexts))
        return Text(*(values[::few] for values in self))


class HeldOut(NamedTuple):
    """Values per token [tokens] and firing counts, without end-of-text and each context's last token, which predicts nothing."""

    document: Int[Tensor, " tokens"]
    values: dict[str, Float[Tensor, " tokens"]]
    """clean, zero, mean: loss in nats; with a dictionary also dictionary: loss, l0: active features, error and spread: squared
    distance of the activations from their reconstruction and from their mean, written: squared length of what the features add
    to the decoder's bias, fit: its product with what they should add; these four summed over their numbers."""
    fired: Int[Tensor, " d_sae"]

    def document_sums(self, *names: str) -> np.ndarray:
        """Sums over each document of the named values, and last the number of its tokens: [documents, names + 1]."""
        documents, index = torch.unique(self.document, return_inverse=True)
        columns = torch.stack([*(self.values[name].double() for name in names), torch.ones(len(index), dtype=torch.float64)], 1)
        return torch.zeros(len(documents), columns.shape[1], dtype=torch.float64).index_add_(0, index, columns).numpy()

    def average(self, name: str, **draws: int) -> Interval:
        """Mean of a value over tokens; `draws` are the seed and n_boot of `bootstrap_interval`."""
        return bootstrap_interval(self.document_sums(name), lambda t: t[..., 0] / t[..., 1], **draws)

    def loss_recovered(self, ablation: str = "zero", **draws: int) -> Interval:
        """(L_ablated - L_dictionary) / (L_ablated - L_clean); the ablation is "zero" or "mean"."""
        return bootstrap_interval(self.document_sums("clean", "dictionary", ablation),
                                  lambda t: recovered_share(t[..., 0], t[..., 1], t[..., 2]), **draws)

    def explained_variance(self, **draws: int) -> Interval:
        """1 - sum ||x - x_hat||^2 / sum ||x - mean||^2, pooled over tokens."""
        return bootstrap_interval(self.document_sums("error", "spread"), lambda t: explained_share(t[..., 0], t[..., 1]), **draws)

    def gain(self, **draws: int) -> Interval:
        """What all features would have to be multiplied with to reconstruct best: above 1 where they are shrunk."""
        return bootstrap_interval(self.document_sums("fit", "written"), lambda t: t[..., 0] / t[..., 1], **draws)


def _batches(text: Text, description: str) -> Iterator[Text]:
    parts = zip(*(values.split(BATCH_CONTEXTS) for values in text), strict=True)
    n = -(-len(text.contexts) // BATCH_CONTEXTS)
    for contexts, documents, domains in tqdm(parts, total=n, desc=description, unit="batch", leave=False, mininterval=2):
        yield Text(contexts.long(), documents, domains)


def mean_activation(model: Transformer, text: Text, after: int | None = None, skip: Skip | None = None) -> Float[Tensor, " d_in"]:
    """The mean activation over all tokens, or those not to `skip`: of the last layer's MLP, or of the residual stream `after` so
    many layers.
    """
    total, n = torch.zeros(residual.width(model, after), dtype=torch.float64), 0
    for batch in _batches(text, "mean activation"):
        acts = residual.activations(model, batch.contexts, after)
        acts = acts.flatten(0, 1) if skip is None else acts[~skip.mask(batch.contexts, acts)]
        total, n = total + acts.double().sum(0), n + len(acts)
    return (total / n).float()


@torch.no_grad()
def held_out_pass(model: Transformer, text: Text, sae: SAE | None = None, after: int | None = None,
                  skip: Skip | None = None, known: HeldOut | None = None) -> HeldOut:
    """Run the model over held-out text: untouched, ablated to zero and to the mean, and with the dictionary if one is given.

    What is ablated or rebuilt is the last layer's MLP activations, or the residual stream `after` so many layers. Positions to
    `skip` are left as they are, under every ablation alike, and are not counted; unless told, everything is edited and
    end-of-text is not counted. `known` is what was found with another dictionary on the same text and there: what both have in
    common is most of the work, and is taken from it.
    """
    mean = mean_activation(model, text, after, skip) if known is None else None
    fired = torch.zeros(len(sae.W_dec) if sae else 0, dtype=torch.int64)
    rows: list[dict[str, Tensor]] = []
    for batch in _batches(text, "held-out pass"):
        edits: dict[str, Callable | None] = {}
        if known is None:
            edits |= {"clean": None, "zero": torch.zeros_like, "mean": lambda acts: mean.expand_as(acts)}
        acts = residual.activations(model, batch.contexts, after) if sae or skip else None
        skipped = (skip or Skip()).mask(batch.contexts, acts)
        keep = ~skipped[:, :-1]
        values = {"document": batch.documents}
        if sae:
            output = sae(acts)
            edits["dictionary"] = lambda _, output=output: output.reconstruction
            active = output.features > 0
            fired += torch.count_nonzero(active[:, :-1][keep], dim=0)
            written = output.reconstruction - sae.b_dec
            values |= {"l0": active.sum(-1).float(), "error": (acts - output.reconstruction).square().sum(-1),
                       "written": written.square().sum(-1), "fit": (written * (acts - sae.b_dec)).sum(-1)}
            if known is None:
                values["spread"] = (acts - mean).square().sum(-1)
        if skip:
            edits = {name: edit and skip.sparing(batch.contexts, edit) for name, edit in edits.items()}
        losses = residual.losses(model, batch.contexts, edits, after)
        rows.append({name: value[:, :-1][keep] for name, value in values.items()} | {n: loss[keep] for n, loss in losses.items()})
    columns = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    columns |= {name: known.values[name] for name in ("clean", "zero", "mean", "spread")} if known else {}
    return HeldOut(columns.pop("document"), columns, fired)


# --- units as detectors of contexts ----------------------------------------------------------------------------------

class LabelCorrelations:
    """Pearson correlation of every unit with every label, accumulated over any number of batches in float64.

    Labels are exclusive: each token has one of `n_labels`.
    """

    def __init__(self, n_units: int, n_labels: int):
        self.tokens = torch.zeros(n_labels, dtype=torch.float64)
        self.sums = torch.zeros(n_labels, n_units, dtype=torch.float64)
        self.squares = torch.zeros(n_units, dtype=torch.float64)

    def update(self, acts: Float[Tensor, "batch n_units"], labels: Int[Tensor, " batch"]) -> None:
        """Add the activations of a batch of tokens and the tokens' labels."""
        labels = labels.long()
        batch = torch.zeros(self.sums.shape, dtype=torch.float32)
        self.sums += batch.index_add_(0, labels, acts.float())
        self.squares += acts.float().square().sum(0)
        self.tokens += torch.bincount(labels, minlength=len(self.tokens))

    def pearson(self) -> Float[Tensor, "n_units n_labels"]:
        """The correlations; 0 for a unit that never fires and for a label that never occurs."""
        n = self.tokens.sum()
        unit_mean, label_mean = self.sums.sum(0) / n, self.tokens / n
        covariance = (self.sums / n).T - unit_mean[:, None] * label_mean
        unit_variance = self.squares / n - unit_mean.square()
        scale = (unit_variance.clamp_min(0)[:, None] * (label_mean * (1 - label_mean))).sqrt()
        return torch.where(scale > 0, covariance / scale.clamp_min(1e-300), 0.0).float()


def _units(model: Transformer, sae: SAE | None, batch: Text, chosen: Tensor | None = None) -> Float[Tensor, "tokens n_units"]:
    acts = residual.activations(model, batch.contexts, None).flatten(0, 1)
    if sae:
        return sae.encode(acts, chosen)
    return acts if chosen is None else acts[:, chosen]


@torch.no_grad()
def label_correlations(model: Transformer, sae: SAE | None, text: Text, n_labels: int) -> Float[Tensor, "n_units n_labels"]:
    """Pearson correlation with each domain of every feature, or of every neuron if there is no dictionary."""
    found: LabelCorrelations | None = None
    for batch in _batches(text, "correlations"):
        acts = _units(model, sae, batch)
        found = found or LabelCorrelations(acts.shape[1], n_labels)
        found.update(acts, batch.domains.flatten())
    assert found is not None
    return found.pearson()


class Detectors(NamedTuple):
    """The best unit for each of some domains, with the per-document sums of `pearson_sums` on the text it was measured on."""

    unit: Int[Tensor, " domains"]
    sums: Float64[np.ndarray, "documents 6 domains"]

    def pearson(self) -> Float64[np.ndarray, " domains"]:
        return pearson_from_sums(*self.sums.sum(0))


@torch.no_grad()
def best_detectors(model: Transformer, sae: SAE | None, choose_on: Text, measure_on: Text, domains: list[int]) -> Detectors:
    """For each domain the unit (feature, or neuron without a dictionary) that correlates best with it on one text, measured
    on another, so that the best of many is not flattered by chance."""
    n_labels = max(int(choose_on.domains.max()), *domains) + 1
    unit = label_correlations(model, sae, choose_on, n_labels)[:, domains].argmax(0)
    wanted = torch.tensor(domains)
    sums = torch.zeros(int(measure_on.documents.max()) + 1, 6, len(domains), dtype=torch.float64)
    for batch in _batches(measure_on, "best detectors"):
        documents = batch.documents.flatten()
        part = pearson_sums(_units(model, sae, batch, unit), batch.domains.flatten()[:, None] == wanted, documents)
        sums.index_add_(0, documents.unique(), part)
    return Detectors(unit, sums[sums[:, 0, 0] > 0].numpy())


def count_won(features: Detectors, neurons: Detectors, margin: float, **draws: int) -> Interval:
    """Domains whose best feature beats the best neuron by `margin` in correlation, with a bootstrap over documents."""
    pairs = np.stack([features.sums, neurons.sums], axis=1)  # [documents, 2, 6, domains]

    def won(totals: np.ndarray) -> np.ndarray | np.int64:
        pearson = pearson_from_sums(*np.moveaxis(totals.reshape(*totals.shape[:-1], *pairs.shape[1:]), -2, 0))
        return (pearson[..., 0, :] - pearson[..., 1, :] >= margin).sum(-1)

    return bootstrap_interval(pairs.reshape(len(pairs), -1), won, **draws)
