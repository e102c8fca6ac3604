"""Which features are active: the choice that every kind of dictionary makes in its own way, compiled by numba.

A micro-batch's choice is a list of pairs of row and feature, row by row and within a row in the order of features: `end[r]` to
`end[r + 1]` are those of row r, `feature` and `z` say which and with what pre-activation. Pre-activations [rows, d_sae] are
float32 or the bits of bfloat16, without the bias.
"""

from typing import no_type_check

import numpy as np
from numba import njit

from sae_lib.kernels import FAST, widen

LANES = 256  # parts of a row whose maxima tell how large its k largest are


@njit(nogil=True, cache=True, fastmath=FAST)
@no_type_check
def _find(pre, bias, floor, flags, words, feature, z):
    """Features of one row with pre + bias > floor, and these values; returns how many, or -1 if there is no room.

    No step of it branches on a feature: flags are set many at a time, and eight without a flag are passed over at once.
    """
    for i in range(len(pre)):
        flags[i] = widen(pre[i]) + bias[i] > floor
    flagged = flags.view(np.uint64)
    n_words = 0
    for c in range(len(flagged)):
        words[n_words] = c
        n_words += np.int64(flagged[c] != 0)
    if 8 * n_words > len(z):
        return -1
    n = 0
    for c in words[:n_words]:
        p, b = pre[8 * c:8 * c + 8], bias[8 * c:8 * c + 8]
        for i in range(len(p)):
            value = widen(p[i]) + b[i]
            feature[n], z[n] = 8 * c + i, value
            n += np.int64(value > floor)
    return n


@njit(nogil=True, cache=True, fastmath=FAST)
@no_type_check
def select_above(pre, bias, floor, end, feature, z):
    """Pairs with pre + bias > floor; returns how many, or -1 if there is no room for them."""
    words, flags = np.empty(len(bias) // 8 + 2, np.int64), np.zeros(8 * ((len(bias) + 7) // 8), np.uint8)
    end[0] = 0
    for r in range(len(pre)):
        n = _find(pre[r], bias, floor, flags, words, feature[end[r]:], z[end[r]:])
        if n < 0:
            return -1
        end[r + 1] = end[r] + n
    return end[len(pre)]


@njit(nogil=True, cache=True)
@no_type_check
def kth_largest(values, n, k):
    """The k-th largest of the first `n` values, which come back in another order (Hoare's selection)."""
    left, right, wanted = 0, n - 1, k - 1
    while left < right:
        pivot, i, j = values[(left + right) // 2], left, right
        while i <= j:
            while values[i] > pivot:
                i += 1
            while values[j] < pivot:
                j -= 1
            if i <= j:
                values[i], values[j] = values[j], values[i]
                i, j = i + 1, j - 1
        if wanted <= j:
            right = j
        elif wanted >= i:
            left = i
        else:
            break
    return values[wanted]


@njit(nogil=True, cache=True, fastmath=FAST)
@no_type_check
def select_largest(pre, bias, k, end, feature, z):
    """Pairs with the k largest pre + bias of each row, as far as they are positive; of equal ones the first.

    Returns how many pairs there are, or -1 if there is no room for them.
    """
    d_sae, n_lanes, zero = len(bias), min(len(bias), max(LANES, 4 * k)), np.float32(0)
    lanes, value = np.empty(n_lanes, np.float32), np.empty(d_sae, np.float32)
    words, flags = np.empty(d_sae // 8 + 2, np.int64), np.zeros(8 * ((d_sae + 7) // 8), np.uint8)
    # Room for all values of a row: `_find` may ask for eight times as much as there is in the end.
    room, room_z = np.empty(8 * (d_sae // 8 + 2), np.int32), np.empty(8 * (d_sae // 8 + 2), np.float32)
    end[0] = 0
    for r in range(len(pre)):
        row = pre[r]
        # The k-th largest of the lanes' maxima: k values at least are as large, and hardly more.
        lanes[:] = zero
        for start in range(0, d_sae, n_lanes):
            p, b = row[start:start + n_lanes], bias[start:start + n_lanes]
            for i in range(len(p)):
                lanes[i] = max(lanes[i], widen(p[i]) + b[i])
        bound = kth_largest(lanes, n_lanes, k) if k <= n_lanes else zero
        n = _find(row, bias, bound * np.float32(0.999999), flags, words, room, room_z)
        cut, at_cut = zero, 0
        if n > k:
            value[:n] = room_z[:n]
            cut = kth_largest(value, n, k)
            at_cut = k
            for i in range(n):
                at_cut -= room_z[i] > cut
        to = end[r]
        if to + min(n, k) > len(z):
            return -1
        for i in range(n):
            if room_z[i] > cut or (room_z[i] == cut and at_cut > 0):
                at_cut -= room_z[i] == cut
                feature[to], z[to] = room[i], room_z[i]
                to += 1
        end[r + 1] = to
    return end[len(pre)]


@njit(nogil=True, cache=True)
@no_type_check
def keep_from(cut, end, feature, z):
    """Leave only pairs with z of at least `cut`, in place."""
    to, begin = 0, 0
    for r in range(len(end) - 1):
        for i in range(begin, end[r + 1]):
            if z[i] >= cut:
                feature[to], z[to] = feature[i], z[i]
                to += 1
        begin, end[r + 1] = end[r + 1], to
