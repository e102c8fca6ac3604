"""Where training begins: new features, and the middle of the activations, by hand."""

import pytest
import torch

from sae_lib.births import bear, geometric_median, make_rare
from sae_lib.errors import StudyError
from sae_lib.variants import Parameters


def parameters():
    return Parameters(torch.ones(3, 2), torch.ones(3), torch.ones(3, 2), torch.tensor([1.0, 0.0]))


def test_a_new_feature_gets_a_direction_and_no_bias():
    p = parameters()
    bear(p, torch.tensor([0, 2]), torch.tensor([[3.0, 4.0], [0.0, -2.0]]), 0.5)
    torch.testing.assert_close(p.W_dec, torch.tensor([[0.6, 0.8], [1.0, 1.0], [0.0, -1.0]]))
    torch.testing.assert_close(p.W_enc_T, torch.tensor([[0.3, 0.4], [1.0, 1.0], [0.0, -0.5]]))
    assert p.b_enc.tolist() == [0, 1, 0]


def test_the_bias_lets_the_told_share_through():
    p = parameters()
    bear(p, torch.tensor([0, 1]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]), 1.0)
    x = torch.tensor([[1.0, 8.0], [2.0, 1.0], [3.0, 3.0], [9.0, 2.0]])
    make_rare(p, torch.tensor([0, 1]), x, 0.5)
    # Centred first coordinates 0, 1, 2, 8: the third highest is 1. Second coordinates 8, 1, 3, 2: the third highest is 2.
    assert p.b_enc.tolist() == [-1, -2, 1]
    fires = (x - p.b_dec) @ p.W_enc_T.T + p.b_enc > 0
    assert fires[:, :2].T.tolist() == [[False, False, True, True], [True, False, True, False]]
    # However small the share, the strongest row is let through.
    make_rare(p, torch.tensor([0]), x, 1e-6)
    assert p.b_enc[0] == -2


def test_geometric_median_of_points_on_a_line_is_their_median():
    points = torch.tensor([[0.0], [1.0], [2.0], [10.0], [1000.0]]) * torch.tensor([3.0, 4.0])
    torch.testing.assert_close(geometric_median(points), torch.tensor([6.0, 8.0]), rtol=1e-3, atol=1e-2)


def test_geometric_median_withstands_what_moves_the_mean():
    x = torch.randn(2001, 8, generator=torch.Generator().manual_seed(0))
    x[:400] = 500.0
    assert geometric_median(x).norm() < 2 < x.mean(0).norm()


def test_geometric_median_has_no_slope():
    # At the minimum the unit vectors to all points add up to zero.
    x = torch.randn(501, 3, generator=torch.Generator().manual_seed(1)).exp()
    towards = x - geometric_median(x)
    assert (towards / towards.norm(dim=1, keepdim=True)).mean(0).norm() < 1e-4


def test_geometric_median_of_equal_points_and_of_two():
    torch.testing.assert_close(geometric_median(torch.full((9, 4), 2.5)), torch.full((4,), 2.5))
    # Every point between two is a median; the iteration starts in the middle and stays.
    torch.testing.assert_close(geometric_median(torch.tensor([[0.0, 0.0], [2.0, 0.0]])), torch.tensor([1.0, 0.0]))


def test_activations_that_are_not_finite_are_refused():
    with pytest.raises(StudyError, match="not finite"):
        geometric_median(torch.tensor([[1.0], [float("inf")]]))
