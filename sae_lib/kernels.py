"""The arithmetic of one training step: the exact gradient of the loss, and Adam on unit-norm dictionary rows.

Written by hand: automatic differentiation would make a matrix product that nobody needs (the gradient to the input) and many
passes over [batch, d_sae]. Loss and recipe: Bricken et al., App. Architecture and "Interaction Between Adam and Decoder
Normalization".

Both weight matrices are kept one row a feature, [d_sae, d_in]: whatever happens to a feature happens in two short rows. Master
weights, moments, biases and all sums are float32; only the factors of matrix products may be bfloat16.

There are two ways to the same gradient. The dense one is five matrix products. Once a few dozen features of thousands are
active, the sparse one is far cheaper: after the encoder's product it only visits active pairs of row and feature. Its threads
own what they write and sum in a fixed order, so its result does not depend on how many there are.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier, local
from typing import NamedTuple, no_type_check

import numpy as np
import torch
from jaxtyping import Float, Int
from numba import njit, types
from numba.extending import overload
from torch import Tensor

DENSE_ROWS = 1024  # micro-batch of the dense way: its feature activations stay in cache between passes
SPARSE_ROWS = 256  # and of the sparse way, where every thread has one of its own
SPARSE_GROUP = 2048  # rows whose errors stay in cache until they are added to the gradients
SPARSE_L0 = 256  # mean number of active features up to which the sparse way is cheaper, and has room for

# Everything that lets sums be vectorised, but not the assumption that values are finite.
FAST = {"reassoc", "contract", "arcp", "nsz"}


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


def native_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware."""
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))


# --- threads ---------------------------------------------------------------------------------------------------------

