"""Loops of the training step that matrix products and torch's operations do not cover, compiled by numba.

They visit active pairs of row and feature only (`selection.py` finds them), make one pass where several operations would make
several, and run on threads that own what they write and sum in a fixed order: results do not depend on how many threads there
are. Matrices are [rows or features, d_in], contiguous, float32; activations may also be the bits of bfloat16.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier
from typing import no_type_check

import numpy as np
import torch
from numba import njit, types
from numba.extending import overload
from torch import Tensor

# Everything that lets sums be vectorised, but not the assumption that values are finite.
FAST = {"reassoc", "contract", "arcp", "nsz"}
SMALLEST_SHARE = 65_536  # elements worth handing to a thread


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads in which torch itself uses one thread each.

    Not torch's own threads: those busy-wait after each of its operations, and would take the cores from the kernels here.
    """
    pool, ready = ThreadPoolExecutor(threads, "kernel"), Barrier(threads)

    def prepare(_: int) -> None:
        torch.get_num_threads()  # a thread's first question sets its number to torch's own, whatever it was told before
        torch.set_num_threads(1)
        ready.wait()

    list(pool.map(prepare, range(threads)))
    torch.set_num_threads(threads)
    return pool


def in_parallel(work: Callable, tasks: list) -> list:
    """`[work(*task) for task in tasks]`, as many at once as torch has threads."""
    threads = torch.get_num_threads()
    if threads == 1 or len(tasks) == 1:
        return [work(*task) for task in tasks]
    return list(_pool(threads).map(lambda task: work(*task), tasks))


def shares(matrix: Tensor) -> list[tuple[int, int]]:
    """Rows in pieces: enough to even out what the threads have to do, none too small to be worth handing over."""
    n = len(matrix)
    pieces = max(1, min(16, matrix.numel() // SMALLEST_SHARE))
    bounds = [n * i // pieces for i in range(pieces + 1)]
    return list(zip(bounds[:-1], bounds[1:], strict=True))


@no_type_check
def widen(x):
    """float32 from float32, or from the bits of a bfloat16."""


@overload(widen)
@no_type_check
def _widen_overload(x):
    if isinstance(x, types.Float):
        return lambda x: x
    return lambda x: np.int32(np.uint32(x) << np.uint32(16)).view(np.float32)


@no_type_check
def _narrow(x, like):
    """The reverse: a float32 as what `like` is, rounded to even."""


@overload(_narrow)
@no_type_check
def _narrow_overload(x, like):  # noqa: ARG001
    if isinstance(like, types.Float):
        return lambda x, like: x  # noqa: ARG005

    def round_to_bits(x, like):  # noqa: ARG001
        bits = np.float32(x).view(np.uint32)
        return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))

    return round_to_bits


@njit(nogil=True, cache=True, fastmath=FAST)
@no_type_check
def relu_rows(features, b_enc, fired):
    """features = relu(features + b_enc) in place; adds to `fired` the rows each was active on, returns the sum of all."""
    total = 0.0
    for r in range(len(features)):
        row, row_total = features[r], np.float32(0)
        for j in range(len(row)):
            value = max(widen(row[j]) + b_enc[j], np.float32(0))
            row[j] = _narrow(value, row[j])
            fired[j] += np.int32(value > np.float32(0))
            row_total += value
        total += row_total
    return total


@njit(nogil=True, cache=True, fastmath=FAST)
@no_type_check
def mask_rows(g, features, l1_coefficient, b_enc_grad):
    """g = (g + l1_coefficient) where the feature is active, else 0, in place; adds its columns' sums to `b_enc_grad`."""
    for r in range(len(g)):
        row, feature = g[r], features[r]
        for j in range(len(row)):
            value = widen(row[j]) + l1_coefficient if widen(feature[j]) > np.float32(0) else np.float32(0)
            row[j] = _narrow(value, row[j])
            b_enc_grad[j] += value


@njit(nogil=True, cache=True, fastmath=FAST)
@no_type_check
def visit_rows(end, feature, f, W_dec, widths, l1_coefficient, factor, target, first_row, errors, g):
    """Errors of a micro-batch, and the gradient at each activation `f` of its pairs, row r's being those up to `end[r + 1]`.

    The loss is factor / 2 * ||target - x_hat||^2 of each row, added up over the nested dictionaries of the first `widths`
    features, plus `l1_coefficient` times the activations. `errors` [level, row, d_in] becomes, from `first_row` on, the
    derivative by what a feature of that level writes. Returns the sums of squared errors, of the widest, and of activations.
    """
    d_in, last = target.shape[1], len(widths) - 1
    squared_error, l1 = 0.0, 0.0
    for r in range(len(target)):
        c, done = target[r], end[r]
        for level in range(last + 1):
            e = errors[level, first_row + r]
            if level == 0:
                for i in range(d_in):
                    e[i] = -c[i]
            else:
                e[:] = errors[level - 1, first_row + r]
            while done < end[r + 1] and feature[done] < widths[level]:
                w, fk = W_dec[feature[done]], f[done]
                for i in range(d_in):
                    e[i] += fk * w[i]
                done += 1
        e, square = errors[last, first_row + r], np.float32(0)
        for i in range(d_in):
            square += e[i] * e[i]
            e[i] *= factor
        squared_error += square
        for level in range(last - 1, -1, -1):  # what an inner feature writes is part of all dictionaries around it
            e, outer = errors[level, first_row + r], errors[level + 1, first_row + r]
            for i in range(d_in):
                e[i] = factor * e[i] + outer[i]
        level = 0
        for k in range(end[r], end[r + 1]):  # the rows of W_dec are still in cache
            while feature[k] >= widths[level]:
                level += 1
            e, w, dot = errors[level, first_row + r], W_dec[feature[k]], np.float32(0)
            for i in range(d_in):
                dot += e[i] * w[i]
            g[k] = dot + l1_coefficient
            l1 += f[k]
    return squared_error, l1


@njit(nogil=True, cache=True, fastmath=FAST)
@no_type_check
def sort_pairs(end, feature, f, g, first_row, begin, row, f_sorted, g_sorted):
    """Pairs of a micro-batch in the order of their features; within each the rows stay in order (counting sort)."""
    begin[:] = 0
    for k in range(end[-1]):
        begin[feature[k] + 1] += 1
    for j in range(len(begin) - 1):
        begin[j + 1] += begin[j]
    for r in range(len(end) - 1):
        for k in range(end[r], end[r + 1]):
            j = feature[k]
            to = begin[j]
            row[to], f_sorted[to], g_sorted[to] = first_row + r, f[k], g[k]
            begin[j] += 1
    for j in range(len(begin) - 1, 0, -1):
        begin[j] = begin[j - 1]
    begin[0] = 0


@njit(nogil=True, cache=True, fastmath=FAST)
@no_type_check
def visit_features(first, last, begin, row, f, g, error_2, centred, W_enc, W_dec_grad, W_enc_grad, b_enc_grad, fired,
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


@njit(nogil=True, cache=True, fastmath=FAST)
@no_type_check
def adam_rows(first, last, w, g, m, v, age, scale, lr, beta1, beta2, eps, unit_norm):
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
