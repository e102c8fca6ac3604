import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import planted, table

from sae_lib.compare import (
    live_units,
    logit_correlation,
    pair_correlations,
    select_tokens,
    table_correlations,
    universality,
)
from sae_lib.errors import StudyError

# --- tables ----------------------------------------------------------------------------------------------------------

def test_live_units_are_those_that_fire_often_enough():
    dense = np.zeros((20, 3))
    dense[:10, 1], dense[:9, 2] = 1, 5
    assert live_units(table(dense)).tolist() == [False, True, False]
    assert live_units(table(dense), 9).tolist() == [False, True, True]


@settings(deadline=None)  # the first call may compile
@given(st.integers(0, 1000))
def test_selected_tokens_are_the_rows_of_the_dense_table(seed):
    dense, keep = planted(30, 4, seed=seed), np.random.default_rng(seed).random(30) < 0.5
    np.testing.assert_array_equal(select_tokens(table(dense), keep).toarray(), dense[keep])


# --- correlations ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("chunk", [256, 4, 1])
def test_best_matches_equal_numpy(chunk):
    a, b = planted(seed=1), planted(n_units=5, seed=2)
    expected = np.corrcoef(a.T, b.T)[:6, 6:]
    match = table_correlations(table(a), table(b), chunk)
    np.testing.assert_array_equal(match.unit, expected.argmax(1))
    np.testing.assert_allclose(match.correlation, expected.max(1), atol=1e-9)


@pytest.mark.parametrize("threshold", [0, 1])
def test_dense_products_change_nothing(monkeypatch, threshold):
    """Blocks of 8,192 tokens: two here, the second not full."""
    a, b = planted(9000, 3, 0.4, 1), planted(9000, 4, 0.4, 2)
    expected = np.corrcoef(a.T, b.T)[:3, 3:]
    monkeypatch.setattr("sae_lib.compare.DENSE", threshold)
    match = table_correlations(table(a), table(b))
    np.testing.assert_array_equal(match.unit, expected.argmax(1))
    np.testing.assert_allclose(match.correlation, expected.max(1), atol=1e-9)


def test_correlations_of_large_activations_on_few_tokens_stay_exact():
    a = np.full((4, 1), 4096.0)
    a[3] = 4097
    match = table_correlations(table(a), table(a))
    assert match.unit == 0
    assert match.correlation == pytest.approx(1, abs=1e-6)


def test_a_planted_permutation_is_found():
    a, order = planted(n_units=50), np.random.default_rng(3).permutation(50)
    match = table_correlations(table(a), table(3 * a[:, order]))
    np.testing.assert_array_equal(order[match.unit], np.arange(50))
    np.testing.assert_allclose(match.correlation, 1)


def test_a_unit_that_never_fires_has_no_match_and_is_none():
    a, b = planted(n_units=3), planted(n_units=3, seed=1)
    a[:, 1], b[:, 0] = 0, 0
    match = table_correlations(table(a), table(b))
    assert match.unit[1] == -1
    assert np.isnan(match.correlation[1])
    assert (match.unit[[0, 2]] > 0).all()


def test_pairs_by_numpy_and_the_silent_ones():
    a, b = planted(n_units=3, seed=4), planted(n_units=3, seed=5)
    a[:, 2], b[:, 2] = 0, 0
    found = pair_correlations(table(a), table(b), np.array([[0, 1], [1, 1], [0, 2], [2, 0]]))
    np.testing.assert_allclose(found[:2], [np.corrcoef(a[:, i], b[:, 1])[0, 1] for i in (0, 1)], atol=1e-9)
    assert found[2] == 0
    assert np.isnan(found[3])


def test_tables_of_different_texts_are_refused():
    a, b = table(planted(10)), table(planted(11))
    with pytest.raises(StudyError, match="10 and 11 tokens"):
        table_correlations(a, b)


# --- universality ----------------------------------------------------------------------------------------------------

DOCUMENT = np.arange(4000) // 10


