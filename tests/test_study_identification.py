"""Notebook 11's artefacts at a size of seconds, and the numbers of sets by hand."""

from dataclasses import replace

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
from texts import tiny_study

from sae_lib import ioi, patching
from sae_lib.errors import StudyError
from sae_lib.study import deep, identification, identification_figures, task_model
from sae_lib.study import identification_numbers as numbers
from sae_lib.study.identification import CODINGS, DENSE, FEATURES, PCA
from sae_lib.study.profiles import SMOKE, IdentificationSizes
from sae_lib.transformer import TransformerConfig


@pytest.fixture
def study(tmp_path, monkeypatch, one_thread):  # noqa: ARG001
    model = TransformerConfig(n_tokens=4096, d_vocab=290, n_ctx=128, n_layers=2, d_model=16, n_heads=2, d_mlp=24,
                              batch_contexts=4)
    sizes = replace(SMOKE.deep, transformer=model, with_names=model,
                    names_dictionary=replace(SMOKE.deep.names_dictionary, n_activations=1280, batch_size=128,
                                             resample_inputs=256))
    own = IdentificationSizes(prompts=6, sentences=4, sentences_of_many=6, exchanges=2, dev_exchanges=2, growth=((3, 1),),
                              layers=(1,), l1=(sizes.names_dictionary.l1_coefficient, 0.0), thresholds=(-2.0, 0.0, 2), most=5)
    return tiny_study(tmp_path, monkeypatch, n_ctx=128, deep=sizes, identification=own, component_sample=64)


def test_everything_is_made_once_and_loaded_after(study):
    made, loaded = study(), study("load")
    accuracy = identification.accuracy(made)
    assert len(accuracy) == 6 and (accuracy.right_low <= accuracy.right).all() and (accuracy["first"] <= 1).all()
    choice = identification.layer_choice(made)
    assert identification.chosen_layer(choice) == 1
    one = identification.one_exchange(made, 1)
    assert set(one.coding) == set(CODINGS) and len(one) == 2 * len(CODINGS)
    assert all(len(kl) == len(edit) <= 6 and edit[0] == 0 for kl, edit in zip(one.kl, one.edit, strict=True))
    many, l1, meaning = (f(made, 1) for f in (identification.many_exchanges, identification.coefficients, identification.meaning))
    assert len(many) == 4 and set(l1.l1) == {made.profile.deep.names_dictionary.l1_coefficient, 0.0}
    assert set(meaning.table["rank"]) <= {1, 2, 3} and set(meaning.table.feature) == set(meaning.examples)
    pd.testing.assert_frame_equal(identification.one_exchange(loaded, 1), one)
    places = identification.where(made)
    at = places.set_index(["role", "after"]).left
    assert at["indirect object", 0] == pytest.approx(0, abs=1e-4) and at["last token", 2] == pytest.approx(0, abs=1e-4)
    assert at["subject", 0] == pytest.approx(1, abs=1e-4)
    labels = ["a"] * len(meaning.table)
    figures = (identification_figures.accuracy_figure(accuracy, task_model.of(made).sentences),
               identification_figures.where_figure(places),
               identification_figures.curves_figure({"one": one, "many": many}, 5),
               identification_figures.edits_figure({"one": one}),
               identification_figures.growth_figure(one, 16), identification_figures.layers_figure(one, 1),
               identification_figures.coefficients_figure(l1),
               identification_figures.first_features_figure(meaning.table, labels, labels))
    assert all(isinstance(figure, go.Figure) and figure.data for figure in figures)


def test_sentences_of_a_set_differ_in_the_exchanged_names_alone(study):
    made = study()
    base, target = identification.exchanged(made, 3, 0, "dev", "order", 12)
    assert ((base.tokens != target.tokens).sum(1) == 1).all() and torch.equal(base.subject, target.subject)
    pairs = list(zip(base.indirect.tolist(), target.indirect.tolist(), strict=True))
    assert len(set(pairs)) == 3 and all(pairs.count(pair) == 4 for pair in pairs)
    names = {name for pair in pairs for name in pair}
    assert len(names) == 6 and not names & set(base.subject.tolist())
    for pair in set(pairs):
        assert base.abba[[p == pair for p in pairs]].sum() == 2
    with pytest.raises(StudyError, match="two or more for each"):
        identification.exchanged(made, 3, 0, "dev", "order", 5)
    again = identification.exchanged(made, 3, 0, "dev", "measure", 12)
    assert again.base.indirect.tolist() == base.indirect.tolist() and not torch.equal(again.base.subject, base.subject)


