"""The case studies' artefacts at a size of seconds, with and without the punctuation that they are about."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from texts import tiny_study

from sae_lib import punctuation, residual
from sae_lib.study import apostrophes, case_figures, cases, causes, deep, edits, parentheses
from sae_lib.study.cases import Unit
from sae_lib.study.profiles import SMOKE
from sae_lib.study.tables import flat
from sae_lib.transformer import TransformerConfig

SENTENCES = ["it's a test, isn't it? we'll see f(x) and g(y, z).", "they don't say it's 'so' (or so), she's here.",
             "print('quoted', f'{x}') and (that's (all) of it)."]


@pytest.fixture(params=[True, False], ids=["with punctuation", "without"])
def study(request, tmp_path, monkeypatch):
    sizes = replace(SMOKE.deep, transformer=TransformerConfig(n_tokens=4096, d_vocab=290, n_ctx=32, n_layers=2, d_model=16,
                                                              n_heads=2, d_mlp=24, batch_contexts=8),
                    dictionary=replace(SMOKE.deep.dictionary, n_activations=2560, batch_size=128, resample_inputs=256),
                    case_contexts=4, case_places=12, tree_places=3, tree_branches=(2, 1))
    make = tiny_study(tmp_path, monkeypatch, n_ctx=32, deep=sizes)
    if request.param:
        for domain in ("letters", "numbers"):
            for path in (tmp_path / "text" / domain).glob("*.txt"):
                path.write_text(" ".join(np.random.default_rng(len(path.name)).choice([*SENTENCES, path.read_text()[:200]], 60)))
    return make()


@pytest.fixture
def punctuated(request):
    return "with punctuation" in request.node.name


def shares_are_shares(table, *columns):
    known = table[list(columns)].to_numpy(dtype=float)
    known = known[np.isfinite(known)]
    return ((known >= -1e-6) & (known <= 1 + 1e-6)).all()


def test_quality_has_each_measure_of_each_layer(study):
    found = cases.quality(study)
    assert found.groupby("after").measure.apply(list).tolist() == [list(cases.MEASURES)] * 2
    assert ((found.low <= found.value + 1e-9) & (found.value <= found.high + 1e-9)).all()
    by = found.pivot(index="after", columns="measure", values="value")
    np.testing.assert_allclose(by["perplexity"] / by["perplexity, untouched"], by["perplexity, times"], rtol=1e-6)
    assert len(case_figures.quality_figure(found).data) == 6


def test_units_are_read_in_the_order_they_are_given(study):
    text, units = study.held_out("test"), [Unit(1, 3, 1), Unit(1, 5), Unit(1, 3, -1)]
    found, mean = cases.read(study, units, text), cases.mean_of_stream(study, 1)
    acts = residual.activations(deep.transformer(study).model, text.contexts.long(), 1).flatten(0, 1)
    expected = torch.stack([(acts[:, 3] - mean[3]).relu(), deep.dictionary(study, 1).model.encode(acts)[:, 5],
                            (mean[3] - acts[:, 3]).relu()], 1)
    expected[torch.from_numpy(flat(text.contexts) == 0)] = 0
    torch.testing.assert_close(torch.from_numpy(found.table.toarray()), expected, atol=1e-4, rtol=1e-3)
    np.testing.assert_array_equal(found.column(units[1]).tokens, np.flatnonzero(expected[:, 1] > 0))


def ablation_of_s(study, after, feature):
    """Change of the probability of "s" where the feature is active on an apostrophe, by way of the bridge's hooks."""
    text, model, sae = cases.test_text(study), deep.transformer(study).model, deep.dictionary(study, after).model
    acts = sae.encode(residual.activations(model, text.contexts.long(), after), [feature])[..., 0]
    where = np.flatnonzero((acts.flatten() > 0).numpy() & punctuation.apostrophes(text.contexts, study.vocabulary).ravel())
    rows, at = map(torch.from_numpy, np.divmod(cases.some_places(study, where, "apostrophe places"), text.contexts.shape[1]))
    tokens, places = text.contexts[rows].long(), (torch.arange(len(rows)), at)
    hook = (residual.hook_name(model, after), lambda x, hook: x - sae.encode(x, [feature]) * sae.W_dec[feature])
    edited, clean = (logits[places].softmax(-1) for logits in (model.run_with_hooks(tokens, fwd_hooks=[hook]), model(tokens)))
    return (edited - clean)[:, apostrophes.token(study, "s")].mean().item()