def test_noise_matches_well_where_it_was_chosen_and_not_where_it_is_measured():
    a, b = planted(4000, 40, 0.02, 6), planted(4000, 400, 0.02, 7)
    found = universality(table(a), table(b), DOCUMENT, n_boot=50)
    assert found.units.chosen.median() > 0.05
    assert found.median.value == found.units.correlation.median()
    assert abs(found.median.value) < 0.03


def test_a_planted_correspondence_of_known_correlation_lies_in_its_interval():
    rng = np.random.default_rng(8)
    a = (rng.random((4000, 30)) < 0.1).astype(np.float32)
    # b keeps each firing with probability 1/2 and adds none: correlation sqrt(q (1 - p) / (1 - q p)), q = 1/2, p = 0.1.
    b, order = a * (rng.random(a.shape) < 0.5), rng.permutation(30)
    found = universality(table(a), table(b[:, order]), DOCUMENT, n_boot=200)
    expected = np.sqrt(0.5 * 0.9 / 0.95)
    assert (order[found.units.match] == found.units.unit).all()
    assert found.median.low - 0.01 < expected < found.median.high + 0.01
    assert abs(found.lean) < 0.01  # every unit fires in nearly every document
    assert found.median.low < found.median.value < found.median.high


def test_units_of_few_documents_lean_low_and_the_interval_holds_the_value():
    """A few documents carry each pair's correlation; elsewhere the two fire weakly and apart. A half may miss them."""
    rng = np.random.default_rng(11)
    a = 5 * (rng.random((4000, 60)) < 0.5) * (rng.random((400, 60)) < 0.015)[DOCUMENT]
    a, b = (a + planted(4000, 60, 0.2, seed) for seed in (12, 13))
    found = universality(table(a), table(b), DOCUMENT, n_boot=200)
    assert found.lean < -0.005
    assert found.median.low < found.median.value < found.median.high


def test_measured_correlations_are_of_the_other_half_alone():
    a, b = planted(4000, 3, seed=9), planted(4000, 3, seed=10)
    b[:, 0] += a[:, 0]
    row = universality(table(a), table(b), DOCUMENT, n_boot=10).units.set_index("unit").loc[0]
    # Documents that a change does not reach are in the other half: find the halves by changing documents one at a time.
    chosen = [d for d in range(0, 400, 40)
              if universality(table(np.where((d == DOCUMENT)[:, None], 0, a)), table(b), DOCUMENT,
                              n_boot=10).units.set_index("unit").loc[0].correlation == row.correlation]
    assert 0 < len(chosen) < 10
    assert row.match == 0


def test_rare_units_are_left_out_and_a_match_that_falls_silent_counts_as_zero():
    a, b = np.zeros((40, 2)), np.zeros((40, 1))
    document = np.arange(40) // 10
    a[:, 0] = np.tile([1, 0], 20)
    a[::10, 1] = 1  # once a document
    # b fires in one document. Either that one is measured and nothing was there to be chosen, or the match falls silent.
    values = []
    for silent in range(4):
        b[:] = 0
        b[document == silent, 0] = a[document == silent, 0]
        try:
            found = universality(table(a), table(b), document, n_boot=5)
        except StudyError as error:
            values.append(str(error))
        else:
            assert found.units.unit.tolist() == [0]
            values.append(found.units.correlation[0])
    assert values.count(0.0) == 2
    assert sum("more held-out text" in str(value) for value in values) == 2


def test_too_few_documents_are_refused():
    with pytest.raises(StudyError, match="four documents"):
        universality(table(planted(30)), table(planted(30)), np.arange(30) // 10)


def test_logit_correlation_by_numpy():
    a, b = torch.randn(6, 40), torch.randn(5, 40) + 1000
    a[2] = 7
    pairs = np.array([[0, 1], [5, 4], [2, 0]])
    found = logit_correlation(a, b, pairs, chunk=2)
    np.testing.assert_allclose(found[:2], [np.corrcoef(a[i], b[j])[0, 1] for i, j in pairs[:2]], atol=1e-6)
    assert np.isnan(found[2])
    b[:, 3] = torch.nan
    used = np.arange(40) != 3
    assert logit_correlation(a, b, pairs[:1])[0] == pytest.approx(np.corrcoef(a[0][used], b[1][used])[0, 1], abs=1e-6)
