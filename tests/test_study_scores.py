from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse import csc_array

from sae_lib.endpoint import EndpointExplainer
from sae_lib.errors import StudyError
from sae_lib.evaluate import Text
from sae_lib.explain import PatternExplainer
from sae_lib.metrics import Interval
from sae_lib.study import scores
from sae_lib.study.pipeline import Study
from sae_lib.study.scores import Kind, Scores


def found(units, rated=()):
    return Scores(pd.DataFrame(units), Interval(1.0, 0.9, 1.0), None, list(rated))


def study(key="abc", **profile):
    made = Study.__new__(Study)
    made.seed, made.profile = 0, SimpleNamespace(name="smoke", **profile)
    made.dictionary = lambda on: SimpleNamespace(artefact=SimpleNamespace(key=key))
    return made


@pytest.fixture
def tokens(monkeypatch):
    """Validation text of 4 contexts of 10 tokens, the first of each end-of-text; the activation of every neuron is the token."""
    contexts = torch.arange(40).reshape(4, 10)
    contexts[:, 0] = 0
    monkeypatch.setattr(scores, "text_of", lambda study, split: {"validation": Text(contexts, contexts, contexts)}[split])
    monkeypatch.setattr(scores, "mlp_activations", lambda model, batch: batch[..., None].float().expand(*batch.shape, 5))


def test_living_units_are_active_on_twenty_tokens_of_the_validation_text(tokens):
    # Unit u is active above 4 u: 36 tokens that are no end-of-text, 32, 28, ..., 20 (from u = 4), ...
    threshold = 4.0 * torch.arange(10)
    kind = Kind(None, torch.eye(10), lambda acts, units: (acts[:, :1] - threshold[units]).relu(), [])
    tokens_above = [sum(t > 4 * u and t % 10 > 0 for t in range(40)) for u in range(10)]
    expected = {u for u in range(10) if tokens_above[u] >= 20}
    units, drawn = scores.living(study(), kind, "neuron", 5)
    assert drawn == 10 and set(units.tolist()) == expected and 0 < len(expected) < 10
    few, drawn = scores.living(study(), kind, "neuron", 1)
    assert drawn == 4 and few.tolist() == [u for u in units.tolist() if u in few.tolist()]


def test_every_few_contexts_are_looked_at():
    contexts = torch.arange(50).reshape(10, 5)
    held_out = study(scored_contexts=4)
    held_out.held_out = lambda split: Text(contexts, contexts, contexts)
    assert scores.text_of(held_out, "test").domains[:, 0].tolist() == [0, 15, 30, 45]


def test_a_summary_leaves_out_units_without_a_score():
    given = {"feature": found({"x": [0.2, 0.4, np.nan, 0.9]}), "neuron": found({"x": [0.1]}), "pca": found({})}
    table = scores.summary(given, "x", n_boot=50)
    assert table.value["feature"] == 0.4 and table.low["feature"] == 0.2 and table.high["feature"] == 0.9
    assert table.units.tolist() == [3, 1, 0] and table.value.isna().tolist() == [False, True, True]


def test_differences_are_told_apart_where_intervals_overlap():
    rng = np.random.default_rng(0)
    given = {"feature": found({"x": rng.normal(0.6, 0.1, 400)}), "ica": found({"x": rng.normal(0.585, 0.1, 400)}),
             "pca": found({}), "neuron": found({"x": [0.1, np.nan]})}
    table = scores.differences(given, "x", statistic=np.mean, n_boot=4000)
    assert table.index.tolist() == ["ica"]
    means = [given[name].units.x.mean() for name in ("feature", "ica")]
    assert table.value["ica"] == pytest.approx(means[0] - means[1])
    # The standard error of a difference is the root of the sum of both squared: 0.1 * sqrt(2 / 400).
    assert table.high["ica"] - table.low["ica"] == pytest.approx(2 * 1.96 * 0.1 * (2 / 400) ** 0.5, rel=0.1)
    assert table.low["ica"] < table.value["ica"] < table.high["ica"]
    assert scores.differences({"ica": given["ica"]}, "x").empty


