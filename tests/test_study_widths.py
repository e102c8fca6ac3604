"""Dictionaries of several widths: made once, loaded without the dictionaries, drawn."""

import shutil
from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse import csr_array
from texts import WORDS, tiny_study

from sae_lib.compare import live_units
from sae_lib.errors import StudyError
from sae_lib.study import paths, width_figures, widths
from sae_lib.study.profiles import SMOKE
from sae_lib.study.widths import CLASSES, Width


@pytest.fixture
def study(tmp_path, monkeypatch):
    train = replace(SMOKE.width_training, n_activations=2560, batch_size=128, resample_inputs=256)
    return tiny_study(tmp_path, monkeypatch, n_ctx=16, widths=(1, 2), width_training=train)


def test_what_was_measured_is_loaded_without_the_dictionaries(study):
    run = study()
    made = [widths.width(run, expansion) for expansion in run.profile.widths]
    linked = widths.links(run, made)
    table = widths._table(run, 2, "test")
    for folder in [*(paths.data() / "artefacts").glob("sae_width_*"), *(paths.data() / "artefacts").glob("table_width_*")]:
        shutil.rmtree(folder)
    again = study("load")
    loaded = [widths.width(again, expansion) for expansion in again.profile.widths]
    for a, b in zip(made, loaded, strict=True):
        pd.testing.assert_frame_equal(a.features, b.features)
    relinked = widths.links(again, loaded)
    for kind in ("links", "by_luck"):
        (was,), (now,) = getattr(linked, kind), getattr(relinked, kind)
        np.testing.assert_allclose(now.toarray(), was.toarray(), rtol=1e-6)
    with pytest.raises(StudyError, match="ARTEFACTS is \"load\""):
        widths._table(again, 2, "test")

    wide = loaded[1]
    assert [len(each.features) for each in loaded] == [32, 64]
    np.testing.assert_array_equal(wide.features.fired, np.diff(table.indptr))
    np.testing.assert_array_equal(wide.features.live, live_units(table))
    assert [level.shape for level in linked.links] == [(32, 64)]
    assert wide.live_by_text.live.iloc[-1] == wide.features.live.sum()
    assert wide.live_by_text.tokens.iloc[-1] == table.shape[0]
    assert sorted(zip(wide.contexts.context, wide.contexts.rule, strict=True)) == sorted(product(WORDS, widths.RULES))
    unit = int(wide.features.fired.argmax())
    tokens = widths.flat(run.held_out("test", whole=True).contexts)
    top = np.argsort(-table[:, [unit]].toarray()[:, 0], kind="stable")[:20]
    assert wide.fires_on[unit, 0] == np.bincount(tokens[top]).argmax()
    for row in wide.contexts.itertuples():
        of = wide.members[(wide.members.context == row.context) & (wide.members.rule == row.rule)]
        assert of.specific.sum() == row.count
        assert row.best in set(of.unit)


# --- figures ---------------------------------------------------------------------------------------------------------

def fake(expansion, members) -> Width:
    """`members`: (unit, fired, specific), specific by the rule of strong activations."""
    n = 4 * expansion
    of = pd.DataFrame(members, columns=["unit", "fired", "specific"]).assign(context="dna", rule="strong")
    of["examples"] = [[[0, 0, 1], [1]] for _ in members]
    shared = {"context": "dna", "best": members[0][0]} | dict.fromkeys(CLASSES, 0.25)
    contexts = pd.DataFrame([shared | {"rule": rule, "count": count}
                             for rule, count in (("all", 0), ("strong", int(of.specific.sum())))])
    features = pd.DataFrame({"fired": np.arange(n), "live": True, "context": 0, "pearson": np.linspace(0, 0.9, n)})
    return Width(expansion, features, np.tile([0, 1, -1], (n, 1)), np.tile([1, 0, 1], (n, 1)), contexts,
                 of.assign(**dict.fromkeys(CLASSES, 0.5)), pd.DataFrame(), {}, None)


VOCABULARY = [b"AC", b"<b>"]