def test_apostrophes(study, punctuated):
    found = apostrophes.apostrophe(study)
    assert found.units.role.value_counts().to_dict() == {"feature": 2, "best dimension": 2, "dimension it reads most": 2}
    assert set(found.units.sign[found.units.role == "feature"]) == {0} and found.best.role == "feature"
    assert shares_are_shares(found.units, "share", "wider", "sensitivity")
    assert (found.units.share <= found.units.wider + 1e-6).all()
    assert len(found.probe) == 2 * apostrophes.PROBED and list(found.kinds.kind) == list(apostrophes.KINDS)
    own = found.kinds[[*apostrophes.KINDS, "other"]]
    np.testing.assert_allclose(own.dropna().sum(axis=1), 1, atol=1e-5)
    assert (found.kinds.tokens > 0).tolist()[:2] == [punctuated] * 2
    assert found.effect.probability.notna().any() == (found.scale["places"] > 0)
    assert found.effect.groupby("role").token.nunique().between(apostrophes.LOWERED, apostrophes.LOWERED + 2).all()
    if punctuated:
        assert ablation_of_s(study, int(found.best.after), int(found.best.number)) == pytest.approx(
            found.effect.set_index(["role", "token"]).probability["feature", apostrophes.token(study, "s")], abs=1e-4)
    else:
        assert not found.units.share.any() and found.scale["places"] == 0
    panels = {role: part for role, part in found.levels.groupby("role")}
    for figure in (case_figures.units_figure(found.units), case_figures.levels_figure(panels),
                   case_figures.lowered_figure(found.effect, study.vocabulary),
                   case_figures.kinds_figure(found.kinds, list(apostrophes.KINDS))):
        assert figure.data
    for _, part in found.levels.groupby("role"):
        assert part.tokens.sum() in set(found.units.active)


def test_parentheses(study, punctuated):
    found = parentheses.parenthesis(study)
    features = found.units[found.units.sign == 0]
    assert len(features) == parentheses.CANDIDATES and features.weight.dropna().is_monotonic_decreasing
    assert set(found.units.after) == {2} and found.units.sign.iloc[-1] != 0
    assert shares_are_shares(found.units, "share", "wider") and (found.units.share <= found.units.wider + 1e-6).all()
    assert (found.base["open"] > found.base["closed next"] > 0) == punctuated
    effect = found.effect.set_index(["place", "edit"]).value
    for place in parentheses.PINNED_AT[1:]:
        silent = effect[place]["ablated: change"]
        assert np.isnan(silent) or abs(silent) < 1e-6  # what is not active cannot be ablated
    figure = case_figures.probability_figure(found.effect, parentheses.PINNED_AT, ("as it is", "ablated", "held at its maximum"))
    assert figure.data


