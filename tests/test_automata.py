import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from scipy.sparse import csc_array
from texts import make_text, one_hot_table

from sae_lib.automata import EdgeCriterion, continues, find_automata, find_edges, hand_overs, token_profiles
from sae_lib.errors import StudyError
from sae_lib.evaluate import Text

ANY = EdgeCriterion(weight=-100.0, share=0.0, lift=0.0, level=1.0, n_permutations=99, n_strata=1, min_fired=1, min_count=1)


def chain(transitions: np.ndarray, n_contexts: int, n_ctx: int, seed: int = 0) -> Text:
    """Contexts of a Markov chain, each started anywhere but at end-of-text."""
    rng = np.random.default_rng(seed)
    ends = transitions.cumsum(1)
    tokens = [rng.integers(1, len(transitions), n_contexts)]
    for _ in range(n_ctx - 1):
        tokens.append((rng.random(n_contexts)[:, None] > ends[tokens[-1]]).sum(1).clip(max=len(transitions) - 1))
    return make_text(np.stack(tokens, 1))


# --- hand-overs ------------------------------------------------------------------------------------------------------

def test_tokens_that_continue_stay_within_context_document_and_text():
    text = make_text([[1, 2, 3, 4], [5, 0, 6, 7]], [[0, 0, 1, 1], [1, 1, 2, 2]])
    assert continues(text).tolist() == [True, False, True, False, False, False, True, False]


def test_hand_overs_equal_a_count_token_by_token():
    rng = np.random.default_rng(0)
    text = make_text(rng.integers(0, 6, (12, 10)), np.repeat(rng.integers(0, 3, (12, 2)), 5, axis=1))
    dense = (rng.random((120, 5)) < 0.3).astype(np.float32)
    tokens, documents = text.contexts.flatten().tolist(), text.documents.flatten().tolist()
    steps = [t for t in range(119) if t % 10 < 9 and documents[t] == documents[t + 1] and tokens[t] and tokens[t + 1]]
    criterion = EdgeCriterion(share=0.25, lift=1.1, min_fired=30)
    rows = []
    for i in range(5):
        for j in range(5):
            times = sum(dense[t, i] and dense[t + 1, j] for t in steps)
            share = times / sum(dense[t, i] for t in steps)
            lift = share / np.mean([dense[t + 1, j] for t in steps])
            if share >= 0.25 and lift >= 1.1 and min(dense[:, [i, j]].sum(0)) >= 30:
                rows.append((i, j, int(times), share, lift))
    assert 0 < len(rows) < 25
    found = hand_overs(csc_array(dense), text, criterion)
    pd.testing.assert_frame_equal(found, pd.DataFrame(rows, columns=found.columns), check_dtype=False, rtol=1e-6)


def test_a_table_of_another_text_is_refused():
    with pytest.raises(StudyError, match="over 3 tokens and the text has 4"):
        hand_overs(csc_array(np.ones((3, 1), dtype=np.float32)), make_text([[1, 2, 3, 4]]), ANY)


# --- edges -----------------------------------------------------------------------------------------------------------

def test_profiles_and_weights_by_hand():
    text = make_text([[1, 2, 3, 1], [2, 3, 0, 3]])
    dense = np.zeros((8, 2), dtype=np.float32)
    dense[[0, 1, 3], 0] = [1, 3, 2]  # on tokens 1, 2, 1
    dense[[5, 6], 1] = [4, 9]  # on token 3 and on end-of-text, which does not count
    used = np.array([False, True, True, True])
    torch.testing.assert_close(token_profiles(csc_array(dense), text.contexts, used), torch.tensor([[0.5, 0.5, 0], [0, 0, 1]]))
    # Over tokens 1, 2, 3 the first unit's weights have mean 3 and variance 6; token 0 is left out.
    edges = find_edges(csc_array(dense), text, torch.tensor([[99.0, 0, 3, 6], [0, 0, 0, 1]]), ANY).set_index(["source", "target"])
    assert edges.weight[0, 0] == pytest.approx(0.5 * (0 - 3) / np.sqrt(6), abs=1e-6)
    assert list(edges.index) == [(0, 0)]


