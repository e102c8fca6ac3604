import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csc_array, csr_array

from sae_lib.compare import (
    decoder_map,
    families,
    live_units,
    logit_correlation,
    masked_cosine,
    pair_correlations,
    select_tokens,
    splits,
    table_correlations,
    universality,
)
from sae_lib.errors import StudyError


def table(dense) -> csc_array:
    return csc_array(np.asarray(dense, dtype=np.float32))


def planted(n_tokens=400, n_units=6, density=0.2, seed=0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.random((n_tokens, n_units)) * (rng.random((n_tokens, n_units)) < density)).astype(np.float32)


# --- tables ----------------------------------------------------------------------------------------------------------

def test_live_units_are_those_that_fire_often_enough():
    dense = np.zeros((20, 3))
    dense[:10, 1], dense[:9, 2] = 1, 5
    assert live_units(table(dense)).tolist() == [False, True, False]
    assert live_units(table(dense), 9).tolist() == [False, True, True]


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
    for compare in (table_correlations, masked_cosine):
        with pytest.raises(StudyError, match="10 and 11 tokens"):
            compare(a, b)


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


# --- splitting -------------------------------------------------------------------------------------------------------

def test_masked_cosine_by_hand():
    a = [[1], [2], [0], [2]]
    b = [[0, 3, 0], [1, 0, 0], [5, 4, 0], [2, 0, 2]]
    # Unit 0 of b: dot 1*2 + 2*2 = 6. Where a fires, b has norm sqrt(5) and a 3; where b fires, a has sqrt(8) and b sqrt(30).
    # Unit 1: dot 3; norms 3 and 3; 1 and 5. Unit 2: dot 4; 3 and 2; 2 and 2.
    found = masked_cosine(table(a), table(b), threshold=0.0, min_fired=1).toarray()
    np.testing.assert_allclose(found, [[6 / (3 * np.sqrt(5)), 3 / 5, 1]])
    assert masked_cosine(table(a), table(b), threshold=0.7, min_fired=1).nnz == 2
    assert masked_cosine(table(a), table(b), threshold=0.0, min_fired=2).toarray()[0, 2] == 0
    assert masked_cosine(table(a), table(b), threshold=0.0, min_fired=4).nnz == 0


def test_masked_cosine_of_dense_loops_is_the_same_and_symmetric():
    a, b = planted(seed=11), planted(n_units=5, seed=12)
    expected = np.zeros((6, 5))
    for i, x in enumerate(a.T):
        for j, y in enumerate(b.T):
            expected[i, j] = max(x[on] @ y[on] / np.linalg.norm(x[on]) / np.linalg.norm(y[on]) for on in (x > 0, y > 0))
    found = masked_cosine(table(a), table(b), chunk=4)
    np.testing.assert_allclose(found.toarray(), np.where(expected > 0.4, expected, 0), rtol=1e-6)
    np.testing.assert_allclose(masked_cosine(table(b), table(a)).toarray().T, found.toarray())


def test_a_planted_split_is_found_with_its_family():
    rng = np.random.default_rng(13)
    kind = rng.integers(0, 8, 600)
    narrow = np.stack([np.isin(kind, [0, 1, 2]), kind == 3, kind == 7], 1)
    middle = np.stack([kind == 3, np.isin(kind, [0, 1]), kind == 2, kind == 6], 1)
    wide = np.stack([kind == 0, kind == 1, kind == 3, kind == 2], 1)
    links = [masked_cosine(table(narrow), table(middle)), masked_cosine(table(middle), table(wide))]
    grown = splits(links, 0)
    assert list(zip(grown.dictionary, grown.parent, grown.unit, strict=True)) == [
        (1, 0, 1), (1, 0, 2), (2, 1, 0), (2, 1, 1), (2, 2, 3)]
    np.testing.assert_allclose(grown.cosine, 1)
    assert splits(links, 2).empty
    pd.testing.assert_frame_equal(families(links), pd.DataFrame(
        [(0, 0, 0), (0, 1, 1), (0, 1, 2), (0, 2, 0), (0, 2, 1), (0, 2, 3), (1, 0, 1), (1, 1, 0), (1, 2, 2)],
        columns=["family", "dictionary", "unit"]), check_dtype=False)


def test_splits_that_merge_keep_all_their_parents_the_strongest_link_first():
    links = [csr_array([[0.5, 0.9]]), csr_array([[0.6], [0.8]])]
    grown = splits(links, 0)
    assert grown.values.tolist() == [[1, 0, 1, 0.9], [1, 0, 0, 0.5], [2, 0, 0, 0.6], [2, 1, 0, 0.8]]


def test_a_map_finds_planted_clusters_says_the_same_twice_and_does_not_warn():
    rng = torch.Generator().manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(2, 30, generator=rng), dim=1)
    decoders = [centres.repeat_interleave(15, 0) + 0.03 * torch.randn(30, 30, generator=rng) for _ in range(2)]
    keep = [np.ones(30, dtype=bool), np.arange(30) % 2 == 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for category in (DeprecationWarning, ImportWarning):  # Python hides these by itself
            warnings.filterwarnings("ignore", category=category)
        found, again = (decoder_map(decoders, 1, keep) for _ in range(2))
    pd.testing.assert_frame_equal(found, again)
    assert found.dictionary.tolist() == [0] * 30 + [1] * 15
    assert found.unit.tolist() == [*range(30), *range(0, 30, 2)]
    group = found.unit >= 15
    assert not set(found.cluster[group]) & set(found.cluster[~group]) - {-1}
    assert (found.cluster >= 0).mean() > 0.8
    gap = np.linalg.norm(found[["x", "y"]][group].mean() - found[["x", "y"]][~group].mean())
    assert gap > 3 * found[["x", "y"]][group].std().max()
    with pytest.raises(StudyError, match="more than 10"):
        decoder_map([torch.randn(10, 4)])
