"""Dictionaries of several widths: made once, loaded without the dictionaries, drawn."""

import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_array

from sae_lib.compare import live_units
from sae_lib.errors import StudyError
from sae_lib.study import paths, pipeline, width_figures, widths
from sae_lib.study.profiles import PROFILES, SMOKE
from sae_lib.study.widths import CLASSES, Width

WORDS = {"letters": "alpha beta gamma delta epsilon zeta eta theta", "numbers": "one two three four five six seven eight"}


@pytest.fixture
def study(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for domain, words in WORDS.items():
        (tmp_path / "text" / domain).mkdir(parents=True)
        for i in range(12):
            (tmp_path / "text" / domain / f"{i}.txt").write_text(" ".join(rng.choice(words.split(), 400)))
    tiny = replace(
        SMOKE, name="tiny", corpus=replace(SMOKE.corpus, source=f"files:{tmp_path / 'text'}", target_tokens=8_000),
        tokens=replace(SMOKE.tokens, vocab_size=290, n_ctx=16, validation_fraction=0.1, test_fraction=0.1),
        transformer=replace(SMOKE.transformer, n_tokens=8_000, d_vocab=290, n_ctx=16, d_model=16, d_mlp=32, batch_contexts=8),
        stream=replace(SMOKE.stream, tokens_per_context=15), held_out_contexts=40, bootstrap=20, widths=(1, 2),
        width_training=replace(SMOKE.width_training, n_activations=2560, batch_size=128, resample_inputs=256))
    monkeypatch.setitem(PROFILES, "tiny", tiny)
    monkeypatch.setenv("SAE_ROOT", str(tmp_path))
    monkeypatch.setenv("SAE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("SAE_FIGURES", str(tmp_path / "figures"))
    return lambda mode="auto": pipeline.Study("tiny", artefacts=mode)


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
    assert widths.links(again, loaded).by_luck == linked.by_luck
    with pytest.raises(StudyError, match="ARTEFACTS is \"load\""):
        widths._table(again, 2, "test")

    wide = loaded[1]
    assert [len(each.features) for each in loaded] == [32, 64]
    np.testing.assert_array_equal(wide.features.fired, np.diff(table.indptr))
    np.testing.assert_array_equal(wide.features.live, live_units(table))
    assert [level.shape for level in linked.links] == [(32, 64)]
    assert wide.live_by_text.live.iloc[-1] == wide.features.live.sum()
    assert wide.live_by_text.tokens.iloc[-1] == table.shape[0]
    assert set(wide.contexts.context) == set(WORDS)
    unit = int(wide.features.fired.argmax())
    tokens = widths.flat(run.held_out("test", whole=True).contexts)
    top = np.argsort(-table[:, [unit]].toarray()[:, 0], kind="stable")[:20]
    assert wide.fires_on[unit, 0] == np.bincount(tokens[top]).argmax()
    for row in wide.contexts.itertuples():
        of = wide.members[wide.members.context == row.context]
        assert of.specific.sum() == row.count
        assert row.best in set(of.unit)


# --- figures ---------------------------------------------------------------------------------------------------------

def fake(expansion, members) -> Width:
    """`members`: (unit, fired, specific)."""
    n = 4 * expansion
    of = pd.DataFrame(members, columns=["unit", "fired", "specific"]).assign(context="dna")
    contexts = pd.DataFrame([{"context": "dna", "best": members[0][0]} | dict.fromkeys(CLASSES, 0.25)])
    features = pd.DataFrame({"fired": np.arange(n), "live": True, "context": 0, "pearson": np.linspace(0, 0.9, n)})
    return Width(expansion, features, np.tile([0, 1, -1], (n, 1)), np.tile([1, 0, 1], (n, 1)), contexts,
                 of.assign(**dict.fromkeys(CLASSES, 0.5)), pd.DataFrame(), {}, None)


VOCABULARY = [b"AC", b"<b>"]


def test_a_family_has_its_specific_features_or_else_the_best_and_the_links_between_them():
    each = [fake(1, [(2, 9, False)]), fake(2, [(5, 3, True), (1, 7, True), (6, 99, False)])]
    links = csr_array(([0.5, 0.9, 0.8], ([2, 2, 3], [5, 6, 1])), shape=(4, 8))
    found = width_figures.family(each, [links], "dna")
    assert found.nodes[["width", "unit", "specific"]].values.tolist() == [[0, 2, False], [1, 1, True], [1, 5, True]]
    assert found.edges.values.tolist() == [[0, 2, 0.5]]  # feature 6 is not specific, feature 3 not of the family
    assert found.counts == [0, 2]
    fig = width_figures.family_figure(found, each, VOCABULARY)
    lines = [trace for trace in fig.data if trace.mode == "lines"]
    assert len(lines) == 1 and 0 < lines[0].x[0] < lines[0].x[1] < 1
    specific, best = (trace for trace in fig.data if trace.mode != "lines")
    assert (len(specific.x), len(best.x)) == (2, 1)
    assert "&lt;b&gt;" in specific.text[0]
    heat = width_figures.members_figure(found, each).data[0]
    np.testing.assert_allclose(heat.z, 0.25)
    assert heat.y == ("1x / 2", "2x / 1", "2x / 5")


def test_linked_features_stand_near_those_they_come_from():
    each = [fake(1, [(0, 9, True), (1, 8, True)]), fake(2, [(0, 9, True), (1, 8, True), (2, 7, True)])]
    links = csr_array(([0.5, 0.5], ([1, 0], [0, 2])), shape=(4, 8))
    placed = width_figures._placed(width_figures.family(each, [links], "dna"))
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
