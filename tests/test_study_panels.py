from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch

from sae_lib.effects import top_logits
from sae_lib.evaluate import Text
from sae_lib.features import specificity_by_level
from sae_lib.study import panels
from sae_lib.study.pipeline import Study


def test_examples_are_escaped_and_marked_by_activation_and_effect():
    text = panels.example_html([b"<b>", b"x", b"y\n", b"z"], np.array([4, 1, 0, 0]), np.array([0, -2, 0.5, 0.05]), 4.0)
    spans = text.split("<span")[1:]
    assert "&lt;b&gt;" in text and "<b>" not in text and "y↵" in text
    assert "40, 1.00)" in spans[0] and "bold" in spans[0] and "border" not in spans[0]
    assert "40, 0.25)" in spans[1] and "bold" not in spans[1] and "solid" in spans[1]
    assert "dotted" in spans[2] and "border" not in spans[3]
    assert "activation 1.00, ablation -2.00 nats" in spans[1]


def test_an_examples_page_stays_in_the_context_of_each_example():
    contexts = torch.arange(1, 41).reshape(2, 20)
    text = Text(contexts, torch.zeros_like(contexts), torch.zeros_like(contexts))
    vocabulary = [f"<{i}>".encode() for i in range(41)]
    page = panels.examples_page(text, vocabulary, np.ones(40), np.zeros(40), {"Top": np.array([19]), "Low": np.array([20])}, 1.0)
    top, low = page.split("<h4>Low</h4>")
    assert [f"&lt;{i}&gt;" in top for i in (7, 8, 20, 21)] == [False, True, True, False]
    assert [f"&lt;{i}&gt;" in low for i in (20, 21, 26, 27)] == [False, True, True, False]


def test_the_label_of_a_domain_that_the_corpus_lacks_holds_nowhere():
    domains = torch.tensor([[0, 1], [1, 0]])
    text, study = Text(domains, domains, domains), Study.__new__(Study)
    study.tokens = SimpleNamespace(domains=["python", "arabic"])  # in place of the cached property
    assert panels.label(study, "arabic", text).tolist() == [False, True, True, False]
    assert not panels.label(study, "dna", text).any()


def test_the_level_figure_draws_the_counts_and_shares_of_each_truth():
    values, inside = np.array([1, 1, 4], np.float32), np.array([True, False, True])
    by_truth = {"proxy": specificity_by_level(values, ~inside, 2), "label": specificity_by_level(values, inside, 2)}
    fig = panels.level_figure({"unit 7": by_truth}, {"unit 7": "label"})
    bars = [trace.y.tolist() for trace in fig.data if trace.type == "bar"]
    assert bars == [[1, 1], [1, 0], [1, 4], [1, 0]]  # in the context, outside; then weighted by activation
    assert {trace.name: trace.y.tolist() for trace in fig.data if trace.type == "scatter"} == {
        "share by proxy": [0.5, 0], "share by label": [0.5, 1]}


def test_the_logit_figure_shows_the_most_raised_tokens_highest_last():
    weights = torch.tensor([0.0, 2.0, -1.0, 1.0])
    top = top_logits(weights, [b"a", b"<b>", b"c", b"\xd8"], 2)
    unit = panels.Written(weights.numpy(), np.array([False, True, False, False]), top)
    fig = panels.logit_figure({"unit": unit}, 2)
    bars = next(trace for trace in fig.data if trace.type == "bar")
    assert bars.x.tolist() == [1, 2] and list(bars.marker.color) == [panels.OUTSIDE, panels.INSIDE]
    assert list(fig.layout.yaxis2.ticktext) == ["b&#x27;\\xd8&#x27;", "&#x27;&lt;b&gt;&#x27;"]


def test_the_correlation_figure_marks_the_papers_number_only_where_there_is_one():
    rows = [{"context": "dna", "truth": by, "unit": "feature", "value": 0.5, "low": 0.4, "high": 0.7, "paper": paper}
            for by, paper in (("proxy", 0.8), ("label", np.nan))]
    rows += [{**row, "unit": "neuron", "paper": np.nan} for row in rows]
    fig = panels.correlation_figure(pd.DataFrame(rows))
    assert [trace.name for trace in fig.data] == ["feature", "feature in the paper", "neuron"]
    np.testing.assert_allclose(fig.data[0].error_x.array, [0.2, 0.2])
    assert fig.layout.yaxis.categoryarray == ("label", "proxy")  # and no row for what is not known of DNA


def test_the_ablation_figure_has_an_axis_for_each_context_and_hides_no_marker():
    rows = [{"context": context, "unit": unit, "tokens": tokens, "value": -value, "low": -2 * value, "high": 0.0}
            for context in ("dna", "arabic", "hex") for unit, value in (("feature", 5.0), ("neuron", 0.1))
            for tokens in ("of the context", "other")]
    fig = panels.ablation_figure(pd.DataFrame(rows))
    assert [trace.xaxis for trace in fig.data] == ["x", "x", "x2", "x2", "x3", "x3"]
    own, other = fig.data[:2]
    assert own.x.tolist() == [-5, -0.1] and own.error_x.arrayminus.tolist() == [5, 0.1]
    assert list(fig.layout.yaxis.ticktext) == ["neuron", "feature"]
    assert [round(place) for place in own.y] == [1, 0] and not set(own.y) & set(other.y)
