"""What notebook 10 draws, from numbers made by hand."""

import numpy as np
import pandas as pd
from test_study_frontier import made

from sae_lib.study import frontier_figures
from sae_lib.study.faults import HEALTHY, Broken
from sae_lib.study.kinds import KINDS


def test_a_front_is_drawn_through_what_no_other_beats_and_other_seeds_are_marked_apart():
    found = made(topk=[(10, 1.5), (20, 1.6), (40, 1.25), (11, 1.4)])
    found.table.loc[3, "seed"] = 1
    fig = frontier_figures.front_figure(found, "recovered", "loss recovered", n_boot=10)
    line, ours, others = (trace for trace in fig.data if trace.legendgroup == "topk")
    np.testing.assert_allclose(line.x, [10, 40])  # at 20 the loss is higher than at 10
    np.testing.assert_allclose(ours.y, [0.5, 0.4, 0.75])
    np.testing.assert_allclose((others.x[0], others.y[0]), (11, 0.6))


def test_rates_are_over_each_kinds_own_best():
    objective = [3.0, 2.0, 50.0, 75.0]
    table = pd.DataFrame({"kind": ["topk", "topk", "gated", "gated"], "lr": [1e-3, 2e-3] * 2, "objective": objective})
    topk, gated = frontier_figures.rates_figure(table).data
    assert (topk.name, gated.name) == (KINDS["topk"], KINDS["gated"])
    np.testing.assert_allclose([*topk.y, *gated.y], [1.5, 1, 1, 1.5])


def test_a_lead_stands_in_the_row_of_its_kind():
    rows = [("topk", "paper", 0.1, 0.05, 0.2), ("gated", "paper", -0.1, -0.2, 0.0), ("gated", "standard", 0.1, 0.0, 0.2)]
    fig = frontier_figures.lead_figure(pd.DataFrame(rows, columns=["kind", "over", "value", "low", "high"]))
    assert list(fig.layout.yaxis.ticktext) == [KINDS["topk"], KINDS["gated"]]
    paper, standard = fig.data
    np.testing.assert_allclose(paper.x, [0.1, -0.1])
    np.testing.assert_allclose(paper.error_x.arrayminus, [0.05, 0.1])
    assert (paper.name, standard.name) == (f"over {KINDS['paper']}", f"over {KINDS['standard']}")
    assert round(standard.y[0]) == 1


def test_gains_of_a_kind_without_active_features_are_left_out():
    rows = [("paper", 1.2, 1.1, 1.3, [1.1, 1.2, 1.4]), ("topk", 1.0, 0.9, 1.1, None)]
    together, each = frontier_figures.gain_figure(pd.DataFrame(rows, columns=["kind", "value", "low", "high", "gains"])).data
    np.testing.assert_allclose(together.y, [1.2, 1.0])
    np.testing.assert_allclose([each.y[0], each.error_y.array[0], each.error_y.arrayminus[0]], [1.2, 0.2, 0.1])
    assert len(each.y) == 1


def test_targets_are_drawn_over_the_log_of_training():
    rows = [(10.0, 9.0, 8.5, 9.5, [2, 4], [40.0, 10.0]), (10.0, 11.0, 10.5, 11.5, [2, 4], [0.0, 0.0])]
    fig = frontier_figures.target_figure(pd.DataFrame(rows, columns=["control", "value", "low", "high", "steps", "l0_curve"]))
    assert fig.data[-1].name == "target 10"
    np.testing.assert_allclose(fig.data[-1].y, [4, 1])  # of the first with this target


def test_shares_of_dead_features_are_means_over_seeds():
    table = pd.DataFrame({"kind": ["topk", "topk", "gated"], "dead": [0.1, 0.3, 0.0], "ultralow": [0.1, 0.1, 0.2]})
    dead, ultralow, seeds = frontier_figures.alive_figure(table).data
    np.testing.assert_allclose([*dead.y, *ultralow.y], [0.2, 0.0, 0.1, 0.2])
    np.testing.assert_allclose(seeds.y, [0.2, 0.4, 0.2])


def test_each_broken_run_is_beside_the_healthy_one():
    logs = pd.concat([pd.DataFrame({"activations": [1000, 2000], "mse": [9.0, value], "l0": 5.0, "dead": 0.1, "run": run})
                      for value, run in enumerate((HEALTHY, "A", "B"), start=1)])
    fig = frontier_figures.broken_figure(Broken(logs, pd.DataFrame(), {}), "AB")
    assert len(fig.data) == 2 * 3 * 2
    assert [trace.y[-1] for trace in fig.data if trace.yaxis in ("y", "y2") and trace.y[0] == 9] == [1, 2, 1, 3]
    assert sum(trace.showlegend for trace in fig.data) == 2