@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads in which torch itself uses one thread each.

    Not torch's own threads: those busy-wait after each of its operations, and would take the cores from the kernels here.
    """
    pool, ready = ThreadPoolExecutor(threads, "kernel"), Barrier(threads)

    def prepare(_: int) -> None:
        torch.set_num_threads(1)
        ready.wait()

    list(pool.map(prepare, range(threads)))
    torch.set_num_threads(threads)
    return pool


def _in_parallel(work: Callable, tasks: list) -> list:
    """`[work(*task) for task in tasks]`, as many at once as torch has threads."""
    return list(_pool(torch.get_num_threads()).map(lambda task: work(*task), tasks))


def _shares(n: int) -> list[tuple[int, int]]:
    """[0, n) in pieces that even out what the threads have to do."""
    bounds = [n * i // 16 for i in range(17)]
    return list(zip(bounds[:-1], bounds[1:], strict=True))


# --- the gradient ----------------------------------------------------------------------------------------------------

class LossGradient:
    """Gradient of  sum over rows of ||x' - x_hat||^2 + l1_coefficient * ||f||_1  for x' = scale * x, added up in `grads`.

    `dtype` is that of the factors in matrix products.
    """

    def __init__(self, p: Parameters, dtype: torch.dtype):
        self.p, self.dtype, self.grads = p, dtype, p.zeros()
        self.low = p.W_enc_T.to(dtype)
        self.buffers: _PairBuffers | None = None

    @torch.no_grad()
    def add(self, x: Float[Tensor, "batch d_in"], l1_coefficient: float, scale: float = 1.0, sparse: bool = False) -> StepSums:
        """Add a batch. `sparse` asks for the way that visits active pairs only; where these are too many it is dense still."""
        if not sparse:
            return self._add_dense(x, l1_coefficient, scale)
        self.low = self.p.W_enc_T if self.dtype == torch.float32 else self.low
        if self.low is not self.p.W_enc_T:
            _in_parallel(lambda i, j: self.low[i:j].copy_(self.p.W_enc_T[i:j]), _shares(len(self.low)))
        sums = [self._add_sparse(rows, l1_coefficient, scale) or self._add_dense(rows, l1_coefficient, scale)
                for rows in x.split(SPARSE_GROUP)]
        return StepSums(*(sum(column) for column in zip(*sums, strict=True)))

    def _add_dense(self, x: Tensor, l1_coefficient: float, scale: float) -> StepSums:
        p, grads, dtype = self.p, self.grads, self.dtype
        W_enc_T, W_dec = p.W_enc_T.to(dtype), p.W_dec.to(dtype)
        squared_error, l1, fired = 0.0, 0.0, torch.zeros(len(p.b_enc), dtype=torch.int64)
        b_enc_grad = torch.zeros_like(p.b_enc)
        for rows in x.split(DENSE_ROWS):
            centred = rows.float().mul(scale).sub_(p.b_dec)
            centred_low = centred.to(dtype)
            features = torch.mm(centred_low, W_enc_T.T).add_(p.b_enc).relu_()
            fired += (features > 0).sum(0)
            l1 += features.sum(dtype=torch.float32).item()

            error = torch.mm(features, W_dec).float().sub_(centred)
            squared_error += error.square().sum().item()
            error_2 = error.mul_(2)  # the derivative of the square
            error_2_low = error_2.to(dtype)
            g = torch.mm(error_2_low, W_dec.T).add_(l1_coefficient)
            g = torch.ops.aten.threshold_backward(g, features, 0)  # the gradient passes where the ReLU did

            grads.W_dec.add_(torch.mm(features.T, error_2_low))
            grads.W_enc_T.add_(torch.mm(g.T, centred_low))
            b_enc_grad += g.sum(0, dtype=torch.float32)
            grads.b_dec.add_(error_2.sum(0))
        grads.b_enc.add_(b_enc_grad)
        grads.b_dec.sub_(b_enc_grad @ p.W_enc_T)  # b_dec is also subtracted before the encoder
        return StepSums(squared_error, l1, fired)

    def _add_sparse(self, x: Tensor, l1_coefficient: float, scale: float) -> StepSums | None:
        """None, with `grads` as they were, if some micro-batch has more than SPARSE_L0 active features a row."""
        p, grads, d_sae = self.p, self.grads, len(self.p.b_enc)
        if self.buffers is None or len(self.buffers.centred) < len(x):
            self.buffers = _PairBuffers(len(x), *p.W_dec.shape, self.dtype)
        b, b_enc, W_dec, minus_b_dec = self.buffers, p.b_enc.numpy(), p.W_dec.numpy(), -p.b_dec
        micro_batches = -(-len(x) // SPARSE_ROWS)

        def visit(i: int) -> tuple[int, float, float]:
            rows = slice(i * SPARSE_ROWS, min((i + 1) * SPARSE_ROWS, len(x)))
            centred = torch.add(minus_b_dec, x[rows], alpha=scale, out=b.centred[rows])
            pre = torch.mm(centred.to(self.dtype), self.low.T, out=b.pre(len(centred)))
            pre = pre.view(torch.uint16) if pre.dtype == torch.bfloat16 else pre
            return _visit_rows(pre.numpy(), b_enc, W_dec, np.float32(l1_coefficient), centred.numpy(),
                               b.error_2[rows].numpy(), rows.start, b.begin[i], b.row[i], b.f[i], b.g[i])

        found = _in_parallel(visit, [(i,) for i in range(micro_batches)])
        if any(pairs < 0 for pairs, _, _ in found):
            return None
        fired, shares = torch.zeros(d_sae, dtype=torch.int64), _shares(d_sae)
        b_dec_grads = torch.zeros(len(shares), len(p.b_dec))
        arrays = [t.numpy() for t in (b.error_2, b.centred, p.W_enc_T, grads.W_dec, grads.W_enc_T, grads.b_enc, fired)]
        _in_parallel(_visit_features, [(*share, b.begin[:micro_batches], b.row, b.f, b.g, *arrays, b_dec_grad.numpy())
                                       for share, b_dec_grad in zip(shares, b_dec_grads, strict=True)])
        grads.b_dec.add_(b.error_2[:len(x)].sum(0)).add_(b_dec_grads.sum(0))
        return StepSums(sum(s for _, s, _ in found), sum(s for _, _, s in found), fired)


class _PairBuffers:
    """Memory of the sparse way, kept between steps: fresh pages for every step would cost as much as the work on them."""

    def __init__(self, n: int, d_sae: int, d_in: int, dtype: torch.dtype):
        micro_batches, capacity = -(-n // SPARSE_ROWS), SPARSE_ROWS * SPARSE_L0
        self.centred, self.error_2 = torch.empty(n, d_in), torch.empty(n, d_in)
        # Active pairs of each micro-batch in the order of their features: row, activation, its gradient; and where in that
        # order each feature begins.
        self.row = np.empty((micro_batches, capacity), np.int32)
        self.f, self.g = (np.empty((micro_batches, capacity), np.float32) for _ in range(2))
        self.begin = np.empty((micro_batches, d_sae + 1), np.int64)
        self._new_pre = lambda: torch.empty(SPARSE_ROWS, d_sae, dtype=dtype)
        self._local = local()

    def pre(self, n: int) -> Tensor:
        """Room for the pre-activations of `n` rows, the calling thread's own."""
        if not hasattr(self._local, "pre"):
            self._local.pre = self._new_pre()
        return self._local.pre[:n]


