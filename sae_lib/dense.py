"""The exact gradient of any kind of dictionary by matrix products over all features, where too many are active to visit them.

It follows the losses in `variants.py` line by line. A GPU always takes this way (`device_step.py`), so nothing in it waits for a
value. On the processor `step.py` has faster ones, and takes this for the few steps in which a new dictionary of a later kind has
thousands of active features.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_lib.variants import AnyParameters, BatchTopK, Standard, largest


def dense_gradient(rule: Standard, p: AnyParameters, grads: AnyParameters, low: Float[Tensor, "d_sae d_in"],
                   x: Float[Tensor, "batch d_in"], coefficient: float | Tensor, scale: float,
                   dead: Bool[Tensor, " d_sae"] | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Add a batch's gradient to `grads`. `low` is the encoder as a factor of products, in the type that all factors have; `dead`
    are features that AuxK revives, if it is to revive any.

    Returns the sum of squared errors, what the coefficient multiplies, the rows each feature was active on, and the smallest
    activation that BatchTopK let through: tensors, all but the third of a single number.
    """
    W_dec, everyone = p.W_dec.to(low.dtype), slice(None)
    times = lambda a, b: (a.to(low.dtype) @ b.to(low.dtype)).float()
    c = torch.add(-p.b_dec, x, alpha=scale)
    z = times(c, low.T) + p.b_enc
    f = rule.activate(p, z, everyone)
    smallest = torch.where(f > 0, f, torch.inf).min() if isinstance(rule, BatchTopK) and len(f) else f.new_tensor(torch.inf)

    widths = rule.widths(len(p.b_enc))
    levels = [slice(first, last) for first, last in zip((0, *widths), widths, strict=False)]
    errors = [-c]
    for level in levels:
        errors.append(errors[-1] + times(f[:, level], W_dec[level]))
    squared_error, residual, written, g = errors[-1].square().sum(), -errors[-1], torch.zeros_like(c), torch.empty_like(f)
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
    if dead is not None:
        a = largest(z.masked_fill(~dead, 0), rule.k_aux)
        error = auxiliary_factor(rule, dead) * (times(a, W_dec) - residual)
        grads.W_dec.add_(times(a.T, error))
        z_grad = z_grad + times(error, W_dec.T) * (a > 0)
    through = z_grad.sum(0)
    grads.W_enc_T.add_(times(z_grad.T, c))
    grads.b_enc.add_(through)
    # b_dec is also subtracted before the encoder.
    grads.b_dec.sub_(through @ p.W_enc_T)
    return squared_error, back.penalty, (f > 0).sum(0), torch.where(smallest.isinf(), 0.0, smallest)


def auxiliary_factor(rule: Standard, dead: Bool[Tensor, " d_sae"]) -> Float[Tensor, ""]:
    """What the errors of dead features are multiplied with in AuxK's derivative: 0 where there are none."""
    return 2 * rule.aux_coefficient * (dead.sum().double() / rule.k_aux).clamp(max=1.0)
