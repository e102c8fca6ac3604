"""Dictionaries of every kind: how each is trained, that an interrupted run goes on, and the numbers that are read off."""

import math
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from texts import tiny_study

from sae_lib.metrics import bootstrap_interval
from sae_lib.recipe import BatchTopKConfig, GatedConfig, JumpReLUConfig, MatryoshkaConfig, TopKConfig, TrainConfig
from sae_lib.study import frontier as module
from sae_lib.study import kinds, paths
from sae_lib.study.frontier import Frontier, frontier
from sae_lib.study.kinds import Setting
from sae_lib.study.profiles import SMOKE
from sae_lib.variants import Standard

BASE = TrainConfig(n_activations=1280, batch_size=128, birth_density=0.05, resample_inputs=256, log_every=2)


@pytest.fixture
def study(tmp_path, monkeypatch):
    sizes = replace(SMOKE.frontier, training=BASE, trial_activations=512, trial_l1=1.0, l1=(0.5, 2.0), gate_l1=(0.5, 2.0),
                    l0=(2, 4), matched_l0=4, rates=(1e-3, 3e-3), seeds=2, widths=(1,), contexts=16, units=3)
    # Words of two short lists use too few tokens for the score on logits.
    monkeypatch.setattr(module.scores, "used_tokens", lambda study: torch.ones(len(study.vocabulary), dtype=torch.bool))
    return tiny_study(tmp_path, monkeypatch, n_ctx=16, expansion=2, frontier=sizes)


# --- how each kind is trained ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "config", "control"), [
    ("standard", TrainConfig, {"l1_coefficient": 7.0}), ("gated", GatedConfig, {"l1_coefficient": 7.0}),
    ("topk", TopKConfig, {"k": 7}), ("batchtopk", BatchTopKConfig, {"k": 7}), ("jumprelu", JumpReLUConfig, {"l0": 7.0}),
    ("matryoshka", MatryoshkaConfig, {"k": 7, "inner": (4, 16)})])
def test_kinds_are_trained_alike_but_for_what_makes_them_sparse(kind, config, control):
    found = kinds.training(Setting(kind, 7.0, 8, 3), BASE, 0.02, 64)
    assert type(found) is config
    assert {name: getattr(found, name) for name in control} == control
    for name in ("n_activations", "batch_size", "birth_density", "lr_decay", "log_every"):
        assert getattr(found, name) == getattr(BASE, name)
    assert (found.lr, found.seed) == (0.02, 3)
    # AuxK takes the place of resampling.
    assert found.resample_at == (() if issubclass(config, TopKConfig) else BASE.resample_at)


def test_the_papers_recipe_differs_in_how_features_are_born():
    found = kinds.training(Setting("paper", 7.0, 8, 3), BASE, 0.02, 64)
    assert found == replace(BASE, l1_coefficient=7.0, birth_density=None, lr=0.02, seed=3)
    assert type(found.rule) is Standard


def test_the_coefficient_for_a_wanted_l0_is_between_those_tried():
    # L0 falls as 100 / coefficient, so 20 needs 5.
    assert kinds.control_for(20.0, [1.0, 10.0], [100.0, 10.0]) == pytest.approx(5)
    assert kinds.control_for(500.0, [1.0, 10.0], [100.0, 10.0]) == 1
    assert kinds.control_for(1.0, [1.0, 10.0], [100.0, 0.0]) == pytest.approx(10 ** 0.4, rel=0.01)


def test_a_matched_dictionary_is_not_taken_for_one_of_the_others():
    assert Setting("gated", 4.0, 8, 0, True).name != Setting("gated", 4.0, 8, 0).name


def test_the_best_rate_has_the_smallest_objective():
    table = pd.DataFrame({"kind": [*"aabb"], "lr": [1e-3, 2e-3] * 2, "objective": [5.0, 4.0, math.nan, 9.0], "fair": True})
    assert kinds.best_rates(table) == {"a": 2e-3, "b": 2e-3}


def test_trials_at_another_l0_than_asked_are_not_compared_unless_all_are():
    table = pd.DataFrame({"kind": [*"aabb"], "lr": [1e-3, 2e-3] * 2, "objective": [5.0, 4.0, 5.0, 4.0],
                          "fair": [True, False, False, False]})
    assert kinds.best_rates(table) == {"a": 1e-3, "b": 2e-3}


# --- made, interrupted, loaded ---------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_where_it_was_and_gives_the_same(study, monkeypatch):
    whole = frontier(study())
    (folder,) = (paths.data() / "artefacts" / "frontier").iterdir()
    shutil.rmtree(folder)
    trained, calls = module.trained, []

    def counted(study, setting, *rest):
        calls.append(setting.name)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return trained(study, setting, *rest)

    monkeypatch.setattr(module, "trained", counted)
    with pytest.raises(KeyboardInterrupt):
        frontier(study())
    again = frontier(study())
    assert len(calls) == len(whole.table) + 1  # the interrupted one twice
    pd.testing.assert_frame_equal(again.table, whole.table)
    np.testing.assert_array_equal(again.own, whole.own)
    pd.testing.assert_frame_equal(again.scores, whole.scores)


