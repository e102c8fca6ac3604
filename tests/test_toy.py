"""Toy models: closed forms by hand, what training finds of them, and neurons that exclusive features share."""

import math

import pytest
import torch

from sae_lib import toy
from sae_lib.errors import StudyError
from sae_lib.seeds import generator
from sae_lib.toy import ToyConfig, Toys


def test_features_are_there_as_often_as_asked_and_uniform():
    density = torch.tensor([[0.1, 1.0], [0.5, 0.25]])
    x = toy.sparse_features(40_000, density, generator(0, "test"))
    assert x.shape == (2, 40_000, 2) and x.min() == 0 and x.max() <= 1
    torch.testing.assert_close((x > 0).float().mean(1), density, atol=0.01, rtol=0)
    torch.testing.assert_close(x[0, :, 1].var(), torch.tensor(1 / 12), atol=0.002, rtol=0)
    torch.testing.assert_close(x.var(1), toy.feature_variance(density), atol=0.004, rtol=0)


def test_a_model_is_what_the_formula_says():
    toys = Toys(torch.tensor([[[1.0, -1.0]]]), torch.tensor([[0.0, 0.1]]), relu=True)
    x = torch.tensor([[1.0, 0.0], [0.25, 1.0]])
    torch.testing.assert_close(toys(x), torch.tensor([[[1.0, 0.0], [0.0, 0.85]]]))
    linear = toys._replace(relu=False)
    torch.testing.assert_close(linear(x), torch.tensor([[[1.0, -0.9], [-0.75, 0.85]]]))


def test_losses_of_a_pair_by_hand():
    # Density 1/2, importance 1/2: the variance is 1/6 - 1/16 = 5/48.
    losses = toy.pair_losses(torch.tensor([0.5]), torch.tensor([0.5]))
    torch.testing.assert_close(losses, torch.tensor([[5 / 96, 5 / 48, 1.5 / 24]]))


def test_the_boundary_is_where_two_losses_meet():
    importance = torch.tensor([0.1, 0.5, 1.0, 4.0])
    boundary = toy.pair_boundary(importance)
    assert boundary[2] == pytest.approx(4 / 7)
    losses = toy.pair_losses(boundary, importance)
    torch.testing.assert_close(losses[:, 2], losses[:, :2].amin(1))
    below, above = (toy.pair_losses(boundary * factor, importance).argmin(1) for factor in (0.99, 1.01))
    assert below.tolist() == [2] * 4 and above.tolist()[:2] == [0, 0] and above[3] == 1


def test_measured_losses_of_known_weights_agree_with_the_closed_forms():
    density, ways = torch.tensor([0.3] * 3), torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[1.0, -1.0]]])
    # What is left out is given as its mean, 0.15.
    toys = Toys(ways, torch.tensor([[0.0, 0.15], [0.15, 0.0], [0.0, 0.0]]), relu=True)
    importance = torch.tensor([1.0, 0.6])
    errors = toy.measure(toys, density)
    expected = toy.pair_losses(torch.tensor([0.3]), torch.tensor([0.6]))[0]
    torch.testing.assert_close((errors.squared * importance).sum(1), expected, rtol=0.02, atol=0)
    assert toy.pair_kind(toys).tolist() == [0, 1, 2]
    assert toy.held(toys).tolist() == [1, 1, 2]
    # The pair's worth: what the interference leaves, 2 (1 - (p^2 / 6) / v).
    worth = toy.capacity(errors)
    torch.testing.assert_close(worth[2], torch.tensor(2 * (1 - 0.015 / (0.1 - 0.0225))), atol=0.02, rtol=0)


