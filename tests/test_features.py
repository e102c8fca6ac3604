import numpy as np
import torch

from sae_lib.features import LabelCorrelations, pearson_sums
from sae_lib.metrics import pearson_from_sums


def test_correlations_equal_numpy_in_any_batching():
    acts, labels = torch.rand(300, 5).relu(), torch.randint(0, 3, (300,))
    acts[:, 4] = 0
    expected = np.array([[np.corrcoef(acts[:, u], labels == c)[0, 1] for c in range(3)] for u in range(4)])
    for size in (300, 7):
        correlations = LabelCorrelations(5, 4)
        for a, c in zip(acts.split(size), labels.split(size), strict=True):
            correlations.update(a, c)
        np.testing.assert_allclose(correlations.pearson()[:4, :3], expected, atol=1e-5)
        assert (correlations.pearson()[4] == 0).all()  # never fires
        assert (correlations.pearson()[:, 3] == 0).all()  # never occurs


def test_a_perfect_detector_has_correlation_one_and_a_shared_one_less():
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    correlations = LabelCorrelations(2, 3)
    correlations.update(torch.stack([(labels == 1).float() * 7, (labels >= 1).float()], 1), labels)
    torch.testing.assert_close(correlations.pearson()[:, 1], torch.tensor([1.0, 0.5]))


def test_document_sums_add_up_to_the_pearson_of_all_tokens():
    x, y, document = torch.rand(200, 2), torch.rand(200, 2) > 0.7, torch.randint(0, 9, (200,)) * 10
    sums = pearson_sums(x, y, document)
    expected = [np.corrcoef(x[:, i], y[:, i])[0, 1] for i in range(2)]
    assert sums.shape == (len(document.unique()), 6, 2)
    np.testing.assert_allclose(pearson_from_sums(*sums.sum(0).numpy()), expected, atol=1e-9)