def test_vocabulary_has_the_names_last(study):
    made = study()
    vocabulary = deep.vocabulary(made)
    assert len(vocabulary) == deep.tokenizer(made).get_vocab_size() and vocabulary[-len(ioi.NAMES)] == b" Adam"


def sets(**columns):
    return pd.DataFrame({"coding": FEATURES} | columns)


def test_half_by_hand():
    curve = np.array([[4.0, 3, 2, 1], [4, 3, 3, 3], [1, 0.9, 0.5, 0.6]])
    np.testing.assert_array_equal(numbers.half(curve), [2, np.nan, 2])


def test_numbers_of_sets_by_hand():
    table = sets(repeat=[0, 1, 2], half=[1.0, 3.0, np.nan], kl=[[2, 1.0], [4, 3, 2.5, 1], [1, 1, 1]],
                 edit=[[0, 1.0], [0, 2, 1, 5.0], [0, 1, 2]])
    np.testing.assert_array_equal(numbers.needed(table), [1, 3, 2])
    assert numbers.mean_half(table, n_boot=50).value == 2
    twice = table.assign(coding=PCA, half=[1.0, 2, 2], edit=[[0, 2.0], [0, 2, 10, 5.0], [0, 1, 2]])
    both = pd.concat([twice[::-1], table])
    found = numbers.needed_ratio(both, FEATURES, PCA, n_boot=200)
    assert found.value == 6 / 5 and found.low == 1 and 1.2 < found.high <= 1.5  # never below the least ratio of a set
    mine, theirs, ratio = numbers.edit_ratio(both, FEATURES, PCA, n_boot=50)
    assert (mine.value, theirs.value, ratio.value) == (3, 6, 0.5)  # the last set never gets there by features
    assert np.isnan(np.array(numbers.edit_ratio(both[both.repeat > 0], FEATURES, PCA))).all()
    np.testing.assert_allclose(numbers.left_by_directions(table, 2), [[1, 0.5, 0.5], [1, 0.75, 0.625], [1, 1, 1]])
    np.testing.assert_allclose(numbers.left_by_edit(table, np.array([0, 1, 3, 6.0])),
                               [[1, 0.5, 0.5, 0.5], [1, 0.625, 0.625, 0.25], [1, 1, 1, 1]])


def test_the_layer_with_the_smallest_share_is_chosen():
    choice = pd.DataFrame({"after": [1, 1, 2, 2], "coding": [FEATURES, PCA] * 2, "half": [4.0, 8, 3, 12],
                           "kl": [[1.0] * 20] * 4})
    assert identification.chosen_layer(choice) == 2
    assert identification.chosen_layer(choice.assign(half=[4.0, 8, np.nan, 12])) == 1  # never: 19 of 12, not none
    assert identification.chosen_layer(choice.assign(half=np.nan)) == 1


def test_codings_by_name(study):
    found = identification.codings(study(), 1, [FEATURES, DENSE, "features, L1 0.5", PCA])
    x = torch.randn(7, 16, generator=torch.Generator().manual_seed(0))
    assert all(isinstance(coding, patching.Coding) for coding in found.values())
    assert [coding.codes(x).shape[1] for coding in found.values()] == [64, 64, 64, 16]


def test_a_ratio_over_sentences_by_hand():
    one, other = (pd.Series({"half": half, "kl": [1.0] * 9, "drawn": drawn, "edit": list(range(0, 18, 2))})
                  for half, drawn in ((3.0, [3, 4] * 50), (6.0, [6] * 100)))
    for found in numbers.drawn_ratios(one, other):
        assert found.value == 0.5 and found.low == 0.5 and found.high == pytest.approx(4 / 6)
    never = other.copy()
    never["half"], never["drawn"] = np.nan, [9.0] * 100  # more than all directions, and no larger edit than with all
    number, edit = numbers.drawn_ratios(one, never)
    assert number.value == 3 / 8 and number.low == pytest.approx(3 / 9) and edit.value == edit.low == 6 / 16