def test_edits(study, punctuated):
    after = 2
    searched = apostrophes.apostrophe(study).units.set_index(["role", "after"]).number
    for case, number in (("parenthesis", parentheses.parenthesis(study).units.number.iloc[0]),
                         ("apostrophe", searched["feature", after])):
        unit = Unit(after, int(number))
        found = edits.rank_one(study, case, unit)
        curves = found.curves.set_index(["edit", "strength"])
        assert list(found.curves.edit) == [edit for edit in edits.EDITS for _ in edits.STRENGTHS]
        assert list(found.curves.strength) == pytest.approx(list(edits.STRENGTHS) * len(edits.EDITS))
        assert len(found.ratios) == len(edits.BROKEN) * (len(edits.EDITS) - 1)
        assert case_figures.edits_figure({case: found}, {edit: edit for edit in edits.EDITS[:3]}).data
        if not punctuated:
            assert curves.wanted.isna().all() and found.ratios.value.isna().all()
            continue
        text = study.held_out("validation")
        concept, wanted = edits._wanted(study, case, text)
        following = np.roll(text.contexts.numpy(), -1, 1)[wanted]
        assert wanted.any() and not (wanted & ~concept).any()
        ends = np.flatnonzero(punctuation.closing(study.vocabulary)) if case == "parenthesis" else [
            i for i, token in enumerate(study.vocabulary) if token == b"s"]
        assert set(following.tolist()) <= set(ends)
        assert (curves.untouched[edits.LEAST] > 0.5).all() and (curves.untouched["rank one"] == 0).all()
        for edit in ("rank one", "LEACE"):
            assert curves.absent[edit].is_monotonic_increasing and curves.absent[edit].iloc[0] > 0


def test_without_the_concept_all_but_leace_can_be_made(study, punctuated):
    made = edits._edits(study, "parenthesis", Unit(2, 0))
    assert ("LEACE" in made) == punctuated and {"rank one", "rank one, random"} <= set(made)


def test_what_is_broken_at_equal_effect_by_hand():
    effects, damages = np.array([1.0, 2.0, 4.0]), np.array([0.1, 0.4, 1.6])
    assert edits.damage_at(2.0, effects, damages) == pytest.approx(0.4)
    assert edits.damage_at(3.0, effects, damages) == pytest.approx(0.1 * 3**2)  # between, and here exactly, a power
    assert edits.damage_at(2.0, np.array([-1.0, 2.0, 1.0]), damages) == pytest.approx(0.4)  # the least strength at which it does
    for effect in (-1.0, 0.0, 0.5, 4.5):
        assert np.isnan(edits.damage_at(effect, effects, damages))
    document = np.array([1.0, 3.0])
    sums = {(edits.LEAST, 1.0, "wanted"): -document, (edits.LEAST, 1.0, "absent"): 0.2 * document}
    for strength in edits.STRENGTHS:
        sums["rank one", strength, "wanted"] = -2 * strength * document
        sums["rank one", strength, "absent"] = strength**2 * document
    found = edits._at_equal_effect(sums, "rank one", "absent", {"seed": 0, "n_boot": 20})
    assert found == pytest.approx((0.8, 0.8, 0.8))  # 0.2 against 0.25, at half of the strength, in every draw
    assert np.isnan(edits._at_equal_effect(sums, "LEACE", "absent", {"seed": 0, "n_boot": 20}).value)


def test_trees_and_the_survey(study, monkeypatch):
    made = causes._layers(study)
    each_its_own = torch.arange(len(made.text.contexts))[:, None].expand(made.text.documents.shape)
    monkeypatch.setattr(causes, "_layers", lambda _: made._replace(text=made.text._replace(documents=each_its_own)))
    unit = Unit(2, int(np.diff(cases.table(study, 2, "test").indptr).argmax()))
    tree = causes.tree(study, "test", unit)
    assert list(tree.columns) == list(causes.COLUMNS) and len(tree)
    assert case_figures.tree_figure(tree, study.vocabulary).data
    assert causes.tree(study, "first", Unit(1, 0)).empty  # no dictionary comes before it
    found = causes.survey(study)
    assert list(found.columns) == list(causes.SURVEYED) and set(found.after) == {2}
    assert case_figures.survey_figure(found).data


def test_leaves_stand_one_below_the_other_and_targets_amid_their_causes():
    tree = pd.DataFrame({"node": [0, 1, 2, 3, 4], "parent": [-1, 0, 0, 1, 1]})
    assert case_figures._heights(tree) == {3: 0.0, 4: 1.0, 1: 0.5, 2: 2.0, 0: 1.25}
