"""What each unit (feature or neuron) fires on, measured against the labels of the text (Bricken et al., Feature Proxies; B8-B9).

The study's corpus labels every document with its domain, a truth the papers did not have: a unit's Pearson correlation with
"this token belongs to a Hebrew document" asks for specificity and sensitivity at once.
"""

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor


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


def pearson_sums(values: Float[Tensor, "tokens pairs"], is_label: Bool[Tensor, "tokens pairs"],
                 document: Int[Tensor, " tokens"]) -> Float64[Tensor, "documents 6 pairs"]:
    """Per-document sums (n, x, y, xx, yy, xy) of unit-label pairs, from which a bootstrap over documents starts."""
    documents, index = torch.unique(document, return_inverse=True)
    x, y = values.double(), is_label.double()
    terms = torch.stack([torch.ones_like(x), x, y, x * x, y * y, x * y], dim=1)
    return torch.zeros(len(documents), *terms.shape[1:], dtype=torch.float64).index_add_(0, index, terms)