def test_intervals_in_their_order_and_averaged_over_units():
    columns = {f"token: {name}": [i, i + 1.0] * 5 for i, name in enumerate(scores.INTERVALS)}
    columns["token: Bottom Activations"][0] = np.nan  # nine units are too few
    table = scores.by_interval({"feature": found(columns)}, "token: ", n_boot=50)
    assert table.interval.tolist() == list(scores.INTERVALS) and len(table) == 13
    np.testing.assert_allclose(table.value, [*(np.arange(12) + 0.5), np.nan])


def test_the_default_explainer_needs_no_network_and_a_server_needs_a_model(monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    found, name = scores.explainer([b"a", b"b"])
    assert isinstance(found, PatternExplainer) and name == "pattern explainer"
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:1/v1")
    monkeypatch.delenv("OPENAI_MODEL", raising=False)
    with pytest.raises(StudyError, match="OPENAI_MODEL"):
        scores.explainer([b"a"])
    monkeypatch.setenv("OPENAI_MODEL", "tiny")
    found, name = scores.explainer([b"a"])
    assert isinstance(found, EndpointExplainer) and "tiny" in name


def test_raters_get_codes_and_another_dictionary_another_file():
    item = {"unit": 7, "interval": "Top Activations", "tokens": [[1, 2]], "levels": [[9, 0]], "top_logits": [3]}
    given = {"feature": found({}, [item]), "neuron": found({}, [item | {"unit": 8, "tokens": [[4, 5]]}]), "pca": found({})}
    first = scores.rating(study(), given)
    assert {(i.kind, i.unit) for i in first.items} == {("feature", 7), ("neuron", 8)}
    of = {item.kind: first.shown[item.code] for item in first.items}
    assert of["feature"].tokens.tolist() == [[1, 2]] and of["neuron"].tokens.tolist() == [[4, 5]]
    assert of["neuron"].top_logits.tolist() == [3]
    assert first.path == scores.rating(study(), given).path != scores.rating(study("other"), given).path


def test_what_is_like_the_top_and_what_a_rater_sees():
    contexts = torch.arange(1, 65).reshape(2, 32) % 5 + 1
    values = np.linspace(1, 10, 64, dtype=np.float32)
    table = csc_array((values, (np.arange(64), np.zeros(64, int))), shape=(64, 1))
    like = scores._like_the_top(table, 0, np.full(64, 3), np.arange(64) // 32, 0)
    assert len(like) == 26 and all(like[f"token: {name}"] == 1 for name in scores.INTERVALS)
    assert like["domain: Top Activations"] == 1 and like["domain: Bottom Activations"] == 0
    top, half = scores._rated(table, 0, contexts, torch.tensor([0.0, 5, torch.nan, 2, *np.zeros(10)]), 0)
    assert np.shape(top["tokens"]) == np.shape(top["levels"]) == (20, 21) and np.shape(half["tokens"]) == (5, 21)
    assert top["top_logits"][:2] == [1, 3] and np.max(top["levels"]) == 9
    assert scores._like_the_top(csc_array((64, 1), dtype=np.float32), 0, np.zeros(64), np.zeros(64), 0) == {}


def test_the_kinds_know_what_they_write_and_others_are_refused():
    transformer = SimpleNamespace(model="the model", artefact="A")
    six = study(transformer=SimpleNamespace(d_mlp=6))
    six.transformer = lambda which: transformer
    neurons, directions = scores.kind(six, "neuron"), scores.kind(six, "random_direction")
    acts = torch.arange(12.0).reshape(2, 6)
    assert neurons.encode(acts, torch.tensor([4, 1])).tolist() == [[4, 1], [10, 7]] and torch.equal(neurons.write, torch.eye(6))
    chosen = torch.tensor([5, 0])
    torch.testing.assert_close(directions.encode(acts, chosen), (acts @ directions.write[chosen].T).relu())
    with pytest.raises(StudyError, match="no kind"):
        scores.kind(six, "svd")


def test_rare_tokens_and_the_end_of_text_are_not_used():
    seen = np.full(400, 3)
    seen[::4] = np.repeat([0, 1, 2], [61, 20, 19])  # every fourth is counted
    four = study()
    four.tokens = SimpleNamespace(tokens=lambda split: seen)  # in place of the cached properties
    four.vocabulary = [b"", b"a", b"b", b"c"]
    used = scores.used_tokens(four)
    assert used.tolist() == [False, True, False, False]