def planted_chain(d_vocab: int = 200):
    """1 -> 2 -> 3 -> 1, 4 -> 4, 5 -> 6; everything else at random."""
    transitions = np.full((d_vocab, d_vocab), 1 / (d_vocab - 1))
    transitions[:, 0] = 0
    for i, j in [(1, 2), (2, 3), (3, 1), (4, 4), (5, 6)]:
        transitions[i] *= 0.2
        transitions[i, j] += 0.8
    return transitions, chain(transitions, 400, 64)


def test_the_edges_of_a_planted_chain_are_found_and_no_others():
    transitions, text = planted_chain()
    weights = torch.from_numpy(np.log(transitions + 1e-4)).float()
    criterion = EdgeCriterion(n_strata=1)
    edges = find_edges(one_hot_table(text, 200), text, weights, criterion)
    assert list(zip(edges.source, edges.target, strict=True)) == [(1, 2), (2, 3), (3, 1), (4, 4), (5, 6)]
    np.testing.assert_allclose(edges.share, 0.8, atol=0.06)
    assert (edges.q <= 0.01).all()
    found = find_automata(edges)
    assert found.states.tolist() == [(4,), (1, 2, 3)]
    # What the text shows but the weights do not is no edge, nor is what the weights say of pairs the text does not show.
    weights[1] = 0
    weights[7, 8] = 10
    edges = find_edges(one_hot_table(text, 200), text, weights, criterion)
    assert list(zip(edges.source, edges.target, strict=True)) == [(2, 3), (3, 1), (4, 4), (5, 6)]


def test_tokens_without_weights_are_left_out():
    transitions, text = planted_chain()
    weights = torch.from_numpy(np.log(transitions + 1e-4)).float()
    weights[:, 2] = torch.nan
    edges = find_edges(one_hot_table(text, 200), text, weights, EdgeCriterion(n_strata=1))
    assert list(zip(edges.source, edges.target, strict=True)) == [(2, 3), (3, 1), (4, 4), (5, 6)]


def test_a_unit_that_fires_on_rare_tokens_alone_is_no_target():
    table, text, weights = unrelated(0)
    text.contexts[(text.contexts == 98)] = 97
    text.contexts[0, 5] = 98  # the only one, under `min_count`
    dense = table.toarray()
    dense[:, 7] = 0
    dense[5, 7] = 1
    found = find_edges(csc_array(dense), text, weights, EdgeCriterion(**{**vars(ANY), "min_count": 5}))
    assert len(found) > 100
    assert (found.p[found.target == 7] == 1).all()


def unrelated(seed: int, n_units: int = 20, d_vocab: int = 100):
    """Units that fire on random tokens, with weights that have nothing to do with them."""
    rng = np.random.default_rng(seed)
    text = make_text(rng.integers(1, d_vocab, (40, 50)))
    strength = rng.random((d_vocab, n_units)) * (rng.random((d_vocab, n_units)) < 0.1)
    table = csc_array(strength[text.contexts.flatten()].astype(np.float32))
    return table, text, torch.from_numpy(rng.standard_normal((n_units, d_vocab))).float()


@pytest.mark.parametrize("n_strata", [1, 4])
def test_p_values_are_uniform_where_weights_and_tokens_are_unrelated(n_strata):
    criterion = EdgeCriterion(**{**vars(ANY), "n_strata": n_strata, "n_permutations": 199})
    p = find_edges(*unrelated(0, n_units=40), criterion).p
    assert len(p) > 1500
    assert (p <= 0.05).mean() == pytest.approx(0.05, abs=0.02)
    assert stats.kstest(p, "uniform").statistic < 0.05


def test_unrelated_units_seldom_have_an_edge_at_all():
    criterion = EdgeCriterion(**{**vars(ANY), "level": 0.1, "n_permutations": 2000})
    with_edges = sum(len(find_edges(*unrelated(seed), criterion)) > 0 for seed in range(1, 13))
    assert with_edges <= 5  # at most 1.2 expected