@no_type_check
def _widen(x):
    """float32 from float32, or from the bits of a bfloat16."""


@overload(_widen)
@no_type_check
def _widen_overload(x):
    if isinstance(x, types.Float):
        return lambda x: x
    return lambda x: np.int32(np.uint32(x) << np.uint32(16)).view(np.float32)


@njit(nogil=True, cache=True, fastmath=FAST)
@no_type_check
def _find_active(pre, b_enc, flags, words, feature, f):
    """Features of one row with pre + b_enc > 0, and these values; returns how many, or -1 if there is no room.

    No step of it branches on a feature: flags are set many at a time, and eight without a flag are passed over at once.
    """
    for i in range(len(pre)):
        flags[i] = _widen(pre[i]) + b_enc[i] > np.float32(0)
    flagged = flags.view(np.uint64)
    n_words = 0
    for c in range(len(flagged)):
        words[n_words] = c
        n_words += np.int64(flagged[c] != 0)
    if 8 * n_words > len(f):
        return -1
    n = 0
    for c in words[:n_words]:
        p, b = pre[8 * c:8 * c + 8], b_enc[8 * c:8 * c + 8]
        for i in range(len(p)):
            value = _widen(p[i]) + b[i]
            feature[n], f[n] = 8 * c + i, value
            n += np.int64(value > np.float32(0))
    return n


