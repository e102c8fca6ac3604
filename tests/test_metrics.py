"""Metrics against cases whose answers are known in closed form (the table of cases in field_notes section 4, and more)."""

import math
import warnings

import numpy as np
import pytest
import torch

from sae_lib.errors import StudyError
from sae_lib.metrics import (
    ReconstructionMetrics,
    bootstrap_interval,
    density_summary,
    feature_density,
    half_sample_interval,
    loss_recovered,
    mean_interval,
    mmcs,
    pearson_from_sums,
    share_interval,
)

N, D = 20_000, 64


def measure(x, x_hat, batch=N):
    metrics = ReconstructionMetrics(x.mean(0), d_sae=1)
    for rows, rows_hat in zip(x.split(batch), x_hat.split(batch), strict=True):
        metrics.update(rows, rows_hat, torch.zeros(len(rows), 1))
    return metrics.result()


def noisy():
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(N, D, generator=torch.Generator().manual_seed(2))
    return x, x + 0.2 ** 0.5 * noise


def spiky():
    # 1 % of rows at 100 times the norm are rebuilt exactly, everything else becomes zero.
    x, _ = noisy()
    x /= x.norm(dim=1, keepdim=True)
    x[: N // 100] *= 100
    x_hat = torch.zeros_like(x)
    x_hat[: N // 100] = x[: N // 100]
    return x, x_hat


def cases():
    x, x_hat = noisy()
    offset = x + 3
    return {"20 % noise": (x, x_hat, 0.8, 0.2), "scaled by 3": (3 * x, 3 * x_hat, 0.8, 0.2),
            "scaled by 10": (10 * x, 10 * x_hat, 0.8, 0.2),
            "only the mean": (offset, offset.mean(0).expand_as(x), 0.0, 1.0),
            "shifted by half": (x, x + 0.5, 0.75, 0.25)}


@pytest.mark.parametrize("case", cases())
def test_explained_variance_of_a_known_case(case):
    x, x_hat, explained, fvu = cases()[case]
    result = measure(x, x_hat)
    assert result.explained_variance == pytest.approx(explained, abs=2e-3)
    assert result.median_fvu == pytest.approx(fvu, abs=6e-3)


def test_huge_rows_carry_explained_variance_but_not_its_median_companion():
    result = measure(*spiky())
    # Energy of the huge rows 0.01 * 100^2 = 100 a row, of all others 0.99.
    assert result.explained_variance == pytest.approx(100 / 100.99, abs=1e-3)
    assert result.explained_variance == pytest.approx(0.99, abs=1e-3)
    assert result.median_fvu == pytest.approx(1.0, abs=0.1)


def test_scale_leaves_explained_variance_and_multiplies_mse():
    x, x_hat = noisy()
    one, ten = measure(x, x_hat), measure(10 * x, 10 * x_hat)
    assert ten.explained_variance == pytest.approx(one.explained_variance, rel=1e-6)
    assert ten.mse == pytest.approx(100 * one.mse, rel=1e-5)
    assert one.mse == pytest.approx(0.2 * D, rel=0.01)


@pytest.mark.parametrize("batch", [1, 7, 300])
def test_batch_size_does_not_matter(batch):
    x, x_hat = noisy()
    x, x_hat = x[:300] + 5, x_hat[:300] + 5
    whole, split = measure(x, x_hat), measure(x, x_hat, batch)
    for name in ("mse", "explained_variance", "median_fvu"):
        assert getattr(split, name) == pytest.approx(getattr(whole, name), rel=1e-10)


def test_explained_variance_uses_the_exact_mean_of_the_rows():
    x, x_hat = noisy()
    metrics = ReconstructionMetrics(torch.full((D,), 2.0), d_sae=1)
    metrics.update(x, x_hat, torch.zeros(N, 1))
    assert metrics.result().explained_variance == pytest.approx(measure(x, x_hat).explained_variance, rel=1e-8)


def test_l0_l1_and_fired_count_features_above_zero():
    features = torch.tensor([[0.0, 2.0, 1.0], [0.0, 0.5, 0.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    metrics = ReconstructionMetrics(torch.zeros(2), d_sae=3)
    metrics.update(torch.ones(4, 2), torch.zeros(4, 2), features)
    result = metrics.result()
    assert (result.l0, result.l1, result.n) == (1.0, 1.125, 4)
    assert result.fired.tolist() == [0, 3, 1]


def test_no_rows_are_refused():
    with pytest.raises(StudyError, match="no activations"):
        ReconstructionMetrics(torch.zeros(2), d_sae=3).result()


def test_loss_recovered_is_the_share_of_the_ablation_gap():
    clean, ablated = torch.tensor([2.0, 4.0]), torch.tensor([5.0, 7.0])
    assert loss_recovered(clean, clean, ablated) == 1
    assert loss_recovered(clean, ablated, ablated) == 0
    assert loss_recovered(clean, torch.tensor([3.0, 4.2]), ablated) == pytest.approx(1 - 0.6 / 3)
    with pytest.raises(StudyError, match="nothing to recover"):
        loss_recovered(ablated, ablated, clean)


def test_density_summary_separates_dead_ultralow_and_live():
    fired, n = torch.tensor([0, 1, 9, 10, 500]), 10_000_000
    assert feature_density(fired, n).tolist() == [0, 1e-7, 9e-7, 1e-6, 5e-5]
    summary = density_summary(fired, n)
    assert (summary.dead, summary.ultralow, summary.live) == (0.2, 0.4, 0.4)
    assert summary.floor == 1e-7 and summary.missed == pytest.approx(math.exp(-10))


def test_density_summary_says_what_few_tokens_cannot_show():
    summary = density_summary(torch.tensor([0, 1, 5]), 100_000)
    assert summary.ultralow == 0 and summary.floor > 1e-6
    assert summary.missed == pytest.approx(math.exp(-0.1))
    assert density_summary(torch.tensor([0, 1, 5]), 100_000, ultralow=2e-5).ultralow == pytest.approx(1 / 3)


def test_mmcs_is_one_for_a_permuted_scaled_dictionary_and_known_for_a_tilted_one():
    a = torch.eye(5)
    assert mmcs(a, 3 * a[torch.tensor([3, 1, 0, 4, 2])]) == pytest.approx(1)
    # Each row tilted by 60 degrees towards a direction of its own.
    a, tilted = torch.eye(5, 10), 0.5 * torch.eye(5, 10) + 0.75 ** 0.5 * torch.eye(10)[5:]
    assert mmcs(a, tilted, chunk=2) == pytest.approx(0.5)
    assert mmcs(torch.eye(4), torch.eye(4)[:1]) == pytest.approx(0.25)


def test_pearson_from_sums_equals_the_textbook():
    rng = np.random.default_rng(0)
    x, y = rng.normal(5, 2, 1000), rng.normal(-3, 1, 1000)
    y += 0.7 * x
    sums = [v.sum() for v in (x, y, x * x, y * y, x * y)]
    assert pearson_from_sums(1000, *sums) == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-10)
    constant = np.full(1000, 0.1)
    assert np.isnan(pearson_from_sums(1000, constant.sum(), sums[1], (constant ** 2).sum(), sums[3], (constant * y).sum()))


MEAN = lambda t: t[..., 0] / t[..., 1]


def documents_of(values) -> np.ndarray:
    return np.stack([values, np.ones(len(values))], axis=1)


def test_bootstrap_covers_the_truth_as_often_as_it_says():
    # 300 experiments of 60 documents; documents differ, so drawing tokens instead would give far too narrow intervals.
    rng, covered = np.random.default_rng(3), 0
    for i in range(300):
        tokens = rng.integers(5, 50, 60)
        hits = tokens * (0.3 + rng.uniform(-0.2, 0.2, 60))
        interval = bootstrap_interval(np.stack([hits, tokens], 1), MEAN, n_boot=400, seed=i)
        assert interval.low <= interval.value <= interval.high
        covered += interval.low <= 0.3 <= interval.high
    assert 0.88 <= covered / 300 <= 0.99


def test_what_no_draw_defines_has_no_interval_and_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nothing = bootstrap_interval(np.ones((3, 1)), lambda t: np.full(t.shape[:-1], np.nan), n_boot=5)
    assert all(math.isnan(end) for end in nothing)


def test_bootstrap_depends_on_its_seed_alone_and_needs_documents():
    sums = np.random.default_rng(0).uniform(size=(50, 2))
    assert bootstrap_interval(sums, MEAN, seed=1) == bootstrap_interval(sums, MEAN, seed=1)
    assert bootstrap_interval(sums, MEAN, seed=1) != bootstrap_interval(sums, MEAN, seed=2)
    with pytest.raises(StudyError, match="two independent samples"):
        bootstrap_interval(sums[:1], MEAN)


def test_the_mean_of_what_is_independent():
    values = np.random.default_rng(0).normal(3, 2, 400)
    found = mean_interval(values, seed=1)
    assert found == bootstrap_interval(documents_of(values), MEAN, seed=1) and found.value == pytest.approx(values.mean())
    # As wide as the normal approximation of the mean's error.
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    with pytest.raises(StudyError, match="two independent samples"):
        mean_interval(values[:1])


def test_share_interval_by_hand():
    # Wilson's interval for 10 of 100, as tabulated; and for none of 100, whose lower end is 0.
    assert share_interval(10, 100) == pytest.approx((0.1, 0.05523, 0.17437), abs=1e-4)
    assert share_interval(0, 100) == pytest.approx((0.0, 0.0, 0.03699), abs=1e-4)


# --- halves ----------------------------------------------------------------------------------------------------------

def test_halves_of_two_documents_by_hand():
    # The mean is 1, that of either half 0 or 2; half a sample left out, so that halves count as they are.
    interval, lean = half_sample_interval(documents_of([0.0, 2.0]), MEAN, n_boot=400)
    assert interval.value == 1
    assert (interval.low, interval.high) == pytest.approx((0, 2), abs=0.2)
    assert lean == pytest.approx((interval.low + interval.high) / -2 + 1)  # the halves' own mean is what they were centred by
    assert half_sample_interval(documents_of([3.0] * 9), MEAN, n_boot=20) == ((3, 3, 3), 0)
    with pytest.raises(StudyError, match="two independent samples"):
        half_sample_interval(documents_of([1.0]), MEAN)


@pytest.mark.parametrize("n", [40, 41])
def test_halves_of_a_mean_give_its_standard_error_and_of_its_square_the_bias(n):
    values = np.random.default_rng(0).normal(1, 2, n)
    variance = values.var(ddof=1) / n  # of the mean, from halves drawn without replacement exactly so
    interval, lean = half_sample_interval(documents_of(values), MEAN, n_boot=4000)
    assert (interval.high - interval.low) / (2 * 1.96 * math.sqrt(variance)) == pytest.approx(1, abs=0.06)
    assert abs(lean) < 0.1 * math.sqrt(variance)
    _, lean = half_sample_interval(documents_of(values), lambda t: MEAN(t) ** 2, n_boot=4000)
    assert lean == pytest.approx(variance, rel=0.2)  # E[mean^2] is greater than E[mean]^2 by the variance of the mean


def test_what_counts_documents_leans_and_the_interval_still_holds_the_value():
    """The share of 40 documents that are there: all in the whole, half in a half, 63 % in a draw with replacement."""
    there = lambda t: (t > 0).mean(axis=-1)
    assert half_sample_interval(np.eye(40), there, n_boot=50) == ((1, 1, 1), -0.5)
    assert bootstrap_interval(np.eye(40), there, n_boot=50).high < 0.8


def test_halves_cover_the_truth_as_often_as_they_say():
    covered, rng = 0, np.random.default_rng(2)
    for i in range(200):
        interval, _ = half_sample_interval(documents_of(rng.normal(size=60)), MEAN, n_boot=300, seed=i)
        covered += interval.low < 0 < interval.high
    assert 0.90 <= covered / 200 <= 0.98
