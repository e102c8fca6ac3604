"""Notebook 01's artefacts: made once, loaded afterwards, drawn with sliders that need no kernel."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch

from sae_lib import toy
from sae_lib.errors import StudyError
from sae_lib.metrics import mmcs
from sae_lib.study import pipeline, toy_figures, toys
from sae_lib.study.profiles import PROFILES, SMOKE, ToySizes
from sae_lib.toy import ToyConfig
from sae_lib.toy_features import FeatureConfig, KnownFeatures

TINY = ToySizes(
    crowd=ToyConfig(4, 2, n_steps=3, batch_size=16), plane=ToyConfig(3, 2, n_steps=3, batch_size=16),
    pair=ToyConfig(2, 1, n_steps=3, batch_size=16), n_densities=3, pair_grid=(3, 2), starts=2, widths=(1.0, 1.5), l1=(0.5, 1.0),
    main_l1=1.0, truth=FeatureConfig(d_in=3, n_features=4, active=1.0), test_rows=64,
    training=replace(SMOKE.toy.training, n_activations=640, batch_size=64, resample_inputs=64))


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.setitem(PROFILES, "tiny", replace(SMOKE, name="tiny", toy=TINY))
    monkeypatch.setattr(toys, "NEURON_RUNS", 2)
    monkeypatch.setattr(toys, "FREE_RUNS", 3)
    for name in ("ROOT", "DATA", "FIGURES"):
        monkeypatch.setenv(f"SAE_{name}", str(tmp_path / name))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield lambda mode="auto": pipeline.Study("tiny", artefacts=mode)
    torch.set_num_threads(threads)


def test_models_are_made_once(study):
    with pytest.raises(StudyError, match="ARTEFACTS is \"load\""):
        toys.crowd(study("load"), relu=True)
    made, loaded = (toys.crowd(study(mode), relu=True) for mode in ("auto", "load"))
    assert torch.equal(made.toys.W, loaded.toys.W) and loaded.toys.relu
    assert made.density.tolist() == pytest.approx([1, 0.1, 0.01] * 2)
    torch.testing.assert_close(made.importance[4], torch.tensor([1, 0.9, 0.81, 0.729]))
    torch.testing.assert_close(made.losses, (made.errors.squared * made.importance).sum(1))
    torch.testing.assert_close(made.errors, toy.measure(made.toys, made.density))
    assert not toys.crowd(study(), relu=False).toys.relu


def test_pairs_cover_the_grid_with_densities_slow(study):
    pairs = toys.pairs(study())
    assert pairs.density.tolist() == pytest.approx([1, 1, 0.05 ** 0.5, 0.05 ** 0.5, 0.05, 0.05])
    assert pairs.importance[:, 1].tolist() == pytest.approx([0.1, 10] * 3)
    assert pairs.importance[:, 0].tolist() == [1] * 6


def test_neurons_are_told_none_one_two_and_so_on(study):
    told, learned = toys.neurons(study())
    assert (told.fires > 0.5).sum(1).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert learned.fires.shape == (3, 4)


def test_every_dictionary_has_its_row(study):
    found = toys.recovery(study())
    pd.testing.assert_frame_equal(found.table, toys.recovery(study("load")).table)
    assert found.table[["truth", "width", "l1"]].values.tolist() == [
        [truth, width, l1] for truth in (0, 1) for l1 in (0.5, 1.0) for width in (4, 6)]
    assert found.table.share.tolist() == [1, 1.5] * 4
    assert set(found.directions) == {(4, 0.5), (6, 0.5), (4, 1.0), (6, 1.0)}
    # The numbers of a row are those of its dictionary.
    assert mmcs(found.directions[6, 1.0], found.truth) == pytest.approx(found.table.mmcs[3], abs=1e-3)
    assert np.nanmean(found.best[3]) == pytest.approx(found.table.mmcs[3], abs=1e-4)
    assert np.isfinite(found.best).sum(1).tolist() == [4, 6] * 4
    assert [config.seed for config in toys.truths(study())] == [0, 1]
    assert not torch.equal(found.truth, KnownFeatures(toys.truths(study())[1], 1).directions)


def test_a_slider_holds_what_each_of_its_positions_shows(study):
    run = study()
    found, linear, relu = toys.recovery(run), toys.crowd(run, relu=False), toys.crowd(run, relu=True)
    figures = [toy_figures.matrices_figure(linear, relu, 1), toy_figures.plane_figure(toys.plane(run), 1),
               toy_figures.cosines_figure(found, 4, [0.5, 1.0], 1), toy_figures.bounce_figure(found.table, 4, 1)]
    for fig in figures:
        (slider,) = fig.layout.sliders
        shown = go.Figure(fig)
        data, layout, traces = slider.steps[slider.active].args
        for key, values in data.items():
            for trace, value in zip(traces, values, strict=True):
                shown.data[trace][key] = value
        for key, value in layout.items():
            assert key.startswith("annotations[")
            shown.layout.annotations[int(key.split("[")[1].split("]")[0])].text = value
        # The position that is marked is the one that is drawn.
        assert json.loads(shown.to_json()) == json.loads(fig.to_json())
        assert len(slider.steps) > 1
    # Densities make a difference however short the training.
    for fig in figures[:2]:
        shown = [json.dumps(step.args[0]) for step in fig.layout.sliders[0].steps]
        assert len(set(shown)) == len(shown)


def test_the_other_figures_show_all_models(study):
    run = study()
    pairs, table = toys.pairs(run), toys.recovery(run).table
    phase = toy_figures.phase_figure(pairs, TINY.pair_grid)
    assert [np.shape(trace.z) for trace in phase.data if trace.type == "heatmap"] == [(2, 3)] * 2
    closed = next(trace for trace in phase.data if trace.type == "heatmap").z
    assert np.array(closed)[:, 0].tolist() == [0, 1]  # always there: the more important one alone
    capacity = toy_figures.capacity_figure(toys.crowd(run, relu=False), toys.crowd(run, relu=True))
    assert [len(trace.y) for trace in capacity.data] == [3, 3]
    told, _ = toys.neurons(run)
    neurons = toy_figures.neurons_figure(told.cross_entropy.view(5, 2), told.squared_error.view(5, 2))
    np.testing.assert_allclose(neurons.data[0].y[1:3], [0.75 * np.log(3), np.log(2)])
    widths = toy_figures.widths_figure(table[table.l1 == 1.0], 4)
    assert [len(trace.x) for trace in widths.data] == [2, 2, 2]
    points = toy_figures.tradeoff_figure(table, "f1", "F1", 0.5)
    assert sum(len(trace.x) for trace in points.data) == len(table) + 1
