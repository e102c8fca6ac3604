"""The arithmetic of one training step: the exact gradient of the loss, and Adam on unit-norm dictionary rows.

Written by hand: automatic differentiation would make a matrix product that nobody needs (the gradient to the input) and many
passes over [batch, d_sae]. Loss and recipe: Bricken et al., App. Architecture and "Interaction Between Adam and Decoder
Normalization".

Both weight matrices are kept one row a feature, [d_sae, d_in]: whatever happens to a feature happens in two short rows. Master
weights, moments, biases and all sums are float32; only the factors of matrix products may be bfloat16.

There are two ways to the same gradient. The dense one is five matrix products. Once a few dozen features of thousands are
active, the sparse one is far cheaper: after the encoder's product it visits active pairs of row and feature only, in float32.
Both first take rows through the dictionary, each thread some, and then bring the errors to the weights, each thread those of
some features: nothing is written by two, so the result does not depend on the number of threads.
"""

from threading import local
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lib.kernels import adam_rows, in_parallel, mask_rows, relu_rows, shares, visit_features, visit_rows

MICRO_BATCH = 256  # rows that one thread takes through the dictionary: their features stay in its cache between passes
GROUP = 2048  # rows whose errors stay in cache until they are added to the gradients of the weights
DENSE_ELEMENTS = 2 ** 23  # room for the features of a group, where all are looked at: its rows are fewer in wide dictionaries
SPARSE_L0 = 512  # mean number of active features up to which the sparse way is cheaper, and has room for


class Parameters(NamedTuple):
    """The dictionary while it is trained, or anything with a value for each of its weights: gradients, moments."""

    W_enc_T: Float[Tensor, "d_sae d_in"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, " d_in"]

    def zeros(self) -> "Parameters":
        return Parameters(*(torch.zeros_like(p) for p in self))


class StepSums(NamedTuple):
    """Sums over one batch."""

    squared_error: float
    """Of ||x - x_hat||^2."""
    l1: float
    """Of the feature activations."""
    fired: Int[Tensor, " d_sae"]
    """Rows each feature was active on."""


