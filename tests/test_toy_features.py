"""Known features: the activations they make, and how well a dictionary is said to find them, by hand."""

import math
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from sae_lib import toy_features
from sae_lib.errors import StudyError
from sae_lib.metrics import mmcs
from sae_lib.sae import SAE, SAEConfig
from sae_lib.toy_features import Coded, FeatureConfig, KnownFeatures
from sae_lib.train import ActivationSource, TrainConfig, train_sae

CONFIG = FeatureConfig(d_in=4, n_features=6, active=1.5, decay=0.5)


def test_rows_are_sums_of_the_features_that_are_there():
    known = KnownFeatures(CONFIG, 8)
    assert isinstance(known, ActivationSource)
    torch.testing.assert_close(known.directions.norm(dim=1), torch.ones(6))
    assert known.offset.norm().item() == pytest.approx(1)
    assert known.density.sum().item() == pytest.approx(1.5)
    torch.testing.assert_close(known.density[1:], known.density[:-1] / 2)
    active = known.active(20_000, "test")
    torch.testing.assert_close((active > 0).float().mean(0), known.density, atol=0.015, rtol=0)
    by_hand = active[7, 0] * known.directions[0] + sum(active[7, i] * known.directions[i] for i in range(1, 6)) + known.offset
    torch.testing.assert_close(known.rows(active)[7], by_hand)


def test_batches_depend_on_seed_and_step_alone():
    known = KnownFeatures(CONFIG, 8)
    first = list(islice(known.batches(), 4))
    assert torch.equal(first[3], next(known.batches(3))) and not torch.equal(first[2], first[3])
    assert torch.equal(known.sample(5, "scale"), KnownFeatures(CONFIG, 99).sample(5, "scale"))
    assert not torch.equal(known.sample(8, "batch"), KnownFeatures(replace(CONFIG, seed=1), 8).sample(8, "batch"))
    assert not torch.equal(known.sample(8, "scale"), known.sample(8, "birth"))


def test_too_many_active_features_are_refused():
    with pytest.raises(StudyError, match="ask for fewer"):
        KnownFeatures(replace(CONFIG, active=4.0), 8)


def test_no_feature_is_matched_twice():
    truth = torch.eye(3)
    learned = torch.tensor([[0.0, 1, 0], [2, 2, 0]])  # the second has cosine 0.707 with the first two
    found = toy_features.match(learned, truth)
    assert found.unit.tolist() == [1, 0, -1]
    assert found.cosine.tolist() == pytest.approx([math.sqrt(0.5), 1, 0])
    # The mean of the greatest cosines looks at the dictionary's features only, or at the true ones only.
    assert mmcs(learned, truth) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert mmcs(truth, learned) == pytest.approx((math.sqrt(0.5) + 1 + 0) / 3)


def test_f1_by_hand():
    active = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 0]])
    found = torch.tensor([[0.2, 0.0], [0, 0.1], [0, 0.3], [0, 0.4]])
    # The first true feature: 1 hit, 1 miss; the second: 2 hits, 1 false alarm; the third is never there.
    f1 = toy_features.matched_f1(found, active, np.array([0, 1, -1]))
    assert f1[:2].tolist() == pytest.approx([2 / 3, 4 / 5]) and np.isnan(f1[2])
    assert toy_features.matched_f1(found, active, np.array([-1, 1, 0]))[0] == 0


def test_bits_by_hand():
    # Half of the entries in one bin and half in another: one bit each. A quarter and three quarters: 0.811 bits each.
    assert toy_features.histogram_bits(torch.tensor([0.0, 0, 1, 1]), 0.0, 1.0) == pytest.approx(4)
    assert toy_features.histogram_bits(torch.tensor([0.0, 0, 0, 1]), 0.0, 1.0) == pytest.approx(4 * 0.811278, abs=1e-5)
    assert toy_features.histogram_bits(torch.zeros(5), 0.0, 1.0) == 0
    # What is closer than a bin counts as the same.
    assert toy_features.histogram_bits(torch.tensor([0.0, 0.009, 1, 1]), 0.0, 1.0) == pytest.approx(4)


def test_all_factorisations_are_coded_in_the_same_bins():
    small = Coded(torch.tensor([[0.0, 0.001]]), torch.eye(2))
    assert toy_features.total_information([small])[0] == pytest.approx(2 + 4)  # features: 1 bit each; directions: 0 or 1
    large = Coded(torch.tensor([[0.0, 1.0]]), torch.eye(2))
    assert toy_features.total_information([small, large]) == pytest.approx([4, 2 + 4])


def test_the_bounce_is_the_least():
    assert toy_features.bounce([4, 6, 8, 16], [9.0, 5.0, 6.0, 12.0]) == 6
    assert toy_features.bounce([4, 6, 8], [math.nan, 5.0, 6.0]) == 6


def test_bits_at_equal_error_lie_between_those_measured():
    assert toy_features.bits_at(0.7, [0.9, 0.6, 0.2], [40.0, 10.0, 5.0]) == pytest.approx(20)
    assert math.isnan(toy_features.bits_at(0.95, [0.9, 0.6], [40.0, 10.0]))
    assert math.isnan(toy_features.bits_at(0.5, [0.9, 0.6], [40.0, 10.0]))


def test_the_studys_own_training_recovers_the_truth_at_the_true_width():
    known = KnownFeatures(FeatureConfig(d_in=16, n_features=24, active=2.0, decay=1.0), 256)
    training = TrainConfig(n_activations=256 * 500, batch_size=256, l1_coefficient=1.4, lr=1e-2, lr_decay=0.5, birth_density=0.05,
                           resample_inputs=512, precision="float32", log_every=1000)
    sae, _ = train_sae(known, SAEConfig(16, 24), training)
    assert mmcs(sae.W_dec, known.directions) > 0.95 and mmcs(known.directions, sae.W_dec) > 0.95
    active = known.active(2000, "test")
    found = toy_features.match(sae.W_dec, known.directions)
    f1 = toy_features.matched_f1(sae(known.rows(active)).features, active, found.unit)
    assert f1.mean() > 0.6
    untrained = SAE(SAEConfig(16, 24)).requires_grad_(False)
    assert mmcs(untrained.W_dec, known.directions) < 0.8
    part = toy_features.coded(sae, known.rows(active))
    assert part.features.shape == (2000, 24) and torch.equal(part.directions, sae.W_dec)
