import numpy as np
import pytest
import torch

from sae_lib.baselines import as_dictionary, ica, pca, random_directions
from sae_lib.errors import StudyError


@pytest.fixture
def sample():
    return torch.rand(500, 6, generator=torch.Generator().manual_seed(3)) ** 4 @ torch.diag(torch.arange(1.0, 7))


def test_pca_is_the_spectrum_with_the_skewed_side_kept(sample):
    found = pca(sample, 6)
    centred = sample - sample.mean(0)
    _, _, expected = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close((found.write @ expected.T).abs(), torch.eye(6), atol=1e-3, rtol=0)
    scores = centred @ found.directions
    assert ((scores**3).mean(0) > 0).all()
    torch.testing.assert_close(found.encode(sample), scores.clamp_min(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(scores @ found.write, centred, atol=1e-4, rtol=1e-4)


def test_components_as_a_dictionary(sample):
    """The first k rebuild the projection on them; of all of them the largest k can only be nearer."""
    found = as_dictionary(pca(sample, 2))(sample)
    centred = sample - sample.mean(0)
    directions = torch.linalg.svd(centred, full_matrices=False)[2][:2]
    torch.testing.assert_close(found.reconstruction, sample.mean(0) + centred @ directions.T @ directions, atol=1e-3, rtol=1e-3)
    assert ((found.features > 0).sum(1) == 2).all()
    largest = as_dictionary(pca(sample, 6), 2)(sample)
    assert ((largest.features > 0).sum(1) == 2).all()
    scores = (centred @ pca(sample, 6).directions).square()
    error = (largest.reconstruction - sample).square().sum(1)
    torch.testing.assert_close(error, scores.sum(1) - scores.topk(2).values.sum(1), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(as_dictionary(pca(sample, 6), 6)(sample).reconstruction, sample, atol=1e-3, rtol=1e-3)


def test_ica_finds_independent_sources():
    rng = np.random.default_rng(0)
    sources = rng.exponential(size=(4000, 3)) * (rng.random((4000, 3)) < 0.3)
    mixed = torch.tensor(sources @ rng.normal(size=(3, 3)), dtype=torch.float32)
    found = ica(mixed, 3)
    correlation = np.corrcoef(found.encode(mixed).T, sources.T)[:3, 3:]
    assert sorted(correlation.argmax(1)) == [0, 1, 2] and correlation.max(1).min() > 0.95  # not the sources' negatives
    torch.testing.assert_close((mixed - found.mean) @ found.directions @ found.write, mixed - found.mean, atol=1e-3, rtol=1e-3)
    assert torch.equal(found.directions, ica(mixed, 3).directions)


def test_random_directions_are_unit_long_and_seeded(sample):
    found = random_directions(6, 40, seed=1)
    torch.testing.assert_close(found.directions.norm(dim=0), torch.ones(40))
    assert torch.equal(found.encode(sample), (sample @ found.directions).relu())
    assert not torch.equal(found.directions, random_directions(6, 40, seed=2).directions)


def test_more_components_than_the_sample_has(sample):
    for make in (pca, ica):
        with pytest.raises(StudyError, match="cannot be found"):
            make(sample, 7)
