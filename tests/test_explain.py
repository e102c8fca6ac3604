import numpy as np
import pytest
import torch
from scipy.sparse import csc_array

from sae_lib.explain import MAX_CLAUSES, Literal, PatternExplainer
from sae_lib.interpret import Examples, logit_question, score_units
from sae_lib.token_classes import Classes, classes_of, quoted

ARABIC = [chr(a) + chr(b) for a in range(0x628, 0x640) for b in range(0x641, 0x645)]
WORDS = [space + a + b for space in (" ", "") for a in "bcdfgklmprst" for b in ("an", "el", "ion", "orp", "un")]
VOCABULARY = [b"", b" the", b" The", b"\n", b".", b",", b"(", b"12", b"7", *(w.encode() for w in WORDS + ARABIC)]
ARABIC_IDS = np.arange(9 + len(WORDS), len(VOCABULARY))


@pytest.fixture
def contexts():
    """Words, with a run of 6 to 12 Arabic tokens in every third context."""
    rng = np.random.default_rng(5)
    contexts = rng.integers(1, 9 + len(WORDS), (300, 64))
    contexts[rng.random(contexts.shape) < 0.1] = 1
    for row in contexts[::3]:
        start, length = rng.integers(2, 50), rng.integers(6, 13)
        row[start:start + length] = rng.choice(ARABIC_IDS, length)
    return torch.tensor(contexts)


def score(contexts, active, seed=0, weights=None):
    """The scores of one unit that is active where `active` says, at random strengths."""
    strength = np.random.default_rng(seed).uniform(2, 3, active.size) * active.ravel()
    table = csc_array(strength[:, None].astype(np.float32))
    return score_units(table, contexts, [0], PatternExplainer(VOCABULARY), weights, seed).iloc[0]


def examples_of(windows, levels):
    n = len(windows)
    return Examples(windows, levels.astype(int), np.zeros(n, int), ["x"] * n, np.ones(n))


def test_a_script_is_explained_as_the_script(contexts):
    scores = score(contexts, np.isin(contexts.numpy(), ARABIC_IDS))
    assert "Arabic letters" in scores.text
    # Strengths are random within the script, so that not even the truth predicts everything.
    assert scores.spearman > 0.85


def test_a_script_is_predicted_on_tokens_never_shown(contexts):
    seen, unseen = ARABIC_IDS[::2], ARABIC_IDS[1::2]
    windows = np.full((40, 9), 10)
    windows[:, 5] = np.resize(seen, 40)
    examples = examples_of(windows, np.where(np.arange(9) == 5, 8, 0) * np.ones((40, 1), int))
    explanation = PatternExplainer(VOCABULARY).explain(examples, np.zeros(0, int), np.zeros(0, int))
    level = explanation.simulate(np.full((1, 9), 10) + (np.arange(9) == 5) * (unseen[0] - 10))
    assert level[0, 5] > 6 and level[0, :5].max() < 1


def test_a_token_after_a_token_is_explained_with_both(contexts):
    tokens = contexts.numpy().copy()
    rng = np.random.default_rng(2)
    x, y = VOCABULARY.index(b" bion"), VOCABULARY.index(b"(")
    places = rng.random((300, 63)) < 0.03
    tokens[:, 1:][places], tokens[:, :-1][places] = x, y
    after = np.zeros(tokens.shape, bool)
    after[:, 1:] = (tokens[:, 1:] == x) & (tokens[:, :-1] == y)
    scores = score(torch.tensor(tokens), after)
    assert "' bion'" in scores.text and "right after" in scores.text
    assert scores.spearman > 0.8
    assert ((tokens == x) & ~after).sum() > 50  # the token alone would not do


def test_a_random_unit_cannot_be_explained(contexts):
    random = [score(contexts, np.random.default_rng(seed).random(contexts.shape) < 0.05, seed).spearman for seed in range(5)]
    assert abs(np.mean(random)) < 0.1 and max(random) < 0.25


def test_silence_has_no_pattern_and_a_constant_prediction():
    explanation = PatternExplainer(VOCABULARY).explain(examples_of(np.full((30, 9), 5), np.zeros((30, 9))),
                                                       np.zeros(0, int), np.zeros(0, int))
    assert "No pattern" in explanation.text and (explanation.simulate(np.full((4, 9), 20)) == 0).all()


