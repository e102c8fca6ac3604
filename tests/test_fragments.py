"""Scores on fragments of 64 tokens, by hand."""

import numpy as np
import pytest
from scipy.sparse import csc_array

from sae_lib import fragments
from sae_lib.errors import StudyError
from sae_lib.interpret import Unanswered


def text(n_fragments=40, seed=0):
    """Tokens 10 to 99 at random; token 5 stands once in each of the first 30 fragments, at place 3."""
    tokens = np.random.default_rng(seed).integers(10, 100, (n_fragments, fragments.FRAGMENT))
    tokens[:30, 3] = 5
    return tokens


def table_of(acts):
    return csc_array(acts.reshape(-1, 1).astype(np.float32))


class Says:
    """An explanation that expects the same level wherever token 5 stands."""

    text = "token 5"

    def simulate(self, windows):
        return 9.0 * (windows == 5)

    def logits(self, tokens):
        return tokens == 5


class Knows:
    def __init__(self, explanation=None):
        self.explanation, self.seen = explanation or Says(), []

    def explain(self, examples, top_logits, bottom_logits):
        self.seen.append(examples)
        return self.explanation


def test_the_end_of_a_context_that_no_fragment_fills_is_left_out():
    tokens = np.arange(2 * 150)
    found, new = fragments.cut(tokens, 150)
    assert found.shape == (4, 64) and new.all()
    assert found[:, 0].tolist() == [0, 64, 150, 214]
    _, new = fragments.cut(np.tile(np.arange(64), 3), 64)
    assert new.tolist() == [True, False, False], "what stands twice is looked at once"
    with pytest.raises(StudyError, match="too short for fragments of 64"):
        fragments.cut(np.arange(60), 30)


def test_drawn_are_five_and_five_of_the_twenty_strongest_and_five_others_that_vary():
    acts = np.zeros((60, 64), dtype=np.float32)
    acts[:40, 0] = np.arange(40, 0, -1)  # the strongest are 0 to 19; 40 to 59 never vary
    drawn = fragments.draw(acts, np.ones(60, dtype=bool), 0, 0)
    top = np.concatenate([drawn.shown, drawn.strong])
    assert len(np.unique(top)) == 10 and (top < 20).all()
    assert len(np.unique(drawn.random)) == 5 and (drawn.random >= 20).all() and (drawn.random < 40).all()
    again = fragments.draw(acts, np.ones(60, dtype=bool), 0, 0)
    assert all((a == b).all() for a, b in zip(drawn, again, strict=True))
    allowed = np.ones(60, dtype=bool)
    allowed[:10] = False
    assert min(map(min, fragments.draw(acts, allowed, 0, 0))) >= 10
    allowed[:16] = False
    assert fragments.draw(acts, allowed, 0, 0) is None, "24 fragments that vary are too few"


def test_levels_and_correlations_by_hand():
    assert fragments.levels(np.array([[0.0, 1.0, 2.4, 4.0]]), 4.0).tolist() == [[0, 2, 6, 10]]  # 2.5 is rounded to even
    x, y = np.array([[1.0, 2.0, 3.0]]), np.array([[1.0, 2.0, 6.0]])
    assert fragments.correlation(x, y) == pytest.approx(5 / np.sqrt(2 * 14))
    assert fragments.correlation(np.ones((1, 3)), y) == 0.0 and np.isnan(fragments.correlation(x, np.ones((1, 3))))


def test_a_true_explanation_scores_one_and_random_text_alone_as_well():
    tokens = text()
    acts = 2.0 * (tokens == 5)
    explainer = Knows()
    found = fragments.score_units(table_of(acts), tokens.ravel(), 64, [0], explainer).iloc[0]
    assert found.top_random == pytest.approx(1) and found.random_only == pytest.approx(1)
    assert found.varied == 30 and found.text == "token 5" and found.dropped == ""
    (shown,) = explainer.seen
    assert shown.tokens.shape == (5, 64) and set(shown.levels.max(1)) == {9}


def test_weak_activations_are_not_rounded_away():
    tokens = text()
    acts = np.where(tokens == 5, np.where(np.arange(40) < 20, 100.0, 1.0)[:, None], 0.0)
    found = fragments.score_units(table_of(acts), tokens.ravel(), 64, [0], Knows()).iloc[0]
    assert found.random_only == pytest.approx(1) and 0.6 < found.top_random < 0.9


def test_an_explanation_of_the_strongest_only_fails_on_random_text():
    """In strong fragments token 5 goes with token 6, in the others it stands alone."""
    tokens = text(60)
    tokens[:, 3] = 5
    tokens[:, 10] = np.where(np.arange(60) < 20, 6, 7)
    acts = np.where(tokens == 5, np.where(np.arange(60) < 20, 9.0, 3.0)[:, None], 0.0) + 9.0 * (tokens == 6)

    class Six(Says):
        def simulate(self, windows):
            return 9.0 * (windows == 6)

    found = fragments.score_units(table_of(acts), tokens.ravel(), 64, [0], Knows(Six())).iloc[0]
    assert 0.4 < found.top_random < 1
    assert found.random_only < found.top_random


def test_units_that_cannot_be_scored_say_why():
    tokens = text()
    rare = np.zeros(tokens.shape)
    rare[:24, 3] = 1.0
    acts = csc_array(np.stack([rare.ravel(), (tokens == 5).ravel()], 1).astype(np.float32))

    class Silent:
        def explain(self, *_):
            raise Unanswered("no answer")

    found = fragments.score_units(acts, tokens.ravel(), 64, [0, 1], Silent())
    assert found.dropped.tolist() == ["varies on fewer than 25 fragments", "no answer"]
    assert found.top_random.isna().all()
    with pytest.raises(StudyError, match="give the text it was made from"):
        fragments.score_units(acts, tokens.ravel()[:-1], 64, [0], Silent())