class LossGradient:
    """Gradient of  sum over rows of ||x' - x_hat||^2 + l1_coefficient * ||f||_1  for x' = scale * x, added up in `grads`.

    `dtype` is that of the factors in matrix products.
    """

    def __init__(self, p: Parameters, dtype: torch.dtype):
        self.p, self.dtype, self.grads = p, dtype, p.zeros()
        self.low = p.W_enc_T.to(dtype)  # the very same tensor if that is float32
        self.dense_rows = max(MICRO_BATCH, min(GROUP, DENSE_ELEMENTS // len(p.b_enc)))
        self.dense_buffers = torch.empty(2, 0, len(p.b_enc), dtype=dtype)
        self.sparse_buffers: _PairBuffers | None = None

    @torch.no_grad()
    def add(self, x: Float[Tensor, "batch d_in"], l1_coefficient: float, scale: float = 1.0, sparse: bool = False) -> StepSums:
        """Add a batch. `sparse` asks for the way that visits active pairs only; where these are too many it is dense still."""
        if self.low is not self.p.W_enc_T:
            in_parallel(lambda i, j: self.low[i:j].copy_(self.p.W_enc_T[i:j]), shares(self.low))
        sums = []
        for rows in x.split(GROUP):
            found = self._add_sparse(rows, l1_coefficient, scale) if sparse else None
            sums += [found] if found else [self._add_dense(few, l1_coefficient, scale) for few in rows.split(self.dense_rows)]
        return StepSums(*(sum(column) for column in zip(*sums, strict=True)))

    def _add_dense(self, x: Tensor, l1_coefficient: float, scale: float) -> StepSums:
        p, grads, n, dtype = self.p, self.grads, len(x), self.dtype
        W_enc, W_dec = self.low.T, p.W_dec.to(dtype)
        if self.dense_buffers.shape[1] < n:
            self.dense_buffers = torch.empty(2, n, len(p.b_enc), dtype=dtype)
        features, g = self.dense_buffers[:, :n]
        centred, error_2 = (torch.empty(n, p.W_dec.shape[1], dtype=dtype) for _ in range(2))
        micro_batches = -(-n // MICRO_BATCH)
        fired = torch.zeros(micro_batches, len(p.b_enc), dtype=torch.int32)
        b_enc_grads, b_dec_grads = torch.zeros(micro_batches, len(p.b_enc)), torch.zeros(micro_batches, len(p.b_dec))

        def through_rows(i: int) -> tuple[float, float]:
            rows = slice(i * MICRO_BATCH, min((i + 1) * MICRO_BATCH, n))
            exact = torch.add(-p.b_dec, x[rows], alpha=scale)
            centred[rows] = exact
            torch.mm(centred[rows], W_enc, out=features[rows])
            l1 = relu_rows(_bits(features[rows]), p.b_enc.numpy(), fired[i].numpy())
            error = torch.mm(features[rows], W_dec).float().sub_(exact)
            squared_error = error.square().sum().item()
            error.mul_(2)  # the derivative of the square
            error_2[rows], b_dec_grads[i] = error, error.sum(0)
            torch.mm(error_2[rows], W_dec.T, out=g[rows])
            mask_rows(_bits(g[rows]), _bits(features[rows]), np.float32(l1_coefficient), b_enc_grads[i].numpy())
            return squared_error, l1

        def to_weights(first: int, last: int) -> None:
            grads.W_dec[first:last].add_(torch.mm(features[:, first:last].T, error_2))
            grads.W_enc_T[first:last].add_(torch.mm(g[:, first:last].T, centred))

        found = in_parallel(through_rows, [(i,) for i in range(micro_batches)])
        in_parallel(to_weights, shares(p.W_dec))
        b_enc_grad = b_enc_grads.sum(0)
        grads.b_enc.add_(b_enc_grad)
        # b_dec is also subtracted before the encoder.
        grads.b_dec.add_(b_dec_grads.sum(0)).sub_(b_enc_grad @ p.W_enc_T)
        return StepSums(sum(s for s, _ in found), sum(s for _, s in found), fired.sum(0))

    def _add_sparse(self, x: Tensor, l1_coefficient: float, scale: float) -> StepSums | None:
        """None, with `grads` as they were, if some micro-batch has more than SPARSE_L0 active features a row."""
        p, grads, d_sae = self.p, self.grads, len(self.p.b_enc)
        if self.sparse_buffers is None or len(self.sparse_buffers.centred) < len(x):
            self.sparse_buffers = _PairBuffers(len(x), *p.W_dec.shape, self.dtype)
        b, b_enc, W_dec, minus_b_dec = self.sparse_buffers, p.b_enc.numpy(), p.W_dec.numpy(), -p.b_dec
        micro_batches = -(-len(x) // MICRO_BATCH)

        def visit(i: int) -> tuple[int, float, float]:
            rows = slice(i * MICRO_BATCH, min((i + 1) * MICRO_BATCH, len(x)))
            centred = torch.add(minus_b_dec, x[rows], alpha=scale, out=b.centred[rows])
            pre = torch.mm(centred.to(self.dtype), self.low.T, out=b.pre(len(centred)))
            return visit_rows(_bits(pre), b_enc, W_dec, np.float32(l1_coefficient), centred.numpy(),
                               b.error_2[rows].numpy(), rows.start, b.begin[i], b.row[i], b.f[i], b.g[i])

        found = in_parallel(visit, [(i,) for i in range(micro_batches)])
        if any(pairs < 0 for pairs, _, _ in found):
            return None
        fired, pieces = torch.zeros(d_sae, dtype=torch.int64), shares(p.W_dec)
        b_dec_grads = torch.zeros(len(pieces), len(p.b_dec))
        arrays = [t.numpy() for t in (b.error_2, b.centred, p.W_enc_T, grads.W_dec, grads.W_enc_T, grads.b_enc, fired)]
        in_parallel(visit_features, [(*piece, b.begin[:micro_batches], b.row, b.f, b.g, *arrays, b_dec_grad.numpy())
                                      for piece, b_dec_grad in zip(pieces, b_dec_grads, strict=True)])
        grads.b_dec.add_(b.error_2[:len(x)].sum(0)).add_(b_dec_grads.sum(0))
        return StepSums(sum(s for _, s, _ in found), sum(s for _, _, s in found), fired)


def _bits(t: Tensor) -> np.ndarray:
    """An array that shares memory; numpy knows bfloat16 only as bits."""
    return (t.view(torch.uint16) if t.dtype == torch.bfloat16 else t).numpy()


class _PairBuffers:
    """Memory of the sparse way, kept between steps: fresh pages for every step would cost as much as the work on them."""

    def __init__(self, n: int, d_sae: int, d_in: int, dtype: torch.dtype):
        micro_batches, capacity = -(-n // MICRO_BATCH), MICRO_BATCH * SPARSE_L0
        self.centred, self.error_2 = torch.empty(n, d_in), torch.empty(n, d_in)
        # Active pairs of each micro-batch in the order of their features: row, activation, its gradient; and where in that
        # order each feature begins.
        self.row = np.empty((micro_batches, capacity), np.int32)
        self.f, self.g = (np.empty((micro_batches, capacity), np.float32) for _ in range(2))
        self.begin = np.empty((micro_batches, d_sae + 1), np.int64)
        self._new_pre = lambda: torch.empty(MICRO_BATCH, d_sae, dtype=dtype)
        self._local = local()

    def pre(self, n: int) -> Tensor:
        """Room for the pre-activations of `n` rows, the calling thread's own."""
        if not hasattr(self._local, "pre"):
            self._local.pre = self._new_pre()
        return self._local.pre[:n]


def adam_step(p: Parameters, grads: Parameters, m: Parameters, v: Parameters, age: Int[Tensor, " d_sae"], step: int,
              scale: float, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> bool:
    """One Adam step on `scale * grads`, in place; `grads` come back zeroed. Returns whether all weights are still finite.

    Of a dictionary row's gradient the component parallel to the row is removed first, and the row is brought back to unit norm
    afterwards. `age` counts each feature's updates since its weights were last reset, this one included, so that a resampled
    feature starts as a new one does; `step` is the same for `b_dec`.

    Raises ValueError if anything is not contiguous float32: the kernel walks through memory in order.
    """
    if not all(t.is_contiguous() and t.dtype == torch.float32 for group in (p, grads, m, v) for t in group):
        raise ValueError("weights, gradients and moments must be contiguous float32 tensors")
    finite = True
    for name in Parameters._fields:
        # A bias of a feature is a row of one number; the decoder's bias is one row.
        shape = {"b_enc": (-1, 1), "b_dec": (1, -1)}.get(name, (-1, p.W_dec.shape[1]))
        tensors = [getattr(group, name).view(shape) for group in (p, grads, m, v)]
        ages = np.array([step]) if name == "b_dec" else age.numpy()
        arrays = [t.numpy() for t in tensors]
        tasks = [(*share, *arrays, ages, scale, lr, *betas, eps, name == "W_dec") for share in shares(tensors[0])]
        finite &= all(in_parallel(adam_rows, tasks))
    return finite
