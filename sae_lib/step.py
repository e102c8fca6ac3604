"""The arithmetic of one training step: the exact gradient of the loss, and Adam on unit-norm dictionary rows.

Written by hand: automatic differentiation would make a matrix product that nobody needs (the gradient to the input) and many
passes over [batch, d_sae]. Loss and recipe: Bricken et al., App. Architecture and "Interaction Between Adam and Decoder
Normalization".

Both weight matrices are kept one row a feature, [d_sae, d_in]: whatever happens to a feature happens in two short rows. Master
weights, moments, biases and all sums are float32; only the factors of matrix products may be bfloat16.

There are two ways to the same gradient. The dense one is five matrix products. Once a few dozen features of thousands are
active, the sparse one is far cheaper: after the encoder's product it visits active pairs of row and feature only, in float32.
Both first take rows through the dictionary, each thread some, and then bring the errors to the weights, each thread those of
some features: nothing is written by two, so the result does not depend on the number of threads. Later kinds of dictionaries
(`variants.py`) differ in which pairs there are and in a few operations on them; their dense way is in `dense.py`.
"""

from collections.abc import Callable
from threading import local
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lib.dense import auxiliary_factor, dense_gradient
from sae_lib.kernels import adam_rows, in_parallel, mask_rows, relu_rows, shares, sort_pairs, visit_features, visit_rows
from sae_lib.selection import keep_from, select_largest
from sae_lib.variants import FLOOR, AnyParameters, Standard

MICRO_BATCH = 256  # rows that one thread takes through the dictionary: their features stay in its cache between passes
GROUP = 2048  # rows whose errors stay in cache until they are added to the gradients of the weights
DENSE_ELEMENTS = 2 ** 23  # room for the features of a group, where all are looked at: its rows are fewer in wide dictionaries
EPS = 1e-8  # Adam's
SPARSE_L0 = 512  # mean number of active features up to which the sparse way is cheaper, and has room for


class StepSums(NamedTuple):
    """Sums over one batch."""

    squared_error: float
    """Of ||x - x_hat||^2."""
    l1: float
    """Of the feature activations, or of whatever the coefficient multiplies."""
    fired: Int[Tensor, " d_sae"]
    """Rows each feature was active on."""
    cut: float = 0.0
    """Of the smallest activation that BatchTopK let through."""


