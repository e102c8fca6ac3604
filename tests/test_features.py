import numpy as np
import pytest
import torch
from scipy.sparse import csc_array

from sae_lib import features
from sae_lib.errors import StudyError
from sae_lib.features import (
    activation_table,
    best_unit,
    column,
    densities,
    intervals,
    is_single_token,
    maxima,
    pearson_difference,
    pearson_interval,
    pearson_sums,
    pearson_with,
    sensitivity,
    share_sums,
    single_token_share,
    specificity,
    specificity_by_level,
    top_in_context,
)
from sae_lib.metrics import pearson_from_sums, share_interval
from sae_lib.transformer import TransformerConfig, build, mlp_activations, parameters


def test_document_sums_add_up_to_the_pearson_of_all_tokens():
    x, y, document = torch.rand(200, 2), torch.rand(200, 2) > 0.7, torch.randint(0, 9, (200,)) * 10
    sums = pearson_sums(x, y, document)
    expected = [np.corrcoef(x[:, i], y[:, i])[0, 1] for i in range(2)]
    assert sums.shape == (len(document.unique()), 6, 2)
    np.testing.assert_allclose(pearson_from_sums(*sums.sum(0).numpy()), expected, atol=1e-9)


# --- the unit table --------------------------------------------------------------------------------------------------

N_CTX = 16


@pytest.fixture
def model():
    model = build(TransformerConfig(n_tokens=1, d_vocab=50, n_ctx=N_CTX, d_model=16, n_heads=2, d_mlp=24))
    with torch.no_grad():
        for value in parameters(model).values():
            value.add_(0.3 * torch.randn_like(value))
    return model.requires_grad_(False)


def table_of(columns):
    """A unit table from the activations of each unit, token by token."""
    return csc_array(np.array(columns, np.float32).T)


@pytest.mark.parametrize("encoded_rows", [1024, 100])
def test_the_table_holds_what_every_unit_does_on_every_token_but_end_of_text(model, monkeypatch, encoded_rows):
    monkeypatch.setattr(features, "ENCODED_ROWS", encoded_rows)
    contexts, directions = torch.randint(1, 50, (70, N_CTX)), torch.randn(24, 9)
    contexts[:, 5] = contexts[33] = 0
    encode = lambda acts: torch.relu(acts @ directions - 0.2)
    table = activation_table(model, contexts, encode)
    expected = encode(mlp_activations(model, contexts).flatten(0, 1))
    expected[contexts.flatten() == 0] = 0
    assert 0 < table.nnz == (expected > 0).sum() < expected.numel()
    np.testing.assert_allclose(table.toarray(), expected.numpy(), atol=1e-5)
    assert (table.dtype, table.indices.dtype, table.indptr.dtype) == (np.float32, np.int32, np.int32)
    for unit in range(9):
        tokens, values = column(table, unit)
        assert (np.diff(tokens) > 0).all()
        np.testing.assert_array_equal(values, table.toarray()[tokens, unit])


def test_a_table_of_nothing_is_refused(model):
    with pytest.raises(StudyError, match="no tokens"):
        activation_table(model, torch.zeros(3, N_CTX, dtype=torch.long), torch.relu)


def test_densities_maxima_and_columns_by_hand():
    table = table_of([[0, 2, 0, 3], [0, 0, 0, 0], [1, 1, 1, 7]])
    assert densities(table).tolist() == [0.5, 0, 1]
    assert maxima(table).tolist() == [3, 0, 7]
    assert [values.tolist() for values in column(table, 0)] == [[1, 3], [2, 3]]
    assert [values.tolist() for values in column(table, 1)] == [[], []]


# --- the unit for a context ------------------------------------------------------------------------------------------

def test_correlations_with_a_target_equal_numpy():
    rng = np.random.default_rng(0)
    acts = np.maximum(rng.normal(size=(6, 500)) - 0.8, 0).astype(np.float32)
    acts[4] = 0
    table = table_of(acts)
    for target in (rng.normal(size=500).astype(np.float32), rng.random(500) < 0.1):
        expected = [np.corrcoef(a, target)[0, 1] if a.any() else 0 for a in acts]
        np.testing.assert_allclose(pearson_with(table, target), expected, atol=1e-7)
    assert (pearson_with(table, np.ones(500, bool)) == 0).all()


def test_the_search_finds_the_best_of_the_units_that_are_active_often_enough():
    target = np.array([0, 0, 0, 0, 1, 1, 1, 5], np.float32)
    table = table_of([[0, 0, 0, 0, 0, 0, 0, 9], [0, 0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0, 0]])
    assert best_unit(table, target).unit == 0
    found = best_unit(table, target, at_least=2)
    assert found == (1, pytest.approx(np.corrcoef([0, 0, 0, 0, 1, 1, 1, 1], target)[0, 1]))
    with pytest.raises(StudyError, match="active on 5"):
        best_unit(table, target, at_least=5)


