"""New features, by hand."""

import torch

from sae_lib.births import bear, make_rare
from sae_lib.step import Parameters


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