def test_what_is_trained_and_what_is_said_of_it(study):
    run = study()
    found = frontier(run)
    again = frontier(study("load"))
    pd.testing.assert_frame_equal(again.table, found.table)
    table = found.table
    swept = table[(table.seed == 0) & (table.expansion == 2)]
    assert set(swept.kind) == set(kinds.KINDS)
    for kind in kinds.KINDS:
        matched = table[(table.kind == kind) & table.matched]
        assert sorted(matched.seed) == [0, 1]
        assert matched.control.nunique() == 1
        assert matched.validation.notna().all()
        assert (swept.kind == kind).sum() == 2 + (kind in kinds.PENALISED)
        assert (found.scores.kind == kind).sum() <= 3
    assert table[table.expansion == 1].kind.tolist() == list(module.WIDE)
    k = table[table.kind == "topk"]
    l0 = found.each(k.index.to_numpy(), "l0", n_boot=20)
    assert (l0.value <= k.control + 1e-6).all()
    explained = found.each(np.arange(len(table)), "explained", n_boot=20)
    assert ((explained.low <= explained.value) & (explained.value <= explained.high)).all()
    lead, whole = found.lead("batchtopk", "topk", "explained", n_boot=20)
    assert math.isnan(whole.least) or lead.low <= lead.value <= lead.high
    assert lead.value == pytest.approx(whole.least, nan_ok=True)


# --- numbers ---------------------------------------------------------------------------------------------------------


def made(**points) -> Frontier:
    """Kinds with points (L0, loss with the dictionary) on two documents of 50 tokens; clean loss 1, ablated 2."""
    rows = [(kind, *point) for kind, found in points.items() for point in found]
    table = pd.DataFrame([{"kind": kind, "seed": 0, "expansion": 8} for kind, *_ in rows])
    common = np.tile([50.0, 100.0, 150.0, 400.0, 50.0], (2, 1))
    own = np.array([[[50 * loss, 50 * l0, 100.0, 30.0, 20.0]] * 2 for _, l0, loss in rows])
    return Frontier(table, common, own, pd.DataFrame(), "")


def test_measures_by_hand():
    found = made(a=[(10, 1.25)])
    value = lambda name: found.of([0], lambda values: values(name)[..., 0], n_boot=10).value
    assert {name: value(name) for name in ("l0", "recovered", "from_mean", "explained", "gain")} == pytest.approx(
        {"l0": 10, "recovered": 0.75, "from_mean": 0.875, "explained": 0.75, "gain": 1.5})


def test_the_lead_of_one_kind_over_another():
    found = made(a=[(10, 1.4), (100, 1.2)], b=[(10, 1.5), (100, 1.25)])
    interval, lead = found.lead("a", "b", "recovered", n_boot=10)
    assert interval == pytest.approx((0.05, 0.05, 0.05))  # both documents are alike
    assert lead == pytest.approx((0.05, 0.075, 10, 100))
    interval, lead = found.lead("b", "a", "recovered", n_boot=10)
    assert (interval.value, lead.mean) == pytest.approx((-0.1, -0.075))


def test_a_leads_interval_draws_the_same_documents_for_both():
    rng = np.random.default_rng(0)
    found = made(a=[(10, 1.4), (100, 1.2)], b=[(10, 1.5), (100, 1.3)])
    noise = rng.normal(0, 5, size=(40, 1))
    own = np.tile(found.own[:, :1], (1, 40, 1))
    own[..., 0] += noise[:, 0]
    found = found._replace(common=np.tile(found.common[:1], (40, 1)), own=own)
    # The documents' common noise cancels in the difference, and is large in each.
    interval, _ = found.lead("a", "b", "recovered", n_boot=50)
    assert interval == pytest.approx((0.1, 0.1, 0.1))
    alone = found.each([0], "recovered", n_boot=50)
    assert (alone.high - alone.low).iloc[0] > 0.01


def test_an_interval_is_that_of_the_metrics():
    found = made(a=[(10, 1.25)], b=[(20, 1.5)])
    rng = np.random.default_rng(1)
    found = found._replace(common=rng.random((30, 5)), own=rng.random((2, 30, 5)))
    sums = np.stack([found.own[1, :, 1], found.common[:, 4]], axis=1)
    expected = bootstrap_interval(sums, lambda t: t[..., 0] / t[..., 1], n_boot=50)
    assert found.each([1], "l0", n_boot=50).iloc[0].tolist() == pytest.approx(list(expected))