@njit(nogil=True, cache=True, fastmath=FAST)
@no_type_check
def _visit_rows(pre, b_enc, W_dec, l1_coefficient, centred, error_2, first_row, begin, row, f_sorted, g_sorted):
    """Active features of a micro-batch, its errors (times 2), and the gradient at each activation.

    Returns the number of pairs, or -1 if there is no room for them, and the sums of squared errors and of activations.
    """
    n_rows, d_sae, d_in, capacity = len(pre), len(W_dec), centred.shape[1], len(row)
    feature, f, g = np.empty(capacity, np.int32), np.empty(capacity, np.float32), np.empty(capacity, np.float32)
    words = np.empty(d_sae // 8 + 2, np.int64)
    flags, end = np.zeros(8 * ((d_sae + 7) // 8), np.uint8), np.zeros(n_rows + 1, np.int64)
    squared_error, l1 = 0.0, 0.0
    begin[:] = 0
    for r in range(n_rows):
        n = _find_active(pre[r], b_enc, flags, words, feature[end[r]:], f[end[r]:])
        if n < 0:
            return -1, 0.0, 0.0
        end[r + 1] = end[r] + n
        e, c = error_2[r], centred[r]
        for i in range(d_in):
            e[i] = -c[i]
        for k in range(end[r], end[r + 1]):
            w, fk = W_dec[feature[k]], f[k]
            for i in range(d_in):
                e[i] += fk * w[i]
        square = np.float32(0)
        for i in range(d_in):
            square += e[i] * e[i]
            e[i] *= np.float32(2)
        squared_error += square
        for k in range(end[r], end[r + 1]):  # the rows of W_dec are still in cache
            w, dot = W_dec[feature[k]], np.float32(0)
            for i in range(d_in):
                dot += e[i] * w[i]
            g[k] = dot + l1_coefficient
            l1 += f[k]
            begin[feature[k] + 1] += 1
    # Counting sort by feature; within each the rows stay in order.
    for j in range(d_sae):
        begin[j + 1] += begin[j]
    for r in range(n_rows):
        for k in range(end[r], end[r + 1]):
            j = feature[k]
            to = begin[j]
            row[to], f_sorted[to], g_sorted[to] = first_row + r, f[k], g[k]
            begin[j] += 1
    for j in range(d_sae, 0, -1):
        begin[j] = begin[j - 1]
    begin[0] = 0
    return end[n_rows], squared_error, l1


@njit(nogil=True, cache=True, fastmath=FAST)
@no_type_check
def _visit_features(first, last, begin, row, f, g, error_2, centred, W_enc, W_dec_grad, W_enc_grad, b_enc_grad, fired,
                    b_dec_grad):
    """Add to the gradients of features [first, last), and of `b_dec` through their encoders, from every micro-batch's pairs."""
    d_in = centred.shape[1]
    for j in range(first, last):
        decoder, encoder, total, n = W_dec_grad[j], W_enc_grad[j], np.float32(0), 0
        for b in range(len(begin)):
            n += begin[b, j + 1] - begin[b, j]
            for k in range(begin[b, j], begin[b, j + 1]):
                e, c, fk, gk = error_2[row[b, k]], centred[row[b, k]], f[b, k], g[b, k]
                for i in range(d_in):
                    decoder[i] += fk * e[i]
                    encoder[i] += gk * c[i]
                total += gk
        fired[j] += n
        b_enc_grad[j] += total
        if n:
            w = W_enc[j]
            for i in range(d_in):
                b_dec_grad[i] -= total * w[i]


# --- the update ------------------------------------------------------------------------------------------------------

@njit(nogil=True, cache=True, fastmath=FAST)
@no_type_check
def _adam_rows(first, last, w, g, m, v, age, scale, lr, beta1, beta2, eps, unit_norm):
    one, scale, b1, b2, eps = np.float32(1), np.float32(scale), np.float32(beta1), np.float32(beta2), np.float32(eps)
    finite = True
    for j in range(first, last):
        wj, gj, mj, vj = w[j], g[j], m[j], v[j]
        parallel, square = np.float32(0), np.float32(0)
        if unit_norm:
            for i in range(len(wj)):
                parallel += gj[i] * wj[i]
        step = np.float32(lr / (1 - beta1 ** age[j]))
        correction = np.float32(1 / np.sqrt(1 - beta2 ** age[j]))
        for i in range(len(wj)):
            gradient = (gj[i] - parallel * wj[i]) * scale
            mj[i] = b1 * mj[i] + (one - b1) * gradient
            vj[i] = b2 * vj[i] + (one - b2) * gradient * gradient
            wj[i] -= step * mj[i] / (np.sqrt(vj[i]) * correction + eps)
            square += wj[i] * wj[i]
            gj[i] = 0
        if unit_norm:
            inverse = one / np.sqrt(square)
            for i in range(len(wj)):
                wj[i] *= inverse
        finite &= np.isfinite(square)
    return finite


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
        arrays = [getattr(group, name).numpy().reshape(shape) for group in (p, grads, m, v)]
        ages = np.array([step]) if name == "b_dec" else age.numpy()
        tasks = [(*share, *arrays, ages, scale, lr, *betas, eps, name == "W_dec") for share in _shares(len(arrays[0]))]
        finite &= all(_in_parallel(_adam_rows, tasks))
    return finite
