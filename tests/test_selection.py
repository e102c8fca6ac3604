"""Which pairs are chosen, against torch and by hand."""

import numpy as np
import pytest
import torch

from sae_lib.selection import keep_from, kth_largest, select_above, select_largest


def bits(t):
    return (t.view(torch.uint16) if t.dtype == torch.bfloat16 else t).numpy()


def chosen(select, pre, bias, *arguments, room=None):
    """Dense activations of what was chosen, and how many pairs there are."""
    room = pre.numel() + 64 if room is None else room
    end, feature, z = np.zeros(len(pre) + 1, np.int64), np.empty(room, np.int32), np.empty(room, np.float32)
    n = select(bits(pre), bias.numpy(), *arguments, end, feature, z)
    found = torch.zeros(pre.shape)
    for r in range(len(pre) if n >= 0 else 0):
        of_row = feature[end[r]:end[r + 1]]
        assert (np.diff(of_row) > 0).all()  # in order, none twice
        found[r, of_row.astype(np.int64)] = torch.from_numpy(z[end[r]:end[r + 1]])
    return found, n


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d_sae, k", [(7, 3), (8, 8), (203, 12), (300, 200), (1000, 32), (1027, 64), (5, 9)])
def test_the_k_largest_of_every_row_as_far_as_they_are_positive(d_sae, k, dtype):
    rng = torch.Generator().manual_seed(d_sae)
    pre, bias = torch.randn(50, d_sae, generator=rng).to(dtype), 0.5 * torch.randn(d_sae, generator=rng)
    pre[3] = -9.0  # nothing is positive
    found, n = chosen(select_largest, pre, bias, k)
    z = pre.float() + bias
    largest = z.topk(min(k, d_sae), dim=1)
    expected = torch.zeros(z.shape).scatter_(1, largest.indices, largest.values.relu())
    assert torch.equal(found, expected) and n == int((expected > 0).sum())


def test_of_equal_values_the_first_are_chosen():
    pre = torch.tensor([[1.0, 2.0, 1.0, 3.0, 1.0, 0.0, -1.0, 1.0]])
    found, n = chosen(select_largest, pre, torch.zeros(8), 4)
    assert found.tolist() == [[1, 2, 1, 3, 0, 0, 0, 0]] and n == 4


def test_features_with_an_infinitely_low_bias_are_never_chosen():
    bias = torch.tensor([0.0, -torch.inf, 0.0, 0.0])
    found, _ = chosen(select_largest, torch.tensor([[1.0, 9.0, 2.0, 3.0]]), bias, 2)
    assert found.tolist() == [[0, 0, 2, 3]]


def test_what_is_above_the_floor():
    pre, bias = torch.tensor([[1.0, 2.0, -1.0], [0.5, 0.0, 4.0]]), torch.tensor([0.0, -1.0, 0.0])
    assert chosen(select_above, pre, bias, np.float32(0))[0].tolist() == [[1, 1, 0], [0.5, 0, 4]]
    assert chosen(select_above, pre, bias, np.float32(0.75))[0].tolist() == [[1, 1, 0], [0, 0, 4]]
    assert chosen(select_above, pre, bias, np.float32(0), room=2)[1] == -1
    assert chosen(select_largest, pre, bias, 2, room=3)[1] == -1


def test_kth_largest():
    rng = np.random.default_rng(0)
    for n in (1, 2, 3, 10, 257):
        values = rng.integers(0, 20, n).astype(np.float32)  # many are equal
        for k in {1, (n + 1) // 2, n}:
            assert kth_largest(values.copy(), n, k) == np.sort(values)[n - k]


def test_pairs_below_the_cut_are_left_out():
    end, feature, z = np.array([0, 3, 3, 5]), np.array([1, 4, 6, 0, 2], np.int32), np.array([5, 1, 3, 2, 3], np.float32)
    keep_from(np.float32(3), end, feature, z)
    assert end.tolist() == [0, 2, 2, 3] and feature[:3].tolist() == [1, 6, 2] and z[:3].tolist() == [5, 3, 3]