def test_the_interval_of_a_correlation_is_about_the_correlation_of_all_tokens():
    rng = np.random.default_rng(1)
    target = rng.random(600).astype(np.float32)
    acts = np.maximum(target + rng.normal(size=600) - 0.5, 0)
    interval = pearson_interval(table_of([np.zeros(600), acts]), 1, target, np.arange(600) // 20, n_boot=200)
    assert interval.value == pytest.approx(np.corrcoef(acts, target)[0, 1], abs=1e-6)
    assert interval.low < interval.value < interval.high


def test_a_unit_is_no_better_than_itself():
    rng = np.random.default_rng(2)
    acts, target = np.maximum(rng.normal(size=200), 0), rng.random(200) < 0.3
    assert pearson_difference(table_of([acts, acts]), 0, 1, target, np.arange(200) // 10, n_boot=50) == (0, 0, 0)


def test_the_paired_difference_by_hand():
    # Two documents, the same four tokens in each: the target, the target, and a unit that has one of its two tokens.
    target = np.tile([True, True, False, False], 2)
    table = table_of([target, np.tile([1, 0, 0, 0], 2)])
    expected = 1 - 1 / np.sqrt(3)  # of the second: (4 * 1 - 2 * 1) / sqrt((4 * 2 - 4) * (4 * 1 - 1))
    found = pearson_difference(table, 0, 1, target, np.arange(8) // 4, n_boot=20)
    assert found == pytest.approx((expected, expected, expected))
    assert pearson_difference(table, 1, 0, target, np.arange(8) // 4, n_boot=20).value == pytest.approx(-expected)


def test_documents_are_drawn_for_both_units_at_once():
    """What makes one document hard makes it hard for both, so the difference is known better than either correlation."""
    rng = np.random.default_rng(3)
    documents, target = np.arange(2000) // 20, rng.random(2000) < 0.3
    noise = rng.normal(size=2000) * rng.choice([0.1, 3], 100)[documents]
    table = table_of([np.maximum(target + noise, 0), np.maximum(target + noise + 0.5 * rng.normal(size=2000), 0)])
    one, other = (pearson_interval(table, unit, target, documents, n_boot=300) for unit in (0, 1))
    difference = pearson_difference(table, 0, 1, target, documents, n_boot=300)
    assert difference.value == pytest.approx(one.value - other.value)
    assert one.low < other.high  # the two intervals overlap,
    assert 0 < difference.low < difference.value < difference.high < (one.high - one.low) / 2  # yet the first is better


def test_a_correlation_with_what_does_not_vary_is_zero():
    documents, active = np.arange(40) // 4, np.arange(40.0) % 3
    table = table_of([np.zeros(40), active])
    assert pearson_interval(table, 0, active.astype(np.float32), documents, n_boot=20) == (0, 0, 0)
    assert pearson_interval(table, 1, np.zeros(40, bool), documents, n_boot=20) == (0, 0, 0)


# --- specificity, sensitivity ----------------------------------------------------------------------------------------

def test_specificity_by_level_by_hand():
    values = np.array([1, 2, 2, 7, 8], np.float32)
    levels = specificity_by_level(values, np.array([False, True, False, True, True]), n_bins=4)
    assert levels.edges.tolist() == [0, 2, 4, 6, 8]
    assert levels.count.tolist() == [1, 2, 0, 2]
    assert levels.in_context.tolist() == [0, 1, 0, 2]
    assert levels.weight.tolist() == [1, 4, 0, 15]
    assert levels.weight_in_context.tolist() == [0, 2, 0, 15]
    np.testing.assert_array_equal(levels.share, [0, 0.5, np.nan, 1])
    with pytest.raises(StudyError, match="never active"):
        specificity_by_level(values[:0], np.zeros(0, bool))


def test_specificity_and_sensitivity_by_hand():
    table = table_of([[0, 0, 0, 0, 0, 0], [1, 0, 3, 4, 0, 0]])
    is_context = np.array([False, False, True, True, True, True])
    documents, draws = np.array([0, 0, 5, 5, 7, 7]), {"n_boot": 50}
    assert specificity(table, 1, is_context, documents, **draws).value == pytest.approx(2 / 3)
    assert specificity(table, 1, is_context, documents, weighted=True, **draws).value == pytest.approx(7 / 8)
    assert sensitivity(table, 1, is_context, documents, **draws).value == pytest.approx(2 / 4)
    weights = np.array([100, 100, 1, 2, 3, 6], np.float32)
    assert sensitivity(table, 1, is_context, documents, weights, **draws).value == pytest.approx(3 / 12)
    assert sensitivity(table, 0, is_context, documents, **draws) == (0, 0, 0)


def test_sums_of_a_share_are_per_document():
    inside, weights, documents = np.array([True, False, True]), np.array([1, 2, 4], np.float32), np.array([3, 3, 9])
    assert share_sums(inside, weights, documents).tolist() == [[1, 3], [4, 4]]
    assert share_sums(inside, None, documents).tolist() == [[1, 2], [1, 1]]


# --- examples --------------------------------------------------------------------------------------------------------

def test_intervals_of_few_activations_by_hand():
    values = np.random.default_rng(0).permutation(np.arange(1, 101)).astype(np.float32)
    found = intervals(values, seed=0, unit=3)
    assert found.maximum == 100
    assert list(found.examples) == ["Top Activations", *(f"Subsample Interval {k}" for k in range(11)), "Bottom Activations"]
    at = {name: values[examples].tolist() for name, examples in found.examples.items()}
    assert at["Top Activations"] == list(range(100, 80, -1))
    assert at["Bottom Activations"] == list(range(1, 21))
    assert at["Subsample Interval 0"] == [100, 99, 98, 97, 96]
    assert at["Subsample Interval 3"][0] == 70 and sorted(at["Subsample Interval 3"]) == [68, 69, 70, 71, 72]
    assert at["Subsample Interval 10"] == [1, 2, 3, 4, 5]


def test_a_unit_with_few_activations_reuses_its_examples():
    found = intervals(np.array([1.0, 3.0], np.float32), seed=0, unit=0)
    assert {name: sorted(examples.tolist()) for name, examples in found.examples.items()} == dict.fromkeys(found.examples, [0, 1])
    with pytest.raises(StudyError, match="Unit 7 is never active"):
        intervals(np.zeros(0, np.float32), seed=0, unit=7)


def test_the_ends_are_those_of_a_sorted_whole_where_many_are_equal():
    for n in (1, 19, 20, 21, 500):
        values = np.random.default_rng(n).integers(1, 6, n).astype(np.float32)
        order, found = np.argsort(values, kind="stable"), intervals(values, seed=0, unit=0).examples
        assert found["Top Activations"].tolist() == order[::-1][:20].tolist()
        assert found["Bottom Activations"].tolist() == order[:20].tolist()


def test_levels_are_of_a_subsample_of_1000_while_the_top_is_of_all():
    values = np.append(np.linspace(0.001, 1, 9999), 50).astype(np.float32)
    draws = [intervals(values, seed=0, unit=unit) for unit in range(20)]
    assert all(values[draw.examples["Top Activations"][0]] == 50 for draw in draws)
    missed = [draw for draw in draws if draw.maximum < 50]
    assert len(missed) >= 10  # a subsample has the outlier with probability 0.1
    for draw in missed:
        assert 0.99 < draw.maximum <= 1
        for k in range(11):  # neighbours in the subsample are 0.001 apart on average
            np.testing.assert_allclose(values[draw.examples[f"Subsample Interval {k}"]], draw.maximum * (10 - k) / 10, atol=0.02)
    assert len({draw.maximum for draw in missed}) > 1


def test_intervals_depend_on_seed_and_unit_only():
    values = np.random.default_rng(0).random(3000).astype(np.float32)
    chosen = lambda seed, unit: np.concatenate([*intervals(values, seed, unit).examples.values()]).tolist()
    assert chosen(0, 1) == chosen(0, 1)
    assert chosen(0, 1) != chosen(0, 2) and chosen(0, 1) != chosen(1, 1)


def test_single_token_units_by_hand():
    rows = 25
    tokens = np.where(np.arange(rows) < 20, 4, np.arange(rows))
    pure = np.where(np.arange(rows) < 20, 2 + np.arange(rows), 1)  # its five weakest activations are on other tokens
    mixed = np.where(np.arange(rows) == 24, 99, pure)
    few = np.where(np.arange(rows) < 3, 1, 0)
    table = table_of([pure, mixed, few, np.zeros(rows)])
    assert is_single_token(table, tokens).tolist() == [True, False, True, False]
    assert single_token_share(table, tokens) == share_interval(1, 2)
    with pytest.raises(StudyError, match="active on 20"):
        single_token_share(table_of([few]), tokens)


def test_the_top_in_the_context_by_hand():
    rising = np.arange(1, 31)  # the 20 greatest are those of the last 20 tokens
    table = table_of([rising, rising[::-1], np.zeros(30), np.where(rising > 27, 1, 0)])
    assert top_in_context(table, rising > 25).tolist() == [5, 0, 0, 3]
    assert top_in_context(table, rising > 0).tolist() == [20, 20, 0, 3]
