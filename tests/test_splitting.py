import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse import csr_array
from texts import planted, table

from sae_lib.errors import StudyError
from sae_lib.splitting import (
    count_of_context,
    decoder_map,
    families,
    links_by_luck,
    live_by_text,
    masked_cosine,
    mixed_clusters,
    nearest_cosine,
    splits,
    strong,
    tokens_inside,
    units_of_context,
)

# --- alive -----------------------------------------------------------------------------------------------------------

def test_live_units_are_counted_in_whole_documents_up_to_each_share():
    documents = np.repeat([7, 3, 5, 9], 10)
    dense = np.zeros((40, 3))
    dense[::10, 0] = 1  # once in every document
    dense[:, 1] = 1  # ten times in every document
    found = live_by_text(table(dense), documents, (0.01, 0.25, 0.5, 0.99, 1.0), seed=3, min_fired=4)
    assert found.tokens.tolist() == [10, 10, 20, 30, 40]  # never less than the first document
    assert found.live.tolist() == [1, 1, 1, 1, 2]
    assert live_by_text(table(dense), documents, (0.5,), min_fired=2).live.tolist() == [2]


@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_nearest_cosine_is_with_another_row(chunk):
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [-1.0, 0.0]])
    np.testing.assert_allclose(nearest_cosine(rows, chunk), [0.6, 0.8, 0.8, 0.0], atol=1e-6)


# --- features of a context -------------------------------------------------------------------------------------------

def test_units_of_a_context_by_hand():
    is_context = np.arange(100) < 30
    dense = np.zeros((100, 5))
    dense[:25, 0] = 1  # all of its 25 tokens inside
    dense[10:50, 1] = 2  # 20 of 40: just half
    dense[10:51, 2] = 2  # 20 of 41
    dense[:19, 3] = 9  # one too few
    assert tokens_inside(table(dense), is_context).tolist() == [25, 20, 20, 19, 0]
    assert units_of_context(table(dense), is_context).tolist() == [0, 1]
    assert units_of_context(table(dense), is_context, share=0.9, min_inside=10).tolist() == [0, 3]


def test_strong_activations_are_above_a_share_of_their_units_maximum():
    dense = np.array([[4, 0, 1], [2, 0, 1], [3, 0, 0], [0, 0, 1]])
    np.testing.assert_array_equal(strong(table(dense)).toarray(), [[4, 0, 1], [0, 0, 1], [3, 0, 0], [0, 0, 1]])
    np.testing.assert_array_equal(strong(table(dense), 0.75).toarray(), [[4, 0, 1], [0, 0, 1], [0, 0, 0], [0, 0, 1]])
    assert strong(table(dense), 0.2).nnz == table(dense).nnz
    is_context = np.array([True, False, False, True])
    assert units_of_context(table(dense), is_context, min_inside=1).tolist() == [2]
    assert units_of_context(strong(table(dense)), is_context, min_inside=1).tolist() == [0, 2]


def test_units_are_counted_on_other_text_with_an_interval_over_documents():
    documents, is_context = np.repeat(np.arange(10), 10), np.arange(100) % 10 < 5
    dense = np.zeros((100, 4))
    dense[is_context, 0] = 1  # in every document alike: certain
    dense[~is_context, 1] = 1
    dense[:5, 2], dense[15:20, 2] = 1, 1  # inside in document 0, as often outside in document 1: half, but which are drawn?
    count = lambda units, **rule: count_of_context(table(dense), np.array(units, dtype=int), is_context, documents, **rule)
    found, counted = count([0, 1, 2, 3], n_boot=200)
    assert found == (2.0, 1.0, 2.0)
    assert counted.tolist() == [True, False, True, False]
    assert count([0], n_boot=50)[0] == (1.0, 1.0, 1.0)
    assert count([0, 1], share=0.0, n_boot=50)[0] == (2.0, 2.0, 2.0)
    assert count([])[0] == (0.0, 0.0, 0.0) and not len(count([])[1])


# --- links -----------------------------------------------------------------------------------------------------------

def test_what_fires_together_does_not_on_other_text():
    dense = np.zeros((80, 3))
    for unit in range(3):
        dense[10 * unit:10 * unit + 10, unit] = 1
    dense[70:, 2] = 1
    dense[30:40, 2] = 1  # half of the text away from the end: this one meets itself
    a = table(dense)
    assert masked_cosine(a, a).nnz == 3
    np.testing.assert_allclose(links_by_luck(a, a, n_ctx=10).toarray(), np.diag([0, 0, (2 / 3) ** 0.5]))
    assert links_by_luck(a, a, n_ctx=10, min_fired=11).nnz == 1
    assert links_by_luck(a, a, n_ctx=10, min_fired=31).nnz == 0


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


def test_tables_of_different_texts_are_not_linked():
    with pytest.raises(StudyError, match="10 and 11 tokens"):
        masked_cosine(table(planted(10)), table(planted(11)))


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


def test_mixed_clusters_are_counted_and_compared_with_dealing():
    found = pd.DataFrame({"cluster": [0, 0, 1, 1, 2, 2, -1, -1], "dictionary": [0, 1, 0, 0, 1, 1, 0, 1]})
    mixed = mixed_clusters(found, n_draws=2000)
    # Of 3 pairs among 6 places with 3 of a kind each: a pair is mixed with probability 3/5.
    assert (mixed.clusters, mixed.mixed) == (3, 1)
    assert mixed.by_luck == pytest.approx(3 * 3 / 5, abs=0.06)
    assert mixed_clusters(found[found.cluster < 0])[:2] == (0, 0)