def test_explanations_are_short_and_predict_levels(contexts):
    rng = np.random.default_rng(0)
    windows = contexts.numpy()[:49, :9]
    explanation = PatternExplainer(VOCABULARY).explain(examples_of(windows, rng.integers(0, 10, (49, 9))),
                                                       np.zeros(0, int), np.zeros(0, int))
    assert len(explanation.clauses) <= MAX_CLAUSES
    levels = explanation.simulate(windows)
    assert levels.shape == (49, 9) and levels.min() >= 0 and levels.max() <= 9


def test_what_stands_before_the_window_is_not_known():
    """The same token is predicted alike wherever nothing that the clauses speak of has changed."""
    windows = np.full((40, 9), 10)
    windows[:, 4], windows[::2, 3] = 20, 6
    levels = np.zeros((40, 9))
    levels[::2, 4] = 9
    explanation = PatternExplainer(VOCABULARY).explain(examples_of(windows, levels), np.zeros(0, int), np.zeros(0, int))
    test = np.full((2, 9), 10)
    test[0, 0], test[1, 3:5] = 20, (6, 20)
    predicted = explanation.simulate(test)
    assert predicted[1, 4] > 7 and predicted[0].max() < 1


def test_logits_of_a_class_are_predicted_and_random_ones_not(contexts):
    active = np.isin(contexts.numpy(), ARABIC_IDS)
    rng = np.random.default_rng(3)
    weights = rng.normal(size=len(VOCABULARY)).astype(np.float32)
    weights[ARABIC_IDS] += 10
    tokens, positive = logit_question(weights, 0, 0)
    scores = score(contexts, active, weights=torch.tensor(weights)[None])
    assert "more likely: Arabic letters" in scores.text
    assert scores.logit == (np.isin(tokens, ARABIC_IDS) == positive).mean() > 0.8
    explainer = PatternExplainer(VOCABULARY)
    shares = []
    for seed in range(40):
        weights = np.random.default_rng(seed).normal(size=len(VOCABULARY))
        order = np.argsort(-weights)
        explanation = explainer.explain(examples_of(np.full((20, 9), 5), np.zeros((20, 9))), order[:10], order[::-1][:10])
        tokens, positive = logit_question(weights, seed, 0)
        shares.append((explanation.logits(tokens) == positive).mean())
    assert np.mean(shares) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("token, some, none", [
    ("ال".encode(), {"Arabic letters", "letters beyond Latin"}, {"letters", "punctuation"}),
    (b"\xd8", {"Arabic letters", "pieces of a character"}, {"Latin letters"}),
    (b"\xd7", {"Hebrew letters"}, {"Arabic letters"}),
    (b"\x90", {"pieces of a character"}, {"Arabic letters"}),
    ("é".encode(), {"accented Latin letters"}, {"letters beyond Latin", "pieces of a character"}),
    ("日".encode(), {"Chinese letters"}, set()),
    (b" The", {"tokens with a space in front", "capitalised words"}, {"capitals", "mixed letters and digits"}),
    (b"iVBOR0", {"mixed letters and digits", "tokens without a space in front"}, {"capitalised words"}),
    (b"ACG", {"the letters A, C, G, T", "capitals"}, set()),
    (b"0f", {"hexadecimal digits"}, {"digits"}),
    (b"\n    ", {"line breaks", "indentation", "spaces or line breaks"}, {"tokens with a space in front"}),
    (b"():", {"punctuation", "opening brackets"}, {"closing brackets"}),
])
def test_classes_of_tokens(token, some, none):
    assert some <= classes_of(token)
    assert not none & classes_of(token)


def test_spelling_forms():
    classes = Classes([b" the", b"The", b"THE", b"then", b" ", b"\n"])
    assert len(set(classes.form[:3])) == 1 and len(set(classes.form)) == 4
    assert classes.form_size[classes.form[0]] == 3
    assert [quoted(token) for token in (b" the", b"\n", b"\xd8")] == ["' the'", r"'\n'", r"b'\xd8'"]


@pytest.mark.parametrize("place, expected", [
    ("here", "011000010"), ("before", "001100001"), ("before2", "000110000"), ("earlier", "001111111"),
    ("left", "001110000"),  # 1 of 2, 2 of 3, 2 of 4 before; then 2 of 5, ...
    ("amid", "000000000"),
])
def test_places_by_hand(place, expected):
    member = np.array([[c == "1" for c in "011000010"]])
    literal = Literal(place, "", np.array([False, True]), 0.0)
    assert "".join(str(int(x)) for x in literal.holds(member.astype(int))[0]) == expected
    assert Literal("amid", "", np.array([False, True]), 0.0).holds(np.array([[1, 1, 0, 1, 1, 0, 0, 0, 0]])).tolist()[0] == [
        False, False, True, False, False, True, True, True, True]
