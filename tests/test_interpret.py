import numpy as np
import pytest
import torch
from scipy import stats
from scipy.sparse import csc_array

from sae_lib import features
from sae_lib.errors import StudyError
from sae_lib.interpret import (
    ELSEWHERE,
    RANDOM,
    Examples,
    FlatText,
    Unanswered,
    activation_scores,
    activations_at,
    interval_scores,
    like_the_top,
    logit_question,
    sample_examples,
    score_units,
    unit_interval,
)

TOKEN = 7


@pytest.fixture
def contexts():
    """100 contexts of 64 tokens; token 7 stands in every 10th place, others at random."""
    contexts = torch.randint(8, 300, (100, 64), generator=torch.Generator().manual_seed(1))
    contexts[:, 3::10] = TOKEN
    contexts[:, 0] = 0
    return contexts


@pytest.fixture
def column(contexts):
    """A unit active on token 7 in the first half of the text, at 400 levels."""
    where = np.flatnonzero(contexts[:50].flatten().numpy() == TOKEN)
    return where, np.linspace(0.01, 4, len(where), dtype=np.float32)


def sampled(contexts, column, seed=0):
    intervals = features.intervals(column[1], seed, 0).examples
    return intervals, *sample_examples(FlatText(contexts), *column, intervals, seed, 0)


def test_the_49_and_60_examples_of_the_paper(contexts, column):
    intervals, shown, asked = sampled(contexts, column)
    top, *others = intervals
    # Neighbouring levels of the top and bottom 20 overlap with the interval's five: what was drawn is not drawn again.
    for examples, n_top, n_random, n_elsewhere in ((shown, 10, 5, 10), (asked, 6, 10, 20)):
        count = {source: list(examples.source).count(source) for source in {*intervals, RANDOM, ELSEWHERE}}
        assert (count[top], count[RANDOM], count[ELSEWHERE]) == (n_top, n_random, n_elsewhere)
        assert all(count[name] == 2 for name in others[1:-1])
        assert all(count[name] <= 2 for name in others)


def test_full_counts_where_intervals_do_not_overlap(contexts, column):
    """Disjoint pools of 25 active tokens an interval."""
    intervals = {str(k): np.arange(25) + 25 * k for k in range(13)}
    shown, asked = sample_examples(FlatText(contexts), *column, intervals, 0, 0)
    assert (len(shown.tokens), len(asked.tokens), asked.levels.size) == (49, 60, 540)


def test_shown_and_asked_examples_share_no_window(contexts, column):
    _, shown, asked = sampled(contexts, column)
    windows = [window.tobytes() for examples in (shown, asked) for window in examples.tokens]
    assert len(set(windows)) == len(windows)


def test_repeated_text_is_drawn_once(contexts, column):
    contexts[:50] = contexts[0].clone()
    assert sample_examples(FlatText(contexts), *column, features.intervals(column[1], 0, 0).examples, 0, 0) is None


