"""Loops of the training step that matrix products and torch's operations do not cover, compiled by numba.

They visit active pairs of row and feature only, make one pass where several operations would make several, and run on threads
that own what they write and sum in a fixed order: results do not depend on how many threads there are. Matrices are
[rows or features, d_in], contiguous, float32; pre-activations may also be the bits of bfloat16.
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
def _widen(x):
    """float32 from float32, or from the bits of a bfloat16."""


@overload(_widen)
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
            value = max(_widen(row[j]) + b_enc[j], np.float32(0))
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
            value = _widen(row[j]) + l1_coefficient if _widen(feature[j]) > np.float32(0) else np.float32(0)
            row[j] = _narrow(value, row[j])
            b_enc_grad[j] += value


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
def visit_rows(pre, b_enc, W_dec, l1_coefficient, centred, error_2, first_row, begin, row, f_sorted, g_sorted):
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