def test_no_linear_model_gives_back_more_than_it_has_dimensions():
    density = torch.full((20,), 0.2)
    W = torch.randn(20, 2, 5, generator=generator(0, "test"))
    mean = torch.full((5,), 0.1)
    b = mean - W.mT @ W @ mean
    assert toy.capacity(toy.measure(Toys(W, b, relu=False), density)).max() < 2
    W = torch.eye(5)[None, :2]
    best = Toys(W, torch.tensor([[0.0, 0.0, 0.1, 0.1, 0.1]]), relu=False)
    errors = toy.measure(best, density[:1])
    torch.testing.assert_close(errors.variance, torch.full((1, 5), 0.2 / 3 - 0.01), rtol=0.02, atol=0)
    assert toy.capacity(errors).item() == pytest.approx(2, abs=1e-3)
    importance = torch.tensor([[3.0, 2.0, 1.0, 0.5, 0.25]])
    loss = toy.linear_loss(density[:1], importance, 2)
    assert loss.item() == pytest.approx(1.75 * (0.2 / 3 - 0.01))
    torch.testing.assert_close((errors.squared * importance).sum(1), loss, rtol=0.02, atol=0)


def test_training_finds_superposition_where_features_are_rare_and_not_where_they_are_common():
    density, importance = torch.tensor([0.1, 1.0, 0.1]), torch.tensor([[1.0, 1.0], [1.0, 0.5], [1.0, 1.0]])
    config = ToyConfig(2, 1, n_steps=250, batch_size=128, lr=0.02, restarts=3)
    toys = toy.train_toys(density, importance, config)
    assert toy.pair_kind(toys).tolist() == [2, 0, 2]
    W = toys.W[0, 0]
    assert W[0] * W[1] < 0
    linear = toy.train_toys(density, importance, config, relu=False)
    assert toy.held(linear)[1] == 1
    assert toy.capacity(toy.measure(linear, density)).max() < 1.02
    # Of two features that are equally important a linear model may hold any mixture, but no more than one feature's worth.
    assert not linear.relu and linear.W.shape == (3, 1, 2)


def test_trainings_depend_on_their_seed_alone():
    density, importance = torch.tensor([0.5]), torch.ones(1, 3)
    one, same, other = (toy.train_toys(density, importance, ToyConfig(3, 2, n_steps=5, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(one.W, same.W) and not torch.equal(one.W, other.W)


def test_a_density_that_is_none_is_refused():
    with pytest.raises(StudyError, match="share above 0"):
        toy.train_toys(torch.tensor([0.5, 1.5]), torch.ones(2, 2), ToyConfig(2, 1, n_steps=1))


def test_closed_forms_of_the_shared_neuron():
    nats = [toy.shared_cross_entropy(4, shared) for shared in range(5)]
    third = 0.75 * math.log(3)
    assert nats == pytest.approx([math.log(4), third, math.log(2), third, math.log(4)])
    assert nats[1] == pytest.approx(0.824, abs=5e-4) and nats[2] == pytest.approx(0.693, abs=5e-4)
    assert [toy.shared_squared_error(4, shared) for shared in range(5)] == pytest.approx([0.75, 0.5, 0.5, 0.5, 0.75])


def test_neurons_that_are_told_their_features_learn_the_closed_forms():
    start = torch.tensor([[30.0, -30, -30, -30], [30, 30, -30, -30], [-30, -30, -30, -30]])
    runs = toy.train_neurons(start)
    torch.testing.assert_close(runs.fires, (start > 0).float())
    expected = torch.tensor([toy.shared_cross_entropy(4, shared) for shared in (1, 2, 0)])
    torch.testing.assert_close(runs.cross_entropy, expected, rtol=0.01, atol=0)
    torch.testing.assert_close(runs.squared_error, torch.tensor([0.5, 0.5, 0.75]), rtol=0.01, atol=0)


def test_a_neuron_that_may_choose_takes_two_features_more_often_than_one():
    runs = toy.train_neurons(torch.randn(40, 4, generator=generator(0, "test")))
    shared = (runs.fires > 0.5).sum(1)
    assert ((runs.fires > 0.95) | (runs.fires < 0.05)).all()
    assert (shared == 2).sum() > 20
    assert (runs.cross_entropy[shared == 2] < 0.7).all()