def test_windows_hold_their_token_and_stay_in_the_context(contexts, column):
    text = FlatText(contexts)
    index = np.array([0, 3, 63, 64, 100, 127, 6399])
    windows = text.windows(index)
    assert (windows // 64 == (index // 64)[:, None]).all()
    assert (windows == index[:, None]).any(1).all()
    assert windows[4].tolist() == list(range(96, 105))
    assert windows[2].tolist() == list(range(55, 64))


def test_levels_are_tenths_of_the_maximum(contexts, column):
    _, shown, _ = sampled(contexts, column)
    values = dict(zip(*column, strict=True))
    truth = np.array([values.get(i, 0) for i in FlatText(contexts).windows(shown.index).ravel()]).reshape(-1, 9)
    assert (shown.levels == np.minimum((10 * truth / truth.max()).astype(int), 9)).all()
    assert shown.levels.max() == 9


def test_tokens_elsewhere_are_the_top_token_in_other_contexts(contexts, column):
    intervals, shown, asked = sampled(contexts, column)
    tops = set(column[0][next(iter(intervals.values()))] // 64)
    for examples in (shown, asked):
        index = examples.index[np.array(examples.source) == ELSEWHERE]
        assert (contexts.flatten().numpy()[index] == TOKEN).all()
        assert not tops & set(index // 64)


def test_random_examples_are_never_about_the_end_of_text(contexts, column):
    contexts[:, ::2] = 0
    _, shown, asked = sampled(contexts, column)
    index = np.concatenate([examples.index[np.array(examples.source) == RANDOM] for examples in (shown, asked)])
    assert len(index) == 15 and (contexts.flatten().numpy()[index] != 0).all()


def test_importance_by_hand(contexts, column):
    _, shown, _ = sampled(contexts, column)
    density, tenth = len(column[0]) / 6400, np.rint(column[1] * 10 / 4)
    weight = dict(zip(shown.source, shown.weight, strict=True))
    assert weight[RANDOM] == 1
    assert weight["Top Activations"] == weight[ELSEWHERE] == pytest.approx(density * (tenth == 10).mean())
    assert weight["Subsample Interval 5"] == pytest.approx(density * (tenth == 5).mean())


def test_activations_at(column):
    assert activations_at(*column, column[0]).tolist() == column[1].tolist()
    assert activations_at(*column, np.array([[0, 6399]])).tolist() == [[0, 0]]


def asked_of(levels, weight=None):
    n = len(levels)
    return Examples(np.zeros((n, 9), int), levels, np.zeros(n, int), ["x"] * n, np.ones(n) if weight is None else weight)


def test_scores_of_a_perfect_a_monotone_a_reversed_and_a_constant_prediction():
    levels = np.arange(27).reshape(3, 9) % 10
    asked = asked_of(levels)
    assert all(score == pytest.approx(1) for score in activation_scores(levels.astype(float), asked).values())
    monotone = activation_scores(np.exp(levels), asked)
    assert monotone["spearman"] == pytest.approx(1) == monotone["importance"] and monotone["pearson"] < 0.9
    assert activation_scores(-levels.astype(float), asked)["spearman"] == pytest.approx(-1)
    assert set(activation_scores(np.full((3, 9), 0.1), asked).values()) == {0}


def test_importance_with_equal_weights_is_spearman_and_ignores_what_has_none():
    rng = np.random.default_rng(0)
    levels, predicted = rng.integers(0, 10, (20, 9)), rng.random((20, 9))
    scores = activation_scores(predicted, asked_of(levels, np.full(20, 0.3)))
    assert scores["importance"] == pytest.approx(stats.spearmanr(levels.ravel(), predicted.ravel()).statistic)
    first = activation_scores(predicted, asked_of(levels, np.r_[np.ones(5), np.zeros(15)]))["importance"]
    assert first == pytest.approx(stats.spearmanr(levels[:5].ravel(), predicted[:5].ravel()).statistic)


def test_logit_question_by_hand():
    weights = np.random.default_rng(0).permutation(500).astype(np.float32)
    tokens, positive = logit_question(weights, 0, 3)
    assert sorted(weights[tokens[positive]]) == list(range(440, 490))
    assert len(set(tokens[~positive])) == 50 and weights[tokens[~positive]].max() < 440
    weights[::2] = np.nan
    tokens, positive = logit_question(weights, 0, 3)
    assert np.isfinite(weights[tokens]).all() and positive.sum() == 50
    with pytest.raises(StudyError, match="too small"):
        logit_question(weights[:200], 0, 3)


class Knowing:
    """Explains by the truth: fires on token 7."""

    text = "token 7"

    def explain(self, examples, top_logits, bottom_logits):
        assert len(top_logits) == len(bottom_logits) and len(top_logits) in (0, 10)
        return self

    def simulate(self, windows):
        return (windows == TOKEN) * 5.0

    def logits(self, tokens):
        return tokens >= 200


def table_of(contexts, *columns):
    data = [np.concatenate([column[i] for column in columns]) for i in (1, 0)]
    return csc_array((*data, np.cumsum([0, *(len(c[0]) for c in columns)])), shape=(contexts.numel(), len(columns)))


def test_units_are_scored_and_rare_ones_dropped(contexts, column):
    every = np.flatnonzero(contexts.flatten().numpy() == TOKEN)
    full = every, np.full(len(every), 2, np.float32)
    table = table_of(contexts, full, (every[:19], full[1][:19]), column)
    weights = torch.arange(300.0).repeat(3, 1)
    scores = score_units(table, contexts, range(3), Knowing(), weights).set_index("unit")
    assert scores.spearman[0] == pytest.approx(1)
    assert 0 < scores.spearman[2] < 0.95  # silent in the half of the text that it is asked about too
    assert (scores.dropped != "").tolist() == [False, True, False]
    assert np.isnan(scores.spearman[1]) and scores.active.tolist() == [len(every), 19, len(column[0])]
    # The 50 positive tokens are 240 to 289; of the others those below 200 are told right.
    assert scores.logit[0] == 0.5 + (logit_question(weights[0].numpy(), 0, 0)[0] < 200).mean()
    assert score_units(table, contexts, [0], Knowing()).logit.isna().all()


def test_a_unit_without_an_answer_is_dropped_and_other_trouble_is_not(contexts, column):
    class Silent:
        def explain(self, *_):
            raise Unanswered("no tags")

    scores = score_units(table_of(contexts, column), contexts, [0], Silent())
    assert scores.dropped.tolist() == ["no tags"] and scores.spearman.isna().all()
    with pytest.raises(StudyError, match="6400"):
        score_units(table_of(contexts[:50], column), contexts, [0], Silent())


def test_short_contexts_are_refused():
    with pytest.raises(StudyError, match="too short"):
        FlatText(torch.zeros(3, 8, dtype=torch.int64))


def test_unit_interval():
    interval = unit_interval([0.1, 0.5, 0.9, float("nan")], n_boot=200)
    assert interval.value == 0.5 and interval.low == 0.1 and interval.high == 0.9
    many = unit_interval(np.random.default_rng(0).normal(0.6, 0.1, 400))
    # The standard error of a normal sample's median is 1.253 sd / sqrt(n).
    assert many.high - many.low == pytest.approx(2 * 1.96 * 1.253 * 0.1 / 20, rel=0.35)
    with pytest.raises(StudyError, match="two scored units"):
        unit_interval([0.3, float("nan")])


def test_interval_scores_by_hand():
    levels, predicted = np.zeros((4, 9), int), np.zeros((4, 9))
    levels[0, 4], levels[1, 4], levels[3, 0] = 9, 1, 5
    predicted[0, 4], predicted[3, :3] = 3, (9, 2, 5)
    examples = Examples(levels, levels, np.zeros(4, int), ["top", "low", ELSEWHERE, RANDOM], np.ones(4))
    own = np.tile(np.arange(9) == 4, (4, 1))
    # Silent are the last window's tokens but for its first: seven predicted 0 or 2 or 5, in all eight.
    scores = interval_scores(predicted, examples, own)
    assert scores == {"top": 7 / 8, "low": (0 + 6 / 2) / 8}
    everywhere = examples._replace(levels=np.ones((4, 9), int))
    assert interval_scores(predicted, everywhere, own) == {}


def test_like_the_top_by_hand():
    intervals = {"top": np.array([0, 1, 2]), "low": np.array([3, 4])}
    assert like_the_top(intervals, np.array([7, 7, 2, 2, 7])) == {"top": pytest.approx(2 / 3), "low": 0.5}


def test_an_asked_window_never_overlaps_a_shown_one(contexts):
    contexts[:, 3::2] = TOKEN  # so dense that neighbours' windows overlap
    where = np.flatnonzero(contexts.flatten().numpy() == TOKEN)
    _, shown, asked = sampled(contexts, (where, np.linspace(0.01, 4, len(where), dtype=np.float32)))
    text = FlatText(contexts)
    assert not set(text.windows(shown.index).ravel()) & set(text.windows(asked.index).ravel())


def test_chance_is_the_explanation_of_another_unit(contexts, column):
    class Numbered(Knowing):
        made = 0

        def explain(self, *_):
            Numbered.made += 1
            told = Numbered()
            told.first = Numbered.made == 1
            return told

        def logits(self, tokens):
            return (tokens >= 200) == self.first

    rising = torch.arange(300.0).repeat(2, 1)
    scores = score_units(table_of(contexts, column, column), contexts, range(2), Numbered(), rising)
    right = 0.5 + (logit_question(rising[1].numpy(), 0, 1)[0] < 200).mean()
    assert np.isnan(scores.logit_of_another[0])
    assert scores.logit_of_another[1] == pytest.approx(right) and scores.logit[1] == pytest.approx(1 - right)