def test_a_family_has_its_specific_features_or_else_the_best_and_the_links_between_them():
    each = [fake(1, [(2, 9, False)]), fake(2, [(5, 3, True), (1, 7, True), (6, 99, False)])]
    links = csr_array(([0.5, 0.9, 0.8], ([2, 2, 3], [5, 6, 1])), shape=(4, 8))
    found = width_figures.family(each, [links], "dna", "strong")
    assert found.nodes[["width", "unit", "specific"]].values.tolist() == [[0, 2, False], [1, 1, True], [1, 5, True]]
    assert found.edges.values.tolist() == [[0, 2, 0.5]]  # feature 6 is not specific, feature 3 not of the family
    assert found.counts == [0, 2]
    fig = width_figures.family_figure(found, each, VOCABULARY)
    lines = [trace for trace in fig.data if trace.mode == "lines"]
    assert [tuple(line.x) for line in lines] == [(0, 1)]  # from marker to marker
    specific, best = (trace for trace in fig.data if trace.mode != "lines")
    assert (len(specific.x), len(best.x)) == (2, 1)
    assert "&lt;b&gt;" in specific.hovertext[0]
    assert fig.layout.annotations[0].text.endswith("\u2068ACAC<b>&lt;b&gt;</b>\u2069</span>")
    named = width_figures.family_figure(found, each, ["ক".encode(), b"<b>"])  # an image may have no font for it, a browser has
    assert named.layout.annotations[0].text == "\u2068'‹Bengali ka›'\u2069 \u2068'&lt;b&gt;'\u2069"
    assert "ক" in named.data[-1].hovertext[0]
    heat = width_figures.members_figure(found, each).data[0]
    np.testing.assert_allclose(heat.z, 0.25)
    assert heat.y == ("1x / 2", "2x / 1", "2x / 5")


def test_counts_of_contexts_are_shown_by_both_rules():
    each = [fake(1, [(2, 9, False)]), fake(2, [(5, 3, True), (1, 7, True)])]
    assert width_figures.context_counts(each, "strong").values.tolist() == [[0, 2]]
    by_all, by_strong = width_figures.counts_figure(each, "dna").data
    assert (by_all.text.tolist(), by_strong.text.tolist()) == ([[0, 0]], [[0, 2]])
    np.testing.assert_allclose(by_strong.z, np.log1p([[0, 2]]))


def test_links_are_shown_as_shares_beside_luck():
    fig = width_figures.links_figure(["1x → 2x"], [np.array([0, 2, 2, 40])], [np.array([0, 0, 0, 1])])
    assert [bar.y.tolist() for bar in fig.data] == [[0.25, 0, 0.5, 0, 0, 0, 0.25], [0.75, 0.25, 0, 0, 0, 0, 0]]


def test_examples_end_with_the_strongest_token_and_keep_to_its_document():
    contexts = torch.tensor([[5, 6, 0, 7, 8, 9, 5, 6, 7, 8, 9, 5], [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2]])
    assert widths._examples(contexts, np.array([1, 5, 11, 12, 22])) == [
        [5, 6], [7, 8, 9], [8, 9, 5, 6, 7, 8, 9, 5], [1], [1]]


def test_linked_features_stand_near_those_they_come_from():
    each = [fake(1, [(0, 9, True), (1, 8, True)]), fake(2, [(0, 9, True), (1, 8, True), (2, 7, True)])]
    links = csr_array(([0.5, 0.5], ([1, 0], [0, 2])), shape=(4, 8))
    placed = width_figures._placed(width_figures.family(each, [links], "dna", "strong"))
    wide = placed[placed.width == 1].set_index("unit").y
    assert wide[2] < wide[0] < wide[1]  # 2 comes from the first, 0 from the second, 1 from nowhere


def test_the_menu_of_the_map_marks_one_context_and_leaves_the_widths_alone():
    each = [fake(1, [(0, 1, True)]), fake(2, [(0, 1, True)])]
    places = pd.DataFrame({"x": np.arange(12.0), "y": 0.0, "unit": [*range(4), *range(8)], "dictionary": [0] * 4 + [1] * 8})
    fig = width_figures.map_figure(places, each, ["dna", "hex"], VOCABULARY, "hex")
    assert [trace.visible for trace in fig.data] == [None, None, False, True]
    assert len(fig.data[2].x) == (np.concatenate([e.features.pearson for e in each]) >= 0.3).sum()
    menu = fig.layout.updatemenus[0]
    assert menu.buttons[menu.active].label == "hex"
    assert [list(button.args[0]["visible"]) for button in menu.buttons] == [[False, False], [True, False], [False, True]]
    assert all(list(button.args[1]) == [2, 3] for button in menu.buttons)
    assert "dna" in fig.data[0].hovertext[3] and "dna" not in fig.data[0].hovertext[0]
