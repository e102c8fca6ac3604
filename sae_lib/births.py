"""How features come into the world: the direction they start along, and how rarely they fire at first.

With a bias of zero a new feature fires on half of all inputs, and the L1 penalty needs thousands of steps to make it rare. The
paper's million steps do not notice. In a run of thousands, the first few hundred features to get there take up the variance and
stay dense, and the others die. A bias from a quantile of the pre-activations lets every feature begin as rare as it should end.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lib.errors import StudyError
from sae_lib.variants import AnyParameters, GatedParameters

FEATURES_AT_ONCE = 512  # whose pre-activations on a sample are in memory together


def bear(p: AnyParameters, features: Int[Tensor, " n"], towards: Float[Tensor, "n d_in"], norm: float | Tensor) -> None:
    """Give features new weights: the dictionary row and, with norm `norm`, the encoder row along `towards`; no bias."""
    direction = towards / towards.norm(dim=1, keepdim=True).clamp_min(1e-12)
    p.W_dec[features], p.W_enc_T[features], p.b_enc[features] = direction, norm * direction, 0.0
    for further in p[4:]:
        further[features] = 0.0


def make_rare(p: AnyParameters, features: Int[Tensor, " n"], x: Float[Tensor, "batch d_in"], density: float) -> None:
    """Set the encoder biases of features so that each fires on the share `density` of the rows of `x`, on one at the least."""
    centred, rows = x - p.b_dec, max(1, round(density * len(x)))
    for few in features.split(FEATURES_AT_ONCE):
        highest = (centred @ p.W_enc_T[few].T).topk(rows + 1, dim=0).values
        p.b_enc[few] = -highest[rows]
        if isinstance(p, GatedParameters):
            p.b_mag[few] = -highest[rows]


def geometric_median(x: Float[Tensor, "n d_in"], tolerance: float = 1e-6, max_iterations: int = 1000) -> Float[Tensor, " d_in"]:
    """The point with the smallest summed distance to the rows, where `b_dec` starts (Bricken et al., Pre-Encoder Bias).

    Weiszfeld's iteration, until a step is shorter than `tolerance` times the mean distance.

    Raises StudyError if a row is not finite.
    """
    if not x.isfinite().all():
        raise StudyError("The activations contain values that are not finite; train the transformer again with a lower "
                         "learning rate.")
    median = x.double().mean(0)
    for _ in range(max_iterations):
        distance = torch.linalg.vector_norm(x - median.float(), dim=1).double()
        mean_distance = distance.mean()
        if mean_distance == 0:
            break
        # The floor keeps an iterate that lands on a row from being stuck there by an infinite weight.
        weight = 1 / distance.clamp_min(1e-6 * mean_distance)
        previous, median = median, (weight.float() @ x).double() / weight.float().double().sum()
        if torch.linalg.vector_norm(median - previous) <= tolerance * mean_distance:
            break
    return median.float()