def test_weights_that_know_only_how_frequent_a_token_is_are_not_significant():
    rng = np.random.default_rng(1)
    d_vocab = 201
    probability = np.concatenate([[0], np.repeat([4.0, 1.0], 100)])
    text = make_text(rng.choice(d_vocab, (400, 50), p=probability / probability.sum()))
    fires = np.zeros((d_vocab, 30), dtype=np.float32)
    for unit in range(30):
        fires[rng.choice(np.arange(1, 101), 20, replace=False), unit] = 1
    table = csc_array(fires[text.contexts.flatten()])
    weights = torch.from_numpy(probability + 0.1 * rng.standard_normal((30, d_vocab))).float()
    significant = [(find_edges(table, text, weights, EdgeCriterion(**{**vars(ANY), "n_strata": n})).p <= 0.05).mean()
                   for n in (1, 2)]
    assert significant[0] == 1
    assert significant[1] == pytest.approx(0.05, abs=0.03)


@pytest.mark.parametrize("criterion", [EdgeCriterion(share=2.0), EdgeCriterion(**{**vars(ANY), "weight": 100.0})])
def test_a_criterion_that_nothing_meets_leaves_no_edges(criterion):
    edges = find_edges(*unrelated(0), criterion)
    assert edges.empty
    assert find_automata(edges).empty


def test_the_same_seed_gives_the_same_edges():
    arguments = (*unrelated(2), ANY)
    pd.testing.assert_frame_equal(find_edges(*arguments, seed=3), find_edges(*arguments, seed=3))
    assert not find_edges(*arguments, seed=3).p.equals(find_edges(*arguments, seed=4).p)


# --- automata --------------------------------------------------------------------------------------------------------

def edge_frame(*rows) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["source", "target", "share"]).assign(lift=10.0, weight=lambda f: 2 + f.share)


def test_cycles_are_ranked_by_their_weakest_hand_over():
    edges = edge_frame((0, 0, 0.3), (5, 5, 0.9), (1, 2, 0.5), (2, 1, 0.4), (2, 3, 0.8), (3, 2, 0.7), (3, 4, 0.9), (7, 8, 1.0))
    found = find_automata(edges)
    assert found.states.tolist() == [(5,), (0,), (2, 3), (1, 2)]
    assert found.share.tolist() == [0.9, 0.3, 0.7, 0.4]
    assert found.weight.tolist() == pytest.approx([2.9, 2.3, 2.7, 2.4])
    assert found.component_size.tolist() == [1, 1, 3, 3]
    assert found["first"].tolist() == [True, True, True, False]


def test_longer_cycles_count_once_and_stop_at_the_limit():
    ring = [(i, (i + 1) % 5, 0.5) for i in range(5)]
    assert find_automata(edge_frame(*ring)).empty
    assert find_automata(edge_frame(*ring), max_states=5).states.tolist() == [(0, 1, 2, 3, 4)]
    both_ways = edge_frame((0, 1, 0.5), (1, 2, 0.5), (2, 0, 0.5), (0, 2, 0.9), (2, 1, 0.8), (1, 0, 0.7))
    found = find_automata(both_ways)
    assert found.states.tolist() == [(0, 1), (0, 2), (1, 2), (0, 2, 1)]
    assert found.share.tolist() == [0.5, 0.5, 0.5, 0.7]


def test_a_component_of_many_alike_keeps_to_the_strongest_edges():
    everyone = edge_frame(*((i, j, 0.2 + (j == (i + 1) % 12) / 2) for i in range(12) for j in range(12) if i != j))
    assert find_automata(everyone, fan_out=1, max_states=12).states.tolist() == [tuple(range(12))]
    assert find_automata(everyone, fan_out=3).n_states.max() == 4


def test_no_edges_no_automata():
    assert find_automata(edge_frame()).empty