class LossGradient:
    """Gradient of  sum over rows of ||x' - x_hat||^2 + what `rule` adds  for x' = scale * x, added up in `grads`.

    `dtype` is that of the factors in matrix products.
    """

    def __init__(self, p: AnyParameters, dtype: torch.dtype, rule: Standard = Standard()):
        self.p, self.dtype, self.rule, self.grads = p, dtype, rule, p.zeros()
        self.low = p.W_enc_T.to(dtype)  # the very same tensor if that is float32
        self.dense_rows = max(MICRO_BATCH, min(GROUP, DENSE_ELEMENTS // len(p.b_enc)))
        self.dense_buffers = torch.empty(2, 0, len(p.b_enc), dtype=dtype)
        self.sparse_buffers: _Buffers | None = None

    @torch.no_grad()
    def add(self, x: Float[Tensor, "batch d_in"], l1_coefficient: float, scale: float = 1.0, sparse: bool = False,
            dead: Bool[Tensor, " d_sae"] | None = None, cut: float = 0.0) -> StepSums:
        """Add a batch. `sparse` asks for the way that visits active pairs only; where these are too many it is dense still.

        `dead` are the features that AuxK revives, `cut` is what BatchTopK's smallest activation was so far. BatchTopK selects
        over GROUP rows at once.
        """
        dead = dead if dead is not None and self.rule.k_aux and dead.any() else None
        if self.low is not self.p.W_enc_T:
            in_parallel(lambda i, j: self.low[i:j].copy_(self.p.W_enc_T[i:j]), shares(self.low))
        sums = []
        for rows in x.split(GROUP):
            found = self._add_sparse(rows, l1_coefficient, scale, dead, cut) if sparse else None
            few = [rows] if self.rule.over_rows else rows.split(self.dense_rows)
            sums += [found] if found else [self._add_densely(r, l1_coefficient, scale, dead) for r in few]
        return StepSums(*(sum(column) for column in zip(*sums, strict=True)))

    def _add_densely(self, x: Tensor, l1_coefficient: float, scale: float, dead: Tensor | None) -> StepSums:
        if type(self.rule) is Standard:
            return self._add_dense(x, l1_coefficient, scale)
        found = dense_gradient(self.rule, self.p, self.grads, self.low, x, l1_coefficient, scale, dead)
        squared_error, penalty, fired, smallest = found
        return StepSums(float(squared_error), float(penalty), fired, float(smallest) * len(x))

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

    def _add_sparse(self, x: Tensor, coefficient: float, scale: float, dead: Tensor | None, cut: float) -> StepSums | None:
        """None, with `grads` as they were, if some micro-batch has more than SPARSE_L0 active features a row."""
        p, grads, rule, minus_b_dec, W_dec = self.p, self.grads, self.rule, -self.p.b_dec, self.p.W_dec.numpy()
        widths = rule.widths(len(p.b_enc))
        if self.sparse_buffers is None or len(self.sparse_buffers.centred) < len(x):
            self.sparse_buffers = _Buffers(len(x), *p.W_dec.shape, len(widths), self.dtype)
        b, shift = self.sparse_buffers, rule.shift(p)
        factor = 0.0 if dead is None else auxiliary_factor(rule, dead).item()
        pairs, aux = b.pairs, b.auxiliary(rule.k_aux) if factor else None
        bias = (p.b_enc if shift is None else p.b_enc - shift).numpy()
        dead_bias = p.b_enc.masked_fill(~dead, -torch.inf).numpy() if factor else None
        rows_of = lambda i: slice(i * MICRO_BATCH, min((i + 1) * MICRO_BATCH, len(x)))

        def choose(i: int, floor: float = 0.0) -> int:
            rows = rows_of(i)
            centred = torch.add(minus_b_dec, x[rows], alpha=scale, out=b.centred[rows])
            pre = _bits(torch.mm(centred.to(self.dtype), self.low.T, out=b.pre(len(centred))))
            if factor:
                select_largest(pre, dead_bias, rule.k_aux, *aux.chosen(i, len(pre))[:3])
            return rule.select(pre, bias, floor, *pairs.chosen(i, len(pre))[:3])

        def visit(i: int) -> tuple[float, float, tuple]:
            rows = rows_of(i)
            centred = b.centred[rows].numpy()
            end, feature, f, g = pairs.chosen(i, len(centred))
            take = lambda values, g, errors, first, penalty=0.0: visit_rows(
                end, feature, values, W_dec, widths, np.float32(penalty), np.float32(2), centred, first, errors.numpy(), g)
            if rule.plain:
                squared_error, penalty = take(f, g, b.errors, rows.start, coefficient if type(rule) is Standard else 0.0)
                further = ()
            else:
                at, z, g_torch = (torch.from_numpy(v[:end[-1]]) for v in (feature, f, g))
                z = z + shift[at] if shift is not None else z.clone()
                f[:end[-1]] = rule.activate(p, z, at).numpy()
                squared_error, _ = take(f, g, b.errors, rows.start)
                gate, gate_g = rule.gate(z), torch.empty_like(z)
                if gate is not None:
                    take(gate.numpy(), gate_g.numpy(), torch.empty(1, *centred.shape), 0)  # these errors reach no decoder
                back = rule.backward(p, z, torch.from_numpy(f[:end[-1]]), g_torch, gate_g, at, coefficient)
                g_torch.copy_(back.z)
                penalty, further = float(back.penalty), (at, f[:end[-1]] > 0, back.further)
            pairs.sort(i, rows.start, end, feature, f, g)
            if factor:
                residual = b.errors[-1, rows].mul(-0.5).numpy()
                end, feature, f, g = aux.chosen(i, len(centred))
                visit_rows(end, feature, f, W_dec, (len(W_dec),), np.float32(0), np.float32(factor), residual, rows.start,
                           b.aux_errors.numpy(), g)
                aux.sort(i, rows.start, end, feature, f, g)
            return squared_error, penalty, further

        tasks = [(i,) for i in range(-(-len(x) // MICRO_BATCH))]
        if rule.over_rows:
            cut = self._choose_over_rows(choose, pairs, len(x), FLOOR * cut)
            found = None if cut is None else in_parallel(visit, tasks)
        else:
            found = in_parallel(lambda i: visit(i) if choose(i) >= 0 else None, tasks)
        if found is None or None in found:
            return None

        fired = torch.zeros(len(p.b_enc), dtype=torch.int64)
        grads.b_dec.add_(b.errors[0, :len(x)].sum(0))
        self._to_weights(pairs, b.errors, widths, fired if rule.plain else torch.zeros_like(fired), len(tasks))
        if factor:
            self._to_weights(aux, b.aux_errors, (len(W_dec),), torch.zeros_like(fired), len(tasks))
        for _, _, further in found:
            if further:
                at, active, values = further
                fired.index_add_(0, at, torch.from_numpy(active).long())
                for name, value in values.items():
                    getattr(grads, name).index_add_(0, at, value)
        return StepSums(sum(s for s, _, _ in found), sum(s for _, s, _ in found), fired, cut * len(x) if rule.over_rows else 0.0)

    def _choose_over_rows(self, choose: Callable, pairs: "_Pairs", n: int, floor: float) -> float | None:
        """Select pairs of all rows together; the smallest activation among them, or None if there is no room for candidates."""
        micro_batches = range(-(-n // MICRO_BATCH))
        parts = [pairs.chosen(i, min(MICRO_BATCH, n - i * MICRO_BATCH)) for i in micro_batches]
        for least in (floor, 0.0):
            if min(in_parallel(choose, [(i, least) for i in micro_batches]), default=0) < 0:
                return None
            values = torch.from_numpy(np.concatenate([f[:end[-1]] for end, _, f, _ in parts] or [np.empty(0, np.float32)]))
            if len(values) >= self.rule.k * n:
                break
        cut = self.rule.cut(values, n).item() if len(values) else 0.0
        in_parallel(keep_from, [(np.float32(cut), *part[:3]) for part in parts])
        return cut

    def _to_weights(self, pairs: "_Pairs", errors: Tensor, widths: tuple[int, ...], fired: Tensor, micro_batches: int) -> None:
        """Bring the pairs' errors to the weights, each piece of features those of its own level."""
        p, grads = self.p, self.grads
        levels = list(enumerate(zip((0, *widths), widths, strict=False)))
        pieces = [(max(first, inner), min(last, outer), level) for first, last in shares(p.W_dec)
                  for level, (inner, outer) in levels if first < outer and last > inner]
        b_dec_grads = torch.zeros(len(pieces), len(p.b_dec))
        arrays = [t.numpy() for t in (self.sparse_buffers.centred, p.W_enc_T, grads.W_dec, grads.W_enc_T, grads.b_enc, fired)]
        sorted_pairs = pairs.begin[:micro_batches], pairs.row, pairs.f_sorted, pairs.g_sorted
        in_parallel(visit_features, [(first, last, *sorted_pairs, errors[level].numpy(), *arrays, b_dec_grad.numpy())
                                      for (first, last, level), b_dec_grad in zip(pieces, b_dec_grads, strict=True)])
        grads.b_dec.add_(b_dec_grads.sum(0))


def _bits(t: Tensor) -> np.ndarray:
    """An array that shares memory; numpy knows bfloat16 only as bits."""
    return (t.view(torch.uint16) if t.dtype == torch.bfloat16 else t).numpy()


class _Pairs:
    """Active pairs of row and feature of each micro-batch, with room for `a_row` of them a row."""

    def __init__(self, n: int, d_sae: int, a_row: int):
        micro_batches, capacity = -(-n // MICRO_BATCH), MICRO_BATCH * a_row
        # As they are found, row by row: where each row ends, feature, activation, its gradient.
        self.end = np.zeros((micro_batches, MICRO_BATCH + 1), np.int64)
        self.feature = np.empty((micro_batches, capacity), np.int32)
        self.f, self.g = (np.empty((micro_batches, capacity), np.float32) for _ in range(2))
        # In the order of their features: row, activation, its gradient; and where in that order each feature begins.
        self.row = np.empty((micro_batches, capacity), np.int32)
        self.f_sorted, self.g_sorted = (np.empty((micro_batches, capacity), np.float32) for _ in range(2))
        self.begin = np.empty((micro_batches, d_sae + 1), np.int64)

    def chosen(self, i: int, rows: int) -> tuple[np.ndarray, ...]:
        return self.end[i, :rows + 1], self.feature[i], self.f[i], self.g[i]

    def sort(self, i: int, first_row: int, *pairs: np.ndarray) -> None:
        sort_pairs(*pairs, first_row, self.begin[i], self.row[i], self.f_sorted[i], self.g_sorted[i])


class _Buffers:
    """Memory of the sparse way, kept between steps: fresh pages for every step would cost as much as the work on them."""

    def __init__(self, n: int, d_sae: int, d_in: int, levels: int, dtype: torch.dtype):
        self.centred, self.errors, self.pairs = torch.empty(n, d_in), torch.empty(levels, n, d_in), _Pairs(n, d_sae, SPARSE_L0)
        self.aux: _Pairs | None = None
        self._new_aux = lambda k_aux: (_Pairs(n, d_sae, k_aux), torch.empty(1, n, d_in))
        self._new_pre = lambda: torch.empty(MICRO_BATCH, d_sae, dtype=dtype)
        self._local = local()

    def auxiliary(self, k_aux: int) -> _Pairs:
        """Room for dead features that AuxK lets fire."""
        if self.aux is None:
            self.aux, self.aux_errors = self._new_aux(k_aux)
        return self.aux

    def pre(self, n: int) -> Tensor:
        """Room for the pre-activations of `n` rows, the calling thread's own."""
        if not hasattr(self._local, "pre"):
            self._local.pre = self._new_pre()
        return self._local.pre[:n]


def adam_step(p: AnyParameters, grads: AnyParameters, m: AnyParameters, v: AnyParameters, age: Int[Tensor, " d_sae"], step: int,
              scale: float, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = EPS,
              threshold_rate: float = 1.0) -> bool:
    """One Adam step on `scale * grads`, in place; `grads` come back zeroed. Returns whether all weights are still finite.

    Of a dictionary row's gradient the component parallel to the row is removed first, and the row is brought back to unit norm
    afterwards. `age` counts each feature's updates since its weights were last reset, this one included, so that a resampled
    feature starts as a new one does; `step` is the same for `b_dec`. Thresholds learn `threshold_rate` times as fast.

    Raises ValueError if anything is not contiguous float32: the kernel walks through memory in order.
    """
    if not all(t.is_contiguous() and t.dtype == torch.float32 for group in (p, grads, m, v) for t in group):
        raise ValueError("weights, gradients and moments must be contiguous float32 tensors")
    finite = True
    for name in p._fields:
        # A number of a feature is a row of one; the decoder's bias is one row.
        shape = {"b_dec": (1, -1), "W_enc_T": (-1, p.W_dec.shape[1]), "W_dec": (-1, p.W_dec.shape[1])}.get(name, (-1, 1))
        tensors = [getattr(group, name).view(shape) for group in (p, grads, m, v)]
        ages = np.array([step]) if name == "b_dec" else age.numpy()
        arrays = [t.numpy() for t in tensors]
        rate = lr * threshold_rate if name == "threshold" else lr
        tasks = [(*share, *arrays, ages, scale, rate, *betas, eps, name == "W_dec") for share in shares(tensors[0])]
        finite &= all(in_parallel(adam_rows, tasks))
    return finite
