"""The exact gradient of any kind of dictionary by matrix products over all features, where too many are active to visit them.

It follows the losses in `variants.py` line by line; `step.py` has the faster ways, and takes this one for the few steps in which
a new dictionary of a later kind has thousands of active features.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_lib.variants import AnyParameters, BatchTopK, Standard, largest


def dense_gradient(rule: Standard, p: AnyParameters, grads: AnyParameters, low: Float[Tensor, "d_sae d_in"],
                   x: Float[Tensor, "batch d_in"], coefficient: float, scale: float, dead: Bool[Tensor, " d_sae"] | None,
                   ) -> tuple[float, float, Tensor, float]:
    """Add a batch's gradient to `grads`. `low` is the encoder as a factor of products, in the type that all factors have.

    Returns the sum of squared errors, what the coefficient multiplies, the rows each feature was active on, and the smallest
    activation that BatchTopK let through, times rows.
    """
    W_dec, everyone = p.W_dec.to(low.dtype), slice(None)
    times = lambda a, b: (a.to(low.dtype) @ b.to(low.dtype)).float()
    c = torch.add(-p.b_dec, x, alpha=scale)
    z = times(c, low.T) + p.b_enc
    f = rule.activate(p, z, everyone)
    cut = f[f > 0].min().item() * len(x) if isinstance(rule, BatchTopK) and (f > 0).any() else 0.0

    widths = rule.widths(len(p.b_enc))
    levels = [slice(first, last) for first, last in zip((0, *widths), widths, strict=False)]
    errors = [-c]
    for level in levels:
        errors.append(errors[-1] + times(f[:, level], W_dec[level]))
    squared_error, residual, written, g = errors[-1].square().sum().item(), -errors[-1], torch.zeros_like(c), torch.empty_like(f)
    # What an inner feature writes is part of all dictionaries around it.
    for level, error in zip(reversed(levels), reversed(errors[1:]), strict=True):
        written = written + 2 * error
        g[:, level] = times(written, W_dec[level].T)
        grads.W_dec[level] += times(f[:, level].T, written)
    grads.b_dec.add_(written.sum(0))

    gate = rule.gate(z)
    gate_g = None if gate is None else times(2 * (times(gate, W_dec) - c), W_dec.T)
    back = rule.backward(p, z, f, g, gate_g, everyone, coefficient)
    for name, value in back.further.items():
        getattr(grads, name).add_(value.sum(0))
    z_grad = back.z
    if factor := auxiliary_factor(rule, dead):
        a = largest(z.masked_fill(~dead, 0), rule.k_aux)
        error = factor * (times(a, W_dec) - residual)
        grads.W_dec.add_(times(a.T, error))
        z_grad = z_grad + times(error, W_dec.T) * (a > 0)
    through = z_grad.sum(0)
    grads.W_enc_T.add_(times(z_grad.T, c))
    grads.b_enc.add_(through)
    # b_dec is also subtracted before the encoder.
    grads.b_dec.sub_(through @ p.W_enc_T)
    return squared_error, back.penalty, (f > 0).sum(0), cut


def auxiliary_factor(rule: Standard, dead: Bool[Tensor, " d_sae"] | None) -> float:
    """What the errors of dead features are multiplied with in AuxK's derivative; 0 where there is none."""
    n_dead = 0 if dead is None or not rule.k_aux else int(dead.sum())
    return 2 * rule.aux_coefficient * min(n_dead / rule.k_aux, 1.0) if n_dead else 0.0
